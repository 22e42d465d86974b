# Copyright 2026 The trl-diffusion-opd Authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Embeddings on disk: exact, of the right encoders, bounded, shared by processes, and never wrong where a file is."""

import os
from functools import wraps

import datasets
import psutil
import pytest
import torch
from helpers.edit_families import small_pictures
from helpers.encoders import (
    Encoder,
    assert_equal,
    lists,
    nested,
    of_the_batch,
    one_tensor,
    padded_to_the_longest,
    rows,
)
from helpers.families import FAMILIES
from helpers.tiny_sd3 import make_pipeline

from trl_diffusion_opd.pipelines import prompt_store
from trl_diffusion_opd.pipelines.fingerprints import encoder_fingerprint
from trl_diffusion_opd.pipelines.prompt_cache import PromptCache
from trl_diffusion_opd.pipelines.prompt_store import PromptStore
from trl_diffusion_opd.pipelines.velocity import VelocityField


SIZE = {"height": 16, "width": 16, "max_sequence_length": 16}


def make_store(folder, fingerprint="f", max_bytes=2**30):
    return PromptStore(folder, fingerprint, max_bytes)


def key(text, **options):
    return (*options.items(), ("prompt", text))


def some_tensors():
    """Every kind of number that an encoder may give, with the values that conversions lose."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, generator=generator)
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40, 65504.0])
    return (
        *(torch.cat([x, odd[None]]).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        torch.arange(6).reshape(2, 3),
        x > 0,
        x.T,  # not contiguous
        torch.tensor(3.5, dtype=torch.bfloat16),
        torch.empty(2, 0, 4),
    )


def bits(tensor):
    return (tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def arrow_files(folder):
    return sorted(folder.rglob("*.arrow"))


def test_tensors_come_back_bit_for_bit(tmp_path):
    store, value = make_store(tmp_path), some_tensors()
    assert store.read(key("a")) is None
    assert store.write(key("a"), (value, [*value], None, "rows"))
    for reader in (store, make_store(tmp_path)):  # this run's, and the next one's
        got = reader.read(key("a"))
        assert type(got) is tuple and type(got[1]) is list and got[2:] == (None, "rows")
        for part in got[:2]:
            assert [bits(t) for t in part] == [bits(t) for t in value]


def test_texts_and_options_are_told_apart(tmp_path):
    store = make_store(tmp_path)
    keys = [key("a"), key("b"), key("a", max_sequence_length="8"), key("a", max_sequence_length="16"), key(("a", "b"))]
    for i, one in enumerate(keys):
        store.write(one, torch.tensor([i]))
    again = make_store(tmp_path)
    assert len(again) == len(keys)
    assert [int(again.read(one)) for one in keys] == list(range(len(keys)))


def test_datasets_reads_the_file(tmp_path):
    make_store(tmp_path).write(key("a"), torch.arange(3))
    (path,) = arrow_files(tmp_path)
    (row,) = datasets.Dataset.from_file(str(path))
    assert "prompt" in row["key"] and row["tensors"] == [torch.arange(3).numpy().tobytes()]


def test_a_tensor_that_comes_again_is_written_once(tmp_path):
    # With guidance the empty prompt's embedding comes with every prompt.
    empty = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    stores = make_store(tmp_path), make_store(tmp_path)
    for i in range(6):
        store = stores[i % 2]
        store._refresh()
        store.write(key(f"prompt {i}"), (torch.full((2,), float(i)), empty))
    assert sum(path.stat().st_size for path in arrow_files(tmp_path)) < 1.5 * empty.nbytes
    again = make_store(tmp_path)
    for i in range(6):
        assert_equal(again.read(key(f"prompt {i}")), (torch.full((2,), float(i)), empty))


@pytest.mark.parametrize("outputs", [rows, one_tensor, lists, nested, padded_to_the_longest])
@pytest.mark.parametrize("negative", [None, ["", "dull"]])
def test_another_run_encodes_nothing(tmp_path, outputs, negative):
    batches = (["cat", "a dog"], ["a dog", "bird"], ["a dog", "a dog"])
    for run in range(3):
        cache, encoder = PromptCache(store=make_store(tmp_path)), Encoder(outputs)
        for prompts in batches:
            got = cache.encode(encoder, prompts, negative_prompt=negative, device="cpu")
            assert_equal(got, outputs(prompts, negative, 64))
        assert cache._bytes == 0  # memory has nothing of what the disk has
        assert bool(encoder.batches) == (run == 0)


def test_a_company_from_disk_is_that_of_the_encoder(tmp_path):
    company = [["x", "yy", "zzz"]]
    cache, encoder = PromptCache(), Encoder(of_the_batch(rows))
    cache.set_companies(company)
    expected = [cache.encode(encoder, prompts, device="cpu") for prompts in (["x", "yy"], ["zzz", "x"])]
    encoder.batches.clear()
    for run in range(3):
        one, other = (PromptCache(store=make_store(tmp_path)) for _ in range(2))  # two processes share the prompts
        for cache, prompts, value in ((one, ["x", "yy"], expected[0]), (other, ["zzz", "x"], expected[1])):
            cache.set_companies(company)
            assert_equal(cache.encode(encoder, prompts, device="cpu"), value)
        encoder.forget_trial()
        assert len(encoder.batches) == 2 * (run == 0)  # each writes what it was asked for
        encoder.batches.clear()
    entries = [row for path in arrow_files(tmp_path) for row in datasets.Dataset.from_file(str(path))["key"]]
    assert sorted(set(entries)) == sorted(entries)
    alone = PromptCache(store=make_store(tmp_path)).encode(encoder, ["x", "yy"], device="cpu")
    assert not torch.equal(alone[0], expected[0][0]) and encoder.batches


def test_a_call_with_an_image_is_not_kept(tmp_path):
    def encode(prompt, image, device=None):
        return torch.tensor([[float(image.sum())]] * len(prompt))

    for value in (1.0, 2.0):  # the image is no part of the key
        cache = PromptCache(store=make_store(tmp_path))
        for prompts in (["x"], ["x", "y"]):
            got = cache.encode(encode, prompts, image=torch.full((2,), value), device="cpu")
            assert got.unique().tolist() == [2 * value]
    assert not arrow_files(tmp_path)


# Which encoders


def velocity_of(pipeline, folder):
    store = None if folder is None else make_store(folder, encoder_fingerprint(pipeline))
    field = VelocityField(pipeline, num_inference_steps=2, **SIZE, prompt_store=store)
    with torch.no_grad():
        return field(torch.ones(2, 4, 8, 8), 0.5, ["a cat", "two dogs"], 3.0)


def test_the_same_velocity_from_disk_without_encoders(tmp_path, monkeypatch):
    expected = velocity_of(make_pipeline(), None)
    assert torch.equal(velocity_of(make_pipeline(), tmp_path), expected)
    pipeline = make_pipeline()

    def refuse(*args, **kwargs):
        raise AssertionError("a prompt was encoded")

    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
        monkeypatch.setattr(encoder, "forward", refuse)
    assert torch.equal(velocity_of(pipeline, tmp_path), expected)


WITH_AN_IMAGE = ("flux_kontext", "qwen_image_edit")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_from_disk_and_ahead(tmp_path, name, monkeypatch):
    family = FAMILIES[name]
    prompts, scale = list(family.prompts)[: 1 if name in WITH_AN_IMAGE else 2], family.guidance_scale
    results, encoded = [], []
    for run in range(3):
        pipeline = family.build()
        # The last one's processor is a stub without files.
        fingerprint = "stub" if name == "qwen_image_edit" else encoder_fingerprint(pipeline)
        store = make_store(tmp_path, fingerprint) if run else None
        field = VelocityField(pipeline, num_inference_steps=2, **family.kwargs, prompt_store=store)
        own = type(pipeline).encode_prompt

        @wraps(own)
        def encode(*args, own=own, **kwargs):
            encoded.append(args[1:2])
            return own(*args, **kwargs)

        with monkeypatch.context() as patch, torch.no_grad(), small_pictures():
            patch.setattr(type(pipeline), "encode_prompt", encode)
            field.encode_prompts(prompts, [scale])
            ahead = len(encoded)
            x = field.initial_latents(prompts, [torch.Generator().manual_seed(i) for i in range(len(prompts))])
            results.append(field(x, 0.5, prompts, scale))
            assert len(encoded) == ahead > 0 or run == 2  # all of it was encoded ahead
        if run == 2 and name not in WITH_AN_IMAGE:
            assert not encoded
        encoded.clear()
    assert torch.equal(results[1], results[0]) and torch.equal(results[2], results[0])


def one_weight(pipeline):
    with torch.no_grad():
        pipeline.text_encoder_2.text_projection.weight[3, 2] += 1e-6


def lower_precision(pipeline):
    pipeline.text_encoder_3.to(torch.bfloat16)


def latents_in_half(pipeline):
    pipeline.transformer.to(torch.bfloat16)


def attention_heads(pipeline):
    pipeline.text_encoder.config.num_attention_heads = 4


def longer_texts(pipeline):
    pipeline.tokenizer.model_max_length = 20


def no_encoder(pipeline):
    pipeline.text_encoder_3 = None


def swapped(pipeline):
    pipeline.text_encoder, pipeline.text_encoder_2 = pipeline.text_encoder_2, pipeline.text_encoder


CHANGES = [one_weight, lower_precision, latents_in_half, attention_heads, longer_texts, no_encoder, swapped]


@pytest.mark.parametrize("change", CHANGES)
def test_other_encoders_have_another_fingerprint(change):
    pipeline = make_pipeline()
    before = encoder_fingerprint(pipeline)
    change(pipeline)
    assert encoder_fingerprint(pipeline) != before


def test_the_fingerprint_is_that_of_the_encoders(tmp_path):
    pipeline = make_pipeline()
    fingerprint = encoder_fingerprint(pipeline)
    pipeline.save_pretrained(tmp_path / "copy")
    assert encoder_fingerprint(type(pipeline).from_pretrained(tmp_path / "copy")) == fingerprint
    velocity_of(pipeline, None)  # tokenizers keep the last call's padding
    with torch.no_grad():
        pipeline.transformer.proj_out.weight += 1
        pipeline.vae.decoder.conv_in.weight += 1
    assert encoder_fingerprint(pipeline) == fingerprint


def test_embeddings_of_another_fingerprint_are_not_seen(tmp_path):
    make_store(tmp_path, "one").write(key("a"), torch.ones(1))
    assert make_store(tmp_path, "other").read(key("a")) is None


# Bound


def test_the_files_are_not_looked_at_for_every_prompt(tmp_path, monkeypatch):
    looks, look = [], prompt_store._size
    monkeypatch.setattr(prompt_store, "_size", lambda folder: looks.append(folder) or look(folder))
    one, other = make_store(tmp_path, max_bytes=2**20), make_store(tmp_path, max_bytes=2**20)
    written = 0
    for i in range(1000):
        written += one.write(key(f"one {i}"), torch.full((100,), float(i)))
        written += other.write(key(f"other {i}"), torch.full((100,), float(-i)))
    # Two that write at the same time, and do not see each other meanwhile.
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 2**20 - 4000 < size <= 2**20
    assert 100 < len(looks) < written / 2 < 1000


def test_bytes_are_bounded_and_the_rest_is_encoded_anew(tmp_path, caplog):
    value = torch.zeros(1000)
    bound = 5 * (value.nbytes + 1000)
    make_store(tmp_path, "of other encoders", bound).write(key("a"), value + 100)
    store, encoder = make_store(tmp_path, "f", bound), Encoder(one_tensor)
    written = [store.write(key(str(i)), value + i) for i in range(10)]
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert written == [True] * sum(written) + [False] * (10 - sum(written)) and 3 <= sum(written) < 6
    assert bound - value.nbytes - 1500 < size <= bound
    assert caplog.text.count("is full") == 1 and str(bound) in caplog.text
    cache = PromptCache(store=store)
    for _ in range(2):  # what is not written is kept in memory
        assert_equal(cache.encode(encoder, ["x", "y"], device="cpu"), one_tensor(["x", "y"], None, 64))
        cache._recent.clear()
    encoder.forget_trial()
    assert encoder.batches == [["x"], ["y"]]
    assert torch.equal(store.read(key("1")), value + 1)


def test_a_full_disk_stops_the_writing_alone(tmp_path, caplog):
    store = make_store(tmp_path)
    store.write(key("a"), torch.ones(4))
    store._file.close()
    store._file = open("/dev/full", "ab")
    assert not store.write(key("b"), torch.ones(4) * 2)
    assert not store.write(key("c"), torch.ones(4) * 3)
    assert "can't be written to" in caplog.text
    assert store.read(key("b")) is None and torch.equal(store.read(key("a")), torch.ones(4))


# Faults


def damaged(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data))


@pytest.mark.parametrize("missing", [1, 8, 200, 4090])
def test_the_whole_rows_of_a_file_that_was_cut_off_are_used(tmp_path, caplog, missing):
    store = make_store(tmp_path)
    for i in range(3):
        store.write(key(str(i)), torch.full((1000,), float(i)))
    (path,) = arrow_files(tmp_path)
    damaged(path, lambda data: data[:-missing])
    again = make_store(tmp_path)
    assert caplog.text.count("ends in the middle of a row") == 1 and path.name in caplog.text
    assert [again.read(key(str(i))) is not None for i in range(3)] == [True, True, False]
    assert torch.equal(again.read(key("1")), torch.ones(1000))
    assert again.write(key("2"), torch.full((1000,), 2.0))
    assert torch.equal(make_store(tmp_path).read(key("2")), torch.full((1000,), 2.0))


@pytest.mark.slow
@pytest.mark.parametrize("live", [False, True])
def test_no_flipped_byte_gives_another_embedding(tmp_path, live, caplog):
    """Every byte of the file once: each prompt is exact or encoded anew, and the file is set aside where it was noticed."""
    values = {str(i): (torch.full((2,), float(i), dtype=torch.bfloat16), None, "shared") for i in range(2)}
    store = make_store(tmp_path / "0")
    for name, value in values.items():
        store.write(key(name), value)
    data = arrow_files(tmp_path / "0")[0].read_bytes()
    noticed = 0
    for position in range(0, len(data), 3):
        folder = tmp_path / str(position + 1)
        (folder / "f").mkdir(parents=True)
        path = folder / "f" / "rows.arrow"
        path.write_bytes(data)
        reader = make_store(folder) if live else None  # damaged while it is in use, or before
        damaged(path, lambda bad, at=position: bad[:at] + bytes([bad[at] ^ 0x55]) + bad[at + 1 :])
        reader = reader or make_store(folder)
        for name, value in values.items():
            got = reader.read(key(name))
            if got is None:
                noticed += 1
                assert reader.write(key(name), value)
                got = reader.read(key(name))
            assert bits(got[0]) == bits(value[0]) and got[1:] == value[1:]
    assert noticed > len(data) // 10
    assert "is damaged" in caplog.text
    assert len(list(tmp_path.rglob("*.damaged"))) > len(data) // 30


@pytest.mark.parametrize("content", [b"PK\x03\x04 no Arrow", b"\x00" * 4096])
def test_another_kind_of_file_is_set_aside(tmp_path, caplog, content):
    make_store(tmp_path).write(key("a"), torch.ones(2))
    (tmp_path / "f" / "strange.arrow").write_bytes(content)
    assert torch.equal(make_store(tmp_path).read(key("a")), torch.ones(2))
    assert "strange.arrow is damaged" in caplog.text and (tmp_path / "f" / "strange.damaged").exists()
    caplog.clear()
    make_store(tmp_path)
    assert not caplog.records


def test_files_deleted_meanwhile_are_encoded_anew(tmp_path):
    one = make_store(tmp_path)
    one.write(key("a"), torch.ones(2))
    reader = make_store(tmp_path)
    (path,) = arrow_files(tmp_path)
    path.unlink()
    assert reader.read(key("a")) is None
    assert reader.write(key("a"), torch.ones(2)) and torch.equal(reader.read(key("a")), torch.ones(2))


@pytest.mark.parametrize("kind", ["a file", "not writable"])
def test_a_folder_that_cannot_be_used_is_refused(tmp_path, monkeypatch, kind):
    folder = tmp_path / "store"
    if kind == "a file":
        folder.touch()
    else:
        monkeypatch.setattr("trl_diffusion_opd.pipelines.prompt_store.os.access", lambda path, mode: False)
    reason = {"a file": "can't be created: ", "not writable": "is not writable. Name another folder"}[kind]
    with pytest.raises(ValueError, match=f"prompt_cache_dir='.*store' {reason}"):
        make_store(folder)


# Several processes


def write_half(folder):
    """300 of 450 prompts; two processes have 150 in common."""
    store, first = PromptStore(str(folder), "f", 2**30), 150 * int(os.environ["RANK"])
    for i in range(first, first + 300):
        if store.read((("prompt", str(i)),)) is None:
            store.write((("prompt", str(i)),), torch.full((100,), float(i)))


def test_two_processes_write_at_the_same_time(tmp_path, caplog, processes):
    assert [writer.code for writer in processes.run(write_half, tmp_path)] == [0, 0]
    store = make_store(tmp_path)
    assert len(arrow_files(tmp_path)) == 2 and len(store) == 450 and not caplog.records
    for i in range(450):
        assert torch.equal(store.read(key(str(i))), torch.full((100,), float(i)))


def test_rows_of_another_process_are_seen_as_they_come(tmp_path):
    one, other = make_store(tmp_path), make_store(tmp_path)
    for i in range(3):
        one.write(key(str(i)), torch.tensor([i]))
        assert int(other.read(key(str(i)))) == i


# Memory


def test_memory_does_not_grow_with_the_store(tmp_path):
    n, one = 200, torch.zeros(2**18)  # 1 MiB a prompt
    store = make_store(tmp_path)
    for i in range(n):
        store.write(key(str(i)), one + i)
    process = psutil.Process()
    cache = PromptCache(store=make_store(tmp_path))
    before = process.memory_info().rss
    for i in range(n):
        got = cache.encode(encodes_nothing, [str(i)], device="cpu")
        assert got[0] == i
    # 200 MiB were read; the 8 batches of the moment are kept, and an allocator's slack.
    assert process.memory_info().rss - before < 40 * 2**20


def encodes_nothing(prompt, device=None):
    raise AssertionError(f"{prompt} was encoded")
