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

"""Turns rewards into advantages: how much better a completion (an image) is than the others of its prompt.

Rewards are a matrix with one row a completion and one column a reward function. The completions of a prompt (a group)
are consecutive rows. NaN marks a reward that does not apply.
"""

import math

import torch
from torch import Tensor


SCALINGS = ("group", "batch", "none")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
# As in TRL: bounds the advantages in a group of nearly equal rewards.
_EPSILON = 1e-4


def weighted_rewards(rewards: Tensor, weights: Tensor) -> Tensor:
    """The reward of each completion: the weighted sum of those that apply, NaN where none does.

    Args:
        rewards (`Tensor` of shape `(n, k)`): NaN where a reward does not apply.
        weights (`Tensor` of shape `(k,)`): weights of the rewards.

    Returns:
        `Tensor` of shape `(n,)`, float64.
    """
    total = (rewards.double() * weights.double()).nansum(1)
    return total.masked_fill(rewards.isnan().all(1), torch.nan)


def group_advantages(
    rewards: Tensor,
    weights: Tensor,
    num_generations: int,
    scale_rewards: str = "group",
    aggregation: str = "sum_then_normalize",
    clip: float = math.inf,
) -> Tensor:
    """Advantages of completions over the others of the same prompt, computed as in TRL's GRPO.

    Args:
        rewards (`Tensor` of shape `(n, k)`):
            Rewards of `n / num_generations` prompts, NaN where a reward does not apply. Sums, means and deviations
            ignore NaNs.
        weights (`Tensor` of shape `(k,)`):
            Weights of the rewards.
        num_generations (`int`):
            Completions of a prompt, a divisor of n.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            The divisor of the difference from the group's mean: the standard deviation of the `"group"`, that of the
            whole `"batch"`, or 1 (`"none"`).
        aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            `"sum_then_normalize"`: adds the weighted rewards, then normalises the sum. `"normalize_then_sum"`:
            normalises each reward in its group, adds them with their weights, and normalises the sum over the batch
            (arXiv 2601.05242); `scale_rewards` then has no effect.
        clip (`float`, *optional*):
            Advantages are clipped to `[-clip, clip]`. By default none is clipped.

    Returns:
        `Tensor` of shape `(n,)`, float64. 0 for a completion to which no reward applies, and for one alone in its
        group.

    Raises:
        ValueError: for an unknown `scale_rewards` or `aggregation`, or if n is not a multiple of `num_generations`.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"Unknown aggregation {aggregation!r}. Choose one of {', '.join(AGGREGATIONS)}.")
    if scale_rewards not in SCALINGS:
        raise ValueError(f"Unknown scaling {scale_rewards!r} of rewards. Choose one of {', '.join(SCALINGS)}.")
    groups = _groups(rewards.double(), num_generations)
    if aggregation == "normalize_then_sum":
        each = (groups - groups.nanmean(1, keepdim=True)) / (_nanstd(groups, 1) + _EPSILON)
        # A value alone in its group has no deviation: it counts as 0, and the completion's other rewards still count.
        summed = weighted_rewards(each.flatten(0, 1).nan_to_num(0.0), weights)
        summed = summed.masked_fill(rewards.isnan().all(1), torch.nan)
        advantages = (summed - summed.nanmean()) / (_nanstd(summed, 0) + _EPSILON)
    else:
        total = _groups(weighted_rewards(rewards, weights), num_generations)
        advantages = total - total.nanmean(1, keepdim=True)
        if scale_rewards == "group":
            advantages = advantages / (_nanstd(total, 1) + _EPSILON)
        elif scale_rewards == "batch":
            advantages = advantages / (_nanstd(total.flatten(), 0) + _EPSILON)
    return advantages.flatten().nan_to_num(0.0).clamp(-clip, clip)


def constant_groups(rewards: Tensor, num_generations: int) -> Tensor:
    """Which groups have the same reward for every completion, so that nothing can be learned from them.

    Args:
        rewards (`Tensor` of shape `(n,)` or `(n, k)`): NaN where a reward does not apply.
        num_generations (`int`): completions of a prompt, a divisor of n.

    Returns:
        `Tensor` of shape `(n / num_generations,)` or `(n / num_generations, k)`, bool. A group with fewer than two
        values counts as constant.
    """
    std = _nanstd(_groups(rewards.double(), num_generations), 1).squeeze(1)
    return torch.isclose(std.nan_to_num(0.0), torch.zeros_like(std))


def _groups(rewards: Tensor, num_generations: int) -> Tensor:
    if len(rewards) % num_generations:
        raise ValueError(f"{len(rewards)} completions are not whole groups of {num_generations}.")
    return rewards.unflatten(0, (-1, num_generations))


def _nanstd(values: Tensor, dim: int) -> Tensor:
    """Standard deviation over `dim` (kept), with Bessel's correction, ignoring NaNs; NaN for fewer than two values."""
    count = (~values.isnan()).sum(dim, keepdim=True)
    squares = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    return torch.where(count > 1, squares / (count - 1), torch.nan).sqrt()
