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
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypedDict

from accelerate import PartialState
from accelerate.utils import gather_object, tqdm
from torch import Tensor

from ..acceleration.processes import failing_together
from ..guards.redaction import shown
from ..models.teachers import TeacherBank
from ..pipelines.drawing import draw_batch
from ..pipelines.images import Picture, copied
from ..pipelines.velocity import VelocityField
from ..rewards import RewardFunc, Row, Scorer, reward_name
from ..rewards.scoring import call_reward, score_names
from .announcement import first_batch
from .plan import Batch, Plan
from .retention import Scores
from .store import KnownScores, Store, merge


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


def measure(field: VelocityField, bank: TeacherBank, plan: Plan, store: Store | None) -> Measured:
    """
    Scores every model on every task. Call it on all processes; all return the same.

    Args:
        field ([`VelocityField`]): the base, with the noise grid.
        bank ([`TeacherBank`]): all models, by name.
        plan ([`Plan`]): what is missing.
        store ([`Store`], *optional*): where images and scores are kept, as the plan was made for.

    Raises:
        [`TimeoutError`]: if a call of a reward function took longer than `reward_timeout`.
    """
    state = PartialState()
    mine = plan.of_process(state.process_index, state.num_processes)
    worker = _Worker(field, bank, plan, store)
    with failing_together():
        try:
            seconds = worker.work(mine)
        except TimeoutError as error:
            if store is not None:
                error.add_note("What has been drawn and scored is kept: the same command goes on from there.")
            raise
    everyone = gather_object([(worker.fresh, seconds, sum(len(batch.numbers) for batch in mine if batch.is_drawn))])
    found = plan.found
    merge(found.scores, (scores for scores, _, _ in everyone))
    scores: Scores = {
        model: {
            task: {
                name: [
                    found.scores[found.identity(plan.keys[model, task], task, f, name)][n]
                    for n in range(part.num_images)
                ]
                for f in part.all_functions()
                for name in score_names(f)
            }
            for task, part in plan.tasks.items()
        }
        for model in bank.teachers
    }
    total = _total([taken for _, taken, _ in everyone])
    return Measured(scores, plan.keys, total, sum(drawn for _, _, drawn in everyone))


def time_batch(field: VelocityField, bank: TeacherBank, plan: Plan) -> float | None:
    """
    Draws the first batch of this process and keeps nothing of it. Returns the seconds that it took, `None` if there
    is nothing to draw.
    """
    state = PartialState()
    batch = next((one for one in plan.of_process(state.process_index, state.num_processes) if one.is_drawn), None)
    if batch is None:
        return None
    start = time.perf_counter()
    _Worker(field, bank, plan, None).draw(batch)
    return time.perf_counter() - start


class _Worker:
    """
    Draws and scores batches on this process, and stores the results.

    Attributes:
        fresh (`dict`): the new scores.
    """

    def __init__(self, field: VelocityField, bank: TeacherBank, plan: Plan, store: Store | None):
        self.field, self.bank, self.plan, self.store = field, bank, plan, store
        self.fresh: KnownScores = {}

    def work(self, batches: Sequence[Batch]) -> _Seconds:
        """Works through the batches. Returns the seconds that it took: `generation`, and `rewards` by name."""
        generation, timeout = 0.0, self.plan.options.reward_timeout
        total = sum(len(batch.numbers) if batch.is_drawn else len(batch.missing) for batch in batches)
        with ExitStack() as stack:
            # One scorer for each function: after an interruption, functions may lack different scores.
            scorers = {
                name: stack.enter_context(Scorer([function], None, timeout, call=self.score))
                for name, function in self.plan.functions().items()
            }
            bar = stack.enter_context(tqdm(total=total, unit=" images"))
            for batch in batches:
                bar.set_description(f"{shown(batch.task)} by {shown(batch.model.names[0])}", refresh=False)
                if batch.is_drawn:
                    start = time.perf_counter()
                    images = dict(zip(batch.numbers, self.draw(batch), strict=True))
                    seconds = time.perf_counter() - start
                    if not generation and not bar.disable:  # the bar of the main process
                        bar.write(first_batch(batches, seconds))
                    generation += seconds
                else:
                    assert self.store is not None  # without a store everything is drawn
                    images = {n: self.store.load(batch.key, batch.task, n) for n in batch.missing}
                columns = self.plan.tasks[batch.task].rows(batch.numbers)
                rows = {n: {name: columns[name][i] for name in columns} for i, n in enumerate(batch.numbers)}
                for name, numbers in batch.unscored.items():
                    if numbers:
                        scorers[name].submit([rows[n] for n in numbers], [images[n] for n in numbers], batch)
                bar.update(len(batch.numbers) if batch.is_drawn else len(batch.missing))
            for scorer in scorers.values():
                scorer.results()
        return {"generation": generation, "rewards": {name: scorers[name].seconds[name] for name in scorers}}

    def draw(self, batch: Batch) -> list[Picture]:
        task = self.plan.tasks[batch.task]

        def velocity(x: Tensor, t: float, prompts: list[str]) -> Tensor:
            return self.bank.mean_velocity(self.field, batch.model.roles, x, t, prompts)

        try:
            prompts = task.texts(batch.model.reader, batch.numbers)
            images = draw_batch(self.field, velocity, prompts, [self.plan.options.seed, task.index], batch.numbers)
        except FloatingPointError as error:
            raise FloatingPointError(f"{batch.model.names[0]}, task {batch.task!r}: {error}") from error
        finally:
            self.bank.rest()
        if self.store is not None:
            pairs = zip(batch.numbers, images, strict=True)
            self.store.save(batch.key, batch.task, {n: image for n, image in pairs if n < self.plan.kept[batch.task]})
        return images

    def score(
        self, function: RewardFunc, rows: Sequence[Row], images: Sequence[Picture], batch: Batch
    ) -> dict[str, list[float | None]]:
        """Calls a reward function and stores its scores at once. Runs in the function's own thread."""
        # Copies, since a function could change the images that other functions score in their threads.
        own = [copied(image) for image in images]
        try:
            scores = call_reward(function, rows, own)
        except BaseException as error:
            if function not in self.plan.tasks[batch.task].functions:
                error.add_note(
                    f"Every reward scores the images of every task, here {reward_name(function)!r} those of task "
                    f"{batch.task!r}. A function must return None for rows that it does not apply to. Or set "
                    "cross_task_rewards=False."
                )
            raise
        for name, values in scores.items():
            identity = self.plan.found.identity(batch.key, batch.task, function, name)
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
