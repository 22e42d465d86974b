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

"""An optimizer step is a round: every task has the same number of micro-batches in it, and they take turns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..data.tasks import TaskSampler, task_of
from ..problems import Problems
from ..rewards.base import Row
from .base_config import DiffusionConfig


@dataclass(frozen=True)
class Rounds:
    """
    What belongs to which task, and when it has its turn.

    Attributes:
        rows (`dict[str, np.ndarray]`): by task the rows of the training data.
        weights (`dict[str, float]`): by task its weight in the loss.
        micro_batches (`int`): of each task in a round, on each process.
        task_column (`str`)
    """

    rows: Mapping[str, np.ndarray]
    weights: Mapping[str, float]
    micro_batches: int
    task_column: str

    @classmethod
    def of(cls, rows: Mapping[str, np.ndarray], args: DiffusionConfig, problems: Problems) -> "Rounds":
        """The rounds that `args` asks for. Sets their `gradient_accumulation_steps` if they leave it open."""
        tasks, n = list(rows), max(1, len(rows))
        if tasks and args.gradient_accumulation_steps is None:
            args.gradient_accumulation_steps = n
        steps = args.gradient_accumulation_steps or n
        if tasks and steps % n:
            problems.append(
                f"gradient_accumulation_steps={steps} is not a multiple of the {n} tasks "
                f"({', '.join(tasks)}), which all have an equal part of an update. Use {-(-steps // n) * n}, or leave it unset."
            )
        given = args.task_weights or {}
        assert isinstance(given, dict)  # the config has parsed or refused strings
        unknown = [task for task in given if task not in tasks]
        if tasks and unknown:
            problems.append(f"task_weights names tasks {unknown} without prompts; the data has {tasks}.")
        weights = {task: float(given.get(task, 1.0)) for task in tasks}
        return cls(rows, weights, steps // n, args.task_column)

    @property
    def tasks(self) -> list[str]:
        return list(self.rows)

    @property
    def counts(self) -> dict[str, int]:
        """Rows of each task."""
        return {task: len(rows) for task, rows in self.rows.items()}

    def __len__(self) -> int:
        """Micro-batches of a round on a process."""
        return self.micro_batches * len(self.rows)

    def share(self, task: str) -> float:
        """Factor of a micro-batch's mean loss, such that an update's losses add up to the weighted mean over tasks."""
        return self.weights[task] / sum(self.weights.values()) / self.micro_batches

    def sampler(self, batch_size: int, seed: int, repeats: int, passes: int) -> TaskSampler:
        """The order of the rows, as [`TaskSampler`] takes its arguments."""
        return TaskSampler(
            [*self.rows.values()],
            batch_size=batch_size,
            micro_batches=self.micro_batches,
            seed=seed,
            repeats=repeats,
            passes=passes,
        )

    def turn(
        self, number: int, rows: Sequence[Row], size: int, update: int, process: tuple[int, int]
    ) -> tuple[str, list[int]]:
        """
        Task of a round's micro-batch, and its samples' positions among the task's samples of this round.

        Args:
            number (`int`): of the micro-batch in the round.
            rows (`list[dict]`): its rows, of which there must be `size`.
            update (`int`): for the message.
            process (`tuple[int, int]`): index of this process and number of processes.

        Raises:
            [`RuntimeError`]: if its rows are of another task than the one whose turn it is, of several, or not as many as it
                has. A data loader that was replaced, or one that hands out rows in another order, would have them taught by
                another task's teacher.
        """
        task, index = self.tasks[number % len(self.rows)], number // len(self.rows)
        found = sorted({task_of(row, self.task_column) for row in rows})
        if found != [task] or len(rows) != size:
            raise RuntimeError(
                f"Micro-batch {number + 1} of update {update} has {len(rows)} rows of {', '.join(found)}, where "
                f"{size} of {task!r} are due. Rounds of tasks need the trainer's own data loader and sampler, which hand out the "
                "rows in order: leave get_train_dataloader and accelerator_config as they are."
            )
        rank, world = process
        first = index * world + rank
        return task, list(range(first * size, (first + 1) * size))
