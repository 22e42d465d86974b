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

from diffusers import FlowMatchEulerDiscreteScheduler


def sd3_levels(steps: int = 10) -> list[float]:
    """The grid of Stable Diffusion 3 (shift 3), as its scheduler sets it."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.tolist()


def uniform_levels(steps: int) -> list[float]:
    return [1 - j / steps for j in range(steps)] + [0.0]


GRIDS = {
    "sd3": sd3_levels(),
    "sd3_28": sd3_levels(28),
    "uniform": uniform_levels(8),
    "near_one": [0.9997, 0.9, 0.75, 0.6, 0.4, 0.15, 0.0],
    "middle": [0.9, 0.7, 0.5, 0.35, 0.25],  # starts below 1 and ends above 0
    "single": [1.0, 0.0],
}
