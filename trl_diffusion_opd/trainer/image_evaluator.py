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

"""Draws and scores images of the student: for evaluations, logged completions and dry runs."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm import tqdm
from transformers import TrainerState

from ..data.readers import Reader
from ..data.tasks import task_rows
from ..models.student import Student
from ..pipelines.drawing import Velocity, draw_with
from ..pipelines.images import Picture
from ..pipelines.velocity import VelocityField
from ..reporting.completions import STUDENT_READ, Completion
from ..rewards import RewardFunc, Scorer, reward_name
from ..rewards.common_scale import Reference, on_common_scale
from .base_config import DiffusionConfig


@dataclass
class Recording:
    """
    What drawing and scoring images adds to, beside their scores.

    Attributes:
        bar (`tqdm`): the bar that counts the images.
        seconds (`dict[str, float]`): seconds of drawing, and of each reward meanwhile.
        logged (`dict[str, list[float]]`): the rewards' own metrics.
    """

    bar: tqdm
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    logged: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


class ImageEvaluator:
    """
    Draws images of a student and scores them. The noise of an image depends only on the seed, its task and its number,
    so evaluations can be compared.

    Args:
        field ([`VelocityField`]): the pipeline's velocity on the noise levels of evaluations.
        student ([`Student`]): the student, evaluated with its averaged weights.
        tasks (`list[str]`): the tasks of the training data.
        reward_funcs (`dict[str, list[Callable]]`): the rewards of each task.
        args ([`DiffusionConfig`]), accelerator ([`~accelerate.Accelerator`])
    """

    def __init__(
        self,
        field: VelocityField,
        student: Student,
        tasks: list[str],
        reward_funcs: Mapping[str, list[RewardFunc]],
        args: DiffusionConfig,
        accelerator: Accelerator,
    ):
        self.field = field
        self.student = student
        self.tasks = tasks
        self.reward_funcs = reward_funcs
        self.args = args
        self.readers = args.readers
        self.accelerator = accelerator

    def monitor(self, task: str, state: TrainerState) -> Scorer:
        """Makes a scorer for scores that are only logged. If a reward times out, training goes on."""
        return Scorer(self.reward_funcs[task], state, self.args.reward_timeout, on_timeout="none", task=task)

    def noise(self) -> Picture:
        """An image of noise, of the size of the others, or a video."""
        (image,) = self.field.decode(self.field.initial_latents([""], [torch.Generator().manual_seed(0)]), [""])
        return image

    def draw(
        self,
        dataset: Dataset,
        task: str,
        rows: list[int],
        update: int = 0,
        on_batch: Callable[[list[int], list[Picture]], None] | None = None,
        velocity: Velocity | None = None,
        reader: Reader = "student",
    ) -> list[tuple[int, Picture]]:
        """
        Draws this process's share of the images of `dataset[rows]`, as `(position in rows, image)`: with the student's
        current weights, or with another model's `velocity`, for what `reader` reads of the rows.
        """
        try:
            return draw_with(
                self.field,
                self.student_velocity() if velocity is None else velocity,
                self.readers.texts(task, (dataset[row] for row in rows)).of(reader),
                entropy=[self.args.seed, self.tasks.index(task)],
                batch_size=self.args.per_device_eval_batch_size,
                process=(self.accelerator.process_index, self.accelerator.num_processes),
                on_batch=on_batch,
            )
        except FloatingPointError as error:
            who = f"The student after update {update}" if velocity is None else "Base or teacher"
            raise FloatingPointError(f"{who}, task {task!r}: {error}") from error

    def student_velocity(self) -> Velocity:
        """The velocity of the student's current weights, as evaluations draw with it."""
        network, scale = self.student.model, self.args.evaluation_guidance
        return lambda x, t, prompts: self.field(x, t, prompts, scale, network)

    def evaluate(
        self,
        dataset: Dataset,
        prefix: str,
        state: TrainerState,
        of_method: Callable[[], dict[str, float]],
        references: Mapping[str, Mapping[str, Reference]],
    ) -> tuple[dict[str, float], int]:
        """
        Draws images for the prompts of `dataset` with the averaged weights and scores them.

        Args:
            dataset ([`~datasets.Dataset`]), prefix (`str`), state ([`~transformers.TrainerState`])
            of_method (`Callable`): returns the method's own metrics with these weights.
            references (`dict`): scores of base and teachers by task and reward, as far as they are known.

        Returns:
            `tuple`: the metrics, as the trainer's `evaluate` describes them, and the number of images.
        """
        metrics: dict[str, float] = {}
        task_means = []
        counts = {
            task: np.resize(rows, self.args.num_eval_images or len(rows)).tolist()
            for task, rows in task_rows(dataset, self.args.task_column).items()
        }
        num_images = sum(map(len, counts.values()))
        with self.student.ema_weights(), self.recording(num_images, "evaluation") as record:
            for task, rows in counts.items():
                scores = self.score_task(dataset, task, rows, state, record)
                means = {name: applicable_mean(values) for name, values in scores.items()}
                metrics |= {f"{prefix}_{task}/{name}": value for name, value in means.items()}
                scaled = [
                    on_common_scale(function, means[name], references.get(task, {}).get(name))
                    for function in self.reward_funcs[task]
                    for name in [reward_name(function)]
                ]
                task_means.append(applicable_mean(scaled))
            metrics |= of_method()
        if any(self.reward_funcs.values()):
            metrics[f"{prefix}_reward"] = applicable_mean(task_means)
        metrics |= {f"{prefix}_{name}": applicable_mean(values) for name, values in record.logged.items()}
        metrics |= {f"{prefix}_{name}": value for name, value in record.seconds.items()}
        return metrics, num_images

    @contextmanager
    def recording(self, images: int, title: str) -> Iterator[Recording]:
        """Context for drawing and scoring so many images. On a terminal it shows a bar, on the main process."""
        hidden = self.args.disable_tqdm or not self.accelerator.is_main_process
        # disable=None: none where the output is a file.
        with tqdm(total=images, desc=title, unit="image", leave=False, disable=True if hidden else None) as bar:
            yield Recording(bar)

    def score_task(
        self,
        dataset: Dataset,
        task: str,
        rows: list[int],
        state: TrainerState,
        record: Recording,
        velocity: Velocity | None = None,
        reader: Reader = "student",
    ) -> dict[str, list[float | None]]:
        """
        Draws and scores the images of `dataset[rows]`, the student's or those of another `velocity`, for what `reader`
        reads; each batch is scored while the next is drawn. Returns scores by reward, of all processes.
        """
        with self.monitor(task, state) as scorer:

            def submit(positions: list[int], images: list[Picture]) -> None:
                scorer.submit([dataset[rows[i]] for i in positions], images)
                record.bar.update(
                    min(len(positions) * self.accelerator.num_processes, record.bar.total - record.bar.n)
                )

            start = time.perf_counter()
            self.draw(dataset, task, rows, state.global_step, submit, velocity, reader)
            record.seconds["generation_time"] += time.perf_counter() - start - scorer.waited
            scores = scorer.results()
        for name, taken in scorer.seconds.items():
            record.seconds[f"reward_time/{name}"] += taken
        for name, values in gathered(scorer.log.metrics).items():
            record.logged[name] += values
        return {name: gather_object(values) for name, values in scores.items()}

    def completions(
        self,
        dataset: Dataset,
        state: TrainerState,
        tasks: Collection[str] | None = None,
        velocity: Velocity | None = None,
        reader: Reader = "student",
    ) -> list[Completion]:
        """
        Draws images for the first prompts of each task. The same on every process.

        Args:
            dataset ([`~datasets.Dataset`]), state ([`~transformers.TrainerState`])
            tasks (`list[str]`, *optional*): the tasks to draw for. By default, all.
            velocity (`Callable`, *optional*): the model that draws. By default, the student with its averaged weights.
            reader (`str`, *optional*): what that model reads of a row: see [`Readers`].
        """
        shown: list[tuple[int, int, Completion]] = []
        with self.student.ema_weights() if velocity is None else nullcontext():
            for k, (task, rows) in enumerate(task_rows(dataset, self.args.task_column).items()):
                if tasks is not None and task not in tasks:
                    continue
                entries = [dataset[int(row)] for row in rows[: self.args.num_completions_to_print]]
                numbers = rows[: len(entries)].tolist()
                mine = self.draw(dataset, task, numbers, state.global_step, velocity=velocity, reader=reader)
                images = [image for _, image in mine]
                with self.monitor(task, state) as scorer:
                    scorer.submit([entries[i] for i, _ in mine], images)
                    scores = scorer.results()
                read = self.readers.texts(task, entries).student
                for n, (i, image) in enumerate(mine):
                    rewards = {name: values[n] for name, values in scores.items()}
                    columns = {
                        name: values[n] for name, values in scorer.log.extra.items() if len(values) == len(mine)
                    }
                    if task in self.readers.templates:
                        columns[STUDENT_READ] = read[i]
                    shown.append((k, i, Completion(entries[i]["prompt"], task, image, rewards, columns)))
        return [completion for _, _, completion in sorted(gather_object(shown), key=lambda item: item[:2])]


def gathered(metrics: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Gathers the values that rewards have logged on all processes, by the name of the metric."""
    values: dict[str, list[float]] = defaultdict(list)
    for name, value in gather_object([(name, value) for name, of_name in metrics.items() for value in of_name]):
        values[name].append(value)
    return values


def applicable_mean(values: list[float | None] | list[float]) -> float:
    """The mean of the values that are numbers; NaN if there are none."""
    applicable = [value for value in values if value is not None and not math.isnan(value)]
    return sum(applicable) / len(applicable) if applicable else math.nan
