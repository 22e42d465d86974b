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

"""What pipelines do that `VelocityField` has to know: guiders, reversed levels, latents of their own."""

import diffusers
import pytest
import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    ClassifierFreeGuidance,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
)
from helpers.families import FAMILIES
from helpers.families_flow import FLOW_FAMILIES

from trl_diffusion_opd.pipelines.prediction import Prediction, noise_grid, prediction_of
from trl_diffusion_opd.pipelines.velocity import VelocityField


HUNYUAN, SD3 = FLOW_FAMILIES["hunyuan_image"], FAMILIES["sd3"]


def field_of(pipeline: DiffusionPipeline, **options: object) -> VelocityField:
    return VelocityField(pipeline, num_inference_steps=2, **{**SD3.kwargs, **options})


@pytest.mark.parametrize(
    "guider", [AdaptiveProjectedMixGuidance(), ClassifierFreeGuidance(stop=0.5)], ids=["with memory", "for some steps"]
)
def test_a_guider_that_changes_with_the_steps_is_refused(guider: object) -> None:
    pipeline = HUNYUAN.build()
    pipeline.guider = guider
    with pytest.raises(ValueError, match="depends on the step's number or on earlier steps.*pipe.guider = "):
        VelocityField(pipeline, num_inference_steps=2, **HUNYUAN.kwargs)


@pytest.mark.parametrize("original", [False, True])
def test_the_default_scale_is_the_guiders(original: bool) -> None:
    pipeline = HUNYUAN.build()
    pipeline.guider = ClassifierFreeGuidance(guidance_scale=2.5, use_original_formulation=original)
    velocity = VelocityField(pipeline, num_inference_steps=2, **HUNYUAN.kwargs)
    assert velocity.default_guidance_scale() == 2.5 + original
    x = velocity.initial_latents(["a"], [torch.Generator().manual_seed(0)])
    plain, empty, guided = (velocity(x, 1.0, ["a"], scale) for scale in (1.0, 0.0, 2.0))
    torch.testing.assert_close(guided, 2 * plain - empty)


def test_reversed_levels() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(4)
    pipeline = SD3.build()
    pipeline.scheduler = scheduler
    assert prediction_of(pipeline) == Prediction("reversed flow")
    grid = noise_grid(prediction_of(pipeline), scheduler)
    torch.testing.assert_close(grid.levels, 1 - scheduler.sigmas.double())
    assert grid.timestep(float(grid.levels[1])) == pytest.approx(float(scheduler.timesteps[1]))
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Prediction("reversed flow").velocity(x, x, 0.5), -x)


def test_noise_over_signal_is_refused() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(2)
    scheduler.sigmas = torch.tensor([80.0, 2.0, 0.0])
    with pytest.raises(ValueError, match=r"makes noise levels above 1: \[80.0, 2.0, 0.0\]"):
        noise_grid(Prediction("flow"), scheduler)


class _InTwoStages(diffusers.StableDiffusion3Pipeline):
    """Prepares the latents of another network first, as cascades do."""

    def check_inputs(self, *args: object, **kwargs: object) -> None:
        self.prepare_latents(1, 4, 16, 16, torch.float32, torch.device("cpu"), None)


def test_a_pipeline_of_two_networks_is_refused() -> None:
    with pytest.raises(ValueError, match="prepares latents twice, for two networks"):
        field_of(_InTwoStages(**SD3.build().components))


def test_learned_variance_is_refused() -> None:
    pipeline = SD3.build()
    pipeline.scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    with pytest.raises(ValueError, match="takes a variance besides the noise"):
        field_of(pipeline)
