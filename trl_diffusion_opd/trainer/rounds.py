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

"""Divides an optimizer step among the tasks: every task has the same number of micro-batches, and tasks take turns."""

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
    The rows of each task, and the tasks' turns in a round. A round is one optimizer step.

    Attributes:
        rows (`dict[str, np.ndarray]`): rows of the training data, by task.
        weights (`dict[str, float]`): weight in the loss, by task.
        micro_batches (`int`): micro-batches of each task in a round, on each process.
        task_column (`str`): the column that names the task.
    """

    rows: Mapping[str, np.ndarray]
    weights: Mapping[str, float]
    micro_batches: int
    task_column: str

    @classmethod
    def of(cls, rows: Mapping[str, np.ndarray], args: DiffusionConfig, problems: Problems) -> "Rounds":
        """Makes the rounds that `args` asks for. Sets `gradient_accumulation_steps` in `args` if it is `None`."""
        tasks, n = list(rows), max(1, len(rows))
        if tasks and args.gradient_accumulation_steps is None:
            args.gradient_accumulation_steps = n
        steps = args.gradient_accumulation_steps or n
        if tasks and steps % n:
            problems.append(
                f"gradient_accumulation_steps={steps} is not a multiple of the {n} tasks "
                f"({', '.join(tasks)}), which all have an equal part of an update. Use {-(-steps // n) * n}, or leave "
                "it unset."
            )
        given = args.task_weights or {}
        assert isinstance(given, dict)  # the config has parsed or refused strings
        unknown = [task for task in given if task not in tasks]
        if tasks and unknown:
            problems.append(
                f"task_weights has a weight for {', '.join(f'task {task!r}' for task in unknown)}, but no prompt in "
                f"train_dataset has that task. Tasks found: {tasks}."
            )
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
        """The factor of a micro-batch's mean loss. With it, an update's losses sum to the weighted mean over tasks."""
        return self.weights[task] / sum(self.weights.values()) / self.micro_batches

    def sampler(self, batch_size: int, seed: int, repeats: int, passes: int) -> TaskSampler:
        """Makes the sampler that orders the rows. See [`TaskSampler`] for the arguments."""
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
        Returns the task of a round's micro-batch, and its samples' positions among the task's samples in the round.

        Args:
            number (`int`): number of the micro-batch in the round.
            rows (`list[dict]`): its rows.
            size (`int`): how many rows it must have.
            update (`int`): number of the update, for the message.
            process (`tuple[int, int]`): index of this process, and number of processes.

        Raises:
            [`RuntimeError`]: if the rows are not `size` rows of the task whose turn it is. This happens with a
                replaced or reordering data loader, and would train rows on another task's teacher.
        """
        task, index = self.tasks[number % len(self.rows)], number // len(self.rows)
        found = sorted({task_of(row, self.task_column) for row in rows})
        if found != [task] or len(rows) != size:
            raise RuntimeError(
                f"Micro-batch {number + 1} of update {update} has {len(rows)} rows of {', '.join(found)}, but it "
                f"should have {size} of {task!r}. Tasks take turns, so the rows must come in order from the trainer's "
                "own data loader and sampler: don't override get_train_dataloader, and leave accelerator_config unset."
            )
        rank, world = process
        first = index * world + rank
        return task, list(range(first * size, (first + 1) * size))
