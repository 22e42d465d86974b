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

"""Wan 2.2 through the trainers: both experts are trained and taught, and saved as diffusers loads them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from helpers.dmd_fixtures import make_trainer as dmd_trainer
from helpers.families import PROMPTS
from helpers.families_experts import TI2V, WAN_2_2, save_pair, wan_2_2
from helpers.family_fixtures import family_trainer, prompts_of
from helpers.grpo_fixtures import brightness
from helpers.opd_fixtures import StopAt
from helpers.pipeline_recorder import STEPS, recorder
from helpers.sft_fixtures import sft_trainer
from peft import LoraConfig, get_peft_model
from torch import Tensor

from trl_diffusion_opd import DiffusionOPDTrainer
from trl_diffusion_opd.algorithms.rollout import sample_generators
from trl_diffusion_opd.models.expert_teachers import read_lora
from trl_diffusion_opd.models.teacher_config import TeacherConfig
from trl_diffusion_opd.pipelines.denoiser import denoiser
from trl_diffusion_opd.pipelines.experts import EXPERTS
from trl_diffusion_opd.pipelines.velocity import VelocityField
from trl_diffusion_opd.trainer import checks
from trl_diffusion_opd.trainer.checks import launch_problems


pytestmark = pytest.mark.slow

SEED = 5
TASKS = dict(zip(("animals", "places"), PROMPTS, strict=True))


def make_trainer(folder: Path, teachers: Any, **options: Any) -> DiffusionOPDTrainer:
    settings = dict(
        train_dataset=Dataset.from_list([{"prompt": prompt, "task": task} for task, prompt in TASKS.items()]),
        num_inference_steps=STEPS,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        seed=SEED,
    )
    return family_trainer(WAN_2_2, folder, teachers, **{**settings, **options})


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, torch.nn.Module]]:
    folder = tmp_path_factory.mktemp("teachers")
    models = {task: save_pair(folder / task, seed) for seed, task in enumerate(TASKS)}
    return {task: str(folder / task) for task in TASKS}, models


def moved(trainer: DiffusionOPDTrainer, before: dict[str, Tensor], expert: str) -> bool:
    after = trainer.student.named_parameters()
    return any(not torch.equal(after[key], p) for key, p in before.items() if f".model.{expert}." in key)


def expected_loss(teacher: torch.nn.Module, prompt: str, task_index: int) -> float:
    """Eq. 12 along the base's own walk, by the pipeline's own loop. See `test_families_trainer.py`."""
    pipeline = WAN_2_2.build()
    velocity = VelocityField(WAN_2_2.build(), num_inference_steps=STEPS, **WAN_2_2.kwargs)
    pipeline.scheduler = recorder(pipeline.scheduler)
    pipeline(
        **WAN_2_2.call_kwargs(WAN_2_2.guidance_scale, (prompt,)),
        num_inference_steps=STEPS,
        generator=sample_generators([SEED, 0, task_index], [0]),
        output_type="latent",
    )
    trace, sigmas = pipeline.scheduler.trace, pipeline.scheduler.sigmas.double()
    with torch.no_grad():
        losses = [
            0.5
            * (sigmas[j + 1] - sigmas[j]) ** 2
            * (student.double() - velocity(x, level, [prompt], WAN_2_2.guidance_scale, teacher).double())
            .square()
            .mean()
            for j, (level, x, student) in enumerate(trace[:-1])
        ]
    return float(sum(losses) / len(losses))


def own_image(pipeline: DiffusionPipeline) -> np.ndarray:
    return pipeline(
        **WAN_2_2.call_kwargs(WAN_2_2.guidance_scale, (PROMPTS[0],)),
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
        return_dict=False,
    )[0]


def test_one_update_saved_and_loaded_by_diffusers(teachers: Any, tmp_path: Path) -> None:
    folders, models = teachers
    trainer = make_trainer(tmp_path, folders)
    before = {key: p.detach().clone() for key, p in trainer.student.named_parameters().items()}
    taught = [p.detach().clone() for p in trainer.bank.backbone.parameters()]
    trainer.train()
    expected = [expected_loss(models[task], TASKS[task], i) for i, task in enumerate(trainer.tasks)]
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert loss == pytest.approx(sum(expected) / len(expected), rel=1e-3)
    assert all(moved(trainer, before, expert) for expert in EXPERTS)
    assert all(torch.equal(a, b) for a, b in zip(taught, trainer.bank.backbone.parameters(), strict=True))

    trainer.save_model(str(tmp_path))
    pipe = WAN_2_2.build()
    base = own_image(pipe)
    exec(trainer.student.load_line(tmp_path), {"pipe": pipe})  # as it is printed at the end of a run
    ours = trainer.pipeline(
        **WAN_2_2.call_kwargs(WAN_2_2.guidance_scale, (PROMPTS[0],)),
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
        return_dict=False,
    )[0]
    np.testing.assert_allclose(own_image(pipe), ours, atol=1e-5)
    assert np.abs(ours - base).max() > 1e-3, "the student would be the base"
    # Without the second file, half of the student is missing.
    half = WAN_2_2.build()
    half.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights_high_noise.safetensors")
    assert np.abs(own_image(half) - ours).max() > 1e-4

    # The folder is a teacher of both experts, a start for another student, and its card loads both halves.
    _, tensors, _ = read_lora(WAN_2_2.build(), TeacherConfig(str(tmp_path)))
    after = {name.replace(".default", ""): p for name, p in trainer.student.named_parameters().items()}
    assert tensors.keys() == after.keys() and all(torch.equal(tensors[name], p) for name, p in after.items())
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert 'weight_name="pytorch_lora_weights_high_noise.safetensors")' in card
    assert 'weight_name="pytorch_lora_weights_low_noise.safetensors", load_into_transformer_2=True)' in card
    assert ").frames[0][0]" in card


def test_resuming_and_evaluating(teachers: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = dict(
        max_steps=2,
        ema_decay=0.9,
        save_strategy="steps",
        save_steps=1,
        eval_dataset=prompts_of(WAN_2_2, 1),
        train_dataset=prompts_of(WAN_2_2),
        reward_funcs=brightness,
        num_trained_timesteps=1,
        sampler="flow_sde",
        guidance_scale=1.0,
    )
    teacher = teachers[0]["animals"]
    through = make_trainer(tmp_path / "through", teacher, **options)
    through.train()
    make_trainer(tmp_path / "stopped", teacher, callbacks=[StopAt(1)], **options).train()
    resumed = make_trainer(tmp_path / "stopped", teacher, **options)
    resumed.train(resume_from_checkpoint=True)
    ours, theirs = resumed.student.named_parameters(), through.student.named_parameters()
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())
    assert resumed.evaluate()["eval_reward"] == through.evaluate()["eval_reward"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_config": None}, "peft_config=None would train all weights of both experts"),
        ({"peft_config": LoraConfig(target_modules=r"transformer_2\..*attn1\.to_q")}, "no LoRA on transformer, which"),
        ({"student_init": "low"}, "no LoRA on transformer, which denoises high noise"),
    ],
)
def test_a_student_on_one_expert_is_refused(
    teachers: Any, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    if "student_init" in options:
        lora = LoraConfig(r=2, target_modules=["attn1.to_q"], init_lora_weights=False)
        network = denoiser(WAN_2_2.build())
        get_peft_model(network, for_one(lora, "transformer_2")).save_pretrained(tmp_path / "low")
        options = {"student_init": str(tmp_path / "low")}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "out", teachers[0]["animals"], train_dataset=prompts_of(WAN_2_2), **options)


def for_one(config: LoraConfig, expert: str) -> LoraConfig:
    config.target_modules = rf"{expert}\..*({'|'.join(config.target_modules)})"
    return config


def test_a_grid_on_one_side_of_the_boundary_is_warned_of(
    teachers: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = wan_2_2(boundary_ratio=0.001)
    make_trainer(tmp_path, teachers[0]["animals"], pipeline=pipeline, train_dataset=prompts_of(WAN_2_2))
    assert "None of the 3 noise levels is on the side of transformer_2, which denoises low noise" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deepspeed_plugin": SimpleNamespace(deepspeed_config={})}, "DeepSpeed's optimizer also moves"),
        ({"ddp_find_unused_parameters": False}, "DDP would wait for the gradients of the other"),
    ],
)
def test_launches_that_move_or_wait_for_an_idle_expert(options: dict[str, Any], message: str) -> None:
    plain = dict.fromkeys(("deepspeed_plugin", "fsdp_plugin_args", "ddp_find_unused_parameters"))
    args = SimpleNamespace(**{"n_gpu": 1, "world_size": 2, "torch_compile": False, "fp16": False, **plain, **options})
    for pipeline, count in ((WAN_2_2.build(), 1), (TI2V.build(), 0)):
        assert [message in problem for problem in launch_problems(denoiser(pipeline), args)].count(True) == count


@pytest.mark.parametrize("make_trainer", [sft_trainer, dmd_trainer])
def test_images_of_their_own_levels_are_refused_under_fsdp(
    make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "uses_fsdp", lambda args: True)
    options = dict(WAN_2_2.kwargs, peft_config=LoraConfig(r=2, target_modules=["attn1.to_q"]))
    with pytest.raises(ValueError, match="Each image gets a noise level of its own.*FSDP would wait for ever"):
        make_trainer(tmp_path, None, pipeline=WAN_2_2.build(), **options)
