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

"""One whole update of every trainable family through the trainer, its loss computed once more from the pipeline's own walk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from helpers.families import FAMILIES, PROMPTS, TRAINED, Family, save_teacher
from helpers.families_flow import FLOW_FAMILIES
from helpers.family_fixtures import family_trainer
from helpers.pipeline_recorder import STEPS, recorder
from torch import nn

from trl_diffusion_opd import DiffusionOPDTrainer
from trl_diffusion_opd.algorithms.rollout import sample_generators
from trl_diffusion_opd.pipelines.velocity import VelocityField


pytestmark = pytest.mark.slow


SEED = 5
TASKS = dict(zip(("animals", "places"), PROMPTS, strict=True))


def expected_loss(family: Family, teacher: nn.Module, prompt: str, task_index: int) -> float:
    """
    Eq. 12 along the base's own walk: half the squared step times the squared gap, a mean over latents and over all steps
    but the last.
    """
    pipeline = family.guided(family.guidance_scale)
    velocity = VelocityField(family.build(), num_inference_steps=STEPS, **family.kwargs)
    pipeline.scheduler = recorder(pipeline.scheduler)
    pipeline(
        **family.call_kwargs(family.guidance_scale, (prompt,)),
        num_inference_steps=STEPS,
        generator=sample_generators([SEED, 0, task_index], [0]),
        output_type="latent",
    )
    trace, sigmas = pipeline.scheduler.trace, pipeline.scheduler.sigmas.double()
    losses = []
    with torch.no_grad():
        for j, (level, x, student) in enumerate(trace[:-1]):
            target = velocity(x, level, [prompt], family.guidance_scale, teacher)
            gap = (student.double() - target.double()).square().mean()
            losses.append(0.5 * (sigmas[j + 1] - sigmas[j]) ** 2 * gap)
    return float(sum(losses) / len(losses))


def make_trainer(family: Family, pipeline: DiffusionPipeline, teachers: Any, folder: Path) -> DiffusionOPDTrainer:
    return family_trainer(
        family,
        folder / "student",
        teachers,
        pipeline,
        train_dataset=Dataset.from_list([{"prompt": prompt, "task": task} for task, prompt in TASKS.items()]),
        num_inference_steps=STEPS,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        weight_decay=0.0,
        seed=SEED,
    )


@pytest.mark.parametrize("name", [*TRAINED, *FLOW_FAMILIES])
def test_one_update(name: str, tmp_path: Path) -> None:
    family = (FAMILIES | FLOW_FAMILIES)[name]
    models = {task: save_teacher(family, tmp_path / task, seed) for seed, task in enumerate(TASKS)}
    trainer = make_trainer(family, family.build(), {task: str(tmp_path / task) for task in TASKS}, tmp_path)
    trained = dict(trainer.student.named_parameters())
    before = {key: p.detach().clone() for key, p in trained.items()}
    teachers = [p.detach().clone() for p in trainer.bank.backbone.parameters()]
    trainer.train()

    expected = [expected_loss(family, models[task], TASKS[task], i) for i, task in enumerate(trainer.tasks)]
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert loss == pytest.approx(sum(expected) / len(expected), rel=1e-3)
    # Of a fresh LoRA, whose B is zero, only B has a gradient.
    moved = {key for key, p in trained.items() if not torch.equal(p, before[key])}
    assert moved and all("lora_B" in key for key in moved), "A moved without a gradient, or nothing moved"
    assert all(torch.equal(a, b) for a, b in zip(teachers, trainer.bank.backbone.parameters(), strict=True))


def test_hidream_is_refused(tmp_path: Path) -> None:
    family = FAMILIES["hidream"]
    with pytest.raises(ValueError, match="experts pass no gradient"):
        make_trainer(family, family.build(), "base", tmp_path)
