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
Plans an evaluation: which images and scores are missing, and in which batches they are made. A batch is of one model
and one task.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset

from ..data.readers import Reader, Readers, has_teacher_prompts, read_columns
from ..data.source_images import SOURCE_IMAGES, has_source_images, pictures_digest
from ..models.roles import model_identity
from ..models.teachers import Role, TeacherBank
from ..rewards import RewardFunc, reward_name
from ..rewards.scoring import score_names
from .identity import digest, reward_digest, rows_digest
from .store import KnownScores, Store


@dataclass(frozen=True)
class Task:
    """
    A task's part of the evaluation.

    Attributes:
        name (`str`): its name.
        index (`int`): its place among the tasks. The noise depends on it.
        readers ([`Readers`]): what each model reads of its rows.
        prompts ([`~datasets.Dataset`]): its rows. If there are more images than rows, they are repeated in order.
        functions (`list` of reward functions): its own rewards.
        others (`list` of reward functions): other tasks' rewards that score its images too.
        num_images (`int`): number of its images.
    """

    name: str
    index: int
    readers: Readers
    prompts: Dataset
    functions: list[RewardFunc]
    others: list[RewardFunc]
    num_images: int

    def rows(self, numbers: range) -> dict[str, list[Any]]:
        """The dataset's rows for the images of these numbers, as columns."""
        return self.prompts[[n % len(self.prompts) for n in numbers]]

    def texts(self, reader: Reader, numbers: range) -> list[str]:
        """What a model reads for the images of these numbers."""
        return self.readers.texts_of(self.name, self.rows(numbers)).of(reader)

    @property
    def has_teacher_prompts(self) -> bool:
        """Whether its teachers read something else than the prompt."""
        return has_teacher_prompts(self.prompts, np.arange(len(self.prompts)))

    def all_functions(self) -> list[RewardFunc]:
        return [*self.functions, *self.others]


@dataclass(frozen=True)
class Options:
    """
    How images are drawn, and which are kept.

    Attributes:
        batch_size (`int`): images that a process draws at a time.
        seed (`int`): seed of the noise.
        num_samples (`int`): number of each task's first images that are always kept.
        keep_images (`bool`): whether the other images are kept too.
        reward_timeout (`float`, *optional*): seconds to wait for one call of a reward function; `None` for no limit.
    """

    batch_size: int
    seed: int
    num_samples: int
    keep_images: bool
    reward_timeout: float | None


@dataclass(frozen=True)
class Model:
    """
    A model to draw with: a weighted mean of networks, each with its guidance scale; its names; and what it reads.
    """

    roles: list[Role]
    names: list[str]
    reader: Reader = "student"


@dataclass(frozen=True)
class Batch:
    """
    Images of one model for one task that are drawn together, and for each reward the images that it must still score.

    Rounding depends on which images are drawn together, so this does not depend on processes or interruptions.
    """

    task: str
    model: Model
    key: str
    numbers: range
    is_drawn: bool
    unscored: Mapping[str, list[int]]

    @property
    def forwards(self) -> int:
        """Samples that the networks compute at each step, to compare the batches' times: guidance doubles them."""
        return len(self.numbers) * sum(1 if role.guidance_scale == 1 else 2 for role in self.model.roles)

    @property
    def missing(self) -> list[int]:
        """Numbers of the images that a reward must still score."""
        return sorted({n for numbers in self.unscored.values() for n in numbers})


@dataclass(frozen=True)
class Found:
    """Results of earlier runs: digests of rewards by task and name, numbers of stored images by key, and scores."""

    rewards: dict[tuple[str, str], str | None]
    images: dict[str, set[int]]
    scores: KnownScores

    def identity(self, key: str, task: str, function: RewardFunc, score: str) -> tuple[str, str, str]:
        """The key under which the scores of a task's images are stored."""
        return key, score, self.rewards[task, reward_name(function)] or ""

    def unscored(self, key: str, task: str, function: RewardFunc, numbers: range) -> list[int]:
        scored = [self.scores.get(self.identity(key, task, function, name), {}) for name in score_names(function)]
        return [n for n in numbers if not all(n in of_name for of_name in scored)]


@dataclass(frozen=True)
class Plan:
    """
    What an evaluation has to do.

    Attributes:
        tasks (`dict[str, Task]`), options ([`Options`]): as given.
        models (`list[Model]`): the models that differ from each other.
        keys (`dict[tuple[str, str], str]`): key in the [`Store`] of a model's images for a task, by (model, task).
        found ([`Found`]): what earlier runs have left.
        batches (`list[Batch]`): the batches in which an image or a score is missing.
        kept (`dict[str, int]`): how many of each task's images of a model are kept in the store.
    """

    tasks: Mapping[str, Task]
    options: Options
    models: list[Model]
    keys: dict[tuple[str, str], str]
    found: Found
    batches: list[Batch]
    kept: Mapping[str, int]

    @property
    def num_images(self) -> int:
        """All images, also those that are there already."""
        return len(self.models) * sum(task.num_images for task in self.tasks.values())

    @property
    def num_drawn(self) -> int:
        return sum(len(batch.numbers) for batch in self.batches if batch.is_drawn)

    @property
    def num_rescored(self) -> int:
        """Images that are there, and lack a score."""
        return sum(len(batch.missing) for batch in self.batches if not batch.is_drawn)

    def functions(self) -> dict[str, RewardFunc]:
        """All reward functions by name."""
        return _functions(self.tasks)

    def of_process(self, index: int, num_processes: int) -> list[Batch]:
        """
        The batches of a process. Those to draw and those to score are divided among processes separately, since
        drawing takes longer.
        """
        return [
            batch
            for is_drawn in (True, False)
            for batch in [b for b in self.batches if b.is_drawn == is_drawn][index::num_processes]
        ]


def make_plan(
    bank: TeacherBank, tasks: Mapping[str, Task], settings: Mapping[str, object], options: Options, store: Store | None
) -> Plan:
    """
    Finds out what an evaluation has to do. Call it on all processes; all return the same.

    Args:
        bank ([`TeacherBank`]): all models, by name.
        tasks (`dict[str, Task]`)
        settings (`dict`): everything that all images depend on besides model, prompt and noise, ready for JSON.
        options ([`Options`])
        store ([`Store`], *optional*): where images and scores are kept. Those that are there already are reused.
    """
    models = _distinct_models(bank, tasks)
    keys = {
        (name, task): digest(
            dict(settings), model_identity(model.roles), options.seed, task, part.index, _read(part, model.reader)
        )
        for task, part in tasks.items()
        for model in models
        for name in model.names
    }
    # The main process looks for stored results on behalf of all: others might see files that are written meanwhile.
    is_main = PartialState().is_main_process
    found: Found = broadcast_object_list([_find(tasks, keys, store) if is_main else None])[0]
    kept = {
        name: 0 if store is None else task.num_images if options.keep_images else options.num_samples
        for name, task in tasks.items()
    }
    batches = _batches(tasks, models, keys, found, options.batch_size, kept)
    return Plan(tasks, options, models, keys, found, batches, kept)


def _distinct_models(bank: TeacherBank, tasks: Mapping[str, Task]) -> list[Model]:
    """
    Merges models that are the same (also equal files in two places) and read the same into one with several names,
    drawn once.
    """
    models: dict[str, Model] = {}
    readers: tuple[Reader, ...] = ("prompt", "teacher", "student")
    read = {reader: digest({task: _read(part, reader) for task, part in tasks.items()}) for reader in readers}
    for name, roles in bank.teachers.items():
        reader: Reader = "prompt" if name == "base" else "teacher" if name.startswith("teacher/") else "student"
        models.setdefault(digest(model_identity(roles), read[reader]), Model(roles, [], reader)).names.append(name)
    return list(models.values())


def _read(part: Task, reader: Reader) -> list[str]:
    """What a model reads of all rows of a task, with a hash of the pictures."""
    columns = [name for name in read_columns(part.prompts) if name != SOURCE_IMAGES]
    texts = part.readers.texts_of(part.name, part.prompts.select_columns(columns)[:]).of(reader)
    rows = range(len(part.prompts))
    return [*texts, pictures_digest(part.prompts, rows)] if has_source_images(part.prompts) else texts


def _functions(tasks: Mapping[str, Task]) -> dict[str, RewardFunc]:
    return {reward_name(function): function for part in tasks.values() for function in part.all_functions()}


def _find(tasks: Mapping[str, Task], keys: Mapping[tuple[str, str], str], store: Store | None) -> Found:
    rewards: dict[tuple[str, str], str | None] = {}
    digests = {name: reward_digest(function) for name, function in _functions(tasks).items()}
    for task, part in tasks.items():
        rows = rows_digest(part.prompts.to_dict())
        for name, of_function in digests.items():
            rewards[task, name] = None if of_function is None else digest(of_function, rows)
    if store is None:
        return Found(rewards, {}, {})
    return Found(rewards, {key: store.numbers(key, task) for (_, task), key in keys.items()}, store.scores())


def _batches(
    tasks: Mapping[str, Task],
    models: Sequence[Model],
    keys: Mapping[tuple[str, str], str],
    found: Found,
    batch_size: int,
    kept: Mapping[str, int],
) -> list[Batch]:
    """Lists the batches in which an image or a score is missing. If one image is missing, the whole batch is drawn."""
    batches = []
    for task, part in tasks.items():
        for model in models:
            key = keys[model.names[0], task]
            for start in range(0, part.num_images, batch_size):
                numbers = range(start, min(start + batch_size, part.num_images))
                unscored = {reward_name(f): found.unscored(key, task, f, numbers) for f in part.all_functions()}
                needed = {n for of_function in unscored.values() for n in of_function}
                needed |= {n for n in numbers if n < kept[task]}
                is_drawn = not needed <= found.images.get(key, set())
                if is_drawn or any(unscored.values()):
                    batches.append(Batch(task, model, key, numbers, is_drawn, unscored))
    return batches
