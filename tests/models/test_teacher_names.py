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

"""A teacher that is named by its file, and a LoRA whose file has any name, here and on the Hub."""

from unittest.mock import Mock

import pytest
import torch
from helpers.teachers_helpers import DIFFUSERS_FILE, PEFT_FILE, make_bank, save_full, velocity
from helpers.tiny_sd3 import forward, make_lora, make_pipeline
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save_file

from trl_diffusion_opd.hub import errors as hub_errors
from trl_diffusion_opd.models.teachers import TeacherConfig, TeacherError, parse_teacher, read_lora


NAMED = "my-style.safetensors"


@pytest.fixture
def pipeline():
    return make_pipeline()


@pytest.fixture
def lora(pipeline, tmp_path):
    """A folder with one LoRA's file of a name of its own, and the velocity of the model that it was saved from."""
    expected = forward(make_lora(pipeline, tmp_path / "lora", seed=1, format="diffusers"))
    (tmp_path / "lora" / DIFFUSERS_FILE).rename(tmp_path / "lora" / NAMED)
    return tmp_path / "lora", expected


@pytest.mark.parametrize("name", [NAMED, ""])
def test_a_file_and_a_folder_with_one_file_are_teachers(lora, pipeline, name, monkeypatch):
    folder, expected = lora
    monkeypatch.chdir(folder.parent)
    for path in (folder / name, f"lora/{name}".rstrip("/")):
        bank = make_bank(make_pipeline(), str(path))
        assert torch.equal(velocity(bank, bank.teachers["task"][0]), expected)
        assert bank.manifest()["task"][0]["source"] == "lora"
        assert bank.summary()[0]["teacher"] == f"lora/{name}".rstrip("/")


def test_two_files_of_one_folder_are_two_teachers(lora, pipeline, tmp_path):
    folder, first = lora
    second = forward(make_lora(pipeline, tmp_path / "other", seed=2, format="diffusers"))
    (tmp_path / "other" / DIFFUSERS_FILE).rename(folder / "b.safetensors")
    bank = make_bank(
        pipeline, {"a": str(folder / NAMED), "b": TeacherConfig(str(folder), weight_name="b.safetensors")}
    )
    assert torch.equal(velocity(bank, bank.teachers["a"][0]), first)
    assert torch.equal(velocity(bank, bank.teachers["b"][0]), second)
    with pytest.raises(ValueError, match=rf"lora: has several files \(b.safetensors, {NAMED}\). Name one"):
        make_bank(make_pipeline(), str(folder))


def test_the_file_of_a_peft_folder_or_a_transformer_brings_its_config(pipeline, tmp_path):
    expected = forward(
        make_lora(pipeline, tmp_path / "peft", seed=1)
    )  # alpha is twice the rank, and only in the config
    full = forward(save_full(pipeline, tmp_path / "full", seed=2))
    weights = "diffusion_pytorch_model.safetensors"
    teachers = {
        "a": str(tmp_path / "peft" / PEFT_FILE),
        "b": TeacherConfig(str(tmp_path / "peft"), weight_name=PEFT_FILE),
        "c": str(tmp_path / "full" / weights),
    }
    bank = make_bank(pipeline, teachers)
    for task, velocities in (("a", expected), ("b", expected), ("c", full)):
        assert torch.equal(velocity(bank, bank.teachers[task][0]), velocities)
    assert len({role.teacher.name for task in "ab" for role in bank.teachers[task]}) == 1
    (tmp_path / "peft" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=f"peft/{PEFT_FILE}: .* in the layout of PEFT.* put that beside it"):
        make_bank(make_pipeline(), str(tmp_path / "peft" / PEFT_FILE))


def test_parses_files(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / NAMED)
    assert parse_teacher(str(tmp_path / NAMED)) == TeacherConfig(str(tmp_path), weight_name=NAMED)
    on_hub = TeacherConfig("owner/repo", subfolder="a", weight_name=NAMED, revision="v1")
    assert parse_teacher(f"owner/repo/a/{NAMED}@v1") == on_hub
    assert parse_teacher(on_hub) == on_hub
    (tmp_path / "old.ckpt").touch()
    for spec, message in (
        (
            str(tmp_path / "old.ckpt"),
            r"old.ckpt' is a file of another kind than .safetensors; pickles .* are not read",
        ),
        (str(tmp_path / "missing.safetensors"), "neither an existing folder .* nor an existing .safetensors file"),
        (f"lora/{NAMED}", "neither an existing folder .* nor an existing .safetensors file"),
        (TeacherConfig(str(tmp_path / NAMED), revision="v1"), "is a file and takes no revision"),
        (
            TeacherConfig(f"owner/repo/{NAMED}", weight_name="b.safetensors"),
            "names a file, but weight_name is 'b.safetensors'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            parse_teacher(spec)


class Hub:
    """One repository at one commit: what of it is fetched, and a list of its files while there is a connection."""

    def __init__(self, monkeypatch, files, cache):
        self.files, self.snapshot, self.fetched, self.error = files, cache / ("1" * 40), [], None
        monkeypatch.setattr(hub_errors, "snapshot_download", self.download)
        monkeypatch.setattr(hub_errors, "model_info", self.info)
        monkeypatch.setattr(hub_errors.time, "sleep", lambda seconds: None)

    def download(self, repo_id, revision, allow_patterns):
        self.snapshot.mkdir(parents=True, exist_ok=True)
        for name in self.files.keys() & set(allow_patterns) if self.error is None else ():
            (self.snapshot / name).parent.mkdir(exist_ok=True)
            save_file(self.files[name], self.snapshot / name)
            self.fetched.append(name)
        return str(self.snapshot)

    def info(self, repo_id, revision):
        if self.error is not None:
            raise self.error
        return Mock(siblings=[Mock(rfilename=name) for name in self.files])


@pytest.mark.parametrize("folder", ["", "styles/"])
def test_one_file_of_any_name_on_the_hub(lora, pipeline, tmp_path, monkeypatch, folder):
    tensors = load_file(lora[0] / NAMED)
    other = "elsewhere/a.safetensors" if folder == "" else "a.safetensors"
    hub = Hub(monkeypatch, {f"{folder}{NAMED}": tensors, other: tensors, f"{folder}notes.md": {}}, tmp_path / "cache")
    spec = f"owner/repo/{folder}".rstrip("/")
    _, state, files = read_lora(pipeline, parse_teacher(spec))
    assert files.names == (NAMED,) and len(state) == len(tensors) and hub.fetched == [f"{folder}{NAMED}"]
    assert files.label == f"{spec}/{NAMED}"
    for error in (OfflineModeIsEnabled("offline"), hub_errors.httpx2.ConnectError("down")):  # what is here is found
        hub.error = error
        assert read_lora(pipeline, parse_teacher(spec))[2].names == (NAMED,)

    hub.error = None
    hub.files[f"{folder}b.safetensors"] = tensors
    with pytest.raises(TeacherError, match=rf"{spec}: has several files \(b.safetensors, {NAMED}\)"):
        read_lora(pipeline, parse_teacher(spec))
    assert read_lora(pipeline, parse_teacher(f"{spec}/b.safetensors"))[2].names == ("b.safetensors",)
    hub.files = {f"{folder}notes.md": {}}
    hub.snapshot = tmp_path / "cache" / ("2" * 40)
    with pytest.raises(TeacherError, match=f"{spec}: has no {DIFFUSERS_FILE}. A teacher is"):
        read_lora(pipeline, parse_teacher(spec))


def test_the_usual_name_needs_no_list(lora, pipeline, tmp_path, monkeypatch):
    hub = Hub(monkeypatch, {DIFFUSERS_FILE: load_file(lora[0] / NAMED), "b.safetensors": {}}, tmp_path / "cache")
    monkeypatch.setattr(hub_errors, "model_info", Mock(side_effect=AssertionError("not needed")))
    assert read_lora(pipeline, parse_teacher("owner/repo"))[2].names == (DIFFUSERS_FILE,)
    assert hub.fetched == [DIFFUSERS_FILE]
