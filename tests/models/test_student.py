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
import re

import pytest
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from helpers.families import FAMILIES
from helpers.tiny_sd3 import ATTENTION, forward, make_lora, make_pipeline, make_transformer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from trl_diffusion_opd.models.student import Student, default_lora_config
from trl_diffusion_opd.models.teachers import add_adapter, parse_teacher, read_lora


PEFT_FILE = "adapter_model.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture
def pipeline():
    return make_pipeline()


def make_student(pipeline, seed=0, ema_decay=None, ema_update_interval=1, **config):
    options = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(pipeline.transformer, LoraConfig(**options), adapter_name="default").eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
    return Student(model, pipeline, ema_decay, ema_update_interval)


def make_full_student(pipeline, **options):
    return Student(pipeline.transformer.requires_grad_(True), pipeline, **options)


def change(student, seed):
    """As an optimizer's step does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def copies(student):
    return [parameter.detach().clone() for parameter in student.parameters()]


def equal(ours, theirs):
    return all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))


# What is trained


def test_default_targets():
    attention = {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    for transformer in (make_transformer(), FAMILIES["flux"].build().transformer):
        config = default_lora_config(transformer)
        assert (config.r, config.lora_alpha, config.init_lora_weights) == (32, 64, "gaussian")
        assert config.target_modules == attention
        model = get_peft_model(transformer, config)
        assert any("lora_" in name for name, _ in model.named_parameters())


def test_default_targets_are_those_that_the_transformer_has():
    # Sana and the like attend without a second stream.
    layer = nn.ModuleDict(
        {"to_q": nn.Linear(2, 2), "to_k": nn.Linear(2, 2), "to_out": nn.ModuleList([nn.Linear(2, 2)])}
    )
    assert default_lora_config(nn.ModuleList([layer])).target_modules == {"to_q", "to_k", "to_out.0"}


def test_default_targets_ask_for_help_where_there_are_none():
    with pytest.raises(ValueError, match=r"Sequential has no attention projection .*LoraConfig\(target_modules="):
        default_lora_config(nn.Sequential(nn.Linear(2, 2)))


def test_a_lora_student_is_its_adapter_and_a_full_one_everything(pipeline, tmp_path):
    assert all(".default." in name for name in make_student(make_pipeline()).named_parameters())
    expected = [name for name, _ in pipeline.transformer.named_parameters()]
    assert list(make_full_student(pipeline).named_parameters()) == expected


# Files


def test_both_formats_hold_the_same_tensors_and_alpha(pipeline, tmp_path):
    student = make_student(pipeline)
    student.save(tmp_path)
    peft = {key.removeprefix("base_model.model."): value for key, value in load_file(tmp_path / PEFT_FILE).items()}
    diffusers = {key.removeprefix("transformer."): v for key, v in load_file(tmp_path / DIFFUSERS_FILE).items()}
    trained = {
        re.sub(r"^base_model\.model\.|\.default", "", name): p for name, p in student.named_parameters().items()
    }
    assert peft.keys() == diffusers.keys() == trained.keys()
    for name, value in trained.items():
        assert torch.equal(peft[name], value) and torch.equal(diffusers[name], value)
    with safe_open(tmp_path / DIFFUSERS_FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert metadata["transformer.lora_alpha"] == config["lora_alpha"] == 8
    assert metadata["transformer.r"] == config["r"] == 4
    assert config["inference_mode"] is True
    assert student.model.peft_config["default"].inference_mode is False  # training goes on
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", PEFT_FILE, DIFFUSERS_FILE]


CONFIGS = {
    "plain": {},
    "alpha alone": {"lora_alpha": 32},
    "rank pattern": {"rank_pattern": {"to_q": 2, r"^transformer_blocks\.0\.attn\.to_v": 6}},
    "alpha pattern": {"alpha_pattern": {"to_k": 1}, "rank_pattern": {"to_k": 2}},
    "rslora": {"use_rslora": True, "lora_alpha": 4},
    "regular expression": {"target_modules": r".*attn\.(to_q|to_v)"},
    "other layers": {"target_modules": ["proj_out", "to_q", "ff.net.2"]},
}


@pytest.mark.parametrize("label", CONFIGS)
def test_every_loader_gives_the_students_output(pipeline, tmp_path, label):
    student = make_student(pipeline, **CONFIGS[label])
    student.save(tmp_path)
    expected = forward(student.model)

    fresh = make_pipeline()
    assert not torch.allclose(forward(fresh.transformer), expected, atol=1e-2)
    fresh.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(forward(fresh.transformer), expected, rtol=0, atol=1e-6)

    peft = PeftModel.from_pretrained(make_transformer(), str(tmp_path)).eval()
    torch.testing.assert_close(forward(peft), expected, rtol=0, atol=1e-6)

    config, weights, _ = read_lora(pipeline, parse_teacher(str(tmp_path)))  # the next student starts from it
    again = add_adapter(make_transformer(), "default", config, weights).eval()
    torch.testing.assert_close(forward(again), expected, rtol=0, atol=1e-6)


def test_a_full_student_is_a_diffusers_model(pipeline, tmp_path):
    student = make_full_student(pipeline)
    change(student, seed=1)
    student.save(tmp_path)
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path, use_safetensors=True)
    assert equal(list(loaded.parameters()), student.parameters())
    assert not any(path.suffix == ".bin" for path in tmp_path.iterdir())


@pytest.mark.parametrize("full", [False, True])
def test_no_file_names_a_local_path(tmp_path, full):
    make_pipeline().save_pretrained(tmp_path / "the-base")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "the-base")
    student = make_full_student(pipeline) if full else make_student(pipeline)
    folder = tmp_path / "saved"
    student.save(folder)
    student.save_state(folder)
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    if not full:
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "the-base"


def test_teachers_are_not_saved_with_the_student(pipeline, tmp_path):
    make_lora(pipeline, tmp_path / "teacher", seed=5)
    student = make_student(pipeline)
    student.save(tmp_path / "alone")
    config, weights, _ = read_lora(pipeline, parse_teacher(str(tmp_path / "teacher")))
    add_adapter(student.model, "teacher_0", config, weights)
    student.save(tmp_path / "beside")
    files = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert sorted(path.name for path in (tmp_path / "beside").iterdir()) == files
    for name in (PEFT_FILE, DIFFUSERS_FILE):
        alone, beside = load_file(tmp_path / "alone" / name), load_file(tmp_path / "beside" / name)
        assert alone.keys() == beside.keys() and all(torch.equal(alone[key], beside[key]) for key in alone)
    name = "adapter_config.json"
    assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "beside" / name).read_bytes()


def test_a_float32_lora_on_a_half_precision_base_stays_float32(pipeline, tmp_path):
    pipeline.transformer.to(torch.bfloat16)
    student = make_student(pipeline)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    student.save(tmp_path)
    student.save_state(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        assert {value.dtype for value in load_file(path).values()} == {torch.float32}


# The moving average


@pytest.mark.parametrize("interval", [1, 3])
def test_the_average_follows_its_warm_up(pipeline, interval):
    student = make_student(pipeline, ema_decay=0.6, ema_update_interval=interval)
    average = [p.detach().double() for p in student.parameters()]
    for step in range(1, 14):
        change(student, seed=step)
        student.update_ema(step)
        if step % interval == 0:
            # Counted in optimizer steps, however seldom the average moves; the first is taken whole.
            decay = min(0.6, step / (9 + step)) if step > 1 else 0.0
            average = [
                decay * a + (1 - decay) * p.detach() for a, p in zip(average, student.parameters(), strict=True)
            ]
        with student.ema_weights():
            for ours, theirs in zip(student.parameters(), average, strict=True):
                torch.testing.assert_close(ours.detach().double(), theirs, rtol=0, atol=1e-6)


def moved_student(pipeline, **options):
    student = make_student(pipeline, ema_decay=0.9, **options)
    change(student, seed=1)
    student.update_ema(5)
    return student


def test_averaged_weights_can_be_nested(pipeline):
    student = moved_student(pipeline)
    trained = copies(student)
    with student.ema_weights():
        averaged = copies(student)
        assert not equal(averaged, trained)
        with student.ema_weights():
            assert equal(student.parameters(), averaged)
        assert equal(student.parameters(), averaged)
    assert equal(student.parameters(), trained)


def test_trained_weights_are_back_after_an_exception(pipeline):
    student = moved_student(pipeline)
    trained = copies(student)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), student.ema_weights(), student.ema_weights():
            raise KeyboardInterrupt
        assert equal(student.parameters(), trained)
    with student.ema_weights():
        assert not equal(student.parameters(), trained)


@pytest.mark.parametrize("ema_decay", [None, 0.0])
def test_without_an_average_the_weights_are_the_trained_ones(pipeline, ema_decay):
    student = make_student(pipeline, ema_decay=ema_decay)
    change(student, seed=1)
    student.update_ema(1)
    trained = copies(student)
    with student.ema_weights():
        assert equal(student.parameters(), trained)


# Checkpoints


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_state_round_trip(tmp_path, full, ema_decay):
    make = make_full_student if full else make_student
    student = make(make_pipeline(), ema_decay=ema_decay)
    change(student, seed=1)
    student.update_ema(5)
    trained = copies(student)
    student.save_state(tmp_path)
    with student.ema_weights():
        averaged = copies(student)
        student.save(tmp_path)

    resumed = make(make_pipeline(), ema_decay=ema_decay)
    resumed.load_state(tmp_path)
    assert equal(resumed.parameters(), trained)
    with resumed.ema_weights():
        assert equal(resumed.parameters(), averaged)
    assert equal(trained, averaged) == (ema_decay is None)

    best = make(make_pipeline(), ema_decay=ema_decay)
    best.load_saved(tmp_path)
    assert equal(best.parameters(), averaged)
    with best.ema_weights():
        assert equal(best.parameters(), averaged)


OTHERS = {
    "rank": ({"r": 2}, r"\(differing: shapes\)"),
    "fewer targets": ({"target_modules": ATTENTION[:-1]}, r"differing: \[.*to_add_out"),
    "more targets": ({"target_modules": [*ATTENTION, "proj_out"]}, r"differing: \[.*proj_out"),
}


@pytest.mark.parametrize("label", OTHERS)
def test_other_weights_are_refused_and_nothing_is_loaded(tmp_path, label):
    config, message = OTHERS[label]
    folder = tmp_path / "checkpoint-7"
    saved = make_student(make_pipeline(), seed=1)
    saved.save(folder)
    saved.save_state(folder)
    student = make_student(make_pipeline(), seed=2, **config)
    before = copies(student)
    for load in (student.load_state, student.load_saved):
        with pytest.raises(
            ValueError, match=f"^checkpoint-7 does not hold the weights .*{message}.*Resume with the peft_config"
        ):
            load(folder)
    assert equal(student.parameters(), before)


def test_a_full_student_in_several_files(pipeline, tmp_path, monkeypatch):
    student = make_full_student(pipeline, ema_decay=0.9)
    save_pretrained = SD3Transformer2DModel.save_pretrained
    monkeypatch.setattr(
        SD3Transformer2DModel,
        "save_pretrained",
        lambda self, *args, **kwargs: save_pretrained(self, *args, **kwargs, max_shard_size="20KB"),
    )
    student.save(tmp_path)
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
    resumed = make_full_student(make_pipeline(seed=1))
    assert not equal(resumed.parameters(), student.parameters())
    resumed.load_saved(tmp_path)
    assert equal(resumed.parameters(), student.parameters())


def test_a_full_student_refuses_a_loras_files(tmp_path):
    make_student(make_pipeline()).save(tmp_path)
    with pytest.raises(ValueError, match="does not hold the weights that this student trains"):
        make_full_student(make_pipeline()).load_saved(tmp_path)
