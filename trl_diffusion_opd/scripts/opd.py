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

"""Distils several teachers into one student (DiffusionOPD), and measures what the student kept of each."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from ..data.tasks import task_rows
from ..guards.extras import extra
from ..problems import Refusal
from ..trainer.diffusion_opd_config import DiffusionOPDConfig
from .arguments import TaughtArguments
from .parser import parse
from .refusals import refusals_told
from .training import only_show, publish, show_warnings, student_is_safe, train, warn_of_idle_rewards


if TYPE_CHECKING:
    from datasets import Dataset

    from ..rewards.base import RewardFunc
    from ..trainer import DiffusionOPDTrainer


@dataclass(kw_only=True)
class OPDScriptArguments(TaughtArguments):
    """
    Arguments of the command beyond [`DiffusionOPDConfig`]. The others are in [`TaughtArguments`] and
    [`ScriptArguments`].

    Args:
        teachers (`list[str]`): as in [`TaughtArguments`], but required.
        test_prompts (`list[str]`, *optional*): `task=source` of held-out prompts. With them, and a reward for each
            task, the retention report is made at the end.
        num_test_images (`int`, *optional*, defaults to `128`): images a task in the report.
        dry_run (`bool`, *optional*, defaults to `False`): show what the run would do, with an image of every model,
            and stop.
    """

    of_prompts: ClassVar[tuple[str, ...]] = (*TaughtArguments.of_prompts, "test_prompts")

    teachers: list[str] = field(metadata={"help": "task=spec …: base, a folder or owner/repo[/sub/folder][@revision]"})
    test_prompts: list[str] | None = field(
        default=None, metadata={"help": "task=source …: held-out prompts for the retention report at the end."}
    )
    num_test_images: int = field(default=128, metadata={"help": "Images a task in the retention report."})
    dry_run: bool = field(
        default=False, metadata={"help": "Show what the run would do, with an image of every model, and stop."}
    )


ARGUMENTS = (OPDScriptArguments, DiffusionOPDConfig)


def main(script_args: OPDScriptArguments, training_args: DiffusionOPDConfig) -> None:
    show_warnings()
    teachers, datasets = script_args.teachers_by_task(), script_args.datasets(training_args)
    rewards, test_dataset = script_args.rewards(), datasets["test_prompts"]
    tested: Collection[str] = []
    if test_dataset is not None:
        tested = _tested_tasks(script_args, training_args, teachers, rewards, test_dataset)

    if not script_args.dry_run:
        warn_of_idle_rewards(training_args, rewards, test_dataset is not None)
    # Imported here, so that --help and errors in the arguments show sooner.
    from ..evaluation import evaluate_retention, rehearse_report, retention_table
    from ..trainer.diffusion_opd_trainer import DiffusionOPDTrainer

    if script_args.dry_run:
        training_args.push_to_hub = False  # or the trainer would make the repository
    arguments = script_args.for_trainer(training_args, datasets, rewards)
    trainer = DiffusionOPDTrainer(teachers=teachers, **arguments)
    if script_args.dry_run:
        only_show(trainer)
        return
    if test_dataset is not None:
        with trainer.averaged_student() as student:
            rehearse_report(
                trainer.evaluator.field,
                student,
                {task: rewards[task] for task in tested},
                test_dataset,
                task_column=training_args.task_column,
                seed=training_args.seed,
                guidance_scale=training_args.evaluation_guidance,
                reward_timeout=training_args.reward_timeout,
                source_images_column=training_args.source_images_column,
            )
        _say_that_a_report_follows(trainer, script_args.num_test_images)
    train(trainer)
    report = None
    if test_dataset is not None:
        told = "`trl-diffusion-opd evaluate` makes it from the saved student."
        with student_is_safe(trainer), extra("The retention report", told):
            report = evaluate_retention(
                arguments["model"],
                {task: teachers[task] for task in tested},
                training_args.output_dir,
                {task: rewards[task] for task in tested},
                test_dataset,
                num_images=script_args.num_test_images,
                output_dir=training_args.output_dir,
                quantization_config=arguments["quantization_config"],
                **training_args.retention_options(),
            )
    if report is not None and trainer.is_world_process_zero():
        print(retention_table(report))
    publish(trainer)  # last, since a push ends with its link


def _tested_tasks(
    script_args: OPDScriptArguments,
    training_args: DiffusionOPDConfig,
    teachers: Collection[str],
    rewards: "Mapping[str, Sequence[RewardFunc]]",
    test_dataset: "Dataset",
) -> Collection[str]:
    """The tasks of the report at the end, which may be fewer than the trained ones. Refuses now what it would refuse."""
    from ..evaluation import report_problems

    columns = training_args.task_column, "--test_prompts", training_args.source_images_column
    problems = report_problems(teachers, rewards, test_dataset, *columns)
    if script_args.num_test_images < 1:
        problems.append(f"--num_test_images {script_args.num_test_images}: it must be at least 1.")
    if problems:
        raise Refusal("\n".join(problems))
    return task_rows(test_dataset, training_args.task_column)


def _say_that_a_report_follows(trainer: "DiffusionOPDTrainer", num_images: int) -> None:
    if trainer.is_world_process_zero():
        print(f"After the training: the report, {num_images:,} images a task by base, each teacher and student.")


if __name__ == "__main__":
    with refusals_told():
        main(*parse(ARGUMENTS))
