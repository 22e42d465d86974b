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
Models that predict noise, v or the sample, held against their own pipelines and against the closed formulas of a
variance-preserving process.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from helpers.families import FAMILIES, Family
from helpers.noise_families import (
    KOLORS,
    NOISE_FAMILIES,
    PIXART,
    STABLE_DIFFUSION,
    V_PREDICTION,
    ZERO_SNR,
    noise_scheduler,
)
from torch import Tensor

from trl_diffusion_opd.algorithms.rollout import walk
from trl_diffusion_opd.algorithms.samplers import sampler_table
from trl_diffusion_opd.pipelines.prediction import Prediction, noise_grid, scheduler_problem
from trl_diffusion_opd.pipelines.velocity import VelocityField


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in range(n)]


@dataclass
class OwnRun:
    """What a pipeline's own loop did: timestep, state and output of every step, its last latents and its image."""

    trace: list[tuple[float, Tensor, Tensor]]
    image: np.ndarray


def own_run(family: Family, pipeline: DiffusionPipeline, steps: int, scale: float) -> OwnRun:
    trace, kept = [], pipeline.scheduler
    pipeline.scheduler = type(kept).from_config(kept.config)
    step = pipeline.scheduler.step

    @functools.wraps(step)
    def recorded(output: Tensor, t: Any, x: Tensor, **kwargs: Any) -> Any:
        trace.append((float(t), x.clone(), output.clone()))
        return step(output, t, x, **kwargs)

    pipeline.scheduler.step = recorded
    (image,) = pipeline(
        **family.call_kwargs(scale),
        num_inference_steps=steps,
        generator=generators(2),
        output_type="np",
        return_dict=False,
    )[:1]
    pipeline.scheduler = kept
    return OwnRun(trace, image)


@pytest.fixture(scope="module", params=NOISE_FAMILIES)
def case(request: pytest.FixtureRequest) -> tuple[Family, DiffusionPipeline]:
    family = NOISE_FAMILIES[request.param]
    return family, family.build()


def expected_velocity(config: Any, alpha: float, sigma: float, x_vp: Tensor, output: Tensor) -> Tensor:
    """`eps - x0` by the definitions of the three predictions."""
    x_vp, output = x_vp.double(), output.double()
    if config["prediction_type"] == "epsilon":
        return output - (x_vp - sigma * output) / alpha
    assert config["prediction_type"] == "v_prediction"
    return (sigma * x_vp + alpha * output) - (alpha * x_vp - sigma * output)


@pytest.mark.parametrize(("steps", "scale"), [(4, 5.0), (10, 1.0), (25, 5.0)])
def test_walk_is_the_pipelines_own_ddim(case: tuple[Family, DiffusionPipeline], steps: int, scale: float) -> None:
    family, pipeline = case
    if steps == 25 and family not in (NOISE_FAMILIES["sdxl_zero_snr"], NOISE_FAMILIES["pixart_sigma"]):
        pytest.skip("a UNet with v prediction and a transformer that predicts noise stand for all")
    velocity = VelocityField(pipeline, num_inference_steps=steps, **family.kwargs)
    own, prompts = own_run(family, pipeline, steps, scale), list(family.prompts)
    squares = pipeline.scheduler.alphas_cumprod.double()
    x = velocity.initial_latents(prompts, generators(2))
    with torch.no_grad():
        for (t, state, output), level in zip(own.trace, velocity.levels.tolist(), strict=False):
            alpha, sigma = squares[int(t)].sqrt().item(), (1 - squares[int(t)]).sqrt().item()
            assert level == pytest.approx(sigma / (alpha + sigma), abs=1e-9)
            if steps == 4:
                v = velocity(state / (alpha + sigma), level, prompts, scale)
                expected = expected_velocity(pipeline.scheduler.config, alpha, sigma, state, output)
                assert (v - expected).abs().max() <= 1e-5 * expected.abs().max()
        table = sampler_table("ode", velocity.levels)
        x = walk(lambda j, x, _: velocity(x, velocity.levels[j].item(), prompts, scale), x, table)
    image = velocity.decode(velocity.clean(x), prompts, output_type="np")
    assert np.abs(image - own.image).max() <= 1e-5
    assert own.image.std() > 0.02, "a flat image would prove nothing"


@pytest.mark.parametrize("kind", ["euler", "dpm"])
@pytest.mark.parametrize("name", ["sd2_v", "pixart_sigma"])
def test_velocity_with_other_schedulers(name: str, kind: str) -> None:
    family = NOISE_FAMILIES[name]
    pipeline = family.build()
    schedule = V_PREDICTION if name == "sd2_v" else PIXART
    pipeline.scheduler = noise_scheduler(schedule, kind, timestep_spacing="trailing")
    velocity = VelocityField(pipeline, num_inference_steps=4, **family.kwargs)
    own, prompts = own_run(family, pipeline, 4, 5.0), list(family.prompts)
    # Euler's walks on x0 + (sigma / alpha) eps, the other's on alpha x0 + sigma eps.
    squares = pipeline.scheduler.alphas_cumprod.double()
    for j, (t, state, output) in enumerate(own.trace):
        alpha, sigma = squares[int(t)].sqrt().item(), (1 - squares[int(t)]).sqrt().item()
        level, x_vp = velocity.levels[j].item(), state * alpha if kind == "euler" else state
        assert level == pytest.approx(sigma / (alpha + sigma), abs=1e-6)
        with torch.no_grad():
            v = velocity(x_vp / (alpha + sigma), level, prompts, 5.0)
        expected = expected_velocity(pipeline.scheduler.config, alpha, sigma, x_vp, output)
        assert (v - expected).abs().max() <= 1e-5 * expected.abs().max()
        if j == 0:
            x = velocity.initial_latents(prompts, generators(2))
            torch.testing.assert_close(x, x_vp / (alpha + sigma), rtol=1e-5, atol=1e-6)
    if kind == "euler":  # of first order, so the whole walk is the pipeline's
        with torch.no_grad():
            table = sampler_table("ode", velocity.levels)
            x = walk(lambda j, x, _: velocity(x, velocity.levels[j].item(), prompts, 5.0), x, table)
        image = velocity.decode(velocity.clean(x), prompts, output_type="np")
        assert np.abs(image - own.image).max() <= 1e-5


def test_samples_of_a_batch_may_have_their_own_levels() -> None:
    for name in ("sdxl", "hunyuan_dit"):  # a UNet gets one timestep a batch, a transformer one a row
        family = NOISE_FAMILIES[name]
        velocity = VelocityField(family.build(), num_inference_steps=4, **family.kwargs)
        prompts, levels = list(family.prompts), velocity.levels[1:3].tolist()
        x = velocity.initial_latents(prompts, generators(2))
        with torch.no_grad():
            together = velocity(x, levels, prompts, 5.0)
            for i, level in enumerate(levels):
                alone = velocity(x[i : i + 1], level, prompts[i : i + 1], 5.0)
                torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


# Predictions


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_exact_outputs_give_the_exact_velocity(kind: str) -> None:
    torch.manual_seed(0)
    x0, eps = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    prediction = Prediction(kind)
    for sigma in (0.05, 0.6, 0.999):
        alpha = math.sqrt(1 - sigma**2)
        x_vp, t = alpha * x0 + sigma * eps, sigma / (alpha + sigma)
        output = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[kind]
        x = prediction.flow_state(x_vp, t)
        torch.testing.assert_close(x, (1 - t) * x0 + t * eps)
        torch.testing.assert_close(prediction.network_state(x, t), x_vp)
        torch.testing.assert_close(prediction.velocity(output, x, t), eps - x0, rtol=1e-9, atol=1e-9)
        rows = prediction.velocity(output, x, [t, t])
        torch.testing.assert_close(rows, eps - x0, rtol=1e-9, atol=1e-9)


def test_a_flow_model_is_untouched() -> None:
    x, flow = torch.randn(2, 3), Prediction("flow")
    assert (
        flow.network_state(x, 0.3) is x and flow.flow_state(x, 0.3) is x and flow.velocity(x, x + 1, [0.3, 0.4]) is x
    )


# Grids


def own_timesteps(kind: str, spacing: str, n: int, total: int, offset: int) -> np.ndarray:
    """As the documentation of diffusers' schedulers defines the three spacings (Table 2 of arXiv 2305.08891)."""
    if spacing == "trailing":
        return np.round(np.arange(total, 0, -total / n)) - 1
    if spacing == "leading":  # DPM leaves room for one step more
        return (np.arange(n) + (kind == "dpm"))[::-1] * (total // (n + (kind == "dpm"))) + offset
    if kind == "dpm":
        return np.linspace(0, total - 1, n + 1).round()[:0:-1]
    grid = np.linspace(0, total - 1, n)[::-1]
    return grid if kind == "euler" else grid.round()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", ["ddim", "euler", "dpm"])
@pytest.mark.parametrize("schedule", [STABLE_DIFFUSION, KOLORS], ids=["sd", "kolors"])
def test_levels_are_those_of_the_schedulers_timesteps(kind: str, spacing: str, schedule: dict[str, Any]) -> None:
    # In equal steps DDIM reaches timestep 0, so it can end only at an image.
    own = {"set_alpha_to_one": True} if (kind, spacing) == ("ddim", "linspace") else {}
    scheduler, n = noise_scheduler(schedule, kind, timestep_spacing=spacing, **own), 10
    scheduler.set_timesteps(n)
    grid = noise_grid(Prediction("epsilon"), scheduler)
    total = schedule["num_train_timesteps"]
    betas = np.linspace(schedule["beta_start"] ** 0.5, schedule["beta_end"] ** 0.5, total) ** 2
    ratio = np.sqrt(1 / np.cumprod(1 - betas) - 1)  # sigma / alpha
    timesteps = own_timesteps(kind, spacing, n, total, 1)
    # Between two timesteps, Euler's sigmas are interpolated.
    expected = np.interp(timesteps, np.arange(total), ratio / (1 + ratio) if kind != "euler" else ratio)
    expected = expected / (1 + expected) if kind == "euler" else expected
    last = ratio[0] / (1 + ratio[0]) if kind == "ddim" and not own else 0.0
    np.testing.assert_allclose(grid.levels.numpy(), [*expected, last], atol=2e-6)
    shown = [grid.timestep(t) for t in grid.levels[:-1].tolist()]
    np.testing.assert_allclose(shown, timesteps, atol=1e-4)
    # Euler's loop walks on x0 + (sigma / alpha) eps, and what it decodes is x0.
    first, end = grid.levels[0].item(), grid.levels[-1].item()
    assert grid.start_scale == pytest.approx(1 / (1 - first) if kind == "euler" else 1 / math.hypot(1 - first, first))
    assert grid.end_scale == (1.0 if end == 0 else pytest.approx(1 / math.hypot(1 - end, end)))
    lowest, highest = (ratio / (1 + ratio))[[0, -1]]
    assert (grid.lowest, grid.highest) == pytest.approx((lowest, highest), abs=1e-6)


def test_timesteps_between_those_of_the_grid_follow_the_schedule() -> None:
    scheduler = noise_scheduler(STABLE_DIFFUSION)
    scheduler.set_timesteps(4)
    grid = noise_grid(Prediction("epsilon"), scheduler)
    squares = scheduler.alphas_cumprod.double()
    for timestep in (0, 17, 500, 998, 999):
        alpha, sigma = squares[timestep].sqrt(), (1 - squares[timestep]).sqrt()
        assert grid.timestep(float(sigma / (alpha + sigma))) == pytest.approx(timestep, abs=1e-6)


def test_zero_terminal_snr_starts_at_pure_noise() -> None:
    for kind, first in (("ddim", 1.0), ("euler", 1 - 1 / 4097), ("dpm", 1 - 1 / 4097)):
        scheduler = noise_scheduler(ZERO_SNR, kind)
        scheduler.set_timesteps(10)
        assert noise_grid(Prediction("v_prediction"), scheduler).levels[0].item() == pytest.approx(first, abs=1e-6)
        with pytest.raises(ValueError, match="an image can't be computed from the predicted noise"):
            noise_grid(Prediction("epsilon"), scheduler)


def test_pndm_is_walked_on_the_grid_of_ddim() -> None:
    family = NOISE_FAMILIES["sd15"]
    pipeline = family.build()
    levels = VelocityField(pipeline, num_inference_steps=10).levels
    options = {**STABLE_DIFFUSION, "skip_prk_steps": True, "set_alpha_to_one": False}
    pipeline.scheduler = diffusers.PNDMScheduler(**options)
    assert torch.equal(VelocityField(pipeline, num_inference_steps=10).levels, levels)


# Refusals

_PLAIN = {name: STABLE_DIFFUSION[name] for name in ("beta_start", "beta_end", "beta_schedule")}


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.EulerAncestralDiscreteScheduler(**_PLAIN), "adds noise by itself"),
        (diffusers.LCMScheduler(**_PLAIN), "adds noise by itself"),
        (diffusers.DDPMScheduler(**_PLAIN, clip_sample=False), "adds noise by itself"),
        (diffusers.DPMSolverMultistepScheduler(**_PLAIN, algorithm_type="sde-dpmsolver++"), "adds noise by itself"),
        (diffusers.HeunDiscreteScheduler(**_PLAIN), "second order: it makes 7 forwards for 4 steps"),
        (diffusers.KDPM2DiscreteScheduler(**_PLAIN), "second order"),
        (DDIMScheduler(**_PLAIN), "clips the predicted image"),
        (diffusers.EDMEulerScheduler(), "neither of flow matching nor"),
        (diffusers.DDIMInverseScheduler(**_PLAIN, clip_sample=False), "does not walk from noise"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_schedulers_that_are_refused(scheduler: Any, message: str) -> None:
    assert message in (scheduler_problem(scheduler, "SomePipeline") or "")
    assert scheduler_problem(
        DDIMScheduler.from_config(scheduler.config, clip_sample=False), "SomePipeline"
    ) is None or (message == "neither of flow matching nor"), "what the message says to use must work"


def test_a_flow_matching_pipeline_with_a_noise_scheduler_is_refused() -> None:
    family = FAMILIES["sd3"]
    pipeline = family.build()
    pipeline.scheduler = noise_scheduler(STABLE_DIFFUSION)
    with pytest.raises(ValueError, match="is a flow-matching pipeline, but its scheduler is DDIMScheduler"):
        VelocityField(pipeline, num_inference_steps=4, **family.kwargs)


def test_inputs_besides_the_prompt_are_refused() -> None:
    pipeline = NOISE_FAMILIES["sd15"].build()
    for options in ({"ip_adapter_image": None}, {"eta": 0.5}):
        with pytest.raises(ValueError, match=f"generation_kwargs: '{next(iter(options))}'"):
            VelocityField(pipeline, num_inference_steps=4, generation_kwargs=options)
    unet = pipeline.unet
    config = dict(unet.config)
    for changes, message in (
        ({"in_channels": 9}, "takes 9 channels and returns 4"),
        ({"encoder_hid_dim_type": "ip_image_proj", "encoder_hid_dim": 8}, "takes an image as a prompt"),
    ):
        unet.register_to_config(**changes)
        with pytest.raises(ValueError, match=message):
            VelocityField(pipeline, num_inference_steps=4)
        unet.register_to_config(**config)
    controlled = diffusers.StableDiffusionControlNetPipeline(
        **pipeline.components, controlnet=diffusers.ControlNetModel.from_unet(unet), requires_safety_checker=False
    )
    with pytest.raises(ValueError, match="has a controlnet"):
        VelocityField(controlled, num_inference_steps=4)
