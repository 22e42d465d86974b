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

"""Wan 2.2's two experts through the `VelocityField`, held against the pipeline's own loop."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.families import FAMILIES, PROMPTS
from helpers.families_experts import BOUNDARY, TI2V, WAN_2_2, random_lora, wan_2_2
from helpers.pipeline_recorder import STEPS, recorder
from torch import Tensor

from trl_diffusion_opd.algorithms.rollout import walk
from trl_diffusion_opd.algorithms.samplers import sampler_table
from trl_diffusion_opd.pipelines.denoiser import denoiser
from trl_diffusion_opd.pipelines.experts import EXPERTS, HIGH_NOISE, LOW_NOISE, expert_at
from trl_diffusion_opd.pipelines.velocity import VelocityField


PROMPT = list(PROMPTS[:1])
EPSILON = 1e-3  # of a central difference: outputs are float32


def generators(n: int = 1) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in range(n)]


def field_of(pipeline: DiffusionPipeline, **options: Any) -> VelocityField:
    kwargs = WAN_2_2.kwargs
    kwargs["generation_kwargs"] |= options
    return VelocityField(pipeline, num_inference_steps=STEPS, **kwargs)


@pytest.fixture(scope="module")
def field() -> VelocityField:
    return field_of(WAN_2_2.build())


def noise(field: VelocityField, n: int = 1) -> Tensor:
    return field.initial_latents(list(PROMPTS)[:n], generators(n))


@pytest.mark.parametrize(("scale", "second"), [(5.0, None), (5.0, 2.0), (1.0, None)])
def test_velocity_and_walk_are_the_pipelines_own(scale: float, second: float | None) -> None:
    options = {} if second is None else {"guidance_scale_2": second}
    pipeline = WAN_2_2.build()
    pipeline.scheduler = recorder(pipeline.scheduler)
    called = calls(pipeline)
    images = pipeline(
        **WAN_2_2.call_kwargs(scale, tuple(PROMPT)),
        **options,
        num_inference_steps=STEPS,
        generator=generators(),
        output_type="np",
        return_dict=False,
    )[0]
    assert called.index(LOW_NOISE) == called.count(HIGH_NOISE) > 0, "one expert after the other"
    field = field_of(WAN_2_2.build(), **options)
    assert torch.equal(field.levels, pipeline.scheduler.sigmas.double())
    for level, x, v in pipeline.scheduler.trace:
        assert torch.equal(field(x, level, PROMPT, scale), v)
    with torch.no_grad():
        table = sampler_table("ode", field.levels)
        x = walk(lambda j, x, _: field(x, field.levels[j].item(), PROMPT, scale), noise(field), table)
    np.testing.assert_allclose(field.decode(x, PROMPT, output_type="np"), images, atol=1e-4)


def calls(pipeline: DiffusionPipeline) -> list[str]:
    called: list[str] = []
    for name in EXPERTS:
        pipeline.components[name].register_forward_pre_hook(lambda *_, name=name: called.append(name))
    return called


def test_the_boundary_belongs_to_high_noise(field: VelocityField) -> None:
    network, called = denoiser(field.pipeline), []

    def transformer(**inputs: Any) -> Any:
        called.append(inputs["expert"])
        return network(**inputs)

    x = noise(field)
    below = float(np.nextafter(np.float32(BOUNDARY), np.float32(0)))
    with torch.no_grad():
        for level in (1.0, BOUNDARY, below, 0.01):
            field(x, level, PROMPT, 1.0, transformer)
    assert called == [HIGH_NOISE, HIGH_NOISE, LOW_NOISE, LOW_NOISE]
    assert called == [expert_at(level * 1000, field.pipeline) for level in (1.0, BOUNDARY, below, 0.01)]


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_rows_on_both_sides_of_the_boundary(field: VelocityField, scale: float) -> None:
    levels, prompts = [0.3, 0.95, 0.875, 0.5], [*PROMPTS, *PROMPTS][:4]
    x = field.initial_latents(prompts, generators(4))
    with torch.no_grad():
        together = field(x, levels, prompts, scale)
        apart = [field(x[i : i + 1], levels[i], prompts[i : i + 1], scale) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("expert", "level"), [(HIGH_NOISE, 0.9), (LOW_NOISE, 0.5)])
def test_gradient_of_one_expert_against_finite_differences(expert: str, level: float) -> None:
    pipeline = WAN_2_2.build()
    model, field = random_lora(0, pipeline), field_of(pipeline)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = {name: p for name, p in trained.items() if f"model.{expert}." in name}
    assert len(own) == len(trained) // 2
    x = noise(field)
    probe = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def loss() -> Tensor:
        return (field(x, level, PROMPT, 5.0, model).double() * probe).sum()

    loss().backward()
    assert all(p.grad is None for name, p in trained.items() if name not in own), "the other expert saw no level"
    # Along its gradient: Wan computes in float32 in part, and a level direction would have no relative error.
    direction = {name: p.grad / p.grad.norm() * p.norm() for name, p in own.items()}
    slope = sum((p.grad * direction[name]).sum().item() for name, p in own.items())
    values = []
    with torch.no_grad():
        for step in (EPSILON, -2 * EPSILON):
            for name, p in own.items():
                p += step * direction[name]
            values.append(loss().item())
    assert (values[0] - values[1]) / (2 * EPSILON) == pytest.approx(slope, rel=1e-2)


def test_a_wan_2_2_of_one_transformer_is_like_any_other() -> None:
    pipeline = TI2V.build()
    pipeline.scheduler = recorder(pipeline.scheduler)
    pipeline(
        **TI2V.call_kwargs(5.0, tuple(PROMPT)),
        num_inference_steps=STEPS,
        generator=generators(),
        output_type="latent",
    )
    field = field_of(TI2V.build())
    assert denoiser(field.pipeline) is field.pipeline.transformer
    for level, x, v in pipeline.scheduler.trace:
        assert torch.equal(field(x, level, PROMPT, 5.0), v)


def test_a_second_network_without_a_boundary_is_never_called() -> None:
    pipeline = wan_2_2(boundary_ratio=None)
    assert denoiser(pipeline) is pipeline.transformer


def other_size() -> DiffusionPipeline:
    second = FAMILIES["wan"].build().transformer
    return wan_2_2(transformer_2=type(second).from_config({**second.config, "num_layers": 1}))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: wan_2_2(transformer=None), "has a transformer_2, for low noise, but no transformer"),
        (lambda: wan_2_2(transformer_2=None), r"boundary_ratio=0.875, .* but no transformer_2"),
        (other_size, "transformer and transformer_2 of WanPipeline differ in num_layers"),
    ],
)
def test_half_of_a_pair_is_refused(build: Callable[[], DiffusionPipeline], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        field_of(build())
