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
Draws and scores the images that are still missing. It works in batches of one model and one task; each batch is scored
while the next one is drawn.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypedDict

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, tqdm
from datasets import Dataset
from PIL.Image import Image
from torch import Tensor

from ..acceleration.processes import failing_together
from ..models.teachers import Role, TeacherBank, model_identity
from ..pipelines.drawing import draw_batch
from ..pipelines.velocity import VelocityField
from ..rewards import RewardFunc, Row, Scorer, reward_name
from ..rewards.scoring import call_reward, score_names
from .identity import digest, reward_digest, rows_digest
from .retention import Scores
from .store import KnownScores, Store, merge


@dataclass(frozen=True)
class Task:
    """
    A task's part of the evaluation.

    Attributes:
        index (`int`): its place among the tasks. The noise depends on it.
        prompts ([`~datasets.Dataset`]): its rows. If there are more images than rows, they are repeated in order.
        functions (`list` of reward functions): its own rewards.
        others (`list` of reward functions): other tasks' rewards that score its images too.
    """

    index: int
    prompts: Dataset
    functions: list[RewardFunc]
    others: list[RewardFunc]

    def rows(self, numbers: range) -> dict[str, list[Any]]:
        """The dataset's rows for the images of these numbers, as columns."""
        return self.prompts[[n % len(self.prompts) for n in numbers]]

    def all_functions(self) -> list[RewardFunc]:
        return [*self.functions, *self.others]


@dataclass(frozen=True)
class Options:
    """
    How many images are drawn, how, and which are kept.

    Attributes:
        num_images (`int`): images a task.
        batch_size (`int`): images that a process draws at a time.
        seed (`int`): seed of the noise.
        num_samples (`int`): number of each task's first images that are always kept.
        keep_images (`bool`): whether the other images are kept too.
        reward_timeout (`float`, *optional*): seconds to wait for one call of a reward function; `None` for no limit.
    """

    num_images: int
    batch_size: int
    seed: int
    num_samples: int
    keep_images: bool
    reward_timeout: float | None


@dataclass(frozen=True)
class Model:
    """A model to draw with: a weighted mean of networks, each with its guidance scale, and the model's names."""

    roles: list[Role]
    names: list[str]


class _Seconds(TypedDict):
    generation: float
    rewards: dict[str, float]


@dataclass(frozen=True)
class Measured:
    """
    The results of an evaluation.

    Attributes:
        scores (`dict`): `scores[model][task][reward]` is a list with one value for each image.
        keys (`dict[tuple[str, str], str]`): key in the [`Store`] of a model's images for a task, by (model, task).
        seconds (`dict`): seconds that this run took, summed over processes: `generation`, and `rewards` by name.
        drawn (`int`): number of images that this run drew.
    """

    scores: Scores
    keys: dict[tuple[str, str], str]
    seconds: _Seconds
    drawn: int

    def told(self) -> str:
        """Says in one line how long it took."""
        taken = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds["rewards"].items())
        drawing = self.seconds["generation"]
        return f"{self.drawn} images were drawn in {drawing:.1f} s; scoring meanwhile took {taken}."


@dataclass(frozen=True)
class _Batch:
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


@dataclass(frozen=True)
class _Found:
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


def measure(
    field: VelocityField,
    bank: TeacherBank,
    tasks: Mapping[str, Task],
    settings: Mapping[str, object],
    options: Options,
    store: Store | None,
) -> Measured:
    """
    Scores every model on every task. Call it on all processes; all return the same.

    Args:
        field ([`VelocityField`]): the base, with the noise grid.
        bank ([`TeacherBank`]): all models, by name.
        tasks (`dict[str, Task]`)
        settings (`dict`): everything that all images depend on besides model, prompt and noise, ready for JSON.
        options ([`Options`])
        store ([`Store`], *optional*): where images and scores are kept. Those that are there already are reused.

    Raises:
        [`TimeoutError`]: if a call of a reward function took longer than `options.reward_timeout`.
    """
    state, num_images = PartialState(), options.num_images
    models = _distinct_models(bank)
    keys = {
        (name, task): digest(
            dict(settings), model_identity(model.roles), options.seed, task, part.index, part.prompts["prompt"][:]
        )
        for task, part in tasks.items()
        for model in models
        for name in model.names
    }
    # The main process looks for stored results on behalf of all: others might see files that are written meanwhile.
    found: _Found = broadcast_object_list([_find(tasks, keys, store) if state.is_main_process else None])[0]
    kept = 0 if store is None else num_images if options.keep_images else options.num_samples
    batches = _plan(tasks, models, keys, found, num_images, options.batch_size, kept)
    # Batches to draw and batches to score are divided among processes separately, since drawing takes longer.
    mine = [
        batch
        for is_drawn in (True, False)
        for batch in [b for b in batches if b.is_drawn == is_drawn][state.process_index :: state.num_processes]
    ]
    worker = _Worker(field, bank, tasks, found, options.seed, store, kept)
    with failing_together():
        try:
            seconds = worker.work(mine, options.reward_timeout)
        except TimeoutError as error:
            if store is not None:
                error.add_note("What has been drawn and scored is kept: the same command goes on from there.")
            raise
    everyone = gather_object([(worker.fresh, seconds, sum(len(batch.numbers) for batch in mine if batch.is_drawn))])
    merge(found.scores, (scores for scores, _, _ in everyone))
    scores: Scores = {
        model: {
            task: {
                name: [found.scores[found.identity(keys[model, task], task, f, name)][n] for n in range(num_images)]
                for f in part.all_functions()
                for name in score_names(f)
            }
            for task, part in tasks.items()
        }
        for model in bank.teachers
    }
    return Measured(scores, keys, _total([taken for _, taken, _ in everyone]), sum(drawn for _, _, drawn in everyone))


def _distinct_models(bank: TeacherBank) -> list[Model]:
    """Merges models that are the same (also equal files in two places) into one with several names, drawn once."""
    models: dict[str, Model] = {}
    for name, roles in bank.teachers.items():
        models.setdefault(digest(model_identity(roles)), Model(roles, [])).names.append(name)
    return list(models.values())


def _functions(tasks: Mapping[str, Task]) -> dict[str, RewardFunc]:
    return {reward_name(function): function for part in tasks.values() for function in part.all_functions()}


def _find(tasks: Mapping[str, Task], keys: Mapping[tuple[str, str], str], store: Store | None) -> _Found:
    rewards: dict[tuple[str, str], str | None] = {}
    digests = {name: reward_digest(function) for name, function in _functions(tasks).items()}
    for task, part in tasks.items():
        rows = rows_digest(part.prompts.to_dict())
        for name, of_function in digests.items():
            rewards[task, name] = None if of_function is None else digest(of_function, rows)
    if store is None:
        return _Found(rewards, {}, {})
    return _Found(rewards, {key: store.numbers(key, task) for (_, task), key in keys.items()}, store.scores())


def _plan(
    tasks: Mapping[str, Task],
    models: Sequence[Model],
    keys: Mapping[tuple[str, str], str],
    found: _Found,
    num_images: int,
    batch_size: int,
    kept: int,
) -> list[_Batch]:
    """Lists the batches in which an image or a score is missing. If one image is missing, the whole batch is drawn."""
    batches = []
    for task, part in tasks.items():
        for model in models:
            key = keys[model.names[0], task]
            for start in range(0, num_images, batch_size):
                numbers = range(start, min(start + batch_size, num_images))
                unscored = {reward_name(f): found.unscored(key, task, f, numbers) for f in part.all_functions()}
                needed = {n for of_function in unscored.values() for n in of_function}
                needed |= {n for n in numbers if n < kept}
                is_drawn = not needed <= found.images.get(key, set())
                if is_drawn or any(unscored.values()):
                    batches.append(_Batch(task, model, key, numbers, is_drawn, unscored))
    return batches


class _Worker:
    """
    Draws and scores batches on this process, and stores the results.

    Attributes:
        fresh (`dict`): the new scores.
    """

    def __init__(
        self,
        field: VelocityField,
        bank: TeacherBank,
        tasks: Mapping[str, Task],
        found: _Found,
        seed: int,
        store: Store | None,
        kept: int,
    ):
        self.field, self.bank, self.tasks, self.found = field, bank, tasks, found
        self.seed, self.store, self.kept = seed, store, kept
        self.fresh: KnownScores = {}

    def work(self, batches: Sequence[_Batch], reward_timeout: float | None) -> _Seconds:
        """Works through the batches. Returns the seconds that it took: `generation`, and `rewards` by name."""
        generation = 0.0
        with ExitStack() as stack:
            # One scorer for each function: after an interruption, functions may lack different scores.
            scorers = {
                name: stack.enter_context(Scorer([function], None, reward_timeout, call=self.score))
                for name, function in _functions(self.tasks).items()
            }
            for batch in tqdm(batches, desc="Evaluating", unit="batch"):
                missing = sorted({n for numbers in batch.unscored.values() for n in numbers})
                if batch.is_drawn:
                    start = time.perf_counter()
                    images = dict(zip(batch.numbers, self.draw(batch), strict=True))
                    generation += time.perf_counter() - start
                else:
                    assert self.store is not None  # without a store everything is drawn
                    images = {n: self.store.load(batch.key, batch.task, n) for n in missing}
                columns = self.tasks[batch.task].rows(batch.numbers)
                rows = {n: {name: columns[name][i] for name in columns} for i, n in enumerate(batch.numbers)}
                for name, numbers in batch.unscored.items():
                    if numbers:
                        scorers[name].submit([rows[n] for n in numbers], [images[n] for n in numbers], batch)
            for scorer in scorers.values():
                scorer.results()
        return {"generation": generation, "rewards": {name: scorers[name].seconds[name] for name in scorers}}

    def draw(self, batch: _Batch) -> list[Image]:
        task = self.tasks[batch.task]

        def velocity(x: Tensor, t: float, prompts: list[str]) -> Tensor:
            return self.bank.mean_velocity(self.field, batch.model.roles, x, t, prompts)

        try:
            prompts = task.rows(batch.numbers)["prompt"]
            images = draw_batch(self.field, velocity, prompts, [self.seed, task.index], batch.numbers)
        except FloatingPointError as error:
            raise FloatingPointError(f"{batch.model.names[0]}, task {batch.task!r}: {error}") from error
        if self.store is not None:
            pairs = zip(batch.numbers, images, strict=True)
            self.store.save(batch.key, batch.task, {n: image for n, image in pairs if n < self.kept})
        return images

    def score(
        self, function: RewardFunc, rows: Sequence[Row], images: Sequence[Image], batch: _Batch
    ) -> dict[str, list[float | None]]:
        """Calls a reward function and stores its scores at once. Runs in the function's own thread."""
        # Copies, since a function could change the images that other functions score in their threads.
        own = [image.copy() for image in images]
        try:
            scores = call_reward(function, rows, own)
        except BaseException as error:
            if function not in self.tasks[batch.task].functions:
                error.add_note(
                    f"Every reward scores the images of every task, here {reward_name(function)!r} those of task "
                    f"{batch.task!r}. A function must return None for rows that it does not apply to. Or set "
                    "cross_task_rewards=False."
                )
            raise
        for name, values in scores.items():
            identity = self.found.identity(batch.key, batch.task, function, name)
            by_number = dict(zip(batch.unscored[reward_name(function)], values, strict=True))
            self.fresh.setdefault(identity, {}).update(by_number)
            if self.store is not None and identity[2]:
                self.store.record(identity, by_number)
        return scores


def _total(seconds: Sequence[_Seconds]) -> _Seconds:
    return {
        "generation": sum(one["generation"] for one in seconds),
        "rewards": {name: sum(one["rewards"][name] for one in seconds) for name in seconds[0]["rewards"]},
    }
