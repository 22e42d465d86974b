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

"""
All families through the one `VelocityField`, held against what each pipeline does by itself. What is particular to models
that predict noise is in `test_prediction.py`.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.edit_families import small_pictures
from helpers.families import FAMILIES, Family, denoiser, flux2_klein, flux2_without_encoder
from helpers.families_flow import FLOW_FAMILIES
from helpers.gradients import derivative_error
from helpers.noise_families import NOISE_FAMILIES
from helpers.pipeline_recorder import STEPS, Recorder, recorder
from helpers.tiny_sd3 import SIZE
from torch import Tensor

from trl_diffusion_opd.algorithms.rollout import walk
from trl_diffusion_opd.algorithms.samplers import sampler_table
from trl_diffusion_opd.pipelines.velocity import VelocityField


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in range(n)]


def state_of(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Everything that a call of the pipeline may leave behind in it, or in its scheduler."""
    scheduler = {f"scheduler.{name}": value for name, value in pipeline.scheduler.__dict__.items()}
    return {
        **pipeline.__dict__,
        **scheduler,
        "training": denoiser(pipeline).training,
        "config": dict(pipeline.config),
    }


@dataclass
class Case:
    """A family's pipeline, its field, and what the pipeline did by itself, computed once a module."""

    family: Family
    pipeline: DiffusionPipeline
    field: VelocityField
    before: dict[str, Any]
    latents: Tensor | None = None
    runs: dict[Any, tuple[Recorder, np.ndarray]] = field(default_factory=dict)

    def noise(self) -> Tensor:
        """What the pipeline starts from, a row a prompt."""
        if self.latents is None:
            prompts = list(self.family.prompts)
            self.latents = self.field.initial_latents(prompts, generators(len(prompts)))
        return self.latents

    def own_run(self, scale: float, prompts: tuple[str, ...]) -> tuple[Recorder, np.ndarray]:
        """Trace and images, with values in [0, 1], of the public `__call__` of a pipeline with the same weights."""
        if (scale, prompts) not in self.runs:
            pipeline = self.family.guided(scale)
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


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with small_pictures():
        yield


@functools.cache
def case_of(name: str) -> Case:
    family = (FAMILIES | FLOW_FAMILIES | NOISE_FAMILIES)[name]
    pipeline = family.build()
    before = state_of(pipeline)
    return Case(family, pipeline, VelocityField(pipeline, num_inference_steps=STEPS, **family.kwargs), before)


@pytest.fixture(scope="module", params=[*FAMILIES, *FLOW_FAMILIES])
def case(request: pytest.FixtureRequest) -> Case:
    """A family of flow matching."""
    return case_of(request.param)


@pytest.fixture(scope="module", params=[*FAMILIES, *FLOW_FAMILIES, *NOISE_FAMILIES])
def any_case(request: pytest.FixtureRequest) -> Case:
    return case_of(request.param)


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
    x = case.noise()
    assert torch.equal(x, own.trace[0][1].float())
    with torch.no_grad():
        table = sampler_table("ode", case.field.levels)
        x = walk(lambda j, x, _: case.field(x, case.field.levels[j].item(), prompts, scale), x, table)
    np.testing.assert_allclose(case.field.decode(x, prompts, output_type="np"), images, atol=1e-4)
    decoded = np.stack([np.asarray(image) for image in case.field.decode(x, prompts)])
    np.testing.assert_allclose(decoded, images.reshape(decoded.shape) * 255, atol=1.0)
    assert images.std() > 0.02, "a flat image would prove nothing"


def rows_of_transformer(case: Case, scale: float) -> int:
    rows = 0

    def transformer(**inputs: Any) -> Any:
        nonlocal rows
        rows += len(next(inputs[name] for name in ("x", "hidden_states", "sample") if name in inputs))
        return denoiser(case.pipeline)(**inputs)

    prompts = list(case.family.prompts)
    x = case.noise()
    with torch.no_grad():
        case.field(x, case.field.levels[0].item(), prompts, scale, transformer)
    return rows


def test_guidance_doubles_the_rows(any_case: Case) -> None:
    batch = len(any_case.family.prompts)
    assert rows_of_transformer(any_case, 1.0) == batch
    assert rows_of_transformer(any_case, any_case.family.guidance_scale) == 2 * batch
    any_case.field.check_guidance(1.0)
    any_case.field.check_guidance(any_case.family.guidance_scale)
    if any_case.family.guidance_name is None:  # a guider takes any scale but 1
        return
    with pytest.raises(ValueError, match="guidance_scale=0.5 does nothing"):
        any_case.field.check_guidance(0.5)


def test_default_guidance_is_that_of_the_pipelines_own_call(case: Case) -> None:
    prompts = case.family.prompts[-1:]
    options = case.family.call_kwargs(1.0, prompts)
    options.pop(case.family.guidance_name, None)
    pipeline = case.family.build()
    pipeline.scheduler = recorder(pipeline.scheduler)
    pipeline(**options, num_inference_steps=STEPS, generator=generators(1), output_type="latent")
    scale = case.field.default_guidance_scale()
    for level, x, v in pipeline.scheduler.trace:
        assert torch.equal(case.field(x, level, list(prompts), scale), v)
    case.field.check_guidance(scale)


OWN_SCALES = {"sd3": 7.0, "flux": 1.0, "qwen_image": 4.0, "z_image": 6.0, "wan": 5.0}


def test_default_guidance_in_numbers(case: Case) -> None:
    for name, scale in OWN_SCALES.items():
        if FAMILIES[name] is case.family:
            assert case.field.default_guidance_scale() == scale


def test_a_guidance_embedding_is_named_where_there_is_one(case: Case) -> None:
    lines = case.field.guidance_lines(case.family.guidance_scale, is_default=False)
    if case.pipeline.transformer.config.get("guidance_embeds"):
        assert case.family.guidance_name == "true_cfg_scale"
        assert (
            f"guidance_scale {case.family.guidance_scale}: classifier-free guidance (true_cfg_scale), two" in lines[0]
        )
        assert lines[1] == "The guidance embedding is 3.5, as given."
    else:
        assert lines == [f"guidance_scale {case.family.guidance_scale}."]


def test_an_embedding_that_is_the_only_guidance() -> None:
    def received(**options: Any) -> list[float]:
        seen: list[float] = []

        def transformer(**inputs: Any) -> Any:
            seen.append(float(inputs["guidance"]))
            return pipeline.transformer(**inputs)

        velocity = VelocityField(pipeline, num_inference_steps=2, **SIZE, generation_kwargs=flux2 | options)
        x = velocity.initial_latents(["a"], generators(1))
        velocity(x, 1.0, ["a"], velocity.default_guidance_scale(), transformer)
        lines.extend(velocity.guidance_lines(1.0, is_default=True))
        return seen

    pipeline, lines = flux2_without_encoder(), []
    flux2 = {"text_encoder_out_layers": (1, 2, 3)} if pipeline.components["text_encoder"] is not None else {}
    assert received() == [4.0], "the default of the pipeline's own call"
    assert received(guidance_scale=2.5) == [2.5]
    none = "The pipeline has no classifier-free guidance: one forward a step."
    how = "set it with generation_kwargs='{\"guidance_scale\": …}'"
    assert lines == [
        none,
        f"The guidance embedding is 4.0, the pipeline's own default; {how}.",
        none,
        "The guidance embedding is 2.5, as given.",
    ]


@pytest.mark.parametrize("build", [lambda: flux2_klein(is_distilled=True), flux2_without_encoder])
def test_guidance_that_a_pipeline_ignores_is_refused(build: Callable[[], DiffusionPipeline]) -> None:
    # A distilled Klein drops the scale, FLUX.2 feeds it to its transformer as an embedding.
    pipeline = build()
    options = {"text_encoder_out_layers": (1, 2, 3)} if pipeline.components["text_encoder"] is not None else {}
    velocity = VelocityField(pipeline, num_inference_steps=2, **SIZE, generation_kwargs=options)
    velocity.check_guidance(1.0)
    with pytest.raises(ValueError, match="guidance_scale=4.0 does nothing"):
        velocity.check_guidance(4.0)


def error_of(case: Case, targets: list[str] | str) -> float:
    return derivative_error(case.field, case.noise(), list(case.family.prompts), case.family.guidance_scale, targets)


def test_gradient_against_finite_differences(any_case: Case) -> None:
    if any_case.family.trainable:
        assert error_of(any_case, list(any_case.family.lora_targets)) < 1e-2
    else:
        # Its experts cut gradients in eval mode. The day this fails, the family can be trained.
        with pytest.raises(RuntimeError, match="does not require grad"):
            error_of(any_case, r".*\.experts\.\d+\.w1")


def test_pipeline_is_left_as_it_was(any_case: Case) -> None:
    prompts = list(any_case.family.prompts)
    x = any_case.noise()
    any_case.field(x, any_case.field.levels[0].item(), prompts, any_case.family.guidance_scale)
    any_case.field.decode(x, prompts)
    after = state_of(any_case.pipeline)
    assert after.keys() == any_case.before.keys()
    changed = [name for name, value in after.items() if value is not any_case.before[name] and name != "config"]
    assert not changed
    assert after["config"] == any_case.before["config"]
