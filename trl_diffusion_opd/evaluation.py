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

"""How much of its teachers' gains a student has: base, teachers and students on the same prompts with the same noise."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env, tqdm
from datasets import Dataset
from diffusers import DiffusionPipeline
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL.Image import Image
from torch import Tensor, nn

from .data import dataset_problems, task_rows
from .retention import Scores, retention_report, retention_table
from .rewards import RewardFunc, RewardFuncs, rewards_by_task, score
from .rollout import sample_generators, walk
from .samplers import sampler_table
from .teacher_specs import TeacherSpec
from .teachers import Teacher, TeacherBank, TeacherConfig, normalize_teachers
from .velocity import VelocityField


__all__ = ["draw_images", "evaluate_retention", "retention_report", "retention_table"]

REPORT_FILE = "retention.json"
SCORES_FILE = "retention_scores.json"

# Two words of a seed, before the caller's: training seeds with [seed, step, task, sample], and no run has a seed and a
# step like these.
_DRAWING = 0xD1FF05ED_E7A15EED


# Drawing


def draw_images(
    field: VelocityField,
    transformer: Callable[..., Any],
    prompts: list[str],
    *,
    entropy: Sequence[int],
    guidance_scale: float,
    batch_size: int,
    process: tuple[int, int] = (0, 1),
    offset: int = 0,
) -> list[tuple[int, Image]]:
    """
    Draws an image a prompt with the deterministic sampler.

    An image depends on `entropy` and on its number, and not on the batch or the process that it is drawn in. Every
    process calls the transformer equally often; what that draws twice is dropped.

    Args:
        field ([`VelocityField`]): the pipeline, with the noise grid to walk.
        transformer (`Callable`): what is called in place of the pipeline's transformer.
        prompts (`list[str]`): prompts of all processes.
        entropy (`Sequence[int]`): what the images have in common, not negative: seed and task. Training's noise is
            another one, whatever it is.
        guidance_scale (`float`): scale of classifier-free guidance, 1 for none.
        batch_size (`int`): images at a time on one process.
        process (`tuple[int, int]`, *optional*): index of this process and number of processes.
        offset (`int`, *optional*): number of the first image, for prompts that are a part of a longer list.

    Returns:
        `list[tuple[int, PIL.Image.Image]]`: position in `prompts` and image, of this process's share.
    """

    def velocity(x: Tensor, t: float, batch: list[str]) -> Tensor:
        return field(x, t, batch, guidance_scale, transformer)

    return _draw(field, velocity, prompts, entropy, batch_size, process, offset)


@torch.no_grad()
def _draw(
    field: VelocityField,
    velocity: Callable[[Tensor, float, list[str]], Tensor],
    prompts: list[str],
    entropy: Sequence[int],
    batch_size: int,
    process: tuple[int, int],
    offset: int,
) -> list[tuple[int, Image]]:
    rank, world = process
    table = sampler_table("ode", field.levels)
    levels = table.levels.tolist()
    share = range(rank, -(-len(prompts) // world) * world, world)
    images: list[tuple[int, Image]] = []
    for start in range(0, len(share), batch_size):
        positions = share[start : start + batch_size]
        batch = [prompts[i % len(prompts)] for i in positions]
        x = field.initial_latents(batch, sample_generators([_DRAWING, *entropy], (offset + i for i in positions)))
        x = walk(lambda j, x, batch=batch: velocity(x, levels[j], batch), x, table)  # type: ignore[misc]
        images += [(i, image) for i, image in zip(positions, field.decode(x, batch), strict=True) if i < len(prompts)]
    return images


# The evaluation


@dataclass(frozen=True)
class _Model:
    """A weighted mean of networks, each at its own guidance, under every name that it is asked for by."""

    roles: list[Teacher]
    names: list[str]


def evaluate_retention(
    pipeline: str | DiffusionPipeline,
    teachers: TeacherSpec | Mapping[str, TeacherSpec],
    students: str | TeacherConfig | Mapping[str, str | TeacherConfig],
    reward_funcs: RewardFuncs,
    dataset: Dataset,
    *,
    num_images: int = 512,
    num_inference_steps: int = 40,
    guidance_scale: float = 4.5,
    teacher_guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    max_sequence_length: int | None = None,
    generation_kwargs: dict[str, Any] | None = None,
    task_column: str = "task",
    batch_size: int = 32,
    seed: int = 0,
    output_dir: str | Path | None = None,
    num_samples: int = 4,
) -> dict[str, Any]:
    """
    Measures how much of its teachers' gains a student has.

    The base, every teacher and every student draw images for the prompts of every task, with the same noise; the first
    reward of a task is its score. No image is drawn twice: a model with several roles is drawn once. Under `accelerate
    launch` each process draws its share, and all of them return the report.

    Args:
        pipeline (`str` or [`~diffusers.DiffusionPipeline`]):
            The base. A Hub id or folder is loaded in float32 on this process's device. A pipeline is used where it is and
            given back as it was.
        teachers (`str`, [`TeacherConfig`], a list of these, or a `dict` from task to any of them):
            As for [`DiffusionOPDTrainer`]. Several teachers of a task are evaluated as their weighted mean velocity.
        students (`str`, [`TeacherConfig`], or a `dict` from name to either):
            What can be a teacher can be a student: a LoRA or a transformer. A single one is called `"student"`.
        reward_funcs (function, `list` or `dict` from task to either):
            Rewards of each task.
        dataset ([`~datasets.Dataset`]):
            Held-out prompts: columns `prompt` and `task`; others are passed to the reward functions.
        num_images (`int`, *optional*, defaults to 512):
            Images a task. Prompts are taken in turn, each time with noise of its own.
        num_inference_steps (`int`, *optional*, defaults to 40):
            Steps of the deterministic sampler.
        guidance_scale (`float`, *optional*, defaults to 4.5):
            Of the base and the students.
        teacher_guidance_scale (`float`, *optional*):
            Of the teachers that name none of their own, `guidance_scale` if not given.
        height (`int`, *optional*), width (`int`, *optional*), max_sequence_length (`int`, *optional*),
        generation_kwargs (`dict`, *optional*):
            As in [`VelocityField`].
        task_column (`str`, *optional*, defaults to `"task"`):
            Column that names the task.
        batch_size (`int`, *optional*, defaults to 32):
            Images at a time on each process.
        seed (`int`, *optional*, defaults to 0):
            Of the noise and the bootstrap.
        output_dir (`str` or `Path`, *optional*):
            Where to write `retention.json` (the report), `retention_scores.json` (the score of every image),
            `retention.png` and `samples.png`.
        num_samples (`int`, *optional*, defaults to 4):
            Prompts a task in `samples.png`.

    Returns:
        `dict`: as [`retention_report`] returns it. Its models are `"base"`, `"teacher/<task>"` and the students' names.

    Raises:
        [`ValueError`]: if anything of this cannot be used. One message lists all of it.
    """
    # Without `cpu`, processes that were launched on a machine without an accelerator would not know of each other.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    base = pipeline
    if isinstance(base, str):
        base = DiffusionPipeline.from_pretrained(base, use_safetensors=True).to(state.device)
    if not isinstance(students, Mapping):
        students = {"student": students}
    problems = dataset_problems(dataset, task_column, "dataset")
    rows = {} if problems else task_rows(dataset, task_column)
    problems += _option_problems(num_images, batch_size, students)
    specs: dict[str, list[TeacherConfig]] = {"base": [TeacherConfig("base", guidance_scale=guidance_scale)]}
    functions: dict[str, list[RewardFunc]] = {}
    if rows:
        try:
            of_tasks = normalize_teachers(teachers, list(rows))
            specs |= {f"teacher/{task}": configs for task, configs in of_tasks.items()}
        except ValueError as error:
            problems += str(error).splitlines()
        try:
            functions = rewards_by_task(reward_funcs, list(rows))
        except ValueError as error:
            problems += str(error).splitlines()
        problems += [f"reward_funcs has no reward for task {task!r}." for task in rows if functions.get(task) == []]
    try:
        for name, configs in normalize_teachers(students, list(students)).items():
            specs[name] = [_at(config, guidance_scale) for config in configs]
    except ValueError as error:
        problems += str(error).splitlines()
    if problems:
        raise ValueError("The evaluation cannot start:\n" + "\n".join(f"- {p}" for p in dict.fromkeys(problems)))

    with _borrowed(base) as transformer:
        field = VelocityField(
            base,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            max_sequence_length=max_sequence_length,
            generation_kwargs=generation_kwargs,
        )
        teacher_scale = guidance_scale if teacher_guidance_scale is None else teacher_guidance_scale
        bank = TeacherBank(transformer, base, specs, teacher_scale, student_adapter=None)
        bank.to(transformer.device)
        for scale in {role.guidance_scale for roles in bank.teachers.values() for role in roles}:
            field.check_guidance(scale)
        scores, samples = _measure(
            field, bank, functions, dataset, rows, num_images, batch_size, seed, num_samples if output_dir else 0
        )
    report = retention_report(scores, {task: f"teacher/{task}" for task in rows}, list(students), seed)
    if output_dir is not None and state.is_main_process:
        _write(Path(output_dir), report, scores, samples)
    state.wait_for_everyone()  # whoever goes on finds the files
    return report


def _option_problems(num_images: int, batch_size: int, students: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, value in (("num_images", num_images), ("batch_size", batch_size)):
        if value < 1:
            problems.append(f"{name}={value}: it must be at least 1.")
    if not students:
        problems.append("There is no student to evaluate.")
    taken = [name for name in students if name == "base" or name.startswith("teacher/")]
    if taken:
        problems.append(f"A student is named {taken[0]!r}, which is the report's name for another model. Rename it.")
    return problems


def _at(config: TeacherConfig, guidance_scale: float) -> TeacherConfig:
    return config if config.guidance_scale is not None else replace(config, guidance_scale=guidance_scale)


@contextmanager
def _borrowed(pipeline: Any) -> Iterator[Any]:
    """The pipeline's transformer to put LoRAs on, which are gone afterwards, also when a teacher cannot be loaded."""
    transformer = pipeline.components.get("transformer")
    if isinstance(transformer, nn.Module) and any(isinstance(m, BaseTunerLayer) for m in transformer.modules()):
        raise ValueError(
            "The pipeline already carries a LoRA, which would count as part of the base. Remove it with "
            "pipe.unload_lora_weights(), and pass it as a student or a teacher."
        )
    networks = [component for component in pipeline.components.values() if isinstance(component, nn.Module)]
    modes = [(module, module.training) for network in networks for module in network.modules()]
    trained = [(parameter, parameter.requires_grad) for network in networks for parameter in network.parameters()]
    for network in networks:
        network.eval()
    try:
        yield transformer
    finally:
        if isinstance(transformer, nn.Module):
            recurse_remove_peft_layers(transformer)
            # PEFT leaves it on the model, and load_lora_weights would take its names for adapters that are there.
            transformer.__dict__.pop("peft_config", None)
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def _distinct_models(bank: TeacherBank) -> list[_Model]:
    models: dict[Any, _Model] = {}
    for name, roles in bank.teachers.items():
        key = tuple((role.name, role.guidance_scale, role.weight) for role in roles)
        models.setdefault(key, _Model(roles, [])).names.append(name)
    return list(models.values())


def _measure(
    field: VelocityField,
    bank: TeacherBank,
    functions: Mapping[str, Sequence[RewardFunc]],
    dataset: Dataset,
    rows: Mapping[str, np.ndarray],
    num_images: int,
    batch_size: int,
    seed: int,
    num_samples: int,
) -> tuple[Scores, dict[str, Any]]:
    """Scores of all images, and for each task its first rows and every model's images for them."""
    state = PartialState()
    process = (state.process_index, state.num_processes)
    models = _distinct_models(bank)
    scores: Scores = {name: {} for name in bank.teachers}
    samples: dict[str, Any] = {}
    chunk = batch_size * state.num_processes
    chunks = range(0, num_images, chunk)
    with tqdm(total=len(rows) * len(models) * len(chunks), desc="Evaluating", unit="batch") as progress:
        for index, (task, of_task) in enumerate(rows.items()):
            data = dataset.select(np.resize(of_task, num_images))
            samples[task] = {"prompts": data["prompt"][:num_samples], "images": {}}
            for model in models:
                mine: list[tuple[int, dict[str, float | None]]] = []
                shown: list[tuple[int, Image]] = []
                for start in chunks:
                    part = data[start : start + chunk]
                    drawn = _draw(
                        field, _velocity(field, bank, model), part["prompt"], [seed, index], batch_size, process, start
                    )
                    progress.update()
                    if not drawn:  # the last chunk may have less images than there are processes
                        continue
                    entries = [{column: values[i] for column, values in part.items()} for i, _ in drawn]
                    values = score(functions[task], entries, [image for _, image in drawn])
                    for n, (i, image) in enumerate(drawn):
                        mine.append((start + i, {name: column[n] for name, column in values.items()}))
                        if start + i < num_samples:
                            shown.append((start + i, image))
                everyone = [values for _, values in sorted(gather_object(mine), key=lambda item: item[0])]
                images = [image for _, image in sorted(gather_object(shown), key=lambda item: item[0])]
                for name in model.names:
                    scores[name][task] = {reward: [v[reward] for v in everyone] for reward in everyone[0]}
                    samples[task]["images"][name] = images
    return scores, samples


def _velocity(field: VelocityField, bank: TeacherBank, model: _Model) -> Callable[[Tensor, float, list[str]], Tensor]:
    def velocity(x: Tensor, t: float, prompts: list[str]) -> Tensor:
        mean = torch.zeros_like(x)
        for role in model.roles:
            with bank.use(role) as transformer:
                mean += role.weight * field(x, t, prompts, role.guidance_scale, transformer)
        return mean

    return velocity


def _write(folder: Path, report: dict[str, Any], scores: Scores, samples: dict[str, Any]) -> None:
    from . import plots  # every trainer imports this file, and matplotlib is slow to load

    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    (folder / SCORES_FILE).write_text(json.dumps(scores) + "\n")
    plots.plot_retention(report, folder / "retention.png")
    students = [name for name in scores if name != "base" and not name.startswith("teacher/")]
    shown = []
    for task, sample in samples.items():
        reward = report["tasks"][task]["reward"]
        columns = {"base": "base", "teacher": f"teacher/{task}", **{name: name for name in students}}
        for i, prompt in enumerate(sample["prompts"]):
            images = {label: sample["images"][model][i] for label, model in columns.items()}
            verdicts = {label: scores[model][task][reward][i] for label, model in columns.items()}
            shown.append(plots.SampleRow(task, prompt, images, verdicts))
    if shown:
        plots.plot_samples(shown, folder / "samples.png")
