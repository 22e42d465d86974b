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

"""Checks `metric_for_best_model` before the first step: some evaluation of the run must log it."""

import difflib
from collections.abc import Callable, Mapping, Sequence

from datasets import Dataset

from ..data.tasks import task_rows
from ..guards.redaction import shown
from ..rewards import RewardFunc, reward_name
from ..rewards.base import parameters_of
from ..rewards.scoring import score_names
from .base_config import DiffusionConfig


_PREFIX = "eval_"
# The most names that the message lists.
_NAMED = 12


def metric_problems(
    args: DiffusionConfig,
    eval_dataset: Dataset | Mapping[str, Dataset] | None,
    functions: Mapping[str, Sequence[RewardFunc]],
    of_method: Callable[[Dataset], list[str]],
) -> list[str]:
    """
    Lists what is wrong with `metric_for_best_model`. Trainer itself would raise a `KeyError`, but only after the first
    evaluation.

    Args:
        args ([`DiffusionConfig`])
        eval_dataset ([`~datasets.Dataset`] or a `dict` of them, *optional*)
        functions (`dict[str, list[Callable]]`): the rewards of each task.
        of_method (`Callable`): returns the names of the method's own metrics for a dataset, without prefix.
    """
    given = args.metric_for_best_model
    if given is None or eval_dataset is None or args.eval_strategy == "no":
        return []
    parts = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
    names = [
        f"{_PREFIX}{part}_{name}" if part else f"{_PREFIX}{name}"
        for part, dataset in parts.items()
        for name in _names(dataset, args.task_column, functions, of_method(dataset))
    ]
    name = given if given.startswith(_PREFIX) else _PREFIX + given
    # Metrics that rewards log with `log_metric` are not known before.
    if name in names or any(
        "log_metric" in (parameters_of(f) or {}) for of_task in functions.values() for f in of_task
    ):
        return []
    alike = difflib.get_close_matches(name, names, n=1)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    why = " (the default if load_best_model_at_end or the schedule needs a metric and none is given)"
    return [
        f"metric_for_best_model='{shown(given)}'{why if given == 'loss' else ''}: no evaluation of this run will have "
        "it."
        + (f" Did you mean '{shown(alike[0])}'?" if alike else "")
        + f" There will be {', '.join(map(shown, names[:_NAMED]))}{more}."
    ]


def _names(
    dataset: Dataset, task_column: str, functions: Mapping[str, Sequence[RewardFunc]], of_method: list[str]
) -> list[str]:
    """The metrics that `DiffusionTrainer.evaluate` logs for a dataset, those that measure the student first."""
    tasks = list(task_rows(dataset, task_column))
    scored = [function for task in tasks for function in functions[task]]
    return [
        *(["reward"] if any(functions.values()) else []),
        *(f"{task}/{name}" for task in tasks for function in functions[task] for name in score_names(function)),
        *of_method,
        "generation_time",
        *dict.fromkeys(f"reward_time/{reward_name(function)}" for function in scored),
        *("runtime", "samples_per_second"),
    ]
