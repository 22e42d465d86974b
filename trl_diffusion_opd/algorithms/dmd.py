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
Distribution matching distillation: DMD2 (arXiv 2405.14867) and trajectory distribution matching, TDM (arXiv
2503.06674), in the coordinates of flow matching.

A student draws an image `x0` in few steps. `real`, a frozen teacher, and `fake`, a model that is trained to denoise the
student's images, say at a noised `x0` in which direction the teacher's distribution lies from the student's. The
student's image moves there. Nothing asks the student to follow the teacher's trajectories.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .flow import per_sample, velocity_difference
from .samplers import SamplerTable
from .sft import flow_matching_loss, shifted


DMD_LOSSES = ("dmd2", "tdm")

# TDM: the largest weight of the fake's loss, a signal-to-noise ratio (Min-SNR, arXiv 2303.09556).
MAX_SNR = 5.0
# The smallest mean absolute error by which the student's losses divide.
_MIN_ERROR = 1e-5
# Rounding of a sampler's coefficients.
_ROUNDING = 1e-6


def image_of(x: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
    """
    The image that a velocity predicts: `x0 = x - t v`.

    Args:
        x, v (`Tensor` of shape `(B, ...)`): states, and velocities there.
        t (`float` or `Tensor` of shape `(B,)`): one noise level for all samples, or one for each.
    """
    return x - per_sample(t, x) * v


def noise_of(x: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
    """The noise that a velocity predicts: `eps = x + (1 - t) v = x0 + v`. Arguments as for [`image_of`]."""
    return x + (1 - per_sample(t, x)) * v


def noised_further(x: Tensor, z: Tensor, t_from: float | Tensor, t_to: float | Tensor) -> Tensor:
    """
    The forward process from one noise level to a higher one: `r x + beta z`, with `r = (1 - t) / (1 - t_from)` and
    `beta² = t² - (r t_from)²` (TDM).

    Of a state `x = (1 - t_from) x0 + t_from eps` it makes `(1 - t) x0 + t eps_mix`, with the mixed noise
    `eps_mix = (r t_from eps + beta z) / t`. From `t_from = 0` it is [`~flow.noised`] (DMD2).

    Args:
        x, z (`Tensor` of shape `(B, ...)`): states, and standard Gaussian noise.
        t_from, t_to (`float` or `Tensor` of shape `(B,)`): their noise level, in [0, 1), and the new one, not below it.
    """
    start, end = (torch.as_tensor(t, dtype=torch.float64, device="cpu") for t in (t_from, t_to))
    r = (1 - end) / (1 - start)
    beta = (end.square() - (r * start).square()).clamp(min=0).sqrt()
    return per_sample(r, x) * x + per_sample(beta, x) * z


def renoise_levels(
    q: Tensor, ends: Sequence[tuple[float, float]], levels: Tensor, lowest: float, highest: float
) -> Tensor:
    """
    Draws the noise levels at which teacher and fake are compared: uniform timesteps, shifted as the pipeline does it.

    Args:
        q (`Tensor` of shape `(B,)`): uniform in [0, 1).
        ends (`Sequence` of `B` pairs): the noise levels between which a sample's level lies. `(0, 1)` is DMD2; in TDM
            it is a stage of the walk, from its end to its start.
        levels (`Tensor` of shape `(N + 1,)`): a fine noise grid of the pipeline, decreasing.
        lowest, highest (`float`): the least and the largest timestep, before the shift. Ignored for a stage that lies
            outside.

    Returns:
        `Tensor` of shape `(B,)`, float64.
    """
    grid = levels.to(torch.float64).flip(0).numpy()
    timesteps = np.linspace(0.0, 1.0, len(grid))
    bounds = []
    for low, high in ends:
        own = [float(np.interp(t, grid, timesteps)) for t in (low, high)]
        within = max(own[0], lowest), min(own[1], highest)
        bounds.append(within if within[0] < within[1] else own)
    first, last = torch.tensor(bounds, dtype=torch.float64).T
    return shifted(last - (last - first) * q.to(torch.float64), levels)


def student_loss(
    x0: Tensor, x: Tensor, t: Tensor, v_real: Tensor, v_fake: Tensor, loss_type: str, huber_c: float = 1e-3
) -> Tensor:
    """
    The student's loss, whose gradient moves its images to where teacher and fake differ.

    With the images `x_r = x - t v_real` and `x_f = x - t v_fake`, and the sample's scale `w = mean |x0 - x_r|`:

    - `"dmd2"` (arXiv 2405.14867, Eq. 3, with the normalisation of arXiv 2311.18828, Eq. 8): `1/2 mean g²`, whose
      gradient is `g / d` with `g = (x_f - x_r) / w`.
    - `"tdm"` (arXiv 2503.06674): `mean (sqrt(e² + c²) - c) / w` with `e = x0 - sg(x0 + x_r - x_f)`. With `c = 0` it is
      `mean e² / w`.

    Args:
        x0 (`Tensor` of shape `(B, ...)`, d values a sample): the student's images, with gradient.
        x (`Tensor` of the same shape), t (`Tensor` of shape `(B,)`): these images noised again, and their levels.
        v_real, v_fake (`Tensor` of the same shape): velocities of teacher and fake at `x`.
        loss_type (`str`): `"dmd2"` or `"tdm"`.
        huber_c (`float`, *optional*, defaults to 1e-3): TDM's `c`, not negative.

    Returns:
        `Tensor` of shape `(B,)`, float32 or, if all inputs are wider, float64.

    Raises:
        ValueError: for an unknown loss.
    """
    if loss_type not in DMD_LOSSES:
        raise ValueError(f"Unknown loss {loss_type!r}. Choose one of {', '.join(DMD_LOSSES)}.")
    with torch.no_grad():
        # x_f - x_r as a difference of velocities: the states cancel.
        away = per_sample(t, x) * velocity_difference(v_real, v_fake)
        errors = (x0 - image_of(x, v_real, t)).abs().flatten(1).mean(1)
        scale = per_sample(errors.clamp(min=_MIN_ERROR), x)
        if loss_type == "dmd2":
            away = away / scale
    # Its value is `away`, its gradient that of x0.
    error = (x0 - x0.detach()) + away
    if loss_type == "dmd2":
        return 0.5 * error.square().flatten(1).mean(1)
    if huber_c == 0:
        return (error.square() / scale).flatten(1).mean(1)
    # sqrt(e² + c²) - c, without cancellation
    square = error.square()
    return (square / ((square + huber_c**2).sqrt() + huber_c) / scale).flatten(1).mean(1)


def fake_loss(v: Tensor, x: Tensor, t: Tensor, x0: Tensor, eps: Tensor, loss_type: str) -> Tensor:
    """
    The fake's loss on the student's images.

    - `"dmd2"`: flow matching, `mean |v - (eps - x0)|²` with `x = (1 - t) x0 + t eps`.
    - `"tdm"`: `min(SNR, 5) mean |x - t v - x0|²`, `SNR = ((1 - t) / t)²`; `x` has the mixed noise of
      [`noised_further`].

    Args:
        v (`Tensor` of shape `(B, ...)`): the fake's velocity at `x`, with gradient.
        x, x0, eps (`Tensor` of the same shape), t (`Tensor` of shape `(B,)`): noised images, the images, fresh noise
            (not used by TDM), and noise levels.
        loss_type (`str`): `"dmd2"` or `"tdm"`.

    Returns:
        `Tensor` of shape `(B,)`, one value a sample.

    Raises:
        ValueError: for an unknown loss.
    """
    if loss_type == "dmd2":
        return flow_matching_loss(v, x0, eps)
    if loss_type != "tdm":
        raise ValueError(f"Unknown loss {loss_type!r}. Choose one of {', '.join(DMD_LOSSES)}.")
    error = (image_of(x, v, t) - x0).square().flatten(1).mean(1)
    return error * ((1 - t) / t).square().clamp(max=MAX_SNR).to(error.device, error.dtype)


def noise_left(table: SamplerTable) -> float:
    """
    The noise that a walk's last step leaves beyond that of its level, as a standard deviation; 0 if its end is the
    predicted image with the noise of that level.

    A step from `(1 - t) x0 + t eps` ends with the noise `sqrt((a t + c)² + s²)`. It is that of the level for `ode`,
    `cps`, `ddim` and `dpm2m`, and more for `flow_sde` and `dance_sde`.
    """
    t, end, a, c, s = (float(v) for v in (*table.levels[-2:], table.a[-1], table.c[-1], table.s[-1]))
    left = (a * t + c) ** 2 + s**2 - end**2
    return left**0.5 if left > _ROUNDING else 0.0
