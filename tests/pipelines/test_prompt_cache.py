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

import pytest
import torch
from helpers.encoders import (
    BY_BATCH,
    BY_ROW,
    LENGTH,
    Encoder,
    assert_equal,
    embed,
    layers_first,
    lists,
    nested,
    of_the_batch,
    one_tensor,
    padded_to_sixteens,
    padded_to_the_longest,
    position_of_the_batch,
    rows,
    shared_ids,
)

from trl_diffusion_opd.pipelines.prompt_cache import _PROBES, PromptCache


@pytest.mark.parametrize("outputs", BY_ROW + BY_BATCH)
@pytest.mark.parametrize("negative", [None, ["", "dull"]])
def test_it_returns_what_the_encoder_returns(outputs, negative):
    cache, encoder = PromptCache(), Encoder(outputs)
    for prompts in (["cat", "a dog"], ["a dog", "cat"], ["a dog", "a dog"], ["cat", "a dog"]):
        got = cache.encode(encoder, prompts, negative_prompt=negative, device="cpu")
        assert_equal(got, outputs(prompts, negative, LENGTH))
    single = None if negative is None else negative[:1]
    assert_equal(cache.encode(encoder, ["cat"], single, "cpu"), outputs(["cat"], single, LENGTH))


@pytest.mark.parametrize("outputs", BY_ROW)
def test_a_prompt_is_encoded_once_and_alone(outputs):
    cache, encoder = PromptCache(), Encoder(outputs)
    for prompts in (["x", "y"], ["y", "z"], ["z", "x", "y"]):
        cache.encode(encoder, prompts, device="cpu")
    encoder.forget_trial()
    assert encoder.batches == [["x"], ["y"], ["z"]]


@pytest.mark.parametrize("outputs", BY_BATCH)
def test_a_batch_that_is_more_than_its_rows_is_encoded_whole(outputs):
    cache, encoder = PromptCache(), Encoder(outputs)
    for prompts in (["x", "yy"], ["yy", "x"], ["x", "yy"]):
        cache.encode(encoder, prompts, device="cpu")
    encoder.forget_trial()
    assert encoder.batches == [["x", "yy"], ["yy", "x"]]


def test_rows_that_stop_fitting_together_are_encoded_whole():
    # CogView4: the trial's short prompts say "rows", and so they are until one is longer than 16 tokens.
    cache, encoder = PromptCache(), Encoder(padded_to_sixteens)
    for prompts in (["x", "yy"], ["x", "y" * 20], ["y" * 20, "z" * 30]):
        assert_equal(cache.encode(encoder, prompts, device="cpu"), padded_to_sixteens(prompts, None, LENGTH))
    encoder.forget_trial()
    assert ["x", "y" * 20] in encoder.batches and ["y" * 20, "z" * 30] not in encoder.batches


def test_the_trial_happens_once():
    cache, encoder = PromptCache(), Encoder(rows)
    cache.encode(encoder, ["x", "y"], device="cpu")
    assert len(encoder.batches) == 3 + 2
    cache.encode(encoder, ["v", "w"], device="cpu")
    assert len(encoder.batches) == 3 + 4


def test_one_prompt_needs_no_trial():
    # A pipeline that edits images may take one prompt for its one image and no more.
    cache, encoder = PromptCache(), Encoder(rows)
    cache.encode(encoder, ["x"], device="cpu")
    assert encoder.batches == [["x"]]


def test_options_and_negative_prompts_belong_to_the_key():
    cache, encoder = PromptCache(), Encoder(rows)
    for options in ({}, {"max_sequence_length": 8}, {"negative_prompt": ["", ""]}, {"negative_prompt": ["bad", ""]}):
        got = cache.encode(encoder, ["x", "y"], device="cpu", **options)
        expected = rows(["x", "y"], options.get("negative_prompt"), options.get("max_sequence_length", LENGTH))
        assert_equal(got, expected)


def test_an_embedding_does_not_depend_on_what_came_before():
    # Half-precision encoders round a row differently in a batch: as if the size of the batch were added.
    def noisy(prompt, negative_prompt, length):
        return (one_tensor(prompt, None, length) + 1e-3 * (len(prompt) - 1)).clone()

    histories = ([], [["x", "y"]], [["z"], ["x"]], [["y", "x", "z"], ["x", "x"]])
    results = []
    for history in histories:
        cache, encoder = PromptCache(), Encoder(noisy)
        for prompts in history:
            cache.encode(encoder, prompts, device="cpu")
        results.append([cache.encode(encoder, prompts, device="cpu") for prompts in (["x", "y"], ["x"], ["z", "x"])])
    for result in results:
        assert_equal(result, results[0])
        assert torch.equal(result[0][:1], result[1]) and torch.equal(result[2][1:], result[1])


def test_bytes_are_bounded_and_the_least_recently_used_goes():
    one = embed("x").nbytes
    cache, encoder = PromptCache(max_bytes=3 * one), Encoder(one_tensor)
    for prompts in (["a1", "b1"], ["c1", "a1"], ["d1", "a1"]):  # d1 pushes b1 out, since a1 was used again
        cache.encode(encoder, prompts, device="cpu")
    encoder.forget_trial()
    assert encoder.batches == [["a1"], ["b1"], ["c1"], ["d1"]]
    encoder.batches.clear()
    cache.encode(encoder, ["c1", "d1", "a1"], device="cpu")
    assert encoder.batches == []
    cache.encode(encoder, ["b1", "a1"], device="cpu")
    assert encoder.batches == [["b1"]]
    assert sum(entry.nbytes for entry in cache._entries.values()) <= 3 * one


def test_a_batch_larger_than_the_bound_still_comes_out_right():
    cache, encoder = PromptCache(max_bytes=1), Encoder(rows)
    assert_equal(cache.encode(encoder, ["x", "y", "z"], device="cpu"), rows(["x", "y", "z"], None, LENGTH))


def test_the_empty_prompt_is_kept_once():
    # As with guidance in SD3: an embedding of "" comes with every prompt.
    cache, encoder = PromptCache(), Encoder(rows)
    prompts = [f"prompt {i}" for i in range(6)]
    cache.encode(encoder, prompts, [""] * 6, "cpu")
    negatives = {entry[1].data_ptr() for entry in cache._entries.values()}
    positives = {entry[0].data_ptr() for entry in cache._entries.values()}
    assert (len(cache._entries), len(positives), len(negatives)) == (6, 6, 1)


def test_another_device_needs_no_second_encoding():
    cache, encoder = PromptCache(), Encoder(one_tensor)
    cache.encode(encoder, ["x", "y"], device="cpu")
    calls = len(encoder.batches)
    assert cache.encode(encoder, ["x", "y"], device="meta").device.type == "meta"
    assert cache.encode(encoder, ["x", "y"], device="cpu").device.type == "cpu"
    assert len(encoder.batches) == calls
    assert {entry.device.type for entry in cache._entries.values()} == {"cpu"}


@pytest.mark.parametrize("outputs", [one_tensor, padded_to_the_longest])
def test_the_callers_list_is_left_alone(outputs):
    # Z-Image writes its chat template into the list that it is given.
    def template(prompt, negative_prompt, length):
        prompt[:] = [f"<{text}>" for text in prompt]
        return outputs(prompt, negative_prompt, length)

    cache, prompts = PromptCache(), ["x", "yy"]
    got = cache.encode(Encoder(template), prompts, device="cpu")
    assert prompts == ["x", "yy"]
    assert torch.equal(got, outputs(["<x>", "<yy>"], None, LENGTH))


def test_no_graph_is_kept():
    weight = torch.ones((), requires_grad=True)
    got = PromptCache().encode(Encoder(lambda *args: one_tensor(*args) * weight), ["x", "y"], device="cpu")
    assert not got.requires_grad


@pytest.mark.parametrize("outputs", [layers_first, padded_to_the_longest])
@pytest.mark.parametrize("negative", [None, [""] * 5])
def test_copies_in_a_batch_that_is_encoded_whole_are_encoded_once(outputs, negative):
    cache, encoder = PromptCache(), Encoder(outputs)
    prompts = ["x", "yyy", "x", "zz", "yyy"]
    got = cache.encode(encoder, prompts, negative_prompt=negative, device="cpu")
    assert_equal(got, outputs(prompts, negative, LENGTH))
    encoder.forget_trial()
    assert encoder.batches == [["x", "yyy", "zz"]]
    # The batch without copies is there already, and so are any other numbers of them.
    for more in (["x", "yyy", "zz"], ["x", "yyy", "zz"] * 3):
        got = cache.encode(encoder, more, negative_prompt=negative and [""] * len(more), device="cpu")
        assert_equal(got, outputs(more, None, LENGTH))
    assert encoder.batches == [["x", "yyy", "zz"]]


def test_a_mask_that_is_there_only_where_it_masks():
    def masked(when):
        def outputs(prompt, negative_prompt, length):
            embeds = padded_to_the_longest(prompt, None, length)
            mask = (embeds[..., 0] != 0).float()
            return embeds, mask if when(mask) else None

        return outputs

    # As Qwen-Image has it, and as it would mislead the trial, whose prompts have 1 and 5 letters.
    for outputs in (masked(lambda mask: not mask.all()), masked(lambda mask: mask.shape[1] > 5)):
        cache, encoder = PromptCache(), Encoder(outputs)
        for prompts in (["xx", "xx"], ["x", "yyyyyy", "x"]):
            assert_equal(cache.encode(encoder, prompts, device="cpu"), outputs(prompts, None, LENGTH))


def test_a_batch_in_which_the_prompts_cannot_be_found_is_encoded_with_its_copies():
    cache, encoder = PromptCache(), Encoder(position_of_the_batch)
    assert_equal(cache.encode(encoder, ["x", "x"], device="cpu"), position_of_the_batch(["x", "x"], None, LENGTH))
    encoder.forget_trial()
    assert encoder.batches == [["x", "x"]]


# Guidance


def guided(prompt, negative_prompt, guidance):
    """As Stable Diffusion 3's: two encodings of the prompts, and of the negative ones where there is guidance."""
    negative = [""] * len(prompt) if negative_prompt is None else negative_prompt
    positive, beside = (torch.cat([embed(text) for text in texts]) for texts in (prompt, negative))
    return positive, beside if guidance else None, positive[:, 0], beside[:, 0] if guidance else None


def guided_lists(prompt, negative_prompt, guidance):
    """As Z-Image's, where there is nothing instead of a list of negative embeddings."""
    return lists(prompt, None, LENGTH)[0], lists([""] * len(prompt), None, LENGTH)[0] if guidance else []


def guided_beside_each_other(prompt, negative_prompt, guidance):
    """A negative embedding that is made for its prompt."""
    positive = one_tensor(prompt, None, LENGTH)
    return positive, 2 * positive if guidance else None


def guided_in_one(prompt, negative_prompt, guidance):
    return one_tensor(prompt, None, LENGTH) + float(guidance)


class GuidedEncoder(Encoder):
    """It remembers each text that it encodes, negative ones in brackets."""

    def __call__(self, prompt, do_classifier_free_guidance, negative_prompt=None, device=None):
        negative = [""] * len(prompt) if negative_prompt is None else negative_prompt
        self.batches.append(list(prompt) + [f"[{text}]" for text in negative if do_classifier_free_guidance])
        return self.outputs(prompt, negative_prompt, do_classifier_free_guidance)


@pytest.mark.parametrize("outputs", [guided, guided_lists])
@pytest.mark.parametrize("negative", [None, "dull"])
def test_guidance_encodes_a_prompt_once_and_the_negative_prompt_once(outputs, negative):
    cache, encoder = PromptCache(), GuidedEncoder(outputs)
    first = ["x", "y"]
    cache.encode(encoder, first, True, negative and [negative] * 2, "cpu")  # with its trials
    encoder.batches.clear()
    for prompts in (["y", "z"], ["v"], ["z", "v", "w", "w"]):
        for guidance in (True, False, True):
            texts = negative and [negative] * len(prompts)
            got = cache.encode(encoder, prompts, guidance, texts, "cpu")
            assert_equal(got, outputs(prompts, texts, guidance))
    encoder.forget_trial()  # of calls without guidance, and of one prompt
    assert [batch for batch in encoder.batches if not set(_PROBES) & set(batch)] == [["z"], ["v"], ["w"]]


@pytest.mark.parametrize("outputs", [guided_beside_each_other, guided_in_one])
def test_guidance_that_cannot_be_told_apart_is_encoded_as_it_is(outputs):
    cache, encoder = PromptCache(), GuidedEncoder(outputs)
    for prompts in (["x", "y"], ["y", "z"], ["z"]):
        for guidance in (True, False):
            assert_equal(cache.encode(encoder, prompts, guidance, device="cpu"), outputs(prompts, None, guidance))


# Company


COMPANIES = [["x", "yy", "zzz"], ["u", "v"]]


@pytest.mark.parametrize("outputs", [rows, one_tensor])
@pytest.mark.parametrize("negative", [None, "dull"])
def test_a_company_is_encoded_at_once_and_nobody_else_matters(outputs, negative):
    def texts(prompts):
        return negative and [negative] * len(prompts)

    rounded = of_the_batch(outputs)
    expected = {one: rounded(company, texts(company), LENGTH) for company in COMPANIES for one in company}
    histories = ([], [["x"]], [["v", "x"], ["q", "u"]], [["zzz", "yy", "x", "v", "u"]], [["u"], ["v"], ["yy"]])
    for history in histories:
        cache, encoder = PromptCache(), Encoder(rounded)
        cache.set_companies(COMPANIES)
        for prompts in (*history, ["x", "v"], ["zzz"], ["yy", "u", "x"], ["q", "yy"]):
            got = cache.encode(encoder, prompts, texts(prompts), "cpu")
            first = got[0] if isinstance(got, tuple) else got
            for prompt, row in zip(prompts, first, strict=True):
                of_company = expected.get(prompt, rounded(["q"], texts(["q"]), LENGTH))
                of_company = of_company[0] if isinstance(of_company, tuple) else of_company
                company = next((one for one in COMPANIES if prompt in one), ["q"])
                assert torch.equal(row, of_company[company.index(prompt)])
        encoder.forget_trial()
        assert sorted(encoder.batches) == [["q"], ["u", "v"], ["x", "yy", "zzz"]]


def test_without_its_company_a_prompt_is_encoded_alone():
    cache, encoder = PromptCache(), Encoder(of_the_batch(rows))
    alone = PromptCache().encode(encoder, ["x", "u"], device="cpu")
    for companies in (COMPANIES, [], COMPANIES):
        cache.set_companies(companies)
        got = cache.encode(encoder, ["x", "u"], device="cpu")
        assert torch.equal(got[0], alone[0]) == (not companies)


def test_of_several_companies_the_first_counts():
    cache, encoder = PromptCache(), Encoder(rows)
    cache.set_companies([["x", "y"], ["y", "z"]])
    cache.encode(encoder, ["y", "z"], device="cpu")
    encoder.forget_trial()
    assert encoder.batches == [["x", "y"], ["y", "z"]]


@pytest.mark.parametrize("outputs", [padded_to_sixteens, *BY_BATCH, shared_ids, lists, nested])
def test_company_changes_no_kind_of_embedding(outputs):
    long, longer = "y" * 20, "z" * 40
    cache, encoder = PromptCache(), Encoder(outputs)
    cache.set_companies([["x", long, "w"], [longer, "v"]])
    for prompts in (["x", "w"], ["w", "v"], [long, "x"], [long, longer], ["v"]):
        assert_equal(cache.encode(encoder, prompts, device="cpu"), outputs(prompts, None, LENGTH))


def test_a_company_that_does_not_fit_into_memory_comes_out_the_same():
    rounded, results = of_the_batch(rows), []
    for max_bytes in (1, 2**30):
        cache, encoder = PromptCache(max_bytes=max_bytes), Encoder(rounded)
        cache.set_companies(COMPANIES)
        batches = (["x", "u"], ["v", "zzz"], ["x", "u"], ["zzz", "x"])
        results.append([cache.encode(encoder, prompts, device="cpu") for prompts in batches])
        assert cache._bytes == sum(t.nbytes for e in cache._entries.values() for t in e if t is not None)
    for small, large in zip(*results, strict=True):
        assert_equal(small, large)
