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
    --max_sequence_length 128 \
    --output_dir outputs/evaluation
```

All options can also be in a YAML file that `--config` names. Images and scores of an earlier run in the output folder
are
reused: an interrupted run continues, and students or rewards can be added later.
"""

import logging
from dataclasses import dataclass, field

from accelerate import PartialState

from ..evaluation.retention import retention_table, scores_table
from ..evaluation.run import evaluate_retention
from ..guards.files import JSON
from ..pipelines.loading_options import full_dtype
from .arguments import load_rewards, load_students, load_teachers
from .parser import parse
from .prompts import load_tasks
from .refusals import refusals_told
from .training import show_warnings
from .values import json_object, packaged


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
        teacher_guidance_scales (`list[str]`, *optional*): `task=scale` for teachers with another scale than
            `guidance_scale`.
        reward_kwargs (`dict`, *optional*): arguments of named rewards, such as `{"remote": {"url": "http://..."}}`.
        model_init_kwargs (`dict`, *optional*): further arguments to load the base, such as
            `{"revision": "...", "variant": "fp16"}`.
        prompt_column (`str`, *optional*): the sources' column with the prompts. By default `prompt`, else `caption`,
            else `text`.
        task_column (`str`, *optional*, defaults to `"task"`): the column of a dataset that names the task.
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
        default=None, metadata={"help": "task=scale … for teachers with another scale than guidance_scale."}
    )
    reward_kwargs: dict[str, JSON] | str | None = field(
        default=None, metadata={"help": "JSON: arguments of named rewards, by name."}
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of the sources with the prompts; prompt, caption or text if not set."}
    )
    task_column: str = field(default="task", metadata={"help": "Column of the dataset that names the task."})
    cross_task_rewards: bool = field(
        default=True, metadata={"help": "Whether every reward scores the images of every task."}
    )
    num_images: int = field(default=512, metadata={"help": "Images a task."})
    num_inference_steps: int = field(default=40, metadata={"help": "Steps of the deterministic sampler."})
    guidance_scale: float = field(default=4.5, metadata={"help": "Guidance scale of base and students; 1 is none."})
    height: int | None = field(default=None, metadata={"help": "Height of the images in pixels."})
    width: int | None = field(default=None, metadata={"help": "Width of the images in pixels."})
    max_sequence_length: int | None = field(default=None, metadata={"help": "Longest prompt in tokens."})
    generation_kwargs: dict[str, JSON] | str | None = field(
        default=None, metadata={"help": "JSON: further arguments of the pipeline's call."}
    )
    model_init_kwargs: dict[str, JSON] | str | None = field(
        default=None, metadata={"help": "JSON: further arguments to load the base, such as its revision and variant."}
    )
    dtype: str = field(default="float32", metadata={"help": "Precision of the base: float32, bfloat16 or float16."})
    batch_size: int = field(default=32, metadata={"help": "Images that each process draws at a time."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise and of the bootstrap."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for images, scores and the report."})
    num_samples: int = field(default=4, metadata={"help": "Prompts a task that are shown with their images."})
    keep_images: bool = field(default=True, metadata={"help": "Whether to keep the images that are not shown."})
    reward_timeout: float | None = field(
        default=900.0, metadata={"help": "Seconds to wait for one call of a reward function; None for no limit."}
    )

    def __post_init__(self) -> None:
        self.dtype = full_dtype(self.dtype)
        # From a command line; a YAML file gives dicts.
        for name in ("reward_kwargs", "generation_kwargs", "model_init_kwargs"):
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
    "reward_kwargs",
    "prompt_column",
)


def main(args: EvaluationArguments) -> None:
    show_warnings()
    logging.getLogger("trl_diffusion_opd").setLevel(logging.INFO)  # to show the time taken
    reward_kwargs = args.reward_kwargs or {}
    assert isinstance(reward_kwargs, dict)  # strings are parsed
    report = evaluate_retention(
        packaged(args.base),
        load_teachers(args.teachers, args.teacher_guidance_scales),
        load_students("student", args.student),
        load_rewards(args.reward_funcs, reward_kwargs),
        load_tasks("dataset", args.dataset, args.task_column, args.prompt_column),
        **{name: value for name, value in vars(args).items() if name not in LOADED},
    )
    if PartialState().is_main_process:
        print(f"{retention_table(report)}\n\n{scores_table(report)}")


if __name__ == "__main__":
    with refusals_told():
        main(*parse(ARGUMENTS))
