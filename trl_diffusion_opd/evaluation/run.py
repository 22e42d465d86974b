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

"""Runs the retention evaluation, from its arguments to its report."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from datasets import Dataset
from datasets.fingerprint import Hasher
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin

from ..acceleration.offload import Offload
from ..acceleration.processes import failing_together, world_problems
from ..acceleration.quantization import QuantizationConfig
from ..data.pictured_prompt import SOURCE_IMAGES
from ..data.readers import Readers, teacher_prompt_problems, template_problems
from ..data.source_images import plain_source_images, source_image_problems
from ..data.tasks import dataset_problems, plain_dataset, task_rows
from ..guards.files import JSON
from ..models.backbone import Backbone
from ..models.expert_teachers import find_teacher
from ..models.own_pipeline import OwnPipelines
from ..models.teacher_config import TeacherSpec, at_the_start
from ..models.teachers import TeacherBank, TeacherConfig, normalize_teachers
from ..pipelines.fingerprints import base_digest
from ..pipelines.loading import borrowed, load_pipeline
from ..pipelines.loading_options import DTYPES, model_init_problems
from ..pipelines.picture_checks import picture_problems
from ..pipelines.velocity import VelocityField
from ..problems import Problems
from ..reporting.console import print_line
from ..reporting.report import Report
from ..rewards import RewardFunc, RewardFuncs, reward_data_problems, reward_name, rewards_by_task
from ..rewards.scoring import score_names, timeout_problems
from .announcement import announce, replaced, timed
from .files import write_results
from .fixed_states import measure_fixed_states
from .measure import Measured, measure, time_batch
from .plan import Options, Plan, Task, make_plan
from .rehearsal import try_rewards
from .retention import retention_report
from .settings import Choice, choose, read_records
from .store import Store


logger = logging.getLogger(__name__)

# Images a task, if there are more prompts and the caller names no number.
MOST_IMAGES = 512


def evaluate_retention(
    pipeline: str | DiffusionPipeline,
    teachers: TeacherSpec | Mapping[str, TeacherSpec],
    students: str | TeacherConfig | Mapping[str, str | TeacherConfig],
    reward_funcs: RewardFuncs,
    dataset: Dataset,
    *,
    num_images: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    teacher_guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    max_sequence_length: int | None = None,
    generation_kwargs: dict[str, object] | None = None,
    prompt_templates: Mapping[str, str] | None = None,
    dtype: str | None = None,
    quantization_config: QuantizationConfig = None,
    model_init_kwargs: dict[str, JSON] | None = None,
    task_column: str = "task",
    source_images_column: str = SOURCE_IMAGES,
    cross_task_rewards: bool = True,
    batch_size: int = 32,
    seed: int = 0,
    output_dir: str | Path | None = None,
    num_samples: int = 4,
    keep_images: bool = True,
    reward_timeout: float | None = 900.0,
    dry_run: bool = False,
) -> Report | None:
    """
    Measures how much of its teachers' gains over the base a student has.

    The base, every teacher and every student draw images for the prompts of every task, with the same noise. A task's
    first reward is its score. The rewards of all tasks score the images of every task, which also shows what a model
    lost on other tasks. No image is drawn twice: a model with several roles is drawn once, and with `output_dir` the
    images and scores of an earlier or interrupted run are reused. Scoring runs while the next images are drawn. Under
    `accelerate launch` the processes share the work, and all of them return the report.

    Settings that are not given are those of the students' own evaluations in training, as the `training_args.json` and
    `teacher_manifest.json` beside each student say. Students that differ in one are refused until it is given. What no
    student knows is the pipeline's own default. Before anything is drawn, every reward scores one image of every
    task, and the main process prints what will be done. The report names each setting and its source.

    Args:
        pipeline (`str` or [`~diffusers.DiffusionPipeline`]):
            The base. A Hub id or folder is loaded onto this process's device. A pipeline stays on its device and is
            unchanged afterwards.
        teachers (`str`, [`TeacherConfig`], a list of these, or a `dict` from task to any of them):
            As for [`DiffusionOPDTrainer`]. Several teachers of a task are evaluated as their weighted mean velocity.
        students (`str`, [`TeacherConfig`], or a `dict` from name to either):
            The trained models: LoRAs or transformers, given like teachers. A single one is called `"student"`.
        reward_funcs (name, function, `list` or `dict` from task to any of them):
            Rewards of each task.
        dataset ([`~datasets.Dataset`]):
            Held-out prompts: columns `prompt` and `task`, for pipelines that edit `source_images`. Other columns are
            passed to the reward functions.
        num_images (`int`, *optional*):
            Images a task. By default one a prompt, and at most 512. If a task has fewer prompts, they are repeated
            with new noise.
        num_inference_steps (`int`, *optional*):
            Steps of the deterministic sampler. By default the students' `eval_num_inference_steps`, else 40.
        guidance_scale (`float`, *optional*):
            Guidance scale of the base, and of students that name none. By default the students'
            `eval_guidance_scale` or `guidance_scale`, else the pipeline's own.
        teacher_guidance_scale (`float`, *optional*):
            Guidance scale of teachers that name none of their own. By default the one at which the students learned
            from the task's teachers, else `guidance_scale`.
        height (`int`, *optional*), width (`int`, *optional*), max_sequence_length (`int`, *optional*),
        generation_kwargs (`dict`, *optional*):
            As in [`VelocityField`]. By default those of the students, else the pipeline's own.
        prompt_templates (`dict`, *optional*):
            For each task the text that the students read, with `{prompt}` in the prompt's place, as in
            [`DiffusionOPDConfig`]. By default those of the students' trainings; `{}` is none. Teachers read the
            column `teacher_prompt` if the task has one, else the prompt. The base and the rewards read the prompt.
        dtype (`str`, *optional*):
            Precision of a base that is given by name: `"float32"` (the default), `"bfloat16"` or `"float16"`.
        quantization_config (*optional*):
            How a base that is given by name is quantized, as for [`DiffusionOPDTrainer`].
        model_init_kwargs (`dict`, *optional*):
            Further arguments to load a base that is given by name, such as `{"revision": ..., "variant": "fp16"}`. Use
            those of the training.
        task_column (`str`, *optional*, defaults to `"task"`):
            Column that names the task.
        source_images_column (`str`, *optional*, defaults to `"source_images"`):
            Column with the pictures that a prompt is about, as in [`DiffusionOPDConfig`]. Rewards get it as
            `source_images`.
        cross_task_rewards (`bool`, *optional*, defaults to `True`):
            Whether rewards also score the images of other tasks. They must return `None` for rows that they do not
            apply to, as the rewards of this package do. Columns without a value in a row are `None`.
        batch_size (`int`, *optional*, defaults to 32):
            Images that each process draws at a time.
        seed (`int`, *optional*, defaults to 0):
            Seed of the noise and of the bootstrap.
        output_dir (`str` or `Path`, *optional*):
            Folder for images, scores, and the report with its tables and pictures. `None` keeps nothing on disk.
        num_samples (`int`, *optional*, defaults to 4):
            Prompts a task that are shown with their images.
        keep_images (`bool`, *optional*, defaults to `True`):
            Whether all images are kept in `output_dir`. `False` keeps only those that are shown. An interrupted run
            can still be continued, but a reward that is added later needs all images drawn again.
        reward_timeout (`float`, *optional*, defaults to 900):
            Seconds to wait for one call of a reward function; `None` for no limit. After that the evaluation stops.
            With `output_dir`, finished images and scores are kept.
        dry_run (`bool`, *optional*, defaults to `False`):
            Check everything, try the rewards, draw one batch to time it, print what the evaluation would do, and stop.
            Nothing is written.

    Returns:
        `dict`: as [`retention_report`] returns it, with `settings`, `guidance_scales` and `fixed_state_kl`. Its models
            are `"base"`, `"teacher/<task>"` and the students' names. `None` with `dry_run`.

    Raises:
        [`ValueError`]: if an argument cannot be used, or a reward can't score an image. One message lists all
            problems, before anything is drawn.
        [`TimeoutError`]: if a call of a reward function takes longer than `reward_timeout`.
    """
    # Without `cpu`, processes on a machine without an accelerator would not connect to each other.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    named = students if isinstance(students, Mapping) else {"student": students}
    if isinstance(dataset, Dataset):
        dataset = plain_source_images(plain_dataset(dataset, task_column), source_images_column)
    problems = _dataset_problems(dataset, task_column, source_images_column)
    rows = {} if problems else task_rows(dataset, task_column)
    options = Options(batch_size, seed, num_samples, keep_images, reward_timeout)
    problems += _option_problems(options, num_images, pipeline, dtype, quantization_config, model_init_kwargs, named)
    specs, functions = _models_and_rewards(teachers, named, reward_funcs, dataset, rows, problems)
    given: dict[str, object] = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "height": height,
    }
    given |= {"width": width, "max_sequence_length": max_sequence_length, "generation_kwargs": generation_kwargs}
    given["prompt_templates"] = prompt_templates if prompt_templates is None else dict(prompt_templates)
    problems += template_problems(prompt_templates or {}, list(rows) or None)
    choice = _chosen(given, teacher_guidance_scale, specs, named, problems)
    problems.raise_under("The evaluation cannot start")

    tasks = _tasks(dataset, rows, choice.readers(), functions, cross_task_rewards, num_images)
    base = _loaded(pipeline, dtype, model_init_kwargs, quantization_config, state.device)
    store = None if output_dir is None else Store(Path(output_dir), state.process_index)
    return _evaluate(base, specs, choice, tasks, list(named), options, store, dry_run)


def _evaluate(
    base: DiffusionPipeline,
    specs: Mapping[str, list[TeacherConfig]],
    choice: Choice,
    tasks: Mapping[str, Task],
    students: list[str],
    options: Options,
    store: Store | None,
    dry_run: bool,
) -> Report | None:
    """Does what [`evaluate_retention`] has prepared."""
    is_main = PartialState().is_main_process
    with borrowed(base) as transformer:
        depends: dict[str, object] = {"base": None if store is None else _shared_digest(base)}
        with failing_together():
            field = VelocityField(base, **choice.options())
            choice = choice.with_default(field)
            _check_pictures(field, tasks)
            bank = _bank(field, transformer, base, specs, choice)
        plan = make_plan(bank, tasks, depends | _depends(field, choice.options()), options, store)
        with failing_together():  # the others wait
            if is_main:
                _announce(field, bank, plan, choice, store, dry_run)
        if dry_run:
            return None
        with failing_together():
            # Now, since a training may write other weights into the folder while images are drawn.
            weights = {name: _weights(specs[name][0], base) for name in students}
        measured = measure(field, bank, plan, store)
        fixed = measure_fixed_states(field, bank, plan, students, store)
    report = _report(measured, tasks, students, options.seed, choice)
    report["fixed_state_kl"] = fixed
    report["weights_sha256"] = weights
    with failing_together():  # all processes wait until the files are written
        if is_main:
            logger.info(measured.told())
            if store is not None:
                write_results(store, report, measured, tasks, options.num_samples)
    return report


def _check_pictures(field: VelocityField, tasks: Mapping[str, Task]) -> None:
    problems = Problems()
    for name, part in tasks.items():
        rows = {name: np.arange(len(part.prompts))}
        problems += picture_problems(field, part.prompts, rows, f"The dataset's task {name!r}")
    problems.raise_under("The evaluation cannot start")


def _chosen(
    given: Mapping[str, object],
    teacher_scale: float | None,
    specs: Mapping[str, list[TeacherConfig]],
    students: Collection[str],
    problems: Problems,
) -> Choice:
    """Chooses how to draw. One process reads the students' files for all. Adds what does not fit to `problems`."""
    configs = {name: specs[name][0] for name in students if name in specs}
    is_main = PartialState().is_main_process
    records, unreadable = broadcast_object_list([read_records(configs) if is_main else None])[0]
    problems += unreadable
    with problems.collect():
        return choose(given, teacher_scale, specs, configs, records)
    return Choice({}, {}, [])


def _report(measured: Measured, tasks: Mapping[str, Task], students: list[str], seed: int, choice: Choice) -> Report:
    own = {task: [name for f in part.functions for name in score_names(f)] for task, part in tasks.items()}
    report = retention_report(measured.scores, {task: f"teacher/{task}" for task in tasks}, students, seed, own)
    report["settings"], report["guidance_scales"] = choice.for_report()
    return report


def _weights(student: TeacherConfig, base: DiffusionPipeline) -> str | None:
    return None if student.model_name_or_path == "base" else find_teacher(student, base).weights_sha256()


def _announce(
    field: VelocityField, bank: TeacherBank, plan: Plan, choice: Choice, store: Store | None, dry_run: bool
) -> None:
    """Prints what the evaluation will do, tries its rewards, and for a dry run draws a batch to time it."""
    generators = [torch.Generator().manual_seed(0)]
    (image,) = field.decode(field.initial_latents([""], generators), [""])  # noise, of the right size
    folder = None if store is None else str(store.folder)
    size = (image[0] if isinstance(image, list) else image).size
    announce(plan, *choice.for_report(), size, PartialState().num_processes, folder)
    if store is not None and not dry_run and (line := replaced(store.folder, plan)) is not None:
        logger.warning(line)
    for warning in choice.warnings:
        logger.warning(warning)
    try_rewards(plan, image)
    if dry_run:
        print_line(timed(plan, PartialState().num_processes, time_batch(field, bank, plan)))


def _depends(field: VelocityField, chosen: Mapping[str, Any]) -> dict[str, object]:
    """What all images depend on besides the base, ready for JSON."""
    return {
        "levels": field.levels.tolist(),
        "size": [chosen[name] for name in ("height", "width", "max_sequence_length")],
        "generation_kwargs": Hasher.hash(chosen["generation_kwargs"] or {}),
    }


def _dataset_problems(dataset: object, task_column: str, source_images_column: str) -> Problems:
    if isinstance(dataset, Dataset):
        found = dataset_problems(dataset, task_column, "dataset")
        return Problems(found + source_image_problems(dataset, source_images_column, "dataset"))
    kind = type(dataset).__name__
    return Problems([f"dataset is a {kind}; it must be a datasets.Dataset (for a DatasetDict, pass one split)."])


def _models_and_rewards(
    teachers: TeacherSpec | Mapping[str, TeacherSpec],
    students: Mapping[str, str | TeacherConfig],
    reward_funcs: RewardFuncs,
    dataset: Dataset,
    rows: Mapping[str, np.ndarray],
    problems: Problems,
) -> tuple[dict[str, list[TeacherConfig]], dict[str, list[RewardFunc]]]:
    """Returns all models by their names in the report, and rewards by task. Adds what does not fit to `problems`."""
    specs: dict[str, list[TeacherConfig]] = {"base": [TeacherConfig("base")]}
    functions: dict[str, list[RewardFunc]] = {}
    if rows:
        with problems.collect():
            of_tasks = normalize_teachers(teachers, list(rows))
            specs |= {f"teacher/{task}": [*map(at_the_start, configs)] for task, configs in of_tasks.items()}
        with problems.collect():
            functions = rewards_by_task(reward_funcs, list(rows))
        problems += [f"reward_funcs has no reward for task {task!r}." for task in rows if functions.get(task) == []]
        problems += reward_data_problems(functions, dataset, rows, "dataset")
        problems += teacher_prompt_problems(dataset, rows, "dataset")
    with problems.collect():
        specs |= normalize_teachers(students, list(students), with_student=False)
    return specs, functions


def _tasks(
    dataset: Dataset,
    rows: Mapping[str, np.ndarray],
    readers: Readers,
    functions: Mapping[str, list[RewardFunc]],
    cross_task_rewards: bool,
    num_images: int | None,
) -> dict[str, Task]:
    every = {reward_name(function): function for of_task in functions.values() for function in of_task}
    return {
        task: Task(
            name=task,
            index=index,
            readers=readers,
            prompts=dataset.select(of_task),
            functions=functions[task],
            others=[f for f in every.values() if f not in functions[task]] if cross_task_rewards else [],
            num_images=min(MOST_IMAGES, len(of_task)) if num_images is None else num_images,
        )
        for index, (task, of_task) in enumerate(rows.items())
    }


def _loaded(
    pipeline: str | DiffusionPipeline,
    dtype: str | None,
    model_init_kwargs: dict[str, JSON] | None,
    quantization_config: QuantizationConfig,
    device: torch.device,
) -> DiffusionPipeline:
    if not isinstance(pipeline, str):
        return pipeline
    with failing_together():
        return load_pipeline(pipeline, dtype or "float32", model_init_kwargs, quantization_config).to(device)


def _bank(
    field: VelocityField,
    transformer: ModelMixin,
    base: DiffusionPipeline,
    specs: Mapping[str, list[TeacherConfig]],
    choice: Choice,
) -> TeacherBank:
    scaled = {
        name: [
            replace(config, guidance_scale=scale["value"])
            for config, scale in zip(configs, choice.scales[name], strict=True)
        ]
        for name, configs in specs.items()
    }
    options = choice.options()
    own = OwnPipelines(
        base, field, options["max_sequence_length"], options["generation_kwargs"], Offload([], transformer.device)
    )
    bank = TeacherBank(Backbone(transformer), base, scaled, default_guidance_scale=1.0, own=own)  # each has its scale
    bank.backbone.to(transformer.device)
    bank.check_guidance(field)
    for one in bank.own_pipelines():
        logger.info(one.line)
    return bank


def _shared_digest(base: DiffusionPipeline) -> str:
    """The base's digest, computed by one process for all: a large base takes a while."""
    return broadcast_object_list([base_digest(base) if PartialState().is_main_process else None])[0]


def _option_problems(
    options: Options,
    num_images: int | None,
    pipeline: str | DiffusionPipeline,
    dtype: str | None,
    quantization_config: QuantizationConfig,
    model_init_kwargs: dict[str, JSON] | None,
    students: Collection[str],
) -> list[str]:
    problems = world_problems()
    for name, value, least in (
        ("num_images", 1 if num_images is None else num_images, 1),
        ("batch_size", options.batch_size, 1),
        ("num_samples", options.num_samples, 0),
    ):
        if value < least:
            problems.append(f"{name}={value}: it must be at least {least}.")
    if dtype is not None and dtype not in DTYPES:
        problems.append(f"dtype={dtype!r}: it must be one of {', '.join(DTYPES)}.")
    if dtype is not None and not isinstance(pipeline, str):
        problems.append("dtype is for a base that is given by name. This one is loaded: load it with that dtype.")
    if not students:
        problems.append("There is no student to evaluate.")
    taken = [name for name in students if name == "base" or name.startswith("teacher/")]
    if taken:
        problems.append(f"A student is named {taken[0]!r}; in the report that name means another model. Rename it.")
    problems += timeout_problems(options.reward_timeout)
    for option, given in (("quantization_config", quantization_config), ("model_init_kwargs", model_init_kwargs)):
        if given and not isinstance(pipeline, str):
            problems.append(f"{option} is for a base that is given by name. This one is loaded: load it with that.")
    return problems + model_init_problems(model_init_kwargs or {})
