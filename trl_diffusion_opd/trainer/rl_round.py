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

"""A round of reinforcement learning: completions of its prompts, their scores and advantages."""

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
        positions (`list[int]`): numbers of its completions among the task's of this round, over all processes.
        latents (`Tensor` of shape `(B, ...)`): the completions at level 0, before they are decoded.
        record: what the method's walk kept.
        advantages (`Tensor` of shape `(B,)`, float32): known when the round is scored.
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
        figures (`dict[str, dict[str, float]]`): metrics of the rewards of each task.
        logged (`dict[str, list[float]]`): what the rewards logged themselves.
        seconds (`dict[str, float]`): what it took.
        constant (`dict[str, bool]`): by reward that counts whether it was the same in every group.
        applied (`set[str]`): rewards with a value.
    """

    rollouts: list[Rollout]
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    logged: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    constant: dict[str, bool] = field(default_factory=dict)
    applied: set[str] = field(default_factory=set)

    def warnings(self, update: int) -> dict[str, str]:
        """What to say of rewards that were the same in every group of every task, which teaches nothing."""
        return {
            name: f"Reward {name!r} had one value in every group of update {update}, so it says "
            "nothing of which completion is better. If this goes on, give it degrees, choose prompts that "
            "sometimes succeed, or raise num_generations. This is said once."
            if name in self.applied
            else f"Reward {name!r} was None for every image of update {update}, so it teaches "
            "nothing. Look at what it needs of the prompts and of the columns. This is said once."
            for name, is_constant in self.constant.items()
            if is_constant
        }
