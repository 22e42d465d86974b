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

import json
import math

import pytest
import torch
from helpers.teachers_helpers import (
    DIFFUSERS_FILE,
    PEFT_FILE,
    edit_json,
    make_bank,
    make_student,
    rewrite,
    save_full,
)
from helpers.tiny_sd3 import ATTENTION, forward, make_lora, make_pipeline, make_transformer

from trl_diffusion_opd.models.teachers import TeacherConfig, TeacherError, parse_teacher, read_lora


@pytest.fixture
def pipeline():
    return make_pipeline()


def first(tensors, part):
    return next(key for key in sorted(tensors) if part in key)


def without(part):
    return lambda tensors: {key: value for key, value in tensors.items() if key != first(tensors, part)}


def with_value(part, value):
    return lambda tensors: {**tensors, first(tensors, part): value(tensors[first(tensors, part)])}


def with_key(key, shape=(2, 2)):
    return lambda tensors: {**tensors, key: torch.ones(shape)}


def zero(side):
    return lambda tensors: {key: value * (f"lora_{side}" not in key) for key, value in tensors.items()}


BROKEN_TENSORS = {
    "lora_B lost": (without("lora_B"), "its config asks for 1 tensors that the file lacks"),
    "lora_A lost": (without("lora_A"), "lacks, such as transformer_blocks.0.attn.add_k_proj.lora_A.weight"),
    "left over": (
        with_key("base_model.model.transformer_blocks.9.attn.to_q.lora_A.weight"),
        "the file has 1 tensors that its config or the base does not have, such as transformer_blocks.9",
    ),
    "other width": (
        with_value("to_q.lora_A", lambda value: value[:, :-1]),
        r"made for another base: transformer_blocks.0.attn.to_q.lora_A.weight is \(4, 15\) in the file and \(4, 16\)",
    ),
    "other rank": (with_value("to_q.lora_A", lambda value: value[:-1]), "its config gives another rank"),
    "zero lora_B": (zero("B"), "every lora_B of adapter_model.safetensors is zero, so this teacher is the base model"),
    "zero lora_A": (zero("A"), "every lora_A of adapter_model.safetensors is zero"),
    "text encoder": (with_key("text_encoder.layers.0.q_proj.lora_A.weight"), "also adapts text encoders"),
    "NaN": (with_value("to_q.lora_B", lambda value: value.fill_(math.nan)), "holds NaN or infinite values in trans"),
    "infinite": (with_value("to_q.lora_B", lambda value: value / 0), "holds NaN or infinite values"),
    "DoRA": (
        with_key("base_model.model.x.lora_magnitude_vector"),
        "its LoRA config has use_dora=False, and the file has x.lora_magnitude_vector",
    ),
    "bias": (
        with_key("base_model.model.proj_out.bias"),
        "tensors that are no LoRA matrices and would be dropped: base_model.model.proj_out.bias",
    ),
}


@pytest.mark.parametrize("label", BROKEN_TENSORS)
def test_refuses_tensors(pipeline, tmp_path, label):
    change, message = BROKEN_TENSORS[label]
    folder = tmp_path / "the-teacher"
    make_lora(pipeline, folder, seed=1)
    rewrite(folder / PEFT_FILE, change)
    with pytest.raises(ValueError, match=f"task 'task': the-teacher: .*{message}"):
        make_bank(pipeline, str(folder))


BROKEN_CONFIGS = {
    "modules_to_save": ({"modules_to_save": ["proj_out"]}, r"modules_to_save=\['proj_out'\], which adds more"),
    "DoRA": ({"use_dora": True}, "its LoRA config has use_dora=True, and the file has no lora_magnitude_vector"),
    "bias": ({"bias": "all"}, "bias='all', which adds more"),
    "lora_bias": ({"lora_bias": True}, "lora_bias=True, which adds more"),
    "trainable tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices="),
    "type": ({"peft_type": "LOKR"}, "a PEFT adapter of type LOKR; only LORA"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "initialised with 'pissa_niter_4', which changes the base"),
    "more targets": ({"target_modules": [*ATTENTION, "proj_out"]}, "asks for 2 tensors that the file lacks"),
    "fewer targets": ({"target_modules": ATTENTION[:-1]}, "the file has 2 tensors that its config or the base"),
    "no such targets": (
        {"target_modules": ["query_key_value"]},
        "the file has 30 tensors that its config or the base does not",
    ),
    "other rank": ({"r": 8}, "its config gives another rank"),
    "no alpha": ({"lora_alpha": 0}, "has an alpha of 0, with which those layers are the base"),
    "no alpha somewhere": ({"alpha_pattern": {"attn.to_q": 0}}, "has an alpha of 0"),
    "a broken pattern": (
        {"target_modules": "(to_q"},
        r"the pattern '\(to_q' of its config is no regular expression \(missing",
    ),
}


@pytest.mark.parametrize("label", BROKEN_CONFIGS)
def test_refuses_configs(pipeline, tmp_path, label):
    changes, message = BROKEN_CONFIGS[label]
    folder = tmp_path / "the-teacher"
    make_lora(pipeline, folder, seed=1)
    edit_json(folder / "adapter_config.json", **changes)
    with pytest.raises(ValueError, match=f"the-teacher: .*{message}"):
        make_bank(pipeline, str(folder))


BROKEN_DIFFUSERS_FILES = {
    "DoRA": (with_key("transformer.x.dora_scale"), "transformer.x.dora_scale would be dropped: these are not all"),
    "text encoder": (with_key("text_encoder_2.x.lora_A.weight"), "also adapts text encoders .text_encoder_2"),
    "second transformer": (
        lambda tensors: tensors | {f"transformer_2.x.lora_{side}.weight": torch.ones(2, 2) for side in "AB"},
        "transformer_2.x.lora_A.weight would be dropped: a SD3Transformer2DModel like this base has no such layer",
    ),
    "half a pair": (with_key("transformer_2.x.lora_A.weight"), "it has transformer_2.x.lora_A.weight and no trans"),
    "no lora_B": (
        lambda tensors: {key: value for key, value in tensors.items() if "lora_A" in key},
        "half of a pair is missing: it has transformer.transformer_blocks",
    ),
    "other base": (
        lambda tensors: {key: value[:, :8] if "lora_A" in key else value for key, value in tensors.items()},
        r"made for another base: .*\(4, 8\) in the file and \(4, 16\) here",
    ),
}


@pytest.mark.parametrize("label", BROKEN_DIFFUSERS_FILES)
def test_refuses_diffusers_files(pipeline, tmp_path, label):
    change, message = BROKEN_DIFFUSERS_FILES[label]
    folder = tmp_path / "the-teacher"
    make_lora(pipeline, folder, seed=1, format="diffusers")
    rewrite(folder / DIFFUSERS_FILE, change)
    with pytest.raises(ValueError, match=f"the-teacher: .*{message}"):
        make_bank(pipeline, str(folder))


def test_refuses_alpha_twice(pipeline, tmp_path):
    make_lora(pipeline, tmp_path, seed=1, format="diffusers")
    module = "transformer.transformer_blocks.0.attn.to_q"
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})}
    rewrite(tmp_path / DIFFUSERS_FILE, lambda t: {**t, f"{module}.alpha": torch.tensor(1.0)}, metadata)
    with pytest.raises(ValueError, match="alpha both in its metadata and as tensors"):
        make_bank(pipeline, str(tmp_path))


def test_refuses_metadata_without_a_rank(pipeline, tmp_path):
    make_lora(pipeline, tmp_path, seed=1, format="diffusers")
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8})}
    rewrite(tmp_path / DIFFUSERS_FILE, lambda tensors: tensors, metadata)
    with pytest.raises(
        ValueError, match=f"metadata of {DIFFUSERS_FILE} is not of a LoRA: it has lora_alpha, but no r"
    ):
        make_bank(pipeline, str(tmp_path))


def test_refuses_shards_without_a_map(pipeline, tmp_path):
    save_full(pipeline, tmp_path, seed=1)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="index.json has no weight_map"):
        make_bank(pipeline, str(tmp_path))


def test_whatever_a_transformers_config_raises_is_a_teachers_error(pipeline, tmp_path):
    save_full(pipeline, tmp_path / "the-teacher", seed=1)
    edit_json(tmp_path / "the-teacher" / "config.json", num_layers=None)
    with pytest.raises(ValueError, match=r"the-teacher: cannot read config.json and .* \(TypeError: "):
        make_bank(pipeline, str(tmp_path / "the-teacher"))


def test_refuses_pickles_and_says_how_to_convert(pipeline, tmp_path):
    make_lora(pipeline, tmp_path, seed=1)
    (tmp_path / PEFT_FILE).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(
        ValueError, match=r"holds adapter_model.bin but no adapter_model.safetensors.*save_file\(torch"
    ):
        make_bank(pipeline, str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "has no pytorch_lora_weights.safetensors. A teacher is a PEFT folder"),
        ({"subfolder": "x"}, "there is no folder 'x' in it"),
        ({"weight_name": "y.safetensors"}, "has no y.safetensors"),
        ({"revision": "main"}, "a local folder has no revision"),
    ],
)
def test_refuses_folders_without_a_teacher(pipeline, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_bank(pipeline, TeacherConfig(str(tmp_path), **options))


@pytest.mark.parametrize("name", ["adapter_config.json", PEFT_FILE])
def test_refuses_damaged_files(pipeline, tmp_path, name):
    make_lora(pipeline, tmp_path, seed=1)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{name} is not (valid JSON|a readable safetensors file)"):
        make_bank(pipeline, str(tmp_path))


def test_refuses_full_teachers_of_another_make(pipeline, tmp_path):
    make_transformer(in_channels=8, num_layers=1).save_pretrained(tmp_path / "wide")
    pipeline.vae.save_pretrained(tmp_path / "vae")
    for name, change in (("short", without("proj_out")), ("nan", with_value("proj_out", lambda v: v * math.nan))):
        save_full(pipeline, tmp_path / name, seed=1)
        rewrite(tmp_path / name / "diffusion_pytorch_model.safetensors", change, {"format": "pt"})
    with pytest.raises(ValueError) as error:
        make_bank(pipeline, {name: str(tmp_path / name) for name in ("wide", "vae", "short", "nan")})
    for message in (
        "task 'wide': wide: made for another base: in_channels 8 (base 4), num_layers 1 (base 2)",
        "task 'vae': vae: its config.json is of class 'AutoencoderKL', but the base's denoiser is a 'SD3Transformer2D",
        "task 'short': short: its weights do not fit its config: {'missing_keys': ['proj_out.bias']",
        "task 'nan': nan: holds NaN or infinite values in proj_out.bias",
    ):
        assert message in str(error.value)


def test_all_problems_are_in_one_message_and_the_student_is_unharmed(pipeline, tmp_path):
    for name in ("good", "zero", "lost"):
        make_lora(pipeline, tmp_path / name, seed=1)
    rewrite(tmp_path / "zero" / PEFT_FILE, zero("B"))
    rewrite(tmp_path / "lost" / PEFT_FILE, without("lora_B"))
    student = make_student(pipeline)
    expected = forward(student)
    trainable = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    names = ["lost", "zero", "good", "nowhere"]
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(ValueError) as error:
        make_bank(pipeline, {name: str(tmp_path / name) for name in names}, student)
    assert [f"task {name!r}" in str(error.value) for name in names] == [True, True, False, True]
    assert torch.equal(forward(student), expected)
    assert {id(parameter) for parameter in student.parameters() if parameter.requires_grad} == trainable


def test_read_lora_refuses_what_is_no_lora(pipeline, tmp_path):
    save_full(pipeline, tmp_path, seed=1)
    with pytest.raises(TeacherError, match="this is a whole transformer"):
        read_lora(pipeline, parse_teacher(str(tmp_path)))
    with pytest.raises(TeacherError, match="not a LoRA"):
        read_lora(pipeline, parse_teacher("base"))
