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

"""Assigns reward functions to tasks, and checks that they can score the prompts of their task."""

import inspect
from collections.abc import Mapping, Sequence

import numpy as np
from datasets import Dataset

from ..data.tasks import BATCH
from ..guards.redaction import shown
from .base import SOURCE_IMAGES, Reward, RewardFunc, parameters_of, reward_name
from .combined import load_reward


# Rows that are read at a time where a reward reads pictures: a picture may have some megabytes.
_PICTURE_BATCH = 64

RewardFuncs = (
    str | RewardFunc | Sequence[str | RewardFunc] | Mapping[str, str | RewardFunc | Sequence[str | RewardFunc]]
)


def rewards_by_task(reward_funcs: RewardFuncs | None, tasks: Sequence[str]) -> dict[str, list[RewardFunc]]:
    """
    Returns the reward functions of every task.

    Args:
        reward_funcs: a reward function or its name, or a list of these, for all tasks; or a dict with these for each
            task. A repeated name is loaded once.
        tasks (`Sequence[str]`): the tasks of the data.

    Raises:
        [`ValueError`]: if a task has no prompts, a name is unknown, two functions have the same name, or an entry is
            not a function. One message lists everything that is wrong.
    """
    if reward_funcs is None:
        return {task: [] for task in tasks}
    given = reward_funcs if isinstance(reward_funcs, Mapping) else dict.fromkeys(tasks, reward_funcs)
    problems = [
        f"reward_funcs: no prompts for task {task!r}; the data has {list(tasks)}."
        for task in given
        if task not in tasks
    ]
    functions: dict[str, list[RewardFunc]] = {task: [] for task in tasks}
    loaded: dict[str, RewardFunc] = {}
    for task in tasks:
        entry = given.get(task, [])
        for item in entry if isinstance(entry, Sequence) and not isinstance(entry, str) else [entry]:
            function: RewardFunc | str = item
            if isinstance(item, str):
                try:
                    loaded[item] = loaded[item] if item in loaded else load_reward(item)
                except (ImportError, ValueError) as error:
                    problems.append(f"reward_funcs: task {task!r}: {error}")
                    continue
                function = loaded[item]
            if inspect.isclass(function):
                problems.append(
                    f"reward_funcs: {function.__name__} of task {task!r} is a class. Give an instance: "
                    f"{function.__name__}(...)."
                )
            elif callable(function):
                functions[task].append(function)
            else:
                problems.append(f"reward_funcs: {function!r} of task {task!r} is neither a name nor a function.")
    problems += _name_problems(functions)
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    return functions


def _name_problems(functions: Mapping[str, Sequence[RewardFunc]]) -> list[str]:
    """
    Finds different functions with the same name. They would share a metric, in a task or in a report of all tasks.
    """
    problems = []
    owners: dict[str, tuple[str, RewardFunc]] = {}
    for task, of_task in functions.items():
        for i, function in enumerate(of_task):
            name = reward_name(function)
            first, other = owners.setdefault(name, (task, function))
            if first == task and function in of_task[:i]:
                problems.append(f"reward_funcs: task {task!r} has {name!r} twice.")
            elif other is not function:
                where = f"task {task!r} has" if first == task else f"tasks {first!r} and {task!r} have"
                problems.append(
                    f"reward_funcs: {where} two functions named {name!r}, which would share a metric. Rename one."
                )
    return problems


def reward_data_problems(
    functions: Mapping[str, Sequence[RewardFunc]], dataset: Dataset, rows: Mapping[str, np.ndarray], source: str
) -> list[str]:
    """
    Says which prompts of a task its own rewards can't score, one sentence a reward.

    Args:
        functions (`dict`): the reward functions of each task.
        dataset ([`~datasets.Dataset`]): the prompts and other columns.
        rows (`dict`): the indices of each task's rows.
        source (`str`): how messages call the dataset.
    """
    problems = []
    for task, of_task in functions.items():
        for reward in of_task:
            if task not in rows:
                continue
            if not isinstance(reward, Reward):
                problems += _column_problems(reward, dataset, source)
                continue
            count, first = 0, ("", "")
            reads_pictures = SOURCE_IMAGES in reward.columns and SOURCE_IMAGES in dataset.column_names
            read = dataset if reads_pictures else _without_pictures(dataset)
            size = _PICTURE_BATCH if reads_pictures else BATCH
            for start in range(0, len(rows[task]), size):
                part = read.select(rows[task][start : start + size]).to_dict()
                for i, prompt in enumerate(part.pop("prompt")):
                    reason = reward.why_not(prompt, {name: values[i] for name, values in part.items()})
                    if reason is not None:
                        first = first if count else (prompt, reason)
                        count += 1
            if count:
                prompt, reason = first
                problems.append(
                    f"{source}: reward {reward.name!r} can't score {count} of the {len(rows[task])} prompts of its "
                    f"task {task!r}, such as '{shown(prompt)}': {shown(reason, 500)}."
                )
    return problems


def _without_pictures(dataset: Dataset) -> Dataset:
    return dataset.remove_columns([name for name in dataset.column_names if name == SOURCE_IMAGES])


def _column_problems(function: RewardFunc, dataset: Dataset, source: str) -> list[str]:
    """Says which columns are missing in `dataset` that a plain function needs as arguments."""
    parameters = parameters_of(function)
    given = {"prompts", "images", "completions", "trainer_state", "log_metric", "log_extra", *dataset.column_names}
    missing = [
        name
        for name, parameter in (parameters or {}).items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and name not in given - {"prompt"}
    ]
    if not missing:
        return []
    return [
        f"{source}: reward {reward_name(function)!r} needs the column(s) {', '.join(map(repr, missing))}, but the "
        f"data has {dataset.column_names}. A reward is called by keyword, with prompts, images and the other columns."
    ]
