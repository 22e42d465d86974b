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

"""Shared parts of the dry runs: clocks, memory, the rows of the first update, pictures, and the report."""

import inspect
import logging
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerState

from ..algorithms.separability import Pair, conflict_warning
from ..data.tasks import TaskSampler, task_rows
from ..guards.extras import extra
from ..guards.files import JSON, file_name
from ..hub.files import DRY_RUN_FOLDER, DRY_RUN_PICTURE
from ..pipelines.drawing import Velocity, draw_with
from ..pipelines.images import Picture
from ..pipelines.view import exchanged_forward
from ..profiling.memory import MemoryRow
from ..profiling.timing import Instant, instant, seconds_between
from ..reporting import console as tables
from ..reporting.sources import SOURCE, source_of
from ..reporting.videos import encoded, still
from ..rewards.base import Row
from .base_trainer import DiffusionTrainer
from .image_evaluator import ImageEvaluator
from .memory_estimate import estimate_memory
from .training_pictures import captioned


logger = logging.getLogger(__name__)


# As in training


def first_update(trainer: DiffusionTrainer, sampler: TaskSampler) -> list[list[int]]:
    """The rows of the training data in each of this process's micro-batches of the first update."""
    size, accelerator = trainer.micro_batch_size, trainer.accelerator
    length = size * accelerator.num_processes
    rows = list(islice(sampler, length * len(trainer.rounds)))
    mine = accelerator.process_index * size
    return [rows[first + mine : first + mine + size] for first in range(0, len(rows), length)]


def number_of_updates(trainer: DiffusionTrainer, sampler: TaskSampler) -> int:
    """The number of optimizer steps of the whole run."""
    epochs = trainer.args.num_train_epochs
    return (
        trainer.args.max_steps if trainer.args.max_steps > 0 else math.ceil(epochs * sampler.rounds * sampler.passes)
    )


@contextmanager
def as_in_training(trainer: DiffusionTrainer) -> Iterator[nn.Module]:
    """Context that yields the trained model as Trainer prepares it: with checkpointing and mixed precision."""
    model = trainer.student.model
    if trainer.args.activation_checkpointing:
        trained: Any = trainer.model
        trained.activation_checkpointing_enable()  # as Trainer does when training begins
    forward = model.forward

    def call(*args: object, **inputs: object) -> object:
        with trainer.accelerator.autocast():
            return forward(*args, **inputs)

    with exchanged_forward(model, call):
        yield model


# Time and forwards


class Clock:
    """Measures the seconds of calls by name. The median is robust against the first call, which sets things up."""

    def __init__(self, device: torch.device):
        self.device = device
        self.calls: dict[str, list[tuple[Instant, Instant]]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = instant(self.device)
        yield
        self.calls.setdefault(name, []).append((begin, instant(self.device)))

    def median(self, name: str) -> float:
        return statistics.median(seconds_between(*call) for call in self.calls[name])


@dataclass
class Forwards:
    """Numbers of samples in forwards, and in forwards with gradient. With guidance each sample counts twice."""

    forwards: int = 0
    backwards: int = 0


@contextmanager
def counted(networks: Sequence[nn.Module]) -> Iterator[Forwards]:
    """Context that counts the samples that the networks compute. LoRAs on one network count as that network."""
    count = Forwards()

    def hook(module: nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        first = list(inspect.signature(type(module).forward).parameters)[1]
        rows = len(inputs[first])
        count.forwards += rows
        count.backwards += rows * torch.is_grad_enabled()

    bases = [network.get_base_model() if isinstance(network, PeftModel) else network for network in networks]
    # By identity, since a student's LoRA and its base are one network.
    handles = [
        base.register_forward_pre_hook(hook, with_kwargs=True) for base in {id(one): one for one in bases}.values()
    ]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


# Memory


def in_use(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


class Peak:
    """The peak of bytes above those in use at the start. On CUDA it is exact, elsewhere it is sampled by [`look`]."""

    def __init__(self, device: torch.device):
        self.device, self._before, self._seen = device, in_use(device), 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def look(self) -> None:
        self._seen = max(self._seen, in_use(self.device) - self._before)

    @property
    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        return self._seen

    def without(self, gradients: Sequence[Tensor | None]) -> int:
        """The peak without the gradients, which are held at the end."""
        if self.device.type != "cuda":  # it was sampled before there were gradients
            return self.bytes
        return self.bytes - sum(gradient.nbytes for gradient in gradients if gradient is not None)


def memory(trainer: DiffusionTrainer, extra: Mapping[str, int], measured: int, what: str) -> dict[str, MemoryRow]:
    """
    Returns [`estimate_memory`] for the trainer's device without sharding, plus the method's own parts.

    Args:
        trainer ([`DiffusionTrainer`])
        extra (`dict[str, int]`): bytes of further parts that the method keeps, by name.
        measured (`int`): measured peak of bytes above those in use before.
        what (`str`): the measured computation, for the row's text.
    """
    rows = estimate_memory(trainer)
    peak = rows.pop("peak")
    for name, size in extra.items():
        rows[name] = {"dtype": "", "bytes": size, "how": "counted"}
        peak["bytes"] += size
    if trainer.accelerator.device.type == "cuda":  # elsewhere a process's memory says little about its tensors
        rows["activations, measured"] = {"dtype": "", "bytes": measured, "how": f"peak of {what}, not in the sum"}
    return {**rows, "peak": peak}


def teacher_warnings(tasks: Mapping[str, dict[str, JSON]]) -> list[str]:
    """Warns of teachers that do not differ from the base."""
    return [
        f"The teacher {teacher['teacher']} of task {task!r} does not differ from the base: its velocities are "
        f"{teacher['gap_to_base']:.1e} apart (relative), and {teacher['rounding']:.1e} is rounding. Is it the right "
        "LoRA?"
        for task, figures in tasks.items()
        for teacher in figures["teachers"]
        if teacher["kind"] not in ("base", "student") and teacher["gap_to_base"] <= teacher["rounding"]
    ]


# Pictures

# For each task the row of the data, and the images by caption.
Pictures = dict[str, tuple[Row, dict[str, Picture]]]


def draw(evaluator: ImageEvaluator, velocity: Velocity, task: str, prompt: str) -> Picture:
    """Draws the image that an evaluation would draw first for a task with this first prompt."""
    entropy = [evaluator.args.seed, evaluator.tasks.index(task)]
    ((_, image),) = draw_with(evaluator.field, velocity, [prompt], entropy=entropy, batch_size=1)
    return image


def draw_models(trainer: DiffusionTrainer) -> Pictures:
    """Draws each model's image, by caption, for each task's first evaluated row, all from the same noise."""
    evaluated = trainer.eval_dataset
    if isinstance(evaluated, Mapping):
        evaluated = next(iter(evaluated.values()))
    firsts: dict[str, Row] = {}  # an evaluation may lack tasks, whose rows are then of the training data
    for dataset in (trainer.train_dataset, evaluated):
        if dataset is not None:
            firsts |= {t: dataset[int(rows[0])] for t, rows in task_rows(dataset, trainer.args.task_column).items()}
    scale = trainer.args.evaluation_guidance
    pictures: Pictures = {}
    for task, row in firsts.items():
        of_task, texts = {}, trainer.texts(task, [row])
        for frozen in trainer.frozen_models(task):
            velocity = frozen.velocity(trainer.evaluator.field)
            of_task[frozen.caption] = draw(trainer.evaluator, velocity, task, texts.of(frozen.reader)[0])
        with trainer.student.ema_weights():
            velocity = trainer.evaluator.student_velocity()
            of_task[captioned("student", scale)] = draw(trainer.evaluator, velocity, task, texts.student[0])
        pictures[task] = row, of_task
    return pictures


def score_pictures(
    evaluator: ImageEvaluator, pictures: Pictures, state: TrainerState
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Scores every image, by task, caption and reward. If a reward hangs, there is a warning and no score."""
    scored = {}
    for task, (row, images) in pictures.items():
        with evaluator.monitor(task, state) as scorer:
            scorer.submit([row] * len(images), list(images.values()))
            scores = scorer.results()
        scored[task] = {
            caption: {name: values[i] for name, values in scores.items()} for i, caption in enumerate(images)
        }
    return scored


def write_pictures(
    output_dir: str | None, pictures: Pictures, scored: Mapping[str, Mapping[str, Mapping[str, float | None]]]
) -> None:
    """
    Writes each image to a file, and one picture of all images with their first reward, into the output folder. A video
    is a strip of frames there, and a file of its own.
    """
    from ..reporting import plots

    folder = Path(output_dir or ".") / DRY_RUN_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for task, (row, of_task) in pictures.items():
        scores = {caption: next(iter(scored[task][caption].values()), None) for caption in of_task}
        for caption, image in of_task.items():
            model = caption.split(",")[0].replace(" ", "_")
            still(image).save(folder / f"{file_name(task)}_{model}.png")
            if isinstance(image, list):
                encoded(image).write(folder / f"{file_name(task)}_{model}")
        reward = next((name for of_image in scored[task].values() for name in of_image), None)
        stills = {caption: still(image) for caption, image in of_task.items()}
        if (source := source_of(row)) is not None:
            stills, scores = {SOURCE: source, **stills}, {SOURCE: None, **scores}
        rows.append(plots.SampleRow(task, row["prompt"], stills, scores, reward))
    with extra(f"The picture {DRY_RUN_PICTURE}"):
        plots.plot_samples(rows, folder / DRY_RUN_PICTURE)


# The end of a dry run with teachers


def taught_report(
    trainer: DiffusionTrainer,
    sampler: TaskSampler,
    tasks: dict[str, dict[str, JSON]],
    seconds: float,
    activations: int,
    pairs: Sequence[Pair],
    print_report: Callable[[dict[str, JSON], str], None],
) -> dict[str, JSON]:
    """
    Draws, scores, writes and prints what is known of the first update. All processes must call it.

    Args:
        trainer ([`DiffusionTrainer`]), sampler ([`TaskSampler`]): the trainer, and the order of its rows.
        tasks (`dict`): figures of each task, with its `"teachers"`. The rewards of the images are added.
        seconds (`float`): the time of an update on this process. That of the slowest one is reported.
        activations (`int`): bytes that a forward and backward of this process held.
        pairs (`list[Pair]`): the comparison of tasks.
        print_report (`Callable`): prints the report, given it and the type of the device.

    Returns:
        `dict`: the report.
    """
    seconds = max(gather_object([seconds]))
    updates = number_of_updates(trainer, sampler)
    report: dict[str, JSON] = {
        "tasks": tasks,
        "separability": [pair.report() for pair in pairs],
        "memory": memory(trainer, {}, activations, "a forward and backward"),
        "seconds_per_update": seconds,
        "updates": updates,
        "seconds": seconds * updates,
        "warnings": [*teacher_warnings(tasks), *filter(None, [conflict_warning(pairs)])],
    }
    images = draw_models(trainer)
    if trainer.accelerator.is_main_process:
        scored = score_pictures(trainer.evaluator, images, trainer.state)
        for task, of_task in scored.items():
            tasks[task]["rewards"] = of_task
        write_pictures(trainer.args.output_dir, images, scored)
        tables.print_pairs(pairs)
        print_report(report, trainer.accelerator.device.type)
        for warning in report["warnings"]:
            logger.warning(warning)
    trainer.accelerator.wait_for_everyone()
    return report
