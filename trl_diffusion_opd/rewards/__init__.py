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
Reward functions, as TRL users write them: `f(prompts, images, completions, **columns, trainer_state) -> list[float | None]`.

They are called by keyword. `images` and `completions` are the same PIL images, so that functions written for TRL work;
`columns` are the other columns of the dataset, a list each; `None` means that the reward does not apply to a sample. The
name of the function is the name of its metric. Rewards are measured, they never enter the distillation loss.
"""

import asyncio
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL.Image import Image


RewardFunc = Callable[..., Any]
RewardFuncs = RewardFunc | Sequence[RewardFunc] | Mapping[str, RewardFunc | Sequence[RewardFunc]]


def reward_name(function: RewardFunc) -> str:
    """Name under which a reward is logged."""
    if isinstance(function, functools.partial):
        return reward_name(function.func)
    return function.__name__ if inspect.isroutine(function) else type(function).__name__


def rewards_by_task(reward_funcs: RewardFuncs | None, tasks: Sequence[str]) -> dict[str, list[RewardFunc]]:
    """
    The reward functions of every task. One function or a list serves all of them.

    Raises:
        [`ValueError`]: if a task is named that has no prompts, a task has two functions of one name, or what is given
            is not a function.
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
    for task in tasks:
        entry = given.get(task, [])
        functions[task] = list(entry) if isinstance(entry, Sequence) and not isinstance(entry, str) else [entry]
        for function in functions[task]:
            if not callable(function):
                problems.append(f"reward_funcs: {function!r} of task {task!r} is not a function.")
        names = [reward_name(function) for function in functions[task] if callable(function)]
        problems += [
            f"reward_funcs: task {task!r} has two functions named {name!r}; their metrics would be one. Rename one."
            for name in sorted({name for name in names if names.count(name) > 1})
        ]
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    return functions


def score(
    functions: Sequence[RewardFunc],
    rows: Sequence[Mapping[str, Any]],
    images: Sequence[Image],
    trainer_state: Any = None,
) -> dict[str, list[float | None]]:
    """
    Scores images.

    Args:
        functions (`list` of reward functions), rows (`list[dict]`): rows of the dataset, one an image.
        images (`list[PIL.Image.Image]`)
        trainer_state ([`~transformers.TrainerState`], *optional*)

    Returns:
        `dict[str, list[float | None]]`: a value an image for each function, by name.

    Raises:
        [`ValueError`]: if a function returns another number of values than it was given images.
    """
    if not images:  # more processes than images
        return {reward_name(function): [] for function in functions}
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    scores: dict[str, list[float | None]] = {}
    for function in functions:
        values = function(
            prompts=[row["prompt"] for row in rows],
            images=list(images),
            completions=list(images),
            trainer_state=trainer_state,
            **columns,
        )
        if inspect.isawaitable(values):
            values = asyncio.run(_wait_for(values))
        if len(values) != len(images):
            raise ValueError(
                f"Reward function {reward_name(function)!r} returned {len(values)} values for {len(images)} images. It "
                "must return one an image, None where it does not apply."
            )
        scores[reward_name(function)] = [None if value is None else float(value) for value in values]
    return scores


def load_reward(spec: str) -> RewardFunc:
    """
    A reward function by its import path, `package.module:function`.

    Raises:
        [`ValueError`]: if there is no such function.
    """
    module, colon, name = spec.partition(":")
    if not colon:
        raise ValueError(f"Reward {spec!r} is not an import path of the form package.module:function.")
    try:
        found: Any = importlib.import_module(module)
        return functools.reduce(getattr, name.split("."), found)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"Reward {spec!r} cannot be imported: {error}") from error


async def _wait_for(awaitable: Any) -> Any:
    return await awaitable
