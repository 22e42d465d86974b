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

"""The samplers, each as a table of four coefficients a step.

The noise level `t` goes from 1 (noise) to 0 (image) along `levels`. The network predicts the velocity `v = eps - x0`
of `x = (1 - t) x0 + t eps`, so `x0 = x - t v` and `eps = x + (1 - t) v`. A step of every sampler here is Gaussian,
with a mean that is linear in `x` and `v`:

    x_{j+1} = a_j x_j + c_j v_j + b_j h_j + s_j z_j,    z_j ~ N(0, I),    h_j = x0 of the step before

At the same state, the steps of two networks differ only in their means, by `c_j (v_1 - v_2)`. The losses in `opd.py`
need nothing else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


SAMPLERS = ("ode", "flow_sde", "dance_sde", "cps", "ddim", "dpm2m")
STOCHASTIC_SAMPLERS = ("flow_sde", "dance_sde", "cps", "ddim")
DEFAULT_NOISE_LEVEL = 0.7

# The second order extrapolates the last change of x0 by r / 2, where r is the ratio of two steps in log-SNR. With a
# larger r it amplifies errors more than it corrects (r is 4.6 on step 8 of SD3's 10-step grid).
MAX_DPM_STEP_RATIO = 2.0


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """The coefficients of a walk (a sampled trajectory) of N steps along `levels`.

    Args:
        a, c, b, s (`Tensor` of shape `(N,)`, float64, on the CPU):
            Factors of the state, the velocity, the previous step's x0, and the noise. `s` is the standard deviation of
            the whole step and includes the square root of the step length. `c` is negative.
        levels (`Tensor` of shape `(N + 1,)`, float64, on the CPU):
            Noise levels, strictly decreasing in `[0, 1]`.
        name (`str`):
            One of `SAMPLERS`.
    """

    a: Tensor
    c: Tensor
    b: Tensor
    s: Tensor
    levels: Tensor
    name: str

    def __len__(self) -> int:
        return len(self.a)

    @property
    def deterministic(self) -> bool:
        """Whether no step adds noise."""
        return not bool((self.s != 0).any())

    def head(self, n: int) -> "SamplerTable":
        """The table of the first `n` steps, for a walk that stops early. Raises `ValueError` unless `0 <= n <= N`."""
        if not 0 <= n <= len(self):
            raise ValueError(f"The walk has {len(self)} steps, so its first {n} cannot be taken.")
        return SamplerTable(self.a[:n], self.c[:n], self.b[:n], self.s[:n], self.levels[: n + 1], self.name)


def sampler_table(name: str, levels: Tensor | Sequence[float], noise_level: float | None = None) -> SamplerTable:
    """Computes the coefficients of a sampler on a noise grid.

    Args:
        name (`str`):
            - `"ode"`: Euler steps of the probability flow (arXiv 2605.15055, Eq. 12; the paper's default).
            - `"flow_sde"`: Flow-GRPO (arXiv 2505.05470), with diffusion `g² = eta² t / (1 - t)`, which grows without
              bound towards t = 1. If the first step would reverse the state's sign (`a <= 0`:
              `eta² |dt| >= 2 (1 - t)`), its `g²` is computed at `levels[1]`. That is so on every grid that starts at
              1, and rarely on one that starts at 0.9.
            - `"dance_sde"`: DanceGRPO (arXiv 2505.07818), with `g = eta`. A step that would amplify the noise that it
              should
              remove (`eta² |dt| > 2 t (t + t')`; at the end of a grid `eta² > 2 t`) becomes an ODE step.
            - `"cps"`: coefficients-preserving sampling (arXiv 2509.05952).
            - `"ddim"`: DDIM with its `eta` (arXiv 2010.02502), adapted to flow matching.
            - `"dpm2m"`: DPM-Solver++ 2M (arXiv 2211.01095). Four kinds of steps are first order (Euler): the first
              step, the one after a start at `t = 1`, a step to 0, and one whose log-SNR step is over twice the
              previous one.
        levels (`Tensor` or sequence of `float`, shape `(N + 1,)`):
            Noise levels, strictly decreasing in `[0, 1]`. They need not start at 1.
        noise_level (`float`, *optional*):
            How much noise the sampler adds (`eta`): any value >= 0 for the two SDEs, `[0, 1]` for `"cps"` and
            `"ddim"`. Defaults to 0.7 for these four. The same value means different amounts of noise in different
            samplers.

    Returns:
        [`SamplerTable`]: the coefficients of N steps.

    Raises:
        ValueError: for an unknown sampler, a grid that is not strictly decreasing in `[0, 1]`, a noise level out of
            range, or any noise level with a sampler that has none.
    """
    check_sampler(name)
    levels = _checked_levels(levels)
    eta = checked_noise_level(name, noise_level)
    t, t_next = levels[:-1], levels[1:]
    dt = t_next - t
    b = torch.zeros_like(t)
    if name == "ode":
        a, c, s = torch.ones_like(t), dt, torch.zeros_like(t)
    elif name == "flow_sde":
        # Only g² is capped, and not by a test for t == 1: grids also start at .9997.
        needed = eta**2 * -dt[0] >= 2 * (1 - t[0])
        a, c, s = _sde_step(t, dt, g_sq_over_t=eta**2 / (1 - (t.clamp(max=levels[1].item()) if needed else t)))
    elif name == "dance_sde":
        g_sq_over_t = eta**2 / t
        # On data without spread a step multiplies the noise by t'/t + g² dt / (2 t²): unstable below -1.
        unstable = t_next / t + g_sq_over_t * dt / (2 * t) < -1
        g_sq_over_t = torch.where(unstable, 0.0, g_sq_over_t)
        a, c, s = _sde_step(t, dt, g_sq_over_t)
    elif name == "cps":
        angle = torch.tensor(eta * torch.pi / 2, dtype=torch.float64)
        a, c = _clean_and_noise_step(t, t_next, kept_noise=t_next * angle.cos())
        s = t_next * angle.sin()
    elif name == "ddim":
        fresh = 1 - (t_next * (1 - t) / (t * (1 - t_next))) ** 2
        s = eta * t_next * fresh.sqrt()
        a, c = _clean_and_noise_step(t, t_next, kept_noise=t_next * (1 - eta**2 * fresh).sqrt())
    else:
        half_r = _dpm_step_ratio(levels) / 2
        b = dt / t * half_r
        a, c, s = 1 - b, dt * (1 + half_r), torch.zeros_like(t)
    return SamplerTable(a, c, b, s, levels, name)


def sde_window(table: SamplerTable, steps: range) -> SamplerTable:
    """The same walk with noise only in a window of steps, and Euler's ODE steps elsewhere (MixGRPO, arXiv 2507.21802).

    Args:
        table (`SamplerTable`):
            The table of a stochastic sampler, of N steps.
        steps (`range`):
            The window: the steps that keep their noise, in `[0, N)`.

    Raises:
        ValueError: if `steps` is empty, outside the walk, or contains a step that adds no noise.
    """
    n = len(table)
    if not (steps and 0 <= steps.start < steps.stop <= n):
        raise ValueError(f"The steps {list(steps)} are not a window of a walk of {n} steps, counted from 0.")
    silent = [j for j in steps if table.s[j] == 0]
    if silent:
        raise ValueError(
            f"Steps {silent} of the sampler {table.name!r} (counted from 0, of {n}) add no noise, so the window "
            "cannot hold them. Choose an earlier window, or raise `noise_level` if it is 0. With 'dance_sde' lower "
            "it: steps that it would make unstable are ODE steps."
        )
    ode = sampler_table("ode", table.levels)
    inside = torch.tensor([j in steps for j in range(n)])
    return SamplerTable(
        a=torch.where(inside, table.a, ode.a),
        c=torch.where(inside, table.c, ode.c),
        b=torch.where(inside, table.b, ode.b),
        s=torch.where(inside, table.s, ode.s),
        levels=table.levels,
        name=table.name,
    )


def check_sampler(name: str) -> None:
    """Raises `ValueError` if `name` is not one of `SAMPLERS`."""
    if name not in SAMPLERS:
        raise ValueError(f"Unknown sampler {name!r}. Choose one of {', '.join(SAMPLERS)}.")


def default_skip_last_steps(sampler_name: str) -> int:
    """
    The number of last steps that are not trained by default. It is 1 as in the paper's code, and 2 for `"cps"` and
    `"ddim"`, whose last step has no noise and the one before it almost none. Raises `ValueError` for an unknown
    sampler.
    """
    check_sampler(sampler_name)
    return 2 if sampler_name in ("cps", "ddim") else 1


def _sde_step(t: Tensor, dt: Tensor, g_sq_over_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Euler-Maruyama of `dx = (v + g² eps / (2 t)) dt + g dw`, which keeps the marginals of the flow for any g."""
    half = g_sq_over_t / 2
    return 1 + half * dt, dt * (1 + half * (1 - t)), (-dt * t * g_sq_over_t).sqrt()


def _clean_and_noise_step(t: Tensor, t_next: Tensor, kept_noise: Tensor) -> tuple[Tensor, Tensor]:
    """The mean `(1 - t') x0 + kept_noise eps` in terms of `x` and `v`."""
    return (1 - t_next) + kept_noise, -(1 - t_next) * t + kept_noise * (1 - t)


def _dpm_step_ratio(levels: Tensor) -> Tensor:
    """The ratio of each log-SNR step to the one before; 0 for a step of first order."""
    log_snr = (1 - levels).log() - levels.log()
    step = log_snr.diff()
    ratio = torch.zeros_like(step)
    ratio[1:] = step[1:] / step[:-1]
    # The log-SNR is infinite at t = 1 and t = 0: a start at 1 gives 0, a step to 0 gives inf, both together give nan.
    return torch.where(ratio <= MAX_DPM_STEP_RATIO, ratio, 0.0)


def _checked_levels(levels: Tensor | Sequence[float]) -> Tensor:
    levels = torch.as_tensor(levels, dtype=torch.float64, device="cpu").detach().clone()
    if levels.ndim != 1 or len(levels) < 2:
        raise ValueError(f"A noise grid is a list of two or more levels, got shape {tuple(levels.shape)}.")
    # This refuses nan as well, since every comparison with it is false.
    if not bool((levels.diff() < 0).all() and levels[0] <= 1 and levels[-1] >= 0):
        raise ValueError(
            "Noise levels must decrease strictly from at most 1 (noise) to at least 0 (image), got "
            f"{levels.tolist()}. "
            "Levels are sigmas, not timesteps up to 1000."
        )
    return levels


def checked_noise_level(name: str, noise_level: float | None) -> float:
    """
    The noise level (eta) that a sampler uses: 0 for a sampler without noise, the default if `noise_level` is `None`.

    Raises:
        ValueError: if the sampler does not accept this noise level.
    """
    if name not in STOCHASTIC_SAMPLERS:
        if noise_level is not None:
            *others, last = STOCHASTIC_SAMPLERS
            raise ValueError(
                f"noise_level={noise_level} with sampler={name!r}, which has no noise: leave it unset or choose "
                f"{', '.join(others)} or {last}."
            )
        return 0.0
    eta = DEFAULT_NOISE_LEVEL if noise_level is None else float(noise_level)
    if name in ("cps", "ddim") and not 0 <= eta <= 1:
        raise ValueError(f"noise_level={noise_level}: {name} takes 0 to 1.")
    if not math.isfinite(eta):
        raise ValueError(f"noise_level={noise_level}: it must be a finite number.")
    if eta < 0:
        raise ValueError(f"noise_level={noise_level} is negative.")
    return eta
