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

"""Noise grids that the tests of samplers, objectives and rollout share."""

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler


def sd3_levels(steps: int = 10) -> list[float]:
    """The grid of Stable Diffusion 3 (shift 3), as its scheduler sets it."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.tolist()


def uniform_levels(steps: int) -> list[float]:
    return [1 - j / steps for j in range(steps)] + [0.0]


def vp_scheduler(zero_snr: bool = False) -> DDIMScheduler:
    """Stable Diffusion's schedule with 10 steps, which ends above 0; or one that starts without signal."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=zero_snr,
        steps_offset=1,
        timestep_spacing="trailing" if zero_snr else "leading",
        rescale_betas_zero_snr=zero_snr,
        prediction_type="v_prediction",
    )
    scheduler.set_timesteps(10)
    return scheduler


def vp_levels(zero_snr: bool = False) -> list[float]:
    """`sigma / (alpha + sigma)` along the timesteps of [`vp_scheduler`]."""
    scheduler = vp_scheduler(zero_snr)
    last = scheduler.final_alpha_cumprod.double().item()
    squares = [*scheduler.alphas_cumprod.double()[scheduler.timesteps].tolist(), last]
    return [(1 - a) ** 0.5 / (a**0.5 + (1 - a) ** 0.5) for a in squares]


GRIDS = {
    "sd3": sd3_levels(),
    "sd3_28": sd3_levels(28),
    "uniform": uniform_levels(8),
    "near_one": [0.9997, 0.9, 0.75, 0.6, 0.4, 0.15, 0.0],
    "middle": [0.9, 0.7, 0.5, 0.35, 0.25],  # starts below 1 and ends above 0
    "single": [1.0, 0.0],
    "noise_model": vp_levels(),
    "zero_snr": vp_levels(zero_snr=True),
}
