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

"""Flow matching on images: noise levels, noised images and the loss (arXiv 2210.02747; the levels as in arXiv 2403.03206)."""

import torch
from torch import Tensor

from .flow import velocity_gap_sq


TIMESTEP_DENSITIES = ("uniform", "logit_normal")


def density_quantile(q: Tensor, density: str, logit_mean: float = 0.0, logit_std: float = 1.0) -> Tensor:
    """
    Quantiles of the density from which timesteps are drawn, before the shift: of uniform `q` it makes draws.

    Args:
        q (`Tensor`): in `[0, 1)`.
        density (`str`):
            - `"uniform"`: all timesteps alike.
            - `"logit_normal"`: `sigmoid(logit_mean + logit_std z)`, `z` standard normal (arXiv 2403.03206, Eq. 19).
        logit_mean (`float`, *optional*, defaults to 0): towards noise if positive, towards images if negative.
        logit_std (`float`, *optional*, defaults to 1): positive.

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
    Noise levels of timesteps on the pipeline's own schedule, whose shift is in its grid, by linear interpolation.

    Args:
        u (`Tensor`): timesteps from 0 (image) to 1 (noise), before the shift.
        levels (`Tensor` of shape `(N + 1,)`): the pipeline's noise grid of many steps, decreasing.

    Returns:
        `Tensor` of `u`'s shape, float64.
    """
    levels = levels.to(torch.float64)
    position = (1 - u.to(torch.float64)) * (len(levels) - 1)
    below = position.floor().long().clamp(max=len(levels) - 2)
    return torch.lerp(levels[below], levels[below + 1], position - below)


def flow_matching_loss(v: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """
    `|v - (eps - x0)|²`, a mean over the latent dimensions (arXiv 2210.02747, with `t` from image to noise).

    Args:
        v (`Tensor` of shape `(B, ...)`): velocity at `noised(x0, eps, t)`, with gradient.
        x0, eps (`Tensor` of the same shape): images and noise.

    Returns:
        `Tensor` of shape `(B,)`, one value a sample. Its least possible mean is not 0: many images and noises meet at a
        state.
    """
    return velocity_gap_sq(v, eps - x0)
