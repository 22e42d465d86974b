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

"""Losses of GRPO on the transitions of a walk.

A step of a stochastic sampler is a draw from a Gaussian: `x' = mean + s z` with the mean linear in the velocity. Two
networks at one state therefore differ by `c (v - v_old)` in the mean, and everything here is written in that difference
and in the walk's own noise `z`. No log-probability is computed and then subtracted, so at equal velocities a ratio is 1
exactly, in any precision.

Log-probabilities and KL divergences are per latent dimension (a mean, not a sum), as in the code of Flow-GRPO and DanceGRPO:
the ratio is then the geometric mean of the dimensions' ratios and stays near 1 whatever the resolution.
"""

import torch
from torch import Tensor

from .flow import velocity_difference, velocity_gap_sq


LOSS_TYPES = ("flow_grpo", "grpo_guard")
SDE_SAMPLERS = ("flow_sde", "dance_sde", "cps")


def log_ratio(v: Tensor, v_old: Tensor, z: Tensor, c: float, s: float) -> Tensor:
    """Logarithm of the ratio of a transition's probabilities under two networks (Flow-GRPO, arXiv 2505.05470).

    With `x' = mean_old + s z` and `d = c (v - v_old)`,

        log p(x') - log p_old(x') = (|s z|² - |s z - d|²) / (2 s²) = <d, z> / s - |d|² / (2 s²).

    Args:
        v (`Tensor` of shape `(B, ...)`):
            Velocity of the network whose probability is the numerator, with gradient.
        v_old (`Tensor` of the same shape):
            Velocity of the network that took the step.
        z (`Tensor` of the same shape):
            The standard Gaussian noise with which it did.
        c, s (`float`):
            The step's row of the sampler table, `s` not 0.

    Returns:
        `Tensor` of shape `(B,)`, float32 (float64 if both velocities are): a mean over the latent dimensions.

    Raises:
        ValueError: if the step adds no noise, or if shapes differ.
    """
    if s == 0:
        raise ValueError("A step without noise (s = 0) has no probability to take a ratio of.")
    difference = velocity_difference(v, v_old)
    return (c / s) * _mean_product(difference, z) - c**2 / (2 * s**2) * difference.square().flatten(1).mean(1)


def normalized_log_ratio(v: Tensor, v_old: Tensor, z: Tensor, c: float) -> Tensor:
    """The log-ratio of GRPO-Guard (arXiv 2510.22319, RatioNorm): `s (log_ratio + |d|² / (2 s²)) = <d, z>`.

    The quadratic term pulls ratios below 1, so that clipping misses those of good samples; the factor `1 / s` gives each
    step another spread. Without both, log-ratios have mean 0, and for equal mean differences the same spread at every step.

    Args:
        v, v_old, z, c: as in [`log_ratio`].

    Returns:
        `Tensor` of shape `(B,)`, float32 (float64 if both velocities are): a mean over the latent dimensions.
    """
    return c * _mean_product(velocity_difference(v, v_old), z)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    """`-min(r A, clip(r, 1 - epsilon, 1 + epsilon) A)`, to be minimised (Flow-GRPO, arXiv 2505.05470).

    Args:
        ratio, advantages (`Tensor` of shape `(B,)`)
        epsilon (`float`): positive.

    Returns:
        `Tensor` of shape `(B,)`.
    """
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)


def is_clipped(ratio: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    """Where the clipping of [`clipped_surrogate`] takes the gradient away: `Tensor` of shape `(B,)`, bool."""
    return ((ratio > 1 + epsilon) & (advantages > 0)) | ((ratio < 1 - epsilon) & (advantages < 0))


def grpo_loss(
    loss_type: str,
    v: Tensor,
    v_old: Tensor,
    z: Tensor,
    advantages: Tensor,
    *,
    c: float,
    s: float,
    dt: float,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """The policy loss of one transition.

    Args:
        loss_type (`str`):
            - `"flow_grpo"`: [`clipped_surrogate`] of the ratio of probabilities (arXiv 2505.05470).
            - `"grpo_guard"`: of the normalised ratio, divided by the length of the step in noise level, by which the
              gradients of a short step would otherwise be smaller than those of a long one (arXiv 2510.22319).
        v, v_old, z (`Tensor` of shape `(B, ...)`), c, s (`float`):
            As in [`log_ratio`].
        advantages (`Tensor` of shape `(B,)`)
        dt (`float`):
            Difference of the step's noise levels, negative.
        epsilon (`float`):
            Ratios are clipped to `[1 - epsilon, 1 + epsilon]`.

    Returns:
        `tuple[Tensor, Tensor]` of shape `(B,)` each: the loss with gradient, and the ratio without.

    Raises:
        ValueError: for an unknown loss type, a step without noise, or shapes that differ.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"Unknown loss type {loss_type!r}. Choose one of {', '.join(LOSS_TYPES)}.")
    if loss_type == "flow_grpo":
        ratio, factor = log_ratio(v, v_old, z, c, s).exp(), 1.0
    else:
        ratio, factor = normalized_log_ratio(v, v_old, z, c).exp(), 1 / abs(dt)
    return factor * clipped_surrogate(ratio, advantages, epsilon), ratio.detach()


def transition_kl(v: Tensor, v_base: Tensor, c: float, s: float) -> Tensor:
    """KL divergence of two transitions from one state, `c² |v - v_base|² / (2 s²)`, per latent dimension.

    Exact: the two Gaussians have the same variance (Flow-GRPO, arXiv 2505.05470).

    Args:
        v (`Tensor` of shape `(B, ...)`): with gradient. v_base: the base model's, of the same shape.
        c, s (`float`): the step's row of the sampler table, `s` not 0.

    Returns:
        `Tensor` of shape `(B,)`, in nats a dimension.
    """
    return c**2 / (2 * s**2) * velocity_gap_sq(v, v_base)


def _mean_product(difference: Tensor, z: Tensor) -> Tensor:
    if z.shape != difference.shape:
        raise ValueError(f"Noise has shape {tuple(z.shape)} and the velocities {tuple(difference.shape)}.")
    return (difference * z).flatten(1).mean(1)
