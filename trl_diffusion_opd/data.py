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

"""Which prompts make up an update: every task has the same number of them, whatever the sizes of the prompt sets."""

from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler


# The one task of a dataset without a task column.
SINGLE_TASK = "default"


def task_rows(dataset: Dataset, task_column: str) -> dict[str, np.ndarray]:
    """
    Rows of each task.

    Returns:
        `dict[str, np.ndarray]`: indices into `dataset`, tasks in order of their names, the same on every process.
    """
    if task_column not in dataset.column_names:
        return {SINGLE_TASK: np.arange(len(dataset))}
    # One vectorised pass: with a million prompts a Python loop takes longer than loading the model.
    names, inverse = np.unique(np.asarray(dataset[task_column][:], dtype=np.str_), return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    bounds = np.cumsum(np.bincount(inverse))[:-1]
    return {str(name): rows for name, rows in zip(names, np.split(order, bounds), strict=True)}


def dataset_problems(dataset: Dataset, task_column: str, name: str) -> list[str]:
    """What keeps `dataset` from being used as prompts, a sentence each."""
    columns = dataset.column_names
    if "prompt" not in columns:
        return [f"{name} has no column 'prompt'; its columns are {columns}. Rename yours with rename_column."]
    problems = []
    prompts = dataset["prompt"][:]
    bad = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str) or not prompt.strip()]
    if len(dataset) == 0:
        problems.append(f"{name} is empty.")
    if bad:
        problems.append(f"{name} has {len(bad)} empty prompt(s), the first in row {bad[0]}. Remove them.")
    if task_column in columns:
        tasks = dataset[task_column][:]
        bad = [i for i, task in enumerate(tasks) if not isinstance(task, str) or not task]
        if bad:
            problems.append(
                f"{name} has {len(bad)} row(s) without a task in '{task_column}', the first is row {bad[0]}."
            )
    return problems


class TaskSampler(Sampler[int]):
    """
    Indices in rounds: a round is one update, and every task has an equal part of it.

    A round consists of micro-batches, each of one task and of `batch_size` prompts over all processes, in the order task
    0, task 1, …, task 0, task 1, …, until every task has `rounds_of_tasks`. An epoch is one pass over the largest
    task; smaller ones start over as often as it takes. Its length is a whole number of rounds.

    For groups of completions a prompt is repeated within its round, one copy after another, so that a group may lie in
    several micro-batches and on several processes. For several updates on the same completions a round is repeated as a
    whole.

    Args:
        rows (`list[np.ndarray]`): rows of each task.
        batch_size (`int`): samples of a micro-batch over all processes.
        micro_batches (`int`): micro-batches of each task in a round.
        seed (`int`)
        repeats (`int`, *optional*, defaults to `1`): samples of each prompt in a round, a divisor of the task's samples in
            it.
        passes (`int`, *optional*, defaults to `1`): how often a round comes, one time after another.
    """

    def __init__(
        self,
        rows: Sequence[np.ndarray],
        batch_size: int,
        micro_batches: int,
        seed: int,
        repeats: int = 1,
        passes: int = 1,
    ):
        self.rows = list(rows)
        self.batch_size = batch_size
        self.micro_batches = micro_batches
        self.seed = seed
        self.repeats = repeats
        self.passes = passes
        self.epoch = 0
        per_round = batch_size * micro_batches // repeats
        self.rounds = -(-max(len(task) for task in self.rows) // per_round)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rounds * self.passes * self.micro_batches * len(self.rows) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        shape = (self.rounds, self.micro_batches, self.batch_size)
        prompts = self.rounds * self.micro_batches * self.batch_size // self.repeats
        order = [self._order(task, prompts).repeat(self.repeats).reshape(shape) for task in range(len(self.rows))]
        # [round, micro-batch, task, sample]
        rounds = np.stack(order, axis=2)
        return iter(rounds.repeat(self.passes, axis=0).reshape(-1).tolist())

    def _order(self, task: int, length: int) -> np.ndarray:
        rows = self.rows[task]
        generator = np.random.default_rng(np.random.SeedSequence([self.seed, self.epoch, task, 1]))
        passes = [generator.permutation(rows) for _ in range(-(-length // len(rows)))]
        return np.concatenate(passes)[:length]
