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

"""What guidance costs: the rows that reach the network, with guidance and without, for every family."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import FAMILIES, TRAINED, save_teacher
from helpers.family_fixtures import family_trainer
from torch import nn

from trl_diffusion_opd import TeacherConfig
from trl_diffusion_opd.pipelines.velocity import VelocityField


pytestmark = pytest.mark.slow


STEPS = 3  # of which the last is not trained


def count_rows(network: nn.Module, name: Any) -> Counter:
    """Rows of all forwards of a network, summed by what `name()` says at each."""
    rows: Counter = Counter()

    def count(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        rows[name()] += len([*args, *kwargs.values()][0])  # latents come first in every family

    network.register_forward_pre_hook(count, with_kwargs=True)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_without_guidance_the_empty_prompt_is_not_computed(name: str) -> None:
    family = FAMILIES[name]
    pipeline = family.build()
    field = VelocityField(pipeline, num_inference_steps=2, **family.kwargs)
    prompts = list(family.prompts)
    x = field.initial_latents(prompts, [torch.Generator().manual_seed(i) for i in range(len(prompts))])
    now = {"scale": 0.0}
    rows = count_rows(pipeline.transformer, lambda: now["scale"])
    for now["scale"] in (1.0, 1.01, family.guidance_scale):
        with torch.no_grad():
            field(x, 0.9, prompts, now["scale"])
    assert rows == {1.0: len(prompts), 1.01: 2 * len(prompts), family.guidance_scale: 2 * len(prompts)}


def rows_of_an_update(name: str, folder: Path, teacher_scale: float | None, **options: Any) -> tuple[float, float]:
    """Rows a forward and sample of the student and of the teacher, in an update of the trainer."""
    family = FAMILIES[name]
    save_teacher(family, folder / "teacher", 1)
    pipeline = family.build()
    teacher = TeacherConfig(str(folder / "teacher"), guidance_scale=teacher_scale)
    trainer = family_trainer(family, folder / "student", teacher, pipeline, num_inference_steps=STEPS, **options)
    # The measure of the noise floor is the student's too, and without gradients.
    rows = count_rows(
        pipeline.transformer, lambda: f"{trainer.bank.backbone.active}{' trained' if torch.is_grad_enabled() else ''}"
    )
    trainer.train()
    samples = len(family.prompts) * (STEPS - 1)
    assert set(rows) == {"default trained", "default", "teacher_0"}
    return rows["default trained"] / samples, rows["teacher_0"] / samples


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_each_forward_of_an_update_has_the_rows_of_its_own_scale(name: str, tmp_path: Path) -> None:
    scale = FAMILIES[name].guidance_scale
    assert rows_of_an_update(name, tmp_path / "a", 1.0, guidance_scale=scale) == (2, 1)
    assert rows_of_an_update(name, tmp_path / "b", None, guidance_scale=1.0, teacher_guidance_scale=scale) == (1, 2)
