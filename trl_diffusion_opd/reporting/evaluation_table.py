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

"""The table of an evaluation: each task's rewards for the base, its teacher and the student, now and at its best."""

import math
from collections.abc import Mapping, Sequence

from rich.cells import cell_len
from rich.table import Table

from ..rewards.common_scale import Reference
from .console import print_table, reward_cell
from .progress import number


# The method's own metric of each task that the table shows, where an evaluation has it.
_OF_METHOD = ("kl", "loss")


def print_evaluation(
    metrics: Mapping[str, float],
    log_history: Sequence[Mapping[str, float]],
    references: Mapping[str, Mapping[str, Reference]],
    rewards: Mapping[str, Sequence[str]],
    prefix: str,
    title: str,
) -> None:
    """
    Prints the table of an evaluation. Only the main process should call it.

    Args:
        metrics (`dict[str, float]`): the evaluation's metrics.
        log_history (`list[dict]`): the run's log, with this evaluation. It gives the best values so far.
        references (`dict`): scores of base and teachers by task and reward, as far as they are known.
        rewards (`dict[str, list[str]]`): the names of the rewards of each evaluated task.
        prefix (`str`): what the metrics' names begin with, such as `"eval"`.
        title (`str`): the table's title.
    """
    known = [reference for of_task in references.values() for reference in of_task.values()]
    method = next((name for name in _OF_METHOD if any(f"{prefix}_{name}/{task}" in metrics for task in rewards)), None)
    columns = {
        "task": True,
        "reward": any(rewards.values()),
        "base": any(reference.base is not None for reference in known),
        "teacher": any(reference.teacher is not None for reference in known),
        "now": any(rewards.values()),
        "best so far": any(rewards.values()),
        str(method): method is not None,
        f"lowest {method}": method is not None and not any(rewards.values()),
    }
    table = Table(title=title, min_width=cell_len(title))
    for name, used in columns.items():
        if used:
            table.add_column(name, justify="left" if name in ("task", "reward") else "right", overflow="fold")

    def add(cells: Mapping[str, str]) -> None:
        table.add_row(*(cells.get(name, "") for name, used in columns.items() if used))

    for task, names in rewards.items():
        own = f"{prefix}_{method}/{task}"
        low = {str(method): _low(metrics.get(own)), f"lowest {method}": best(log_history, own, rises=False)}
        first = {"task": task, **low}
        for name in names:
            key, reference = f"{prefix}_{task}/{name}", references.get(task, {}).get(name, Reference())
            scores = {"base": reward_cell(reference.base), "teacher": reward_cell(reference.teacher)}
            add(
                {**first, "reward": name, **scores, "now": _score(metrics[key]), "best so far": best(log_history, key)}
            )
            first = {}
        if not names:
            add(first)
    whole = f"{prefix}_reward"
    if whole in metrics and len([name for names in rewards.values() for name in names]) > 1:
        table.add_section()
        add({"task": whole, "now": _score(metrics[whole]), "best so far": best(log_history, whole)})
    print_table(table)


def best(log_history: Sequence[Mapping[str, float]], name: str, rises: bool = True) -> str:
    """Returns the best value of a metric so far, with its update in brackets."""
    found = [(entry[name], entry["step"]) for entry in log_history if name in entry and not math.isnan(entry[name])]
    if not found:
        return "-"
    value, step = max(found, key=lambda one: one[0]) if rises else min(found, key=lambda one: one[0])
    return f"{_score(value) if rises else number(value)} ({step:.0f})"


def _score(value: float) -> str:
    return reward_cell(None if math.isnan(value) else value)


def _low(value: float | None) -> str:
    return "-" if value is None else number(value)
