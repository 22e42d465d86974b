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

"""The losses of GRPO, computed on the steps (transitions) of a sampled trajectory.

A step of a stochastic sampler draws from a Gaussian: `x' = mean + s z`, with a mean that is linear in the velocity. At
the same state, the means of two networks differ by `c (v - v_old)`. Everything here is computed from that difference
and from the noise `z` that the step added. Log-probabilities are never computed and subtracted, so equal velocities
give a ratio of exactly 1 in any precision.

Log-probabilities and KL divergences are means over the latent dimensions, not sums, as in the code of Flow-GRPO and
DanceGRPO. The ratio is then the geometric mean of the dimensions' ratios and stays near 1 at any resolution.
"""

import torch
from torch import Tensor

from .flow import velocity_difference, velocity_gap_sq


LOSS_TYPES = ("flow_grpo", "grpo_guard", "dppo")
SDE_SAMPLERS = ("flow_sde", "dance_sde", "cps")
DIVERGENCE_THRESHOLD = 1e-5  # Flow-DPPO's, in nats per latent dimension


def log_ratio(v: Tensor, v_old: Tensor, z: Tensor, c: float, s: float) -> Tensor:
    """The logarithm of the ratio of a step's probabilities under two networks (Flow-GRPO, arXiv 2505.05470).

    With `x' = mean_old + s z` and `d = c (v - v_old)`,

        log p(x') - log p_old(x') = (|s z|² - |s z - d|²) / (2 s²) = <d, z> / s - |d|² / (2 s²).

    Args:
        v (`Tensor` of shape `(B, ...)`):
            Velocity of the trained network (the numerator), with gradient.
        v_old (`Tensor` of the same shape):
            Velocity of the network that took the step.
        z (`Tensor` of the same shape):
            The standard Gaussian noise of that step.
        c, s (`float`):
            The step's coefficients in the sampler table. `s` must not be 0.

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

    The quadratic term of `log_ratio` pulls ratios below 1, so clipping rarely acts on good samples. Its factor `1 / s`
    gives every step a different spread. Without both, log-ratios have mean 0 and, for equal differences of the means,
    the same spread at every step.

    Args:
        v, v_old, z, c: as in [`log_ratio`].

    Returns:
        `Tensor` of shape `(B,)`, float32 (float64 if both velocities are): a mean over the latent dimensions.
    """
    return c * _mean_product(velocity_difference(v, v_old), z)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    """`-min(r A, clip(r, 1 - epsilon, 1 + epsilon) A)`, to be minimised (Flow-GRPO, arXiv 2505.05470).

    Args:
        ratio, advantages (`Tensor` of shape `(B,)`): `r` and `A` of each sample.
        epsilon (`float`): positive.

    Returns:
        `Tensor` of shape `(B,)`.
    """
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)


def is_clipped(ratio: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    """Whether clipping in [`clipped_surrogate`] removes a sample's gradient: `Tensor` of shape `(B,)`, bool."""
    return ((ratio > 1 + epsilon) & (advantages > 0)) | ((ratio < 1 - epsilon) & (advantages < 0))


def masked_surrogate(ratio: Tensor, advantages: Tensor, divergence: Tensor, threshold: float) -> Tensor:
    """`-r A`, or 0 for the samples of [`is_masked`], to be minimised (Flow-DPPO, arXiv 2606.11025).

    Args:
        ratio, advantages (`Tensor` of shape `(B,)`): `r` and `A` of each sample.
        divergence (`Tensor` of shape `(B,)`), threshold (`float`): as in [`is_masked`].

    Returns:
        `Tensor` of shape `(B,)`.
    """
    return (-ratio * advantages).masked_fill(is_masked(ratio.detach(), advantages, divergence, threshold), 0.0)


def is_masked(ratio: Tensor, advantages: Tensor, divergence: Tensor, threshold: float) -> Tensor:
    """
    Whether a sample's step is left out of [`masked_surrogate`]: the two networks are too far apart, and the sample would
    drive them further apart.

    A ratio is one draw and mostly noise; the divergence of two Gaussians is exact. So a sample whose ratio is far from
    1 by chance is kept, and so is every sample that would bring the networks nearer to each other.

    Args:
        ratio, advantages (`Tensor` of shape `(B,)`): a sample drives apart if `A > 0` and `r > 1`, or `A < 0` and `r < 1`.
        divergence (`Tensor` of shape `(B,)`): the KL divergence from the network that took the step, as
            [`transition_kl`] computes it, in nats per latent dimension.
        threshold (`float`): the largest divergence at which no sample is left out.

    Returns:
        `Tensor` of shape `(B,)`, bool.
    """
    return (divergence > threshold) & ((ratio - 1) * advantages > 0)


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
    divergence_threshold: float = DIVERGENCE_THRESHOLD,
) -> tuple[Tensor, Tensor, Tensor]:
    """The policy loss of one transition.

    Args:
        loss_type (`str`):
            - `"flow_grpo"`: [`clipped_surrogate`] of the ratio of probabilities (arXiv 2505.05470).
            - `"grpo_guard"`: [`clipped_surrogate`] of the ratio from [`normalized_log_ratio`], divided by the step's
              length in noise level; otherwise short steps would have smaller gradients than long ones (arXiv
              2510.22319).
            - `"dppo"`: [`masked_surrogate`] of the ratio of probabilities (arXiv 2606.11025).
        v, v_old, z (`Tensor` of shape `(B, ...)`), c, s (`float`):
            As in [`log_ratio`].
        advantages (`Tensor` of shape `(B,)`):
            Advantages of the samples.
        dt (`float`):
            The next noise level minus the step's own, negative.
        epsilon (`float`):
            Ratios are clipped to `[1 - epsilon, 1 + epsilon]`. Not used by `"dppo"`.
        divergence_threshold (`float`, *optional*, defaults to `1e-5`):
            As in [`is_masked`]. Used by `"dppo"` alone.

    Returns:
        `tuple[Tensor, Tensor, Tensor]` of shape `(B,)` each: the loss with gradient; the ratio without; and whether a
        sample's gradient is removed, by the clip or by the mask.

    Raises:
        ValueError: for an unknown loss type, a step without noise, or shapes that differ.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"Unknown loss type {loss_type!r}. Choose one of {', '.join(LOSS_TYPES)}.")
    if loss_type == "grpo_guard":
        ratio, factor = normalized_log_ratio(v, v_old, z, c).exp(), 1 / abs(dt)
    else:
        ratio, factor = log_ratio(v, v_old, z, c, s).exp(), 1.0
    if loss_type == "dppo":
        divergence = transition_kl(v.detach(), v_old, c, s)
        loss = masked_surrogate(ratio, advantages, divergence, divergence_threshold)
        return loss, ratio.detach(), is_masked(ratio.detach(), advantages, divergence, divergence_threshold)
    loss = factor * clipped_surrogate(ratio, advantages, epsilon)
    return loss, ratio.detach(), is_clipped(ratio.detach(), advantages, epsilon)


def transition_kl(v: Tensor, v_base: Tensor, c: float, s: float) -> Tensor:
    """KL divergence of two networks' steps from the same state: `c² |v - v_base|² / (2 s²)`, per latent dimension.

    It is exact, because the two Gaussians have the same variance (Flow-GRPO, arXiv 2505.05470).

    Args:
        v (`Tensor` of shape `(B, ...)`): the student's velocity, with gradient.
        v_base (`Tensor` of the same shape): the base model's velocity.
        c, s (`float`): the step's coefficients in the sampler table. `s` must not be 0.

    Returns:
        `Tensor` of shape `(B,)`, in nats per dimension.
    """
    return c**2 / (2 * s**2) * velocity_gap_sq(v, v_base)


def _mean_product(difference: Tensor, z: Tensor) -> Tensor:
    if z.shape != difference.shape:
        raise ValueError(f"Noise has shape {tuple(z.shape)} and the velocities {tuple(difference.shape)}.")
    return (difference * z).flatten(1).mean(1)
