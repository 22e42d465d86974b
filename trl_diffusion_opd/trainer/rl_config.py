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

import math
from dataclasses import dataclass, field

from ..algorithms.advantages import AGGREGATIONS, SCALINGS
from .base_config import DiffusionConfig


@dataclass
class DiffusionRLConfig(DiffusionConfig):
    r"""
    What the configurations of the trainers by reward share. Not used directly.

    One round draws `num_generations` completions (images) for each of its prompts, scores them, and takes `num_iterations`
    optimizer steps on them. `per_device_train_batch_size` counts completions, as in TRL: those of a micro-batch on one
    process. A round of a task has

        per_device_train_batch_size x processes x gradient_accumulation_steps / tasks

    completions, which must be a multiple of `num_generations`; divided by it they are the task's prompts. A group may be
    spread over micro-batches and processes. An epoch is one pass over the prompts of the largest task.

    Parameters:
        > Parameters that control the groups

        num_generations (`int`, *optional*, defaults to `8`):
            Completions of each prompt, a group, which are compared with each other. At least 2.
        num_iterations (`int`, *optional*, defaults to `1`):
            Optimizer steps on the completions of one round. Checkpoints are saved at the end of a round, so `max_steps`
            and `save_steps` must be multiples of it.

        > Parameters that control the rewards

        reward_weights (`list[float]`, *optional*):
            Weight of each reward function, in the order in which `reward_funcs` names them, a function that serves
            several tasks counted once. Not set, all have the weight 1. A reward of weight 0 is measured and logged only.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            What advantages are divided by: the standard deviation within the `"group"`, that over all completions of the
            task in a round (`"batch"`), or nothing (`"none"`).
        multi_objective_aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            `"sum_then_normalize"`: weighted rewards are added, then scaled as `scale_rewards` says.
            `"normalize_then_sum"`: each reward is normalised within its group before they are weighted and added, and
            the sum is normalised over the task's completions of a round, whatever `scale_rewards` says.
        advantage_clip (`float`, *optional*, defaults to `5.0`):
            Advantages above it become it, and those below its negative that. It is in their own unit: standard deviations,
            or with `scale_rewards="none"` that of the rewards. Within a `"group"` of 26 completions or fewer none is above 5;
            over a large `"batch"` a rare success reaches 30.
    """

    # Parameters that control the groups
    num_generations: int = field(default=8, metadata={"help": "Completions of each prompt, a group. At least 2."})
    num_iterations: int = field(default=1, metadata={"help": "Optimizer steps on the completions of one round."})

    # Parameters that control the rewards
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function, in their order. 1 for each if not set."}
    )
    scale_rewards: str = field(
        default="group",
        metadata={"help": "Standard deviation by which advantages are divided, if any.", "choices": list(SCALINGS)},
    )
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata={
            "help": "Whether several rewards are added before they are normalised, or after.",
            "choices": list(AGGREGATIONS),
        },
    )
    advantage_clip: float = field(
        default=5.0, metadata={"help": "Largest advantage, and with a minus the least, in standard deviations."}
    )

    def _problems(self) -> list[str]:
        problems = super()._problems()
        problems += self._choice_problems("scale_rewards", "multi_objective_aggregation")
        bad = [weight for weight in self.reward_weights or [] if not math.isfinite(weight)]
        if bad:
            problems.append(f"reward_weights: {bad[0]} is not a finite number.")
        # None is what switches a limit off elsewhere.
        if not isinstance(self.advantage_clip, int | float) or not 0 < self.advantage_clip < math.inf:
            problems.append(
                f"advantage_clip={self.advantage_clip!r}: it must be a positive number, and a large one, such as 1000, leaves all "
                "advantages as they are."
            )
        if self.num_generations < 2:
            problems.append(
                f"num_generations={self.num_generations}: a completion is compared with the others of its prompt, so a "
                "group has at least 2."
            )
        if self.num_iterations < 1:
            problems.append(f"num_iterations={self.num_iterations}: it must be at least 1.")
        elif self.num_iterations > 1:
            problems += self._partial_round_problems()
        return problems

    def _partial_round_problems(self) -> list[str]:
        n, problems = self.num_iterations, []
        given: dict[str, float] = {"max_steps": self.max_steps} if self.max_steps > 0 else {}
        if self.save_strategy == "steps":
            given["save_steps"] = self.save_steps
        for name, steps in given.items():
            if steps % n:
                fitting = max(n, round(steps / n) * n)
                problems.append(
                    f"{name}={steps} with num_iterations={n} ends in the middle of a round, whose completions are not "
                    f"saved. Use a multiple of {n}, such as {fitting}."
                )
        return problems
