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
What a network predicts, and on which noise grid its pipeline walks. Models that predict noise, v or the sample are flow
models in other coordinates.

A variance-preserving model has the state `x_vp = alpha x0 + sigma eps`, `alpha² + sigma² = 1`. With
`x = x_vp / (alpha + sigma)` and `t = sigma / (alpha + sigma)` the same state is `x = (1 - t) x0 + t eps`, that of flow
matching, and `v = eps - x0` follows from what the network predicts. An Euler step in `(x, t)` is then a step of DDIM
(arXiv 2010.02502) without noise. Since `alpha² + sigma² = 1`, alpha and sigma are functions of `t` alone:
`alpha + sigma = 1 / sqrt((1 - t)² + t²)`.

Only this file knows other coordinates than those of flow matching.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, PNDMScheduler, SchedulerMixin
from torch import Tensor


FLOW, REVERSED, EPSILON, V, SAMPLE = "flow", "reversed flow", "epsilon", "v_prediction", "sample"

# Above this level the noise hides the image, so that x0 can't be computed from predicted noise. Grids that start at
# zero signal reach 1, or 0.9998 where a scheduler avoids dividing by 0; all others stay below 0.995.
_NO_SIGNAL = 0.999
# Signal and noise of a grid that starts at t = 1 are not divided by 0.
_TINY = 1e-12
_HOW = "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)"


@dataclass(frozen=True)
class Prediction:
    """
    What a network predicts: `"flow"` (`eps - x0`), `"reversed flow"` (`x0 - eps`, with a scheduler that counts from noise
    at 0 to the image at 1), `"epsilon"` (`eps`), `"v_prediction"` (`alpha eps - sigma x0`) or
    `"sample"` (`x0`).
    """

    kind: str

    @property
    def is_flow(self) -> bool:
        return self.kind in (FLOW, REVERSED)

    def network_state(self, x: Tensor, t: float | Sequence[float]) -> Tensor:
        """
        The state that the network gets.

        Args:
            x (`torch.Tensor` of shape `(B, ...)`): state in flow coordinates.
            t (`float` or `Sequence[float]` of length `B`): noise level in [0, 1], one for all samples or one for each.

        Returns:
            `torch.Tensor` of `x`'s shape: `(alpha + sigma) x`; `x` itself for a flow model.
        """
        return x if self.is_flow else _times(_each(_scale, t), x)

    def flow_state(self, x_vp: Tensor, t: float | Sequence[float]) -> Tensor:
        """The inverse of [`~Prediction.network_state`]."""
        return x_vp if self.is_flow else _times(_each(lambda level: 1 / _scale(level), t), x_vp)

    def velocity(self, output: Tensor, x: Tensor, t: float | Sequence[float]) -> Tensor:
        """
        The velocity `v = eps - x0` that a network's output means.

        Args:
            output (`torch.Tensor` of shape `(B, ...)`): the output, after guidance.
            x (`torch.Tensor` of the same shape): state in flow coordinates.
            t (`float` or `Sequence[float]` of length `B`): noise level in (0, 1], below 1 for `"epsilon"`.

        Returns:
            `torch.Tensor` of `x`'s shape; for a flow model `output` itself, or its negative.
        """
        if self.is_flow:
            return -output if self.kind == REVERSED else output
        return _times(_each(lambda level: self._factors(level)[0], t), output) + _times(
            _each(lambda level: self._factors(level)[1], t), x
        )

    def output_weight(self, t: float) -> float:
        """The squared error of an output, divided by that of its velocity, at the level `t`."""
        return 1.0 if self.is_flow else 1 / self._factors(t)[0] ** 2

    def _factors(self, t: float) -> tuple[float, float]:
        """`p, q` of `v = p output + q x`."""
        if self.kind == EPSILON:
            return 1 / (1 - t), -1 / (1 - t)
        if self.kind == SAMPLE:
            return -1 / t, 1 / t
        return _scale(t), (2 * t - 1) * _scale(t) ** 2


def _scale(t: float) -> float:
    """`alpha + sigma` at the level `t`."""
    return 1 / math.sqrt((1 - t) ** 2 + t**2)


def _each(function: Callable[[float], float], t: float | Sequence[float]) -> float | list[float]:
    return [function(level) for level in t] if isinstance(t, Sequence) else function(t)


def _times(factor: float | list[float], x: Tensor) -> Tensor:
    """`x` times one factor, or each of its rows times its own."""
    if isinstance(factor, list):
        rows = torch.tensor(factor, dtype=x.dtype, device=x.device)
        return rows.reshape(-1, *[1] * (x.ndim - 1)) * x
    return factor * x


@dataclass(frozen=True, eq=False)
class NoiseGrid:
    """
    A pipeline's grid of noise levels.

    Args:
        levels (`torch.Tensor` of shape `(N + 1,)`, float64): decreasing. The last is 0 or, if the pipeline stops
            earlier, above 0.
        timestep (`Callable`): returns the timestep that the network gets at a level.
        start_scale (`float`): what the pipeline's first latents are divided by to give those in flow coordinates.
        end_scale (`float`): what latents in flow coordinates at the last level are multiplied by to give those that the
            pipeline decodes.
        lowest, highest (`float`): the range of levels that the network was trained on.
    """

    levels: Tensor
    timestep: Callable[[float], float]
    start_scale: float = 1.0
    end_scale: float = 1.0
    lowest: float = 0.0
    highest: float = 1.0


def prediction_of(pipeline: DiffusionPipeline) -> Prediction:
    """
    What the network of a pipeline predicts, as its scheduler says. Call [`scheduler_problem`] before.
    """
    scheduler = pipeline.components["scheduler"]
    if is_flow_matching(scheduler):
        return Prediction(REVERSED if scheduler.config.get("invert_sigmas") else FLOW)
    return Prediction(str(scheduler.config["prediction_type"]))


def is_flow_matching(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler is for networks that predict the velocity of flow matching."""
    config = scheduler.config
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or (
        config.get("prediction_type") == "flow_prediction" and bool(config.get("use_flow_sigmas"))
    )


def grid_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """
    A copy of a scheduler to read a grid from. PNDM makes one forward more than it has steps, so a DDIM of the same
    timesteps takes its place.
    """
    if isinstance(scheduler, PNDMScheduler):
        return DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    return copy.deepcopy(scheduler)


def scheduler_problem(scheduler: SchedulerMixin, pipeline_name: str) -> str | None:
    """
    Says why the velocity can't be computed with a scheduler; `None` if it can. A scheduler that is not for flow matching
    is tried out on a step: its name does not count.

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]): a pipeline's scheduler. It is not changed.
        pipeline_name (`str`): the pipeline's class, for the message.
    """
    if is_flow_matching(scheduler):
        return None
    name, prediction = type(scheduler).__name__, scheduler.config.get("prediction_type")
    if "alphas_cumprod" not in vars(scheduler) or prediction not in (EPSILON, V, SAMPLE):
        return (
            f"{pipeline_name} has the scheduler {name} with prediction_type={prediction!r}, which is neither of flow "
            "matching nor of a model that predicts noise, v or the sample with a variance-preserving schedule. Use "
            "the scheduler that the model was published with."
        )
    if str(scheduler.config.get("variance_type")).startswith("learned"):
        return (
            f"{name} takes a variance besides the noise from the network (variance_type="
            f"{scheduler.config['variance_type']!r}), for which there is no velocity. Use {_HOW}, if the pipeline allows it."
        )
    trial = grid_scheduler(scheduler)
    trial.set_timesteps(4)
    if list(signature(scheduler.step).parameters)[:3] != ["model_output", "timestep", "sample"]:
        return f"{name} does not step from the network's output alone. Use {_HOW}."
    if len(trial.timesteps) != 4:
        return (
            f"{name} is of second order: it makes {len(trial.timesteps)} forwards for 4 steps, and a step here is one "
            f"forward. Use {_HOW}; the option sampler='dpm2m' is of second order with one forward a step."
        )
    x, output = torch.tensor([[[[0.3]]]]), torch.tensor([[[[0.7]]]])
    if not torch.equal(_one_step(trial, output, x, seed=0), _one_step(trial, output, x, seed=1)):
        return (
            f"{name} adds noise by itself, but here the option `sampler` says which noise is added. Use {_HOW}, and for "
            "noise sampler='ddim' with a noise_level."
        )
    if not {"sigmas", "final_alpha_cumprod"} & set(vars(trial)) or bool((trial.timesteps.diff() > 0).any()):
        return f"{name} does not walk from noise to an image on a grid of its own. Use {_HOW}."
    if not torch.allclose(_one_step(trial, 1e3 * output, 1e3 * x), 1e3 * _one_step(trial, output, x), rtol=1e-3):
        return (
            f"{name} clips the predicted image (clip_sample or thresholding), which is meant for pixels and not for "
            f"latents. Use {_HOW[:-1]}, clip_sample=False, thresholding=False)."
        )
    return None


def _one_step(scheduler: SchedulerMixin, output: Tensor, x: Tensor, seed: int = 0) -> Tensor:
    trial = copy.deepcopy(scheduler)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Not the first step, at which a schedule of zero signal would divide by 0.
        return trial.step(output, trial.timesteps[1], x, return_dict=False)[0]


def noise_grid(prediction: Prediction, scheduler: SchedulerMixin) -> NoiseGrid:
    """
    Reads the grid of a scheduler whose timesteps are set.

    Raises:
        [`ValueError`]: if it does not have one level a step, or if a network can't be used on it.
    """
    grid = _flow_grid(scheduler) if prediction.is_flow else _vp_grid(scheduler)
    name = type(scheduler).__name__
    if grid.levels[0] > 1:
        raise ValueError(
            f"{name} makes noise levels above 1: {_short(grid.levels)}. These are noise over signal, which the pipeline "
            "itself converts for its network; a pipeline of flow matching has levels from 1 (noise) to 0 (image)."
        )
    if not bool((grid.levels.diff() < 0).all()):
        raise ValueError(
            f"{name} makes noise levels that do not decrease with every step: {_short(grid.levels)}. Use fewer "
            "steps; or, if the last step stands still, a scheduler with steps_offset=1 or set_alpha_to_one=True."
        )
    if prediction.kind == EPSILON and grid.levels[0] > _NO_SIGNAL:
        raise ValueError(
            f"{name} starts at the noise level {float(grid.levels[0]):.4f}, without signal (rescale_betas_zero_snr), "
            "where an image can't be computed from the predicted noise (prediction_type='epsilon'). Use "
            f"{_HOW[:-1]}, rescale_betas_zero_snr=False), or prediction_type='v_prediction' if the model was trained "
            "for it."
        )
    return grid


def _flow_grid(scheduler: SchedulerMixin) -> NoiseGrid:
    # Flow-prediction solvers (Sana's) have integer timesteps, so only their levels are used.
    levels = scheduler.sigmas.to("cpu", torch.float64)
    steps = scheduler.config.num_train_timesteps
    own = scheduler.timesteps.to("cpu", torch.float64)
    if scheduler.config.get("invert_sigmas"):  # Mochi's
        return NoiseGrid(1 - levels, lambda t: (1 - t) * steps)
    # CogView4 shifts the levels but gives its transformer the timesteps from before the shift.
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and len(own) == len(levels) - 1:
        if not torch.allclose(own, levels[:-1] * steps):
            knots, values = levels.flip(0).numpy(), torch.cat([own, own.new_zeros(1)]).flip(0).numpy()
            return NoiseGrid(levels, lambda t: float(np.interp(t, knots, values)))
    return NoiseGrid(levels, lambda t: t * steps)


def _vp_grid(scheduler: SchedulerMixin) -> NoiseGrid:
    trained = _levels_of(scheduler.alphas_cumprod)
    timesteps = scheduler.timesteps.to("cpu", torch.float64)
    if timesteps.max() > len(trained) - 1:
        raise ValueError(
            f"{type(scheduler).__name__} makes the timestep {int(timesteps.max())} for {len(timesteps)} steps, but the "
            f"model knows {len(trained)} from 0 on. Use fewer steps."
        )
    if "sigmas" in vars(scheduler):  # sigma / alpha of every level
        sigmas = scheduler.sigmas.to("cpu", torch.float64)
        levels = sigmas / (1 + sigmas)
    else:
        levels = torch.cat([trained[timesteps.long()], _last_level(scheduler, trained)[None]])
    log_ratios = _log_ratio(trained.numpy())

    def between(t: float) -> float:
        return float(np.interp(_log_ratio(t), log_ratios, np.arange(len(log_ratios))))

    if any(abs(between(t) - own) > 1 for t, own in zip(levels.tolist(), timesteps.tolist(), strict=False)):
        raise ValueError(
            f"{type(scheduler).__name__} gives the network timesteps that do not belong to its noise levels: "
            f"{_short(timesteps)} at {_short(levels)}. Use {_HOW}."
        )
    exactly = dict(zip(levels.tolist(), timesteps.tolist(), strict=False))
    # Schedulers with the scaling of EDM (arXiv 2206.00364) walk on x0 + (sigma / alpha) eps.
    is_edm = float(scheduler.scale_model_input(torch.ones(1), scheduler.timesteps[0])) != 1
    start, end = (1 / (1 - t) if is_edm else _scale(t) for t in (min(float(levels[0]), 1 - _TINY), float(levels[-1])))
    return NoiseGrid(
        levels,
        lambda t: exactly[t] if t in exactly else between(t),
        start_scale=start,
        end_scale=end,
        lowest=float(trained[0]),
        highest=float(trained[-1]),
    )


def all_levels(prediction: Prediction, scheduler: SchedulerMixin) -> NoiseGrid:
    """The grid of all timesteps that a network was trained on, of a model that is not of flow matching."""
    assert not prediction.is_flow
    trained = _levels_of(scheduler.alphas_cumprod)
    log_ratios, last = _log_ratio(trained.numpy()), len(trained) - 1
    if prediction.kind == EPSILON and trained[-1] > _NO_SIGNAL:
        last -= 1  # predicted noise says nothing about an image at zero signal
    return NoiseGrid(
        torch.cat([trained[: last + 1].flip(0), trained.new_zeros(1)]),
        lambda t: float(np.interp(_log_ratio(t), log_ratios, np.arange(len(log_ratios)))),
        lowest=float(trained[0]),
        highest=float(trained[last]),
    )


def _levels_of(alphas_cumprod: Tensor) -> Tensor:
    """The levels of all timesteps, increasing. `alphas_cumprod` are the squares of alpha."""
    squares = alphas_cumprod.detach().to("cpu", torch.float64)
    alpha, sigma = squares.sqrt(), (1 - squares).sqrt()
    return sigma / (alpha + sigma)


def _last_level(scheduler: SchedulerMixin, trained: Tensor) -> Tensor:
    """The level at which DDIM's last step ends."""
    step = scheduler.config.num_train_timesteps // len(scheduler.timesteps)
    previous = int(scheduler.timesteps[-1]) - step
    return trained[previous] if previous >= 0 else _levels_of(torch.as_tensor(scheduler.final_alpha_cumprod))


def _log_ratio(t: float | np.ndarray) -> np.ndarray:
    """`log(sigma / alpha)`."""
    t = np.clip(t, _TINY, 1 - _TINY)
    return np.log(t) - np.log1p(-t)


def _short(values: Tensor) -> str:
    shown = [round(value, 4) for value in values.tolist()]
    return f"{shown}" if len(shown) <= 6 else f"[{', '.join(map(str, shown[:5]))}, …, {shown[-1]}]"
