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

"""How good a completion was among those of its prompt: rewards to advantages, and what of them says nothing.

Rewards come as a matrix with a row a completion and a column a reward function, the completions of a prompt one after
another. NaN stands for a reward that does not apply.
"""

import math

import torch
from torch import Tensor


SCALINGS = ("group", "batch", "none")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
# As in TRL: keeps a group of nearly equal rewards from being blown up.
_EPSILON = 1e-4


def weighted_rewards(rewards: Tensor, weights: Tensor) -> Tensor:
    """The reward of each completion: the weighted sum of those that apply, NaN where none does.

    Args:
        rewards (`Tensor` of shape `(n, k)`): NaN where a reward does not apply.
        weights (`Tensor` of shape `(k,)`)

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
    """Advantages of completions over the others of their prompt, as TRL's GRPO computes them.

    Args:
        rewards (`Tensor` of shape `(n, k)`):
            Rewards of `n / num_generations` prompts, NaN where a reward does not apply. NaNs are left out of sums, means and
            deviations.
        weights (`Tensor` of shape `(k,)`):
            Weights of the rewards.
        num_generations (`int`):
            Completions of a prompt, a divisor of n.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            What the difference from the group's mean is divided by: the standard deviation of the `"group"`, that of the
            whole `"batch"`, or nothing (`"none"`).
        aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            `"sum_then_normalize"`: weighted rewards are added, then normalised. `"normalize_then_sum"`: each reward is
            normalised in its group, then they are weighted and added, and the sum is normalised over the batch
            (arXiv 2601.05242); `scale_rewards` then has no effect.
        clip (`float`, *optional*):
            The largest advantage, and with a minus the least. Without it none is clipped.

    Returns:
        `Tensor` of shape `(n,)`, float64. 0 for a completion that no reward applies to, and for one that is alone in its
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
        # A value alone in its group has no deviation: it adds nothing, and its completion is not left out for that.
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
    """Which groups have one value of a reward and so say nothing of what is better.

    Args:
        rewards (`Tensor` of shape `(n,)` or `(n, k)`): NaN where a reward does not apply.
        num_generations (`int`): completions of a prompt, a divisor of n.

    Returns:
        `Tensor` of shape `(n / num_generations,)` or `(n / num_generations, k)`, bool. A group with less than two values counts
        as constant.
    """
    std = _nanstd(_groups(rewards.double(), num_generations), 1).squeeze(1)
    return torch.isclose(std.nan_to_num(0.0), torch.zeros_like(std))


def _groups(rewards: Tensor, num_generations: int) -> Tensor:
    if len(rewards) % num_generations:
        raise ValueError(f"{len(rewards)} completions are not whole groups of {num_generations}.")
    return rewards.unflatten(0, (-1, num_generations))


def _nanstd(values: Tensor, dim: int) -> Tensor:
    """Standard deviation over `dim` (kept), with Bessel's correction, NaNs left out; NaN with less than two values."""
    count = (~values.isnan()).sum(dim, keepdim=True)
    squares = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    return torch.where(count > 1, squares / (count - 1), torch.nan).sqrt()
