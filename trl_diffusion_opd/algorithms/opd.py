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

"""The losses of on-policy distillation: which steps are trained, with which weights.

Student and teacher take Gaussian steps with the same variance. With every sampler, the divergence at a state is
therefore a weight `w_j` times the squared difference of the two velocities. Every loss here has that form, or has it
as its expectation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .flow import velocity_difference, velocity_gap_sq
from .samplers import STOCHASTIC_SAMPLERS, SamplerTable


WEIGHTINGS = ("kl", "released", "velocity", "x0")


def step_weights(table: SamplerTable, levels: Tensor | Sequence[float], weighting: str) -> Tensor:
    """The weight `w_j` of the squared difference of velocities (the velocity gap), for each step.

    Args:
        table (`SamplerTable`):
            Coefficients of N steps.
        levels (`Tensor` or sequence of `float`, shape `(N + 1,)`):
            The noise levels of `table`.
        weighting (`str`):
            - `"kl"`: `c² / (2 s²)` for a stochastic sampler, the KL divergence (arXiv 2605.15055, Eq. 11); `c² / 2`
              for a deterministic one (Eq. 12). The second is not the limit of the first as the noise goes to 0.
            - `"released"`: what the paper's code computes. `c² / (2 g²)` for Flow-SDE, which is Eq. 11 times the step
              length; `"kl"` otherwise.
            - `"velocity"`: 1.
            - `"x0"`: `t²`, the squared error of the predicted image.

    Returns:
        `Tensor` of shape `(N,)`, float64. With `"kl"` and `"released"`, a stochastic sampler's step without noise has
        infinite weight; `trained_steps` refuses to train such a step.

    Raises:
        ValueError: for an unknown weighting, or if `levels` does not have one entry more than `table` has steps.
    """
    levels = torch.as_tensor(levels, dtype=torch.float64, device="cpu")
    if levels.shape != (len(table) + 1,):
        raise ValueError(f"{len(table)} steps need {len(table) + 1} noise levels, got shape {tuple(levels.shape)}.")
    if weighting == "velocity":
        return torch.ones_like(table.c)
    if weighting == "x0":
        return levels[:-1] ** 2
    if weighting not in WEIGHTINGS:
        raise ValueError(f"Unknown loss weighting {weighting!r}. Choose one of {', '.join(WEIGHTINGS)}.")
    if table.name not in STOCHASTIC_SAMPLERS:
        return table.c**2 / 2
    kl = table.c**2 / (2 * table.s**2)
    if weighting == "released" and table.name == "flow_sde":
        return kl * -levels.diff()
    return kl


def trained_steps(weights: Tensor, skip_last_steps: int) -> range:
    """The steps that are trained: all but the last `skip_last_steps`.

    Args:
        weights (`Tensor` of shape `(N,)`):
            From `step_weights`.
        skip_last_steps (`int`):
            In `[0, N)`.

    Raises:
        ValueError: if no step is left, or if a step that is left has a weight that is not finite.
    """
    n = len(weights)
    if not 0 <= skip_last_steps < n:
        raise ValueError(
            f"`skip_last_steps={skip_last_steps}` must be at least 0 and leave one of the {n} steps to train. Lower "
            "it or take more inference steps."
        )
    steps = range(n - skip_last_steps)
    infinite = [j for j in steps if not weights[j].isfinite()]
    if infinite:
        raise ValueError(
            f"Steps {infinite} of {n} (counted from 0) would be trained but add no noise, so the KL divergence of "
            "student and teacher is infinite there. Raise `skip_last_steps` past them (or `noise_level`, if it is 0; "
            "with 'dance_sde' lower it, since steps that it would make unstable are ODE steps), choose the "
            "`loss_weighting` 'velocity' or 'x0', or the sampler 'ode'."
        )
    return steps


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The trained steps of a walk (a sampled trajectory), which are its first n, and the weights of their losses.

    Args:
        table (`SamplerTable`):
            The whole walk, of N steps.
        weights, kl_weights (`Tensor` of shape `(n,)`, float64):
            Weights of the trained steps in the loss, and in the KL that is logged.
        density (`Tensor` of shape `(n,)`, float64, *optional*):
            What the steps are drawn in proportion to, if only some are. By default it is `weights`.
        unbiased (`bool`):
            Whether a drawn step counts 1 / its probability, which makes the loss that of all steps. Otherwise it counts
            `n / k`, so that `density` says how much the steps count, besides their weights.
    """

    table: SamplerTable
    weights: Tensor
    kl_weights: Tensor
    density: Tensor | None = None
    unbiased: bool = True

    @classmethod
    def of(
        cls,
        table: SamplerTable,
        weighting: str,
        skip_last_steps: int,
        timestep_density: Sequence[float] | None = None,
        unbiased: bool = True,
    ) -> "StepPlan":
        """
        The plan that trains all steps but the last `skip_last_steps`, drawn by a Beta distribution of these two
        parameters, if any. Raises `ValueError` like `step_weights` and `trained_steps`.
        """
        weights, kl_weights = (step_weights(table, table.levels, name) for name in (weighting, "kl"))
        n = len(trained_steps(weights, skip_last_steps))
        density = None if timestep_density is None else beta_density(len(table), *timestep_density)[:n]
        return cls(table, weights[:n], kl_weights[:n], density, unbiased)

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def steps(self) -> range:
        """The trained steps."""
        return range(len(self))

    @property
    def walked(self) -> SamplerTable:
        """The part of the walk that ends with the last trained step."""
        return self.table.head(len(self))

    def draw(self, k: int | None, seed: Sequence[int]) -> dict[int, float]:
        """
        Draws the steps of an update: `k` steps, or all if `k` is `None`. Each is mapped to 1 / its probability, or to
        `n / k` if the plan is not unbiased. The same `seed` gives the same steps on every process.
        """
        if k is None:
            return dict.fromkeys(self.steps, 1.0)
        pi = self._probabilities(k)
        u = float(np.random.default_rng(np.random.SeedSequence(seed)).random())
        return {j: 1.0 / float(pi[j]) if self.unbiased else len(self) / k for j in systematic_sample(pi, u)}

    def _probabilities(self, k: int) -> Tensor:
        return inclusion_probabilities(self.weights if self.density is None else self.density, k)

    def expected_steps(self, k: int | None) -> tuple[float, float]:
        """The average number of steps that an update walks if it draws `k`, and the number that it trains."""
        if k is None:
            return float(len(self)), float(len(self))
        pi = self._probabilities(k)
        draws = [systematic_sample(pi, (i + 0.5) / 100) for i in range(100)]
        return sum(max(steps) + 1 for steps in draws) / len(draws), float(k)

    def loss(self, gaps: Tensor, drawn: Mapping[int, float] | None = None) -> Tensor:
        """The weighted mean of the trained steps' squared velocity gaps, or an unbiased estimate from drawn steps.

        Args:
            gaps (`Tensor` of shape `(n,)`, or `(k,)` if `k` steps were drawn):
                Squared velocity gaps, in the order of the steps.
            drawn (`Mapping[int, float]`, *optional*):
                What `draw` returned, if steps were drawn.
        """
        return self._mean(self.weights, gaps, drawn)

    def kl(self, gaps: Tensor, drawn: Mapping[int, float] | None = None) -> Tensor:
        """The same as `loss`, with the weights of the KL."""
        return self._mean(self.kl_weights, gaps, drawn)

    def _mean(self, weights: Tensor, gaps: Tensor, drawn: Mapping[int, float] | None) -> Tensor:
        if drawn is None:
            return (weights * gaps).mean()
        factors = torch.tensor([*drawn.values()], dtype=torch.float64) / len(self)
        return (factors * weights[[*drawn]] * gaps).sum()


def dominant_step(weights: Tensor) -> tuple[int, float]:
    """
    The step with the largest weight, and its share of the sum of weights, in `[0, 1]`. `weights` are those of the
    trained steps: shape `(n,)`, finite, not all 0.
    """
    step = int(weights.argmax())
    return step, float(weights[step] / weights.sum())


def beta_density(steps: int, a: float, b: float) -> Tensor:
    """The density of a Beta distribution at the steps of a walk, from noise (at 1) to image (at 0), each at its middle.

    `u^(a - 1) (1 - u)^(b - 1)`, up to a factor. It is taken in steps, not in levels, so a shift of the noise grid does
    not move it. Beta(5, 2) prefers early steps, whose mean is at .71.

    Args:
        steps (`int`):
            Number of steps.
        a, b (`float`):
            Positive.

    Returns:
        `Tensor` of shape `(steps,)`, float64, positive.
    """
    u = 1 - (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    return u ** (a - 1) * (1 - u) ** (b - 1)


def inclusion_probabilities(weights: Tensor, k: int) -> Tensor:
    """The probability `pi_j = min(1, alpha w_j)` of drawing each step, with `alpha` such that the sum is `k`.

    A drawn step gets the weight `w_j / pi_j`. The loss is then unbiased, and all steps whose `pi_j` is below 1 have
    the same weight.

    Args:
        weights (`Tensor` of shape `(n,)`):
            Finite and not negative. A step of weight 0 is never drawn.
        k (`int`):
            From 1 to the number of positive weights.

    Returns:
        `Tensor` of shape `(n,)`, float64, in `[0, 1]`.

    Raises:
        ValueError: if a weight is negative or not finite, or `k` is out of range.
    """
    weights = weights.to(torch.float64)
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError(f"Step weights must be finite and not negative, got {weights.tolist()}.")
    positive = int((weights > 0).sum())
    if not 1 <= k <= positive:
        raise ValueError(f"Cannot train {k} steps of {len(weights)}: {positive} of them have a positive weight.")
    certain = torch.zeros_like(weights, dtype=torch.bool)
    while True:
        pi = weights * ((k - certain.sum()) / weights[~certain].sum().clamp(min=torch.finfo(torch.float64).tiny))
        # A probability within rounding of 1 counts as 1, so that `systematic_sample` cannot take the step twice.
        capped = certain | (pi >= 1 - 1e-12)
        if bool((capped == certain).all()):
            return torch.where(certain, 1.0, pi)
        certain = capped


def systematic_sample(pi: Tensor, u: float) -> list[int]:
    """Draws steps with the given probabilities.

    It draws step `j` if `floor(C_j - u) > floor(C_{j-1} - u)`, where `C` is the cumulative sum of `pi`.

    Args:
        pi (`Tensor` of shape `(n,)`):
            In `[0, 1]`, with an integer sum `k`, from `inclusion_probabilities`.
        u (`float`):
            Uniform in `[0, 1)`. The same `u` gives the same steps on every process.

    Returns:
        `list[int]` of exactly `k` different steps, ascending.

    Raises:
        ValueError: if `u` is outside `[0, 1)` or the sum of `pi` is not an integer.
    """
    if not 0 <= u < 1:
        raise ValueError(f"`u` must be in [0, 1), got {u}.")
    total = float(pi.sum())
    if abs(total - round(total)) > 1e-6:
        raise ValueError(f"Inclusion probabilities must sum to the number of steps to draw, got {total}.")
    # A step of probability 1 shifts C by an integer and so does not affect the others. Drawing only the rest avoids
    # that rounding in the cumulative sum loses or repeats a step.
    taken = [j for j, p in enumerate(pi.tolist()) if p >= 1]
    rest = [j for j, p in enumerate(pi.tolist()) if 0 < p < 1]
    missing = round(total) - len(taken)
    if missing > 0:
        edges = pi[rest].to(torch.float64).cumsum(0).tolist()
        edges[-1] = float(missing)
        taken += [rest[next(i for i, edge in enumerate(edges) if edge - m > u)] for m in range(missing)]
    return sorted(taken)


def extrapolated_target(v_teacher: Tensor, v_base: Tensor, extrapolation: float) -> Tensor:
    """The target beyond the teacher, away from the base: `v_base + extrapolation (v_teacher - v_base)`.

    It is the velocity that matches the normalised product `p_T^extrapolation p_R^(1 - extrapolation)` of a step's two
    Gaussians of equal variance (arXiv 2609.39692, Eq. 8), so the closed form of the loss stays. The target is linear in
    both, so it holds for branches of guidance as it does for velocities.

    Args:
        v_teacher, v_base (`Tensor` of one shape):
            Velocities at the same states; of the base, at the teacher's guidance scale and prompt.
        extrapolation (`float`):
            1 is the teacher, 0 the base.

    Returns:
        `Tensor` of that shape and dtype.
    """
    return v_base + extrapolation * (v_teacher - v_base)


def branch_gap_sq(student: Tensor, teacher: Tensor, weight: float) -> Tensor:
    """The squared difference of conditional branches, and `weight` times that of the directions of guidance.

    Guidance with scale `w` is `v_u + w (v_c - v_u)`. Student and teacher can agree there and still differ in both
    branches, `v_c` with the prompt and `v_u` without. This (arXiv 2607.24731) is 0 only if both agree, and so the
    guided velocities of all scales:

        |v_c,S - v_c,T|² + weight |(v_c - v_u)_S - (v_c - v_u)_T|²,

    averaged over the latent dimensions like [`velocity_gap_sq`].

    Args:
        student, teacher (`Tensor` of shape `(3, B, ...)`):
            Guided velocity, conditional branch `v_c`, and direction `v_c - v_u`. The first is not used.
        weight (`float`):
            Not negative.

    Returns:
        `Tensor` of shape `(B,)`, one value a sample.

    Raises:
        ValueError: if the shapes differ.
    """
    return velocity_gap_sq(student[1], teacher[1]) + weight * velocity_gap_sq(student[2], teacher[2])


def policy_gradient_loss(
    v_student: Tensor, v_teacher: Tensor, z: Tensor | None, c: float, s: float, weight: float
) -> Tensor:
    """REINFORCE on the log-ratio of student and teacher: its gradient estimates the closed form's, for comparison.

    With `x' = mean_S + s z`, the gradient of `KL(S, T)` is the expectation of `(log p_S(x') - log p_T(x')) grad log
    p_S(x')` over the noise of the walk. For Gaussian steps of equal variance, and without cancellation,

        log p_S(x') - log p_T(x') = KL + (c / s) <v_S - v_T, z>,        grad log p_S(x') = grad (c / s) <z, v_S>.

    The KL does not depend on `z` and the score has mean 0, so subtracting the KL as a baseline changes no expectation.
    The product is divided once by the d latent dimensions and scaled by `2 s² weight / c²` (for other weightings than
    the KL's). The expectation of its gradient is then exactly the gradient of
    `weight * velocity_gap_sq(v_student, v_teacher)`. The variance of its gradient is `d + 1` times the squared norm of
    that gradient (in the space of velocities, at one state); the closed form has variance 0. Only the gradient of this
    loss has a meaning, not its value.

    Args:
        v_student (`Tensor` of shape `(B, ...)`):
            The student's velocity, with gradient.
        v_teacher, z (`Tensor` of the same shape):
            The teacher's velocity, and the noise of this step in the student's walk (`None` if the step adds none).
        c, s (`float`):
            The step's coefficients in the sampler table, `c` with its sign.
        weight (`float`):
            The step's weight, from `step_weights`.

    Returns:
        `Tensor` of shape `(B,)`, one value a sample.

    Raises:
        ValueError: if the step adds no noise, or if shapes differ.
    """
    if z is None or s == 0:
        raise ValueError("A step without noise (s = 0) has no policy gradient. Use `loss_type='kl'` or skip the step.")
    if z.shape != v_student.shape:
        raise ValueError(f"Noise has shape {tuple(z.shape)} and the student's velocity {tuple(v_student.shape)}.")
    gap = velocity_difference(v_student, v_teacher).detach()
    advantage = (c / s) * (gap * z).flatten(1).sum(1)
    score = (c / s) * (z * v_student.to(gap.dtype)).flatten(1).mean(1)
    return 2 * s**2 * weight / c**2 * advantage * score
