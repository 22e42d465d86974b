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
    Parameters shared by the trainers that learn from rewards. Not used directly.

    One round draws `num_generations` completions (images) for each of its prompts, scores them, and takes
    `num_iterations` optimizer steps on them. The completions of one prompt are a group. As in TRL,
    `per_device_train_batch_size` counts
    completions: those of a micro-batch on one process. So a round has

        per_device_train_batch_size x processes x gradient_accumulation_steps / tasks

    completions of each task. This must be a multiple of `num_generations`; the quotient is the task's prompts in a
    round. A group may be spread over micro-batches and processes. An epoch is one pass over the prompts of the largest
    task.

    Parameters:
        > Parameters that control the groups

        num_generations (`int`, *optional*, defaults to `8`):
            Completions of each prompt, which are compared with each other. At least 2. More give a less noisy signal,
            and take more time.
        num_iterations (`int`, *optional*, defaults to `1`):
            Optimizer steps on the completions of one round. Checkpoints are saved at the end of a round, so
            `max_steps` and `save_steps` must be multiples of it.

        > Parameters that control the rewards

        reward_weights (`list[float]`, *optional*):
            Weight of each reward function, in the order in which `reward_funcs` names them. A function that serves
            several tasks is counted once. `None` is 1 for each. A reward of weight 0 is only measured and logged.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            The standard deviation that advantages are divided by: that of the `"group"`, that of all completions of
            the task in a round (`"batch"`), or none (`"none"`).
        multi_objective_aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            How several rewards are combined. `"sum_then_normalize"`: weighted rewards are added, then scaled by
            `scale_rewards`. `"normalize_then_sum"`: each reward is normalized within its group, then they are weighted
            and added, and the sum is normalized over the task's completions of a round; `scale_rewards` is ignored.
        advantage_clip (`float`, *optional*, defaults to `5.0`):
            Advantages are clipped to plus and minus this value. Its unit is theirs: standard deviations, or with
            `scale_rewards="none"` the rewards' own unit. In a `"group"` of 26 completions or fewer none exceeds 5;
            over a large `"batch"` a rare success can reach 30.
    """

    # Parameters that control the groups
    num_generations: int = field(
        default=8, metadata={"help": "Completions of each prompt (a group), which are compared. At least 2."}
    )
    num_iterations: int = field(default=1, metadata={"help": "Optimizer steps on the completions of one round."})

    # Parameters that control the rewards
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function, in their order. If not set, 1 for each."}
    )
    scale_rewards: str = field(
        default="group",
        metadata={"help": "Standard deviation that advantages are divided by, if any.", "choices": list(SCALINGS)},
    )
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata={
            "help": "Whether several rewards are added before they are normalized, or after.",
            "choices": list(AGGREGATIONS),
        },
    )
    advantage_clip: float = field(
        default=5.0, metadata={"help": "Advantages are clipped to plus and minus this many standard deviations."}
    )

    def _problems(self) -> list[str]:
        problems = super()._problems()
        problems += self._choice_problems("scale_rewards", "multi_objective_aggregation")
        bad = [weight for weight in self.reward_weights or [] if not math.isfinite(weight)]
        if bad:
            problems.append(f"reward_weights: {bad[0]} is not a finite number.")
        # None is refused too, which switches off a limit elsewhere.
        if not isinstance(self.advantage_clip, int | float) or not 0 < self.advantage_clip < math.inf:
            problems.append(
                f"advantage_clip={self.advantage_clip!r}: it must be a positive number. A large one, such as 1000, "
                "clips nothing."
            )
        if self.num_generations < 2:
            problems.append(
                f"num_generations={self.num_generations}: a completion is compared with the others of its prompt, so "
                "it must be at least 2."
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
                    f"{name}={steps} with num_iterations={n} ends in the middle of a round, but the round's "
                    f"completions are not saved. Use a multiple of {n}, such as {fitting}."
                )
        return problems
