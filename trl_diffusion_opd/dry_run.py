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

"""What a run would do, shown before it starts: an update's worth of forwards, memory, time, and a picture of every model."""

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import psutil
import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor, nn

from . import tables
from .data import TaskSampler, task_rows
from .evaluation import draw_images
from .objectives import inclusion_probabilities, systematic_sample, velocity_gap_sq
from .rewards import score
from .rollout import gaussian, sample_generators, walk
from .teachers import Teacher, rescaled_factors


if TYPE_CHECKING:
    from .trainer.diffusion_opd_trainer import DiffusionOPDTrainer

logger = logging.getLogger(__name__)

FOLDER = "dry_run"
PICTURE = "dry_run.png"


def dry_run(trainer: "DiffusionOPDTrainer") -> dict[str, Any]:
    """
    Shows what `trainer.train()` would do, without training: see [`DiffusionOPDTrainer.dry_run`].

    For each task it walks one micro-batch of the first update along the trained steps, with the velocities of student,
    teachers and base, and runs one forward and backward. No weight and no random state changes.

    Args:
        trainer ([`DiffusionOPDTrainer`]): one that has not trained yet. Called on all processes.

    Returns:
        `dict`:
        - `"tasks"`: by task `"kl"`, `"velocity_gap"` and `"noise_floor"` as in the logged metrics, over all trained steps;
          `"teachers"`, a list with each one's `"gap_to_base"` (relative norm of the difference to the base's velocity, at
          the teacher's guidance) and `"rounding"` (the same for two equal networks); and `"rewards"` by model and name.
        - `"memory"`: by part, `{"dtype", "bytes", "how"}`, on one process and without sharding.
        - `"seconds_per_update"`, `"updates"`, `"seconds"`: of the walks alone.
        - `"warnings"`: a sentence each.
    """
    if trainer.args.activation_checkpointing:
        trainer.model.activation_checkpointing_enable()  # as Trainer does when training begins
    sampler = trainer._get_train_sampler()
    tasks, costs, activations = {}, [], []
    for task in trainer.tasks:
        prompts, positions = _micro_batch(trainer, sampler, task)
        figures, cost = _walk(trainer, task, prompts, positions)
        cost["update"], used = _forward_backward(trainer, prompts, positions)
        tasks[task] = figures
        costs.append(cost)
        activations.append(used)
    seconds = max(gather_object([_seconds(trainer, costs)]))
    epochs = trainer.args.num_train_epochs
    updates = trainer.args.max_steps if trainer.args.max_steps > 0 else math.ceil(epochs * sampler.rounds)
    report = {
        "tasks": tasks,
        "memory": _memory(trainer, max(activations)),
        "seconds_per_update": seconds,
        "updates": updates,
        "seconds": seconds * updates,
        "warnings": _warnings(tasks),
    }
    images = _draw(trainer)
    if trainer.accelerator.is_main_process:
        for task, (row, of_task) in images.items():
            tasks[task]["rewards"] = _score(trainer, task, row, of_task)
        _write(trainer, images, tasks)
        tables.print_dry_run(report, trainer.accelerator.device.type)
        for warning in report["warnings"]:
            logger.warning(warning)
    trainer.accelerator.wait_for_everyone()
    return report


def _micro_batch(trainer: "DiffusionOPDTrainer", sampler: TaskSampler, task: str) -> tuple[list[str], list[int]]:
    """This process's prompts in the first update's first micro-batch of a task, and their places in the task's part."""
    size, accelerator = trainer._train_batch_size, trainer.accelerator
    length = size * accelerator.num_processes
    first = trainer.tasks.index(task) * length + accelerator.process_index * size
    rows = list(islice(sampler, first, first + size))
    start = accelerator.process_index * size
    return [trainer.train_dataset[row]["prompt"] for row in rows], list(range(start, start + size))


# An update's forwards


class _Clock:
    """Seconds of calls, the median of each kind: the first one sets things up, and others may have to wait."""

    def __init__(self, device: torch.device):
        self.device = device
        self.times: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.times.setdefault(name, []).append(time.perf_counter() - start)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])


def _network(trainer: "DiffusionOPDTrainer", module: nn.Module) -> Callable[..., Any]:
    """The module as it computes in training, where accelerate has wrapped the trained model for mixed precision."""
    if module is not trainer.accelerator.unwrap_model(trainer.model):
        return module

    def call(**inputs: Any) -> Any:
        with trainer.accelerator.autocast():
            return module(**inputs)

    return call


@torch.no_grad()
def _walk(
    trainer: "DiffusionOPDTrainer", task: str, prompts: list[str], positions: list[int]
) -> tuple[dict[str, Any], dict[str, float]]:
    """What the walk shows of a task, and the seconds of a forward of `"student"`, `"teachers"` and `"base"`."""
    args, field, bank, roles = trainer.args, trainer.velocity_field, trainer.bank, trainer.bank.teachers[task]
    steps = len(trainer.trainable_steps)
    levels = trainer.table.levels.tolist()
    generators = sample_generators([args.seed, trainer.state.global_step, trainer.tasks.index(task)], positions)
    clock = _Clock(trainer.accelerator.device)
    # At each step: squared gap of student and target, squared norm of the target, and for each teacher the squared gap
    # to the base and the squared norm of its velocity.
    squares: list[list[Tensor]] = []
    rounding = [_rounding(trainer)] * len(roles)

    def velocity(j: int, x: Tensor) -> Tensor:
        t = levels[j]
        with clock("student"):
            student = field(x, t, prompts, args.guidance_scale, _network(trainer, _student(trainer)))
        target, of_teachers = torch.zeros_like(x), []
        for i, role in enumerate(roles):
            scale = role.guidance_scale
            with bank.use(role) as module, clock(f"teacher {i}"):
                own = field(x, t, prompts, scale, _network(trainer, module))
            with bank.use(None) as module, clock("base"):
                base = field(x, t, prompts, scale, _network(trainer, module))
            of_teachers += [velocity_gap_sq(own, base).mean(), own.square().mean()]
            target += role.weight * own
            if j == steps - 1 and role.kind == "lora":
                with bank.use(role) as module, rescaled_factors(bank.backbone, role.name):
                    again = field(x, t, prompts, scale, _network(trainer, module))
                rounding[i] = max(rounding[i], math.sqrt(velocity_gap_sq(own, again).mean() / own.square().mean()))
        squares.append([velocity_gap_sq(student, target).mean(), target.square().mean(), *of_teachers])
        return student if args.on_policy else target

    x = field.initial_latents(prompts, generators)
    walk(velocity, x, trainer.table.head(steps), lambda j: gaussian(generators, x))
    local = torch.stack([torch.stack(row) for row in squares])
    sums = trainer.accelerator.gather(local[None]).double().mean(0).cpu()
    rounding = [max(column) for column in zip(*gather_object([rounding]), strict=True)]
    kl_weights = trainer.kl_weights[:steps]
    gap, norm = sums[:, 0], sums[:, 1]
    figures = {
        "kl": float((kl_weights * gap).mean()),
        "velocity_gap": math.sqrt(gap.sum() / norm.sum()),
        "noise_floor": float((kl_weights * norm).mean()) * max(rounding) ** 2,
        "teachers": [
            {
                "teacher": _name(role),
                "kind": role.kind,
                "guidance_scale": role.guidance_scale,
                "gap_to_base": math.sqrt(sums[:, 2 + 2 * i].sum() / sums[:, 3 + 2 * i].sum()),
                "rounding": rounding[i],
            }
            for i, role in enumerate(roles)
        ],
    }
    teachers = sum(clock.median(f"teacher {i}") for i in range(len(roles)))
    return figures, {"student": clock.median("student"), "teachers": teachers, "base": clock.median("base")}


def _student(trainer: "DiffusionOPDTrainer") -> Any:
    return trainer.accelerator.unwrap_model(trainer.model)


def _name(role: Teacher) -> str:
    return "/".join(filter(None, (role.source, role.config.subfolder)))


def _rounding(trainer: "DiffusionOPDTrainer") -> float:
    """The relative rounding of one number: what two equal networks differ by is hardly less."""
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.accelerator.mixed_precision)
    frozen = (p.dtype for p in trainer.bank.backbone.parameters() if not p.requires_grad)
    weights = next(dtype for dtype in frozen if dtype.is_floating_point)  # quantised ones are integers
    return max(torch.finfo(dtype).eps for dtype in (weights, mixed) if dtype is not None)


def _forward_backward(trainer: "DiffusionOPDTrainer", prompts: list[str], positions: list[int]) -> tuple[float, int]:
    """Seconds of the student's forward and backward at one step, and the bytes that they need on the device."""
    device, field = trainer.accelerator.device, trainer.velocity_field
    x = field.initial_latents(prompts, sample_generators([trainer.args.seed], positions))
    parameters = trainer.student.parameters()
    clock, used = _Clock(device), 0
    for _ in range(3):
        before = _in_use(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with clock("update"):
            velocity = field(
                x,
                float(trainer.table.levels[0]),
                prompts,
                trainer.args.guidance_scale,
                _network(trainer, _student(trainer)),
            )
            loss = velocity_gap_sq(velocity, x).mean()
            at_loss = _in_use(device)
            # Not backward(): the parameters' own gradients stay as they are.
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        if device.type == "cuda":
            kept = sum(gradient.nbytes for gradient in gradients if gradient is not None)
            used = max(used, torch.cuda.max_memory_allocated(device) - before - kept)
        else:
            used = max(used, at_loss - before)
        del gradients, loss, velocity
    return clock.median("update"), used


def _in_use(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


# Time and memory


def _seconds(trainer: "DiffusionOPDTrainer", costs: list[dict[str, float]]) -> float:
    """Seconds of an update: what the steps of its walks cost, as measured on one micro-batch of each task."""
    args, k = trainer.args, trainer.args.num_trained_timesteps
    walked = trained = float(len(trainer.trainable_steps))
    if k is not None:
        pi = inclusion_probabilities(trainer.weights[: len(trainer.trainable_steps)], k)
        draws = [systematic_sample(pi, (i + 0.5) / 100) for i in range(100)]
        trained, walked = float(k), sum(max(steps) + 1 for steps in draws) / len(draws)
    seconds = 0.0
    for cost in costs:
        seconds += trained * (cost["teachers"] + cost["update"] + (cost["base"] if args.beta > 0 else 0.0))
        seconds += (walked - trained) * cost["student" if args.on_policy else "teachers"]
    return seconds * trainer._micro_batches


def _memory(trainer: "DiffusionOPDTrainer", activations: int) -> dict[str, dict[str, Any]]:
    student = trainer.student.parameters()
    teachers = list(trainer.bank.parameters())
    taken = {id(parameter) for parameter in [*student, *teachers]}
    parts: dict[str, list[Tensor]] = {}
    for name, component in trainer._pipeline.components.items():
        if isinstance(component, nn.Module):
            parts[name] = [p for p in component.parameters() if id(p) not in taken]
    parts["student"] = list(student)
    parts["teachers" if trainer.student.is_lora else "teachers and frozen base"] = list(teachers)
    parts["moving average"] = [] if trainer.student.ema is None else trainer.student.ema.shadow_params
    rows = {
        name: _row(sum(p.nbytes for p in tensors), {p.dtype for p in tensors}, "counted")
        for name, tensors in parts.items()
        if tensors
    }
    trained, dtypes = rows["student"]["bytes"], {p.dtype for p in student}
    rows["gradients"] = _row(trained, dtypes, "as the student")
    rows["optimizer"] = _row(2 * trained, dtypes, "estimate: Adam's two moments")
    measured = trainer.accelerator.device.type == "cuda"
    how = "measured: peak of forward and backward" if measured else "estimate: growth of the process in a forward"
    rows["activations"] = _row(activations, set(), how)
    rows["sum"] = _row(sum(row["bytes"] for row in rows.values()), set(), "estimate")
    return rows


def _row(size: int, dtypes: set[torch.dtype], how: str) -> dict[str, Any]:
    return {"dtype": ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes)), "bytes": size, "how": how}


def _warnings(tasks: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"The teacher {teacher['teacher']} of task {task!r} does not differ from the base: its velocities are "
        f"{teacher['gap_to_base']:.1e} apart (relative), and {teacher['rounding']:.1e} is rounding. Is it the right LoRA?"
        for task, figures in tasks.items()
        for teacher in figures["teachers"]
        if teacher["kind"] != "base" and teacher["gap_to_base"] <= teacher["rounding"]
    ]


# Pictures


def _draw(trainer: "DiffusionOPDTrainer") -> dict[str, tuple[dict[str, Any], dict[str, Image.Image]]]:
    """For each task the first row that is evaluated and, by a caption, the images of the models, all from the same noise."""
    args, bank = trainer.args, trainer.bank
    evaluated: Any = trainer.eval_dataset
    if isinstance(evaluated, Mapping):
        evaluated = next(iter(evaluated.values()))
    firsts: dict[str, dict[str, Any]] = {}  # an evaluation need not have every task
    for dataset in (trainer.train_dataset, evaluated):
        if dataset is not None:
            firsts |= {t: dataset[int(rows[0])] for t, rows in task_rows(dataset, args.task_column).items()}
    scale = args.guidance_scale if args.eval_guidance_scale is None else args.eval_guidance_scale
    images: dict[str, tuple[dict[str, Any], dict[str, Image.Image]]] = {}
    for task, row in firsts.items():

        def draw(module: nn.Module, guidance_scale: float, task: str = task, row: dict[str, Any] = row) -> Image.Image:
            entropy = [args.seed, trainer.tasks.index(task)]  # an evaluation's, so it shows the same image
            ((_, image),) = draw_images(
                trainer.eval_field,
                module,
                [row["prompt"]],
                entropy=entropy,
                guidance_scale=guidance_scale,
                batch_size=1,
            )
            return image

        of_task = {}
        with bank.use(None) as module:
            of_task[f"base, CFG {scale:g}"] = draw(module, scale)
        for i, role in enumerate(bank.teachers[task], start=1):
            name = "teacher" if len(bank.teachers[task]) == 1 else f"teacher {i}"
            with bank.use(role) as module:
                of_task[f"{name}, CFG {role.guidance_scale:g}"] = draw(module, role.guidance_scale)
        with trainer.student.ema_weights():
            of_task[f"student, CFG {scale:g}"] = draw(_student(trainer), scale)
        images[task] = row, of_task
    return images


def _score(
    trainer: "DiffusionOPDTrainer", task: str, row: dict[str, Any], images: dict[str, Image.Image]
) -> dict[str, dict[str, float | None]]:
    scores = score(trainer.reward_funcs[task], [row] * len(images), list(images.values()), trainer.state)
    return {caption: {name: values[i] for name, values in scores.items()} for i, caption in enumerate(images)}


def _write(
    trainer: "DiffusionOPDTrainer",
    images: dict[str, tuple[dict[str, Any], dict[str, Image.Image]]],
    tasks: dict[str, dict[str, Any]],
) -> None:
    from . import plots  # matplotlib is slow to load

    folder = Path(trainer.args.output_dir or ".") / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    widest = max(len(of_task) for _, of_task in images.values())
    rows = []
    for task, (row, of_task) in images.items():
        scores = {caption: next(iter(tasks[task]["rewards"][caption].values()), None) for caption in of_task}
        for caption, image in of_task.items():
            model = caption.split(",")[0].replace(" ", "_")
            image.save(folder / f"{quote(task, safe=' ')}_{model}.png")
        # All rows of the picture have the same number of models.
        width, height = next(iter(of_task.values())).size
        blanks = {" " * n: Image.new("RGB", (width, height), "white") for n in range(1, widest - len(of_task) + 1)}
        rows.append(plots.SampleRow(task, row["prompt"], {**of_task, **blanks}, {**scores, **dict.fromkeys(blanks)}))
    plots.plot_samples(rows, folder / PICTURE)
