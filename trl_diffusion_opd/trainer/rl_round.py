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

"""Data of a round of reinforcement learning: the drawn completions, their advantages and metrics."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Rollout:
    """
    A micro-batch of completions.

    Attributes:
        task (`str`), prompts (`list[str]`)
        positions (`list[int]`): numbers of its completions among those of the task in this round, over all processes.
        latents (`Tensor` of shape `(B, ...)`): the completions as latents at level 0.
        record: what the method kept of the trajectories.
        advantages (`Tensor` of shape `(B,)`, float32): zero until the round is scored.
    """

    task: str
    prompts: list[str]
    positions: list[int]
    latents: Tensor
    record: Any
    advantages: Tensor


@dataclass
class Round:
    """
    A round that was drawn and scored.

    Attributes:
        rollouts (`list[Rollout]`): its micro-batches.
        figures (`dict[str, dict[str, float]]`): metrics of each task's rewards.
        logged (`dict[str, list[float]]`): metrics that the rewards logged themselves.
        seconds (`dict[str, float]`): seconds of drawing and of each reward.
        constant (`dict[str, bool]`): for each reward with a weight, whether it had one value within every group.
        applied (`set[str]`): rewards that gave any value.
    """

    rollouts: list[Rollout]
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    logged: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    constant: dict[str, bool] = field(default_factory=dict)
    applied: set[str] = field(default_factory=set)

    def warnings(self, update: int) -> dict[str, str]:
        """Warnings for rewards that had one value within every group, so that nothing is learned from them."""
        return {
            name: f"In update {update} every image of each prompt got the same reward from {name!r}, so there is nothing to "
            "learn from it. If this continues, use a graded reward, prompts that sometimes succeed, or a larger "
            "num_generations. This is said once."
            if name in self.applied
            else f"In update {update} reward {name!r} was None for every image, so there is nothing to learn from it. Check "
            "which prompts and columns it needs. This is said once."
            for name, is_constant in self.constant.items()
            if is_constant
        }
