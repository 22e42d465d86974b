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

"""The rewards that run a CLIP, loaded by id from a loopback Hub and against their formulas."""

import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.clip_models import (
    PROJECTION,
    apply_head,
    cropped_pixels,
    letterboxed_pixels,
    make_clip,
    make_head,
    make_images,
    make_open_clip,
    open_clip_embeddings,
    transformers_embeddings,
)
from helpers.loopback_hub import READ_TOKEN, TOKEN
from huggingface_hub import HfApi
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from trl_diffusion_opd.hub import errors as hub_errors
from trl_diffusion_opd.rewards import Aesthetic, CLIPScore, HPSv2, PickScore, load_reward
from trl_diffusion_opd.rewards import model_files as hub_files


IMAGES = make_images()
PROMPTS = ["a cat", "TWO dogs", "a very long prompt that has many more letters than fit " * 5, ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One folder a repository: a CLIP with its processor, a processor alone, open_clip's weights, a head."""
    root = tmp_path_factory.mktemp("models")
    made = SimpleNamespace(**{name: root / name for name in ("clip", "processor", "hps", "head")})
    made.weights = make_clip(made.clip)
    make_clip(made.processor, seed=1)
    (made.processor / "model.safetensors").unlink()
    made.hps.mkdir()
    made.open_clip = make_open_clip()
    torch.save({"state_dict": made.open_clip}, made.hps / "weights.pt")
    made.head.mkdir()
    made.head_weights = make_head(PROJECTION)
    torch.save(made.head_weights, made.head / "head.pth")
    # What may lie beside them, and is not for us.
    (made.clip / "pytorch_model.bin").write_bytes(b"a pickle")
    (made.clip / "model.py").write_text("raise RuntimeError")
    return made


OPTIONS = {
    PickScore: dict(model="clip", processor="processor"),
    CLIPScore: dict(model="clip"),
    HPSv2: dict(model="hps", filename="weights.pt", processor="processor"),
    Aesthetic: dict(model="clip", head="head", head_filename="head.pth"),
}
_REPOSITORIES = ("model", "processor", "head")


def local(reward_class, folders, **options):
    """Makes a reward from the local folders."""
    named = {key: str(getattr(folders, x)) if key in _REPOSITORIES else x for key, x in OPTIONS[reward_class].items()}
    return reward_class(**{**named, **options})


def expected(reward_class, folders) -> list[float]:
    """Scores of `IMAGES` for `PROMPTS` by the published formulas."""
    scores = []
    for prompt, picture in zip(PROMPTS, IMAGES, strict=True):
        if reward_class is HPSv2:
            image, text = open_clip_embeddings(folders.open_clip, letterboxed_pixels(picture), prompt)
        else:
            rule = "torchvision" if reward_class is Aesthetic else "transformers"
            image, text = transformers_embeddings(folders.weights, cropped_pixels(picture, rule=rule), prompt)
        if reward_class is PickScore:
            scores.append((folders.weights["logit_scale"].double().exp() * image @ text).item())
        elif reward_class is Aesthetic:
            scores.append(apply_head(folders.head_weights, image))
        else:
            scores.append((image @ text).item())
    return scores


@pytest.mark.parametrize("reward_class", OPTIONS)
def test_from_the_hub_as_published(reward_class, folders, hub):
    api = HfApi()
    for name in ("clip", "processor", "hps", "head"):
        api.create_repo(f"tester/{name}")
        api.upload_folder(repo_id=f"tester/{name}", folder_path=getattr(folders, name))
    options = {key: f"tester/{x}" if key in _REPOSITORIES else x for key, x in OPTIONS[reward_class].items()}
    hub.requests.clear()
    reward = load_reward(reward_class.name, **options)
    assert type(reward) is reward_class
    scores = reward(prompts=PROMPTS, images=IMAGES)
    assert scores == pytest.approx(expected(reward_class, folders), abs=1e-5)
    assert max(scores) - min(scores) > 0.05  # there is something to tell apart
    low, high = reward.bounds
    assert all((low is None or low <= score) and (high is None or score <= high) for score in scores)
    # Only what it needs, and it is known which.
    read = {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request}
    assert not read & {"pytorch_model.bin", "model.py"}
    for repository in {options[key] for key in _REPOSITORIES if key in options}:
        assert f"{repository}@{hub.repositories[repository].branches['main']}" in reward.fingerprint
    assert reward.fingerprint.startswith(f"{reward_class.name} ") and reward.fingerprint.endswith("float32")


@pytest.mark.parametrize("reward_class", OPTIONS)
def test_batches_precision_and_autocast(reward_class, folders):
    reward = local(reward_class, folders)
    scores = reward(prompts=PROMPTS, images=IMAGES)
    for size in (1, 3):
        assert local(reward_class, folders, batch_size=size)(prompts=PROMPTS, images=IMAGES) == pytest.approx(
            scores, abs=1e-5
        )
    with torch.autocast("cpu", torch.bfloat16):
        assert reward(prompts=PROMPTS, images=IMAGES) == scores
    assert reward(prompts=PROMPTS[::-1], images=IMAGES[::-1])[::-1] == pytest.approx(scores, abs=1e-5)

    half = local(reward_class, folders, dtype="bfloat16", device="cpu")
    assert half(prompts=PROMPTS, images=IMAGES) == pytest.approx(
        scores, abs=0.3 if reward_class is PickScore else 0.03
    )
    assert half.fingerprint != reward.fingerprint and half.fingerprint.endswith("bfloat16")
    # Frozen, without dropout, in the dtype asked for; the head stays in float32.
    modules = [value for value in vars(half).values() if isinstance(value, torch.nn.Module)]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    assert parameters and not any(parameter.requires_grad for parameter in parameters)
    assert not any(part.training for module in modules for part in module.modules())
    assert {parameter.dtype for parameter in modules[0].parameters()} == {torch.bfloat16}


def test_the_scale_is_not_rounded(folders, tmp_path):
    weights = dict(folders.weights, logit_scale=torch.tensor(math.log(100)))
    folder = shutil.copytree(folders.clip, tmp_path / "clip")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    options = dict(model=str(folder), processor=str(folders.processor))
    reward, half = PickScore(**options), PickScore(**options, dtype=torch.bfloat16)
    assert half.logit_scale == reward.logit_scale == pytest.approx(100, rel=1e-6)


def test_images_in_other_modes(folders):
    reward = local(CLIPScore, folders)
    grey = IMAGES[0].convert("L")
    assert reward(prompts=["a cat"] * 2, images=[grey, grey.convert("RGB")])[0] == pytest.approx(
        reward(prompts=["a cat"], images=[grey.convert("RGB")])[0], abs=1e-6
    )
    assert reward(prompts=[], images=[]) == []


def test_hpsv2_in_other_formats(folders, tmp_path):
    scores = local(HPSv2, folders)(prompts=PROMPTS, images=IMAGES)
    # The bare tensors, in float16 as files to download are, and as safetensors.
    half = {name: tensor.half() for name, tensor in folders.open_clip.items()}
    torch.save(half, tmp_path / "half.pt")
    save_file(folders.open_clip, tmp_path / "whole.safetensors")
    processor = str(folders.processor)
    rounded = HPSv2(str(tmp_path), "half.pt", processor=processor)
    assert next(rounded.model.parameters()).dtype == torch.float32
    assert rounded(prompts=PROMPTS, images=IMAGES) == pytest.approx(scores, abs=0.01)
    whole = HPSv2(str(tmp_path), "whole.safetensors", processor=processor)
    assert whole(prompts=PROMPTS, images=IMAGES) == scores
    assert whole.fingerprint != rounded.fingerprint
    # Converted by others.
    converted = HPSv2(str(folders.clip), None, processor=processor)
    images = [
        transformers_embeddings(folders.weights, letterboxed_pixels(x), p)
        for x, p in zip(IMAGES, PROMPTS, strict=True)
    ]
    assert converted(prompts=PROMPTS, images=IMAGES) == pytest.approx([(i @ t).item() for i, t in images], abs=1e-5)


def test_hpsv2_reads_prompts_as_open_clip_does(folders, monkeypatch):
    """Against what open_clip's own tokenizer made of the same prompts, with a small part of its vocabulary."""
    recorded = json.loads((Path(__file__).parents[1] / "helpers" / "open_clip_tokens.json").read_text())
    merges = [tuple(merge.split()) for merge in recorded["merges"]]
    letters = sorted(ByteLevel.alphabet())
    words = letters + [f"{letter}</w>" for letter in letters] + ["".join(merge) for merge in merges]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    prompts = [row["prompt"] for row in recorded["prompts"]]

    def read(reward):
        monkeypatch.setattr(reward, "tokenizer", CLIPTokenizer(vocab=vocab, merges=merges))
        monkeypatch.setattr(reward.model.config.text_config, "max_position_embeddings", 77)
        seen = []

        def features(input_ids, attention_mask):
            for ids, mask in zip(input_ids, attention_mask, strict=True):
                tokens = reward.tokenizer.convert_ids_to_tokens(ids[mask.bool()].tolist())
                assert (tokens[0], tokens[-1]) == ("<|startoftext|>", "<|endoftext|>")
                seen.append(tokens[1:-1])
            return SimpleNamespace(pooler_output=torch.ones(len(input_ids), PROJECTION))

        monkeypatch.setattr(reward.model, "get_text_features", features)
        reward(prompts=prompts, images=IMAGES[:1] * len(prompts))
        return seen

    assert read(local(HPSv2, folders)) == [row["tokens"] for row in recorded["prompts"]]
    # PickScore and CLIPScore were trained and published with transformers' tokenizer, which keeps the quotes as they are.
    for others in (PickScore, CLIPScore):
        tokens = read(local(others, folders))
        assert sum(a != row["tokens"] for a, row in zip(tokens, recorded["prompts"], strict=True)) > 15


class TestRevisions:
    def test_pins(self):
        assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in hub_files.PINNED_REVISIONS.values())

    def test_a_pinned_commit_is_what_is_read(self, folders, hub, tmp_path, monkeypatch):
        first = hub.add_folder("tester/clip", folders.clip)
        make_clip(tmp_path, seed=5)
        hub.add_folder("tester/clip", tmp_path)
        hub.add_folder("tester/processor", folders.processor)
        options = dict(model="tester/clip", processor="tester/processor")
        old = local(PickScore, folders)(prompts=PROMPTS, images=IMAGES)
        assert PickScore(**options)(prompts=PROMPTS, images=IMAGES) != pytest.approx(old, abs=0.01)
        monkeypatch.setitem(hub_files.PINNED_REVISIONS, "tester/clip", first)
        pinned = PickScore(**options)
        assert pinned(prompts=PROMPTS, images=IMAGES) == pytest.approx(old, abs=1e-5)
        assert f"tester/clip@{first}" in pinned.fingerprint
        assert PickScore(**options, revision="main").fingerprint != pinned.fingerprint

    def test_a_local_folder_is_known_by_its_content(self, folders, tmp_path):
        copied = shutil.copytree(folders.clip, tmp_path / "clip")
        reward = CLIPScore(str(copied))
        assert reward.fingerprint == local(CLIPScore, folders).fingerprint
        assert str(tmp_path) not in reward.fingerprint and "sha256:" in reward.fingerprint
        make_clip(copied, seed=7)
        assert CLIPScore(str(copied)).fingerprint != reward.fingerprint


class TestRefusals:
    @pytest.mark.parametrize("reward_class", OPTIONS)
    def test_repositories(self, reward_class, folders, hub, monkeypatch):
        name = reward_class.name
        for part in [key for key in OPTIONS[reward_class] if key in _REPOSITORIES]:
            gated, private = f"tester/gated-{part}", f"tester/private-{part}"
            hub.create(gated, gated=True)
            hub.create(private, private=True)
            for repository in (gated, private):
                hub.add_folder(repository, getattr(folders, OPTIONS[reward_class][part]))
            with pytest.raises(ValueError, match=f"Reward '{name}': tester/none: .* no such repository on the Hub"):
                local(reward_class, folders, **{part: "tester/none"})
            monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
            with pytest.raises(
                ValueError, match=f"Reward '{name}': {gated}: the repository is gated. Accept its terms"
            ):
                local(reward_class, folders, **{part: gated})
            monkeypatch.delenv("HF_TOKEN")
            with pytest.raises(ValueError, match=f"Reward '{name}': {private}: .* private repository log in"):
                local(reward_class, folders, **{part: private})
            monkeypatch.setenv("HF_TOKEN", TOKEN)
            local(reward_class, folders, **{part: private})

    def test_revision(self, folders, hub):
        hub.add_folder("tester/clip", folders.clip)
        with pytest.raises(ValueError, match="'clipscore': tester/clip: the repository has no revision 'v2'"):
            CLIPScore("tester/clip", "v2")
        with pytest.raises(ValueError, match="'clipscore': a local folder has no revision"):
            CLIPScore(str(folders.clip), "v2")

    def test_the_hub_is_away(self, hub, monkeypatch):
        monkeypatch.setattr(hub_errors, "time", SimpleNamespace(sleep=lambda seconds: None))
        hub.fail("/api/models/tester/away", 503, times=100)
        with pytest.raises(ValueError, match="Reward 'clipscore': tester/away: "):
            CLIPScore("tester/away")

    def test_files_that_are_not_there(self, folders, tmp_path, hub):
        pickled = shutil.copytree(folders.clip, tmp_path / "pickled")
        (pickled / "model.safetensors").unlink()
        hub.add_folder("tester/pickled", pickled)
        for model, where in ((str(pickled), ""), ("tester/pickled", " at revision main")):
            with pytest.raises(
                ValueError, match=rf"pickled: there is no model\*.safetensors{where}. Pickled weights are"
            ):
                CLIPScore(model)
        hub.create("tester/empty")
        with pytest.raises(ValueError, match=r"'clipscore': tester/empty: there is no config.json, no model"):
            CLIPScore("tester/empty")
        with pytest.raises(ValueError, match="'hpsv2': processor: there is no HPS_v2.1_compressed.pt"):
            HPSv2(str(folders.processor), processor=str(folders.processor))
        with pytest.raises(
            ValueError, match="'pickscore': hps: there is no preprocessor_config.json or .*, no tokenizer"
        ):
            PickScore(str(folders.clip), processor=str(folders.hps))

    @pytest.mark.parametrize("reward_class", [HPSv2, Aesthetic])
    def test_code_in_a_pickle_is_not_run(self, reward_class, folders, tmp_path):
        class Attack:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "attacked"),)

        part, key = ("model", "filename") if reward_class is HPSv2 else ("head", "head_filename")
        torch.save({"state_dict": Attack()}, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=f"'{reward_class.name}': .*bad.pt is not a file of tensors only"):
            local(reward_class, folders, **{part: str(tmp_path), key: "bad.pt"})
        assert not (tmp_path / "attacked").exists()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "cannot be read. It is damaged or incomplete|is not a file of tensors only"),
            (b"PK\x03\x04 not a zip", "cannot be read. It is damaged or incomplete"),
            ([1, 2], "must hold tensors by name"),
            ({"epoch": 3}, "must hold tensors by name"),
        ],
    )
    def test_files_of_something_else(self, content, message, folders, tmp_path):
        if isinstance(content, bytes):
            (tmp_path / "x.pt").write_bytes(content)
        else:
            torch.save(content, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=message):
            local(HPSv2, folders, model=str(tmp_path), filename="x.pt")

    @pytest.mark.parametrize("layout", ["transformers", "open_clip", "head"])
    def test_weights_of_another_model(self, layout, folders, tmp_path):
        weights, name = {
            "transformers": (folders.weights, "visual_projection.weight"),
            "open_clip": (folders.open_clip, "visual.conv1.weight"),
            "head": (folders.head_weights, "layers.2.weight"),
        }[layout]

        def load(changed):
            if layout == "transformers":
                folder = shutil.copytree(folders.clip, tmp_path / "changed", dirs_exist_ok=True)
                save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
                return CLIPScore(str(folder))
            torch.save(changed, tmp_path / "changed.pt")
            if layout == "open_clip":
                return local(HPSv2, folders, model=str(tmp_path), filename="changed.pt")
            return local(Aesthetic, folders, head=str(tmp_path), head_filename="changed.pt")

        load(dict(weights))
        with pytest.raises(ValueError, match="1 tensors are missing"):
            load({key: value for key, value in weights.items() if key != name})
        with pytest.raises(ValueError, match=r"1 tensors are unexpected \(other.weight\)"):
            load({**weights, "other.weight": torch.zeros(2)})
        with pytest.raises(ValueError, match="1 tensors are of another shape"):
            load({**weights, name: torch.zeros(3, *weights[name].shape[1:])})

    def test_a_damaged_safetensors_file(self, folders, tmp_path):
        folder = shutil.copytree(folders.clip, tmp_path / "cut")
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[:-10])
        with pytest.raises(ValueError, match="'clipscore': cut: cannot be loaded"):
            CLIPScore(str(folder))

    def test_a_default_head_that_is_another(self, folders, hub, tmp_path):
        torch.save(folders.head_weights, tmp_path / "openai-clip_aesthetic-predictor.pt")
        hub.add_folder("birder-project/aesthetic-predictor", tmp_path)
        with pytest.raises(ValueError, match="is not LAION's predictor any more: its SHA-256 is"):
            Aesthetic(str(folders.clip))

    def test_arguments(self, folders):
        with pytest.raises(
            ValueError, match="'clipscore': dtype='int8', it must be one of float32, float16, bfloat16"
        ):
            local(CLIPScore, folders, dtype="int8")
        with pytest.raises(ValueError, match="'clipscore': batch_size=0"):
            local(CLIPScore, folders, batch_size=0)
