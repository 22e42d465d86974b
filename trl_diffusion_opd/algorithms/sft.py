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
The loss of flow matching on images (arXiv 2210.02747) and the noise levels at which it is computed (arXiv 2403.03206).
"""

import torch
from torch import Tensor

from .flow import velocity_gap_sq


TIMESTEP_DENSITIES = ("uniform", "logit_normal")


def density_quantile(q: Tensor, density: str, logit_mean: float = 0.0, logit_std: float = 1.0) -> Tensor:
    """
    The quantile function of the density from which timesteps are drawn, before the shift. Uniform `q` become draws
    from it.

    Args:
        q (`Tensor`): in `[0, 1)`.
        density (`str`):
            - `"uniform"`: all timesteps are equally likely.
            - `"logit_normal"`: `sigmoid(logit_mean + logit_std z)`, `z` standard normal (arXiv 2403.03206, Eq. 19).
        logit_mean (`float`, *optional*, defaults to 0): positive values shift draws towards noise, negative towards
            images.
        logit_std (`float`, *optional*, defaults to 1): the spread of the draws, positive.

    Returns:
        `Tensor` of `q`'s shape, float64, in `[0, 1]`.

    Raises:
        ValueError: for an unknown density.
    """
    q = q.to(torch.float64)
    if density == "uniform":
        return q
    if density == "logit_normal":
        return torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(q))
    raise ValueError(f"Unknown density of timesteps {density!r}. Choose one of {', '.join(TIMESTEP_DENSITIES)}.")


def shifted(u: Tensor, levels: Tensor) -> Tensor:
    """
    Shifts timesteps to noise levels of the pipeline's own schedule, by linear interpolation in its (shifted) noise
    grid.

    Args:
        u (`Tensor`): timesteps from 0 (image) to 1 (noise), before the shift.
        levels (`Tensor` of shape `(N + 1,)`): a fine noise grid of the pipeline, decreasing.

    Returns:
        `Tensor` of `u`'s shape, float64.
    """
    levels = levels.to(torch.float64)
    position = (1 - u.to(torch.float64)) * (len(levels) - 1)
    below = position.floor().long().clamp(max=len(levels) - 2)
    return torch.lerp(levels[below], levels[below + 1], position - below)


def flow_matching_loss(v: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """
    `|v - (eps - x0)|²`, averaged over the latent dimensions (arXiv 2210.02747, with `t` from image to noise).

    Args:
        v (`Tensor` of shape `(B, ...)`): velocity at `noised(x0, eps, t)`, with gradient.
        x0, eps (`Tensor` of the same shape): images and noise.

    Returns:
        `Tensor` of shape `(B,)`, one value a sample. Its mean cannot reach 0, since different images and noises lead
        to the same state.
    """
    return velocity_gap_sq(v, eps - x0)
