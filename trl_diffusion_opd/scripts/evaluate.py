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
Measures how much of its teachers' gains a student has, from the command line.

```bash
trl-diffusion-opd evaluate \
    --base stabilityai/stable-diffusion-3.5-medium \
    --dtype bfloat16 \
    --teachers aesthetic=quanhaol/DiffusionOPD/AesTeacher/lora ocr=quanhaol/DiffusionOPD/OCRTeacher/lora \
    --student opd=quanhaol/DiffusionOPD/Student/lora mine=outputs/sd35-opd \
    --reward_funcs aesthetic=pickscore ocr=ocr \
    --dataset aesthetic=prompts/aesthetic_test.txt ocr=prompts/ocr_test.txt \
    --output_dir outputs/evaluation
```

Guidance, steps, size and text length are those that the students were trained with, unless options say otherwise. All
options can also be in a YAML file that `--config` names. Images and scores of an earlier run in the output folder are
reused: an interrupted run continues, and students or rewards can be added later.
"""

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from accelerate import PartialState

from ..data.pictured_prompt import SOURCE_IMAGES
from ..evaluation.retention import retention_table, scores_table
from ..evaluation.run import evaluate_retention
from ..guards.files import JSON
from ..hub.files import PAGE_FILE, TABLES_FILE
from ..models.teacher_config import local_folder, parse_teacher
from ..pipelines.loading_options import full_dtype
from .arguments import LORA_SCALES, TEACHER_BASES, load_rewards, load_students, load_teachers, on_bases
from .parser import parse
from .prompt_sources import load_tasks
from .refusals import refusals_told
from .training import show_warnings
from .values import json_object, packaged


DEFAULT_FOLDER = "outputs/evaluation"


@dataclass
class EvaluationArguments:
    """
    Arguments of the command. Lists are given as `task=value task=value …`. The others are those of
    [`evaluate_retention`].

    Args:
        base (`str`): the base, a Hub id or a folder.
        teachers (`list[str]`): `task=spec`, where a spec is `base`, a folder or `owner/repo[/sub/folder][@revision]`.
        student (`list[str]`): `name=spec` of each student, or the spec of a single one.
        reward_funcs (`list[str]`): `task=name` of a reward of the package, or `task=package.module:function`.
        dataset (`list[str]`): `task=source` of the prompts, or one source with a column that names the task. A source
            is a Hub dataset (`owner/name[:split]`) or a text, jsonl, csv, tsv or parquet file.
        teacher_guidance_scales (`list[str]`, *optional*): `task=scale` for teachers with another scale than the
            student learned from them at.
        teacher_lora_scales (`list[str]`, *optional*): `task=scale`, as in training.
        teacher_bases (`list[str]`, *optional*): `task=base` for teachers on another base than the student's.
        reward_kwargs (`dict`, *optional*): arguments of named rewards, such as `{"remote": {"url": "http://..."}}`.
        prompt_templates (`dict`, *optional*): what the students read in a task, such as `{"night": "{prompt}, night"}`.
        model_init_kwargs (`dict`, *optional*): further arguments to load the base, such as
            `{"revision": "...", "variant": "fp16"}`.
        prompt_column (`str`, *optional*): the sources' column with the prompts. By default `prompt`, else `caption`,
            else `text`.
        task_column (`str`, *optional*, defaults to `"task"`): the column of a dataset that names the task.
        source_images_column (`str`, *optional*, defaults to `"source_images"`): the sources' column with pictures to
            edit. Names of files in it are relative to the file that names them.
        output_dir (`str`, *optional*): folder for images, scores and the report. By default the folder of the student,
            where its model card finds the report; `outputs/evaluation` for several students, or one of the Hub.
    """

    base: str = field(metadata={"help": "The base: a Hub id or a folder."})
    teachers: list[str] = field(metadata={"help": "task=spec …: base, a folder or owner/repo[/sub/folder][@revision]"})
    student: list[str] = field(metadata={"help": "name=spec …, or the spec of a single student."})
    reward_funcs: list[str] = field(
        metadata={"help": "task=name …: a reward of the package, or package.module:function"}
    )
    dataset: list[str] = field(
        metadata={"help": "task=source …, or one Hub dataset or file with a column that names the task."}
    )
    teacher_guidance_scales: list[str] | None = field(
        default=None, metadata={"help": "task=scale … for teachers with another scale than in training."}
    )
    teacher_lora_scales: list[str] | None = field(default=None, metadata={"help": LORA_SCALES})
    teacher_bases: list[str] | None = field(default=None, metadata={"help": TEACHER_BASES})
    reward_kwargs: dict[str, JSON] | str | None = field(
        default=None, metadata={"help": "JSON: arguments of named rewards, by name."}
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of the sources with the prompts; prompt, caption or text if not set."}
    )
    task_column: str = field(default="task", metadata={"help": "Column of the dataset that names the task."})
    source_images_column: str = field(
        default=SOURCE_IMAGES,
        metadata={"help": "Column of the dataset with each row's list of pictures to edit or to refer to."},
    )
    cross_task_rewards: bool = field(
        default=True, metadata={"help": "Whether every reward scores the images of every task."}
    )
    num_images: int | None = field(
        default=None, metadata={"help": "Images a task. If not set, one a prompt, and at most 512."}
    )
    num_inference_steps: int | None = field(
        default=None, metadata={"help": "Steps of the deterministic sampler. If not set, the student's, or 40."}
    )
    guidance_scale: float | None = field(
        default=None,
        metadata={"help": "Guidance scale of base and students; 1 is none. If not set, the student's."},
    )
    height: int | None = field(
        default=None, metadata={"help": "Height of the images in pixels. If not set, the student's."}
    )
    width: int | None = field(
        default=None, metadata={"help": "Width of the images in pixels. If not set, the student's."}
    )
    max_sequence_length: int | None = field(
        default=None, metadata={"help": "Longest prompt in tokens. If not set, the student's."}
    )
    generation_kwargs: dict[str, JSON] | str | None = field(
        default=None, metadata={"help": "JSON: further arguments of the pipeline's call. If not set, the student's."}
    )
    prompt_templates: dict[str, JSON] | str | None = field(
        default=None,
        metadata={
            "help": 'JSON: what the students read in a task, e.g. \'{"night": "{prompt}, night"}\'. If not set, as in '
            "training."
        },
    )
    model_init_kwargs: dict[str, JSON] | str | None = field(
        default=None, metadata={"help": "JSON: further arguments to load the base, such as its revision and variant."}
    )
    dtype: str = field(default="float32", metadata={"help": "Precision of the base: float32, bfloat16 or float16."})
    batch_size: int = field(default=32, metadata={"help": "Images that each process draws at a time."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise and of the bootstrap."})
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for images, scores and the report. If not set, the folder of a single local student, else "
            f"{DEFAULT_FOLDER}."
        },
    )
    num_samples: int = field(default=4, metadata={"help": "Prompts a task that are shown with their images."})
    keep_images: bool = field(default=True, metadata={"help": "Whether to keep the images that are not shown."})
    reward_timeout: float | None = field(
        default=900.0, metadata={"help": "Seconds to wait for one call of a reward function; None for no limit."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Check all, try the rewards, time one batch, say what would be done, stop."}
    )

    def __post_init__(self) -> None:
        self.dtype = full_dtype(self.dtype)
        # From a command line; a YAML file gives dicts.
        for name in ("reward_kwargs", "generation_kwargs", "prompt_templates", "model_init_kwargs"):
            given = getattr(self, name)
            if isinstance(given, str):
                setattr(self, name, json_object(name, given))


ARGUMENTS = (EvaluationArguments,)
# These name what is loaded here. The other arguments are options of `evaluate_retention`.
LOADED = (
    "base",
    "teachers",
    "student",
    "reward_funcs",
    "dataset",
    "teacher_guidance_scales",
    "teacher_lora_scales",
    "teacher_bases",
    "reward_kwargs",
    "prompt_column",
)


def main(args: EvaluationArguments) -> None:
    show_warnings()
    logging.getLogger("trl_diffusion_opd").setLevel(logging.INFO)  # to show the time taken
    reward_kwargs = args.reward_kwargs or {}
    assert isinstance(reward_kwargs, dict)  # strings are parsed
    students = load_students("student", args.student)
    folder = student_folder(students)
    args.output_dir = args.output_dir or folder or DEFAULT_FOLDER
    report = evaluate_retention(
        packaged(args.base),
        on_bases(
            load_teachers(args.teachers, args.teacher_guidance_scales, args.teacher_lora_scales), args.teacher_bases
        ),
        students,
        load_rewards(args.reward_funcs, reward_kwargs),
        load_tasks("dataset", args.dataset, args.task_column, args.prompt_column, args.source_images_column),
        **{name: value for name, value in vars(args).items() if name not in LOADED},
    )
    if report is not None and PartialState().is_main_process:
        print(f"{retention_table(report)}\n\n{scores_table(report)}\n\n{where(args.output_dir, folder)}")


def student_folder(students: Mapping[str, str]) -> str | None:
    """The folder of a single student that is on this machine, else `None`."""
    if len(students) != 1:
        return None
    with suppress(ValueError):  # no student, which the evaluation refuses with all else
        config = parse_teacher(next(iter(students.values())))
        folder = None if config.model_name_or_path == "base" else local_folder(config)
        return None if folder is None else str(folder)
    return None


def where(output_dir: str, student: str | None) -> str:
    """Says where the report is, and how it gets into the model card of a student that is on this machine."""
    text = f"The report is {os.path.join(output_dir, TABLES_FILE)}; {PAGE_FILE} beside it shows the images."
    if student is None:
        return text
    report = "" if os.path.realpath(output_dir) == os.path.realpath(student) else f" --report {output_dir}"
    return f"{text} `trl-diffusion-opd push {student} owner/name{report}` puts it into the student's card."


if __name__ == "__main__":
    with refusals_told():
        main(*parse(ARGUMENTS))
