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

"""Finds problems of a retention report before anything is drawn: before a training that it follows, or at its start."""

from collections.abc import Collection, Mapping, Sequence

from datasets import Dataset
from torch import nn

from ..data.pictured_prompt import SOURCE_IMAGES
from ..data.readers import Readers
from ..data.source_images import plain_source_images, source_image_problems
from ..data.tasks import dataset_problems, task_rows
from ..pipelines.drawing import draw_images
from ..pipelines.images import Picture
from ..pipelines.picture_checks import picture_problems
from ..pipelines.velocity import VelocityField
from ..problems import Problems, Refusal
from ..rewards import RewardFunc, reward_data_problems, reward_name
from ..rewards.trial import NUM_TRIED, trial_error, trial_problem
from .plan import Plan


def report_problems(
    teachers: Collection[str],
    reward_funcs: Mapping[str, Sequence[RewardFunc]],
    dataset: Dataset,
    task_column: str,
    name: str,
    source_images_column: str = SOURCE_IMAGES,
) -> list[str]:
    """
    Lists the problems of a report on held-out prompts, a sentence each.

    Args:
        teachers (`dict`), reward_funcs (`dict`): teachers and reward functions by task. Further tasks are ignored.
        dataset ([`~datasets.Dataset`]), task_column (`str`), name (`str`): the prompts, the column of their tasks, and
            the dataset's name in messages.
        source_images_column (`str`, *optional*, defaults to `"source_images"`): the column of their pictures.
    """
    problems = dataset_problems(dataset, task_column, name)
    if problems:
        return problems
    dataset = plain_source_images(dataset, source_images_column)
    problems += source_image_problems(dataset, source_images_column, name)
    rows = task_rows(dataset, task_column)
    untaught = [task for task in rows if task not in teachers]
    unscored = [task for task in rows if not reward_funcs.get(task)]
    if untaught:
        problems.append(
            f"{name}: tasks {untaught} have no teacher to compare with. Name a teacher, or leave out their prompts."
        )
    if unscored:
        problems.append(f"{name}: tasks {unscored} have no reward. Name one in --reward_funcs.")
    return problems + reward_data_problems(reward_funcs, dataset, rows, name)


def rehearse_report(
    field: VelocityField,
    student: nn.Module,
    reward_funcs: Mapping[str, Sequence[RewardFunc]],
    dataset: Dataset,
    *,
    task_column: str,
    seed: int,
    guidance_scale: float,
    reward_timeout: float | None = None,
    source_images_column: str = SOURCE_IMAGES,
) -> None:
    """
    Draws an image for the first prompt of each task with the untrained student, and has every reward score it, twice
    in one call. The report does the same: rewards of other tasks show what a model lost there. Each process does all of it.

    Args:
        field ([`VelocityField`]): the pipeline, with the report's noise grid.
        student (`nn.Module`): the student before training.
        reward_funcs (`dict`): reward functions by task.
        dataset ([`~datasets.Dataset`]), task_column (`str`): the report's prompts, and the column of their tasks.
        seed (`int`), guidance_scale (`float`), reward_timeout (`float`, *optional*): as in the report.
        source_images_column (`str`, *optional*, defaults to `"source_images"`): the column of the prompts' pictures.

    Raises:
        [`ValueError`]: if a reward can't score an image, with its error as the cause, or if the pipeline can't use the
            pictures.
    """
    dataset = plain_source_images(dataset, source_images_column)
    of_tasks = task_rows(dataset, task_column)
    problems = Problems(picture_problems(field, dataset, of_tasks, "The report's dataset"))
    problems.raise_under("The report at the end would fail")
    every = {reward_name(function): function for of_task in reward_funcs.values() for function in of_task}
    for index, (task, rows) in enumerate(of_tasks.items()):
        row = dataset[int(rows[0])]
        prompts = Readers().texts(task, [row]).prompt
        ((_, image),) = draw_images(
            field, student, prompts, entropy=[seed, index], guidance_scale=guidance_scale, batch_size=1
        )
        for function in every.values():
            error = trial_error(function, task, [dataset[int(n)] for n in rows[:NUM_TRIED]], image, reward_timeout)
            if error is not None:
                raise Refusal(
                    f"The report at the end would fail: {trial_problem(function, f'of task {task!r}', row, error)} In "
                    "a report every reward scores the images of all tasks. It must return None for rows that it does "
                    "not apply to."
                ) from error


def try_rewards(plan: Plan, image: Picture) -> None:
    """
    Has every reward score an image for the first two rows of every task that it must score, so that one that fails does so
    before anything is drawn. Rewards without missing scores are not called.

    Args:
        plan ([`Plan`]): the evaluation.
        image (`PIL.Image.Image`): any image of the right size.

    Raises:
        [`ValueError`]: if rewards fail. One message lists all, and the first one's error is the cause.
        [`TimeoutError`]: if a reward does not answer.
    """
    needed = {(b.task, name) for b in plan.batches for name, numbers in b.unscored.items() if numbers}
    problems, errors = Problems(), []
    for name, function in plan.functions().items():
        # Its own tasks first: if it fails there, other tasks tell nothing more.
        tasks = sorted(plan.tasks, key=lambda task: function not in plan.tasks[task].functions)
        for task in tasks:
            if (task, name) not in needed:
                continue
            columns = plan.tasks[task].rows(range(NUM_TRIED))
            rows = [{column: values[n] for column, values in columns.items()} for n in range(NUM_TRIED)]
            error = trial_error(function, task, rows, image, plan.options.reward_timeout)
            if isinstance(error, TimeoutError):
                raise error
            if error is None:
                continue
            errors.append(error)
            is_own = function in plan.tasks[task].functions
            whose = f"of {'its own ' if is_own else ''}task {task!r}"
            problems.append(
                trial_problem(function, whose, rows[0], error)
                + (
                    ""
                    if is_own
                    else " It must return None for rows that it does not apply to. Or set cross_task_rewards=False "
                    "(--no_cross_task_rewards): then only a task's own rewards score its images."
                )
            )
            if is_own:
                break
    try:
        problems.raise_under("The evaluation cannot start: every reward was tried on two images of every task")
    except ValueError as refusal:
        raise refusal from errors[0]
