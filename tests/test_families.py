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

"""Thirteen families through the one `VelocityField`, held against what each pipeline does by itself."""

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from families import FAMILIES, Family
from peft import LoraConfig, get_peft_model
from torch import Tensor

from trl_diffusion_opd.rollout import walk
from trl_diffusion_opd.samplers import sampler_table
from trl_diffusion_opd.velocity import VelocityField


STEPS = 3
EPSILON = 1e-2  # of a central difference: outputs are float32


class Recorder(FlowMatchEulerDiscreteScheduler):
    """Keeps the level, the state and the velocity of every step that a pipeline makes."""

    solver_levels: Tensor | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        self.trace: list[tuple[float, Tensor, Tensor]] = []
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        if self.solver_levels is not None:
            self.sigmas, self.timesteps = self.solver_levels, self.solver_levels[:-1] * 1000

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        level = self.sigmas[len(self.trace)]
        self.trace.append((float(level), sample.clone(), model_output.clone()))
        return super().step(model_output, timestep, sample, **kwargs)


def recorder(scheduler: Any) -> Recorder:
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return Recorder.from_config(scheduler.config)
    own = Recorder()
    scheduler.set_timesteps(STEPS)
    own.solver_levels = scheduler.sigmas
    return own


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in range(n)]


@dataclass
class Case:
    """A family's pipeline, its field, and what the pipeline did by itself, computed once a module."""

    family: Family
    pipeline: DiffusionPipeline
    field: VelocityField
    runs: dict[Any, tuple[Recorder, np.ndarray]] = field(default_factory=dict)

    def own_run(self, scale: float, prompts: tuple[str, ...]) -> tuple[Recorder, np.ndarray]:
        """Trace and images, with values in [0, 1], of the public `__call__` of a pipeline with the same weights."""
        if (scale, prompts) not in self.runs:
            pipeline = self.family.build()
            pipeline.scheduler = recorder(pipeline.scheduler)
            images = pipeline(
                **self.family.call_kwargs(scale, prompts),
                num_inference_steps=STEPS,
                generator=generators(len(prompts)),
                output_type="np",
                return_dict=False,
            )[0]
            self.runs[scale, prompts] = (pipeline.scheduler, images)
        return self.runs[scale, prompts]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    family = FAMILIES[request.param]
    pipeline = family.build()
    return Case(family, pipeline, VelocityField(pipeline, num_inference_steps=STEPS, **family.kwargs))


@pytest.mark.parametrize("guided", [True, False])
def test_velocity_is_the_pipelines_own(case: Case, guided: bool) -> None:
    scale, prompts = case.family.guidance_scale if guided else 1.0, case.family.prompts[-1:]
    own, _ = case.own_run(scale, prompts)
    assert torch.equal(case.field.levels, own.sigmas.double())
    assert len(own.trace) == STEPS
    for level, x, v in own.trace:
        assert torch.equal(case.field(x, level, list(prompts), scale), v)


def test_velocity_of_a_batch(case: Case) -> None:
    scale, prompts = case.family.guidance_scale, list(case.family.prompts)
    own, _ = case.own_run(scale, case.family.prompts)
    for level, x, v in own.trace:
        # Some encoders round differently when the field gives them one prompt at a time.
        torch.testing.assert_close(
            case.field(x, level, prompts, scale), v, rtol=1e-5, atol=1e-5 * v.abs().max().item()
        )
    assert prompts == list(case.family.prompts), "the caller's list of prompts was written to"


def test_ode_walk_ends_in_the_pipelines_image(case: Case) -> None:
    scale, prompts = case.family.guidance_scale, list(case.family.prompts)
    own, images = case.own_run(scale, case.family.prompts)
    x = case.field.initial_latents(prompts, generators(len(prompts)))
    assert torch.equal(x, own.trace[0][1].float())
    with torch.no_grad():
        table = sampler_table("ode", case.field.levels)
        x = walk(lambda j, x: case.field(x, case.field.levels[j].item(), prompts, scale), x, table)
    np.testing.assert_allclose(case.field.decode(x, prompts, output_type="np"), images, atol=1e-4)
    decoded = np.stack([np.asarray(image) for image in case.field.decode(x, prompts)])
    np.testing.assert_allclose(decoded, images.reshape(decoded.shape) * 255, atol=1.0)
    assert images.std() > 0.02, "a flat image would prove nothing"


def test_gradient_against_finite_differences(case: Case) -> None:
    error = derivative_error(case)
    if case.family.trainable:
        assert error < 1e-2
    else:
        # Experts that cut gradients in eval mode: the day this fails, the family can be trained.
        assert error > 1e-2


def derivative_error(case: Case) -> float:
    """Relative error of the directional derivative of a loss in the LoRA's weights, in a random direction."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=list(case.family.lora_targets), init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(case.pipeline.transformer), config).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    prompts = list(case.family.prompts)
    x = case.field.initial_latents(prompts, generators(len(prompts)))
    level, probe = case.field.levels[1].item(), torch.randn(x.shape, dtype=torch.float64)

    def loss() -> Tensor:
        return (case.field(x, level, prompts, case.family.guidance_scale, model).double() * probe).sum()

    gradients = torch.autograd.grad(loss(), parameters)
    directions = [[torch.randn_like(p) * p.std() for p in parameters] for _ in range(4)]
    slopes = [sum((g * d).sum().item() for g, d in zip(gradients, ds, strict=True)) for ds in directions]
    # The steepest of a few: a direction that happens to be level has no relative error.
    slope, direction = max(zip(slopes, directions, strict=True), key=lambda pair: abs(pair[0]))
    values = []
    with torch.no_grad():
        for step in (EPSILON, -2 * EPSILON):
            for p, d in zip(parameters, direction, strict=True):
                p += step * d
            values.append(loss().item())
    return abs((values[0] - values[1]) / (2 * EPSILON) - slope) / abs(slope)
