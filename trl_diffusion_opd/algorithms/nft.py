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

"""Reinforcement learning on the forward process (DiffusionNFT, arXiv 2509.16117).

The old policy, a slowly moving average of the student, draws images `x0`. They are noised again,
`x_t = (1 - t) x0 + t eps`, and the student is compared with the old policy at `x_t`. A good image pulls the student's
velocity toward `v = eps - x0`, a bad one pushes it away. The loss uses no likelihood and no trajectory, so any sampler
may draw the images.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


NFT_WEIGHTINGS = ("adaptive", "velocity")
LEVEL_SAMPLINGS = ("grid", "uniform")

# The smallest mean absolute error by which the adaptive weighting divides.
_MIN_ERROR = 1e-5


def optimality(advantages: Tensor, clip: float) -> Tensor:
    """
    The probability that an image counts as good: `r = 1/2 + 1/2 clip(A / clip, -1, 1)` (Algorithm 1).

    The paper writes `r = 1/2 + 1/2 clip((reward - mean of the group) / Z, -1, 1)`. If advantages are in standard
    deviations, its `Z` is `clip` standard deviations.

    Args:
        advantages (`Tensor`): rewards minus the mean of their group, in any unit.
        clip (`float`): positive. An advantage of `clip` or more gives `r = 1` (good), one of `-clip` or less gives
            `r = 0` (bad).

    Returns:
        `Tensor` of the same shape, in `[0, 1]`; 1/2 for an image whose reward is its group's mean.

    Raises:
        ValueError: if `clip` is not positive.
    """
    if not clip > 0:
        raise ValueError(f"Advantages can't be clipped at {clip}: it must be positive.")
    return 0.5 + 0.5 * (advantages / clip).clamp(-1, 1)


def implicit_velocities(v_student: Tensor, v_old: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """
    The velocities of the implicit positive and negative policy (Theorem 3.2): `(1 - beta) v_old + beta v_student` and
    `(1 + beta) v_old - beta v_student`. They lie on opposite sides of `v_old`, at the same distance.
    """
    gap = beta * (v_student - v_old)
    return v_old + gap, v_old - gap


def nft_loss(
    v_student: Tensor,
    v_old: Tensor,
    target: Tensor,
    t: float,
    optimality: Tensor,
    beta: float,
    weighting: str = "adaptive",
) -> Tensor:
    """
    The loss of DiffusionNFT: `r w+ |v+ - v|² + (1 - r) w- |v- - v|²` (Theorem 3.2), averaged over the latent
    dimensions.

    At `v_student = v_old` its gradient is that of flow matching on the image, times `beta (2 r - 1)`: toward images
    that are better than their group's mean, away from worse ones. The expected loss over all images of the old policy,
    without weights, has its minimum at `v_old + (2 / beta) Delta`, where `Delta = alpha (v_good - v_old)` points to
    the velocity of the good images.

    Args:
        v_student (`Tensor` of shape `(B, ...)`): the student's velocity, with gradient.
        v_old (`Tensor` of the same shape): velocity of the policy that drew the images, at the same states.
        target (`Tensor` of the same shape): `v = eps - x0`.
        t (`float`): noise level of the states.
        optimality (`Tensor` of shape `(B,)`): `r` from [`optimality`], in `[0, 1]`.
        beta (`float`): the paper's beta, positive. A smaller value puts the optimum further from the old policy.
        weighting (`str`):
            - `"adaptive"`: replaces `w |v - target|²` by `|x - x0|² / sg(mean |x - x0|)`, with `x = x_t - t v` of
              either policy, so that errors have the same size for every image and level.
            - `"velocity"`: `w = 1`.

    Returns:
        `Tensor` of shape `(B,)`, one value a sample, float32 or, if all velocities are wider, float64.

    Raises:
        ValueError: if shapes differ, `beta` is not positive, or the weighting is unknown.
    """
    if not v_student.shape == v_old.shape == target.shape or optimality.shape != v_student.shape[:1]:
        shapes = [tuple(tensor.shape) for tensor in (v_student, v_old, target, optimality)]
        raise ValueError(
            f"The velocities of student, old policy and image, and r, don't fit together: shapes {shapes}."
        )
    if not beta > 0:
        raise ValueError(f"beta={beta}: it must be positive, or the student has no part in the loss.")
    if weighting not in NFT_WEIGHTINGS:
        raise ValueError(f"Unknown loss weighting {weighting!r}. Choose one of {', '.join(NFT_WEIGHTINGS)}.")
    double = v_student.dtype == v_old.dtype == target.dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    v_student, v_old, target, r = (tensor.to(dtype) for tensor in (v_student, v_old, target, optimality))
    positive, negative = (
        _weighted_square(velocity - target, t, weighting)
        for velocity in implicit_velocities(v_student, v_old.detach(), beta)
    )
    return r * positive + (1 - r) * negative


def _weighted_square(error: Tensor, t: float, weighting: str) -> Tensor:
    if weighting == "velocity":
        return error.square().flatten(1).mean(1)
    # x - x0 = x_t - t v - x0 = -t (v - target). Subtracting the states themselves would lose digits.
    error = t * error.flatten(1)
    scale = error.detach().abs().mean(1).clamp(min=_MIN_ERROR)
    return error.square().mean(1) / scale


def old_policy_decay(updates: int, rate: float, maximum: float, start: int = 0) -> float:
    """
    The decay of the old policy after `i` updates of the student: `eta_i = min(rate (i - start), maximum)`, and 0 up to
    `start`. The old policy becomes `eta old + (1 - eta) student` (Algorithm 1 and Appendix C), so at 0 it is the
    student.
    """
    return min(rate * max(updates - start, 0), maximum)


def draw_levels(
    levels: Sequence[float],
    k: int,
    sampling: str,
    generator: np.random.Generator,
    trained: tuple[float, float] = (0.0, 1.0),
) -> list[float]:
    """
    Draws the noise levels at which images are trained.

    Args:
        levels (`Sequence[float]` of length `N + 1`): the noise grid of the rollout. Its last level is the image.
        k (`int`): number of levels to draw, at most N for `"grid"`.
        sampling (`str`):
            - `"grid"`: k different levels of the grid, all equally likely.
            - `"uniform"`: splits `trained` into k equal parts and draws one level uniformly from each.
        generator (`numpy.random.Generator`): source of the randomness.
        trained (`tuple[float, float]`, *optional*): the lowest and the highest level that the network knows.

    Returns:
        `list[float]`: k levels in (0, 1], decreasing.

    Raises:
        ValueError: for an unknown sampling, or if the grid has fewer than k levels.
    """
    if sampling not in LEVEL_SAMPLINGS:
        raise ValueError(f"Unknown sampling of noise levels {sampling!r}. Choose one of {', '.join(LEVEL_SAMPLINGS)}.")
    if not 1 <= k <= (len(levels) - 1 if sampling == "grid" else k):
        raise ValueError(f"{k} noise levels can't be drawn from a grid of {len(levels) - 1} steps.")
    if sampling == "grid":
        drawn = generator.choice(len(levels) - 1, size=k, replace=False)
        return [float(levels[j]) for j in sorted(drawn)]
    lowest, highest = trained
    return [float(lowest + (highest - lowest) * ((k - j - u) / k)) for j, u in enumerate(generator.random(k))]
