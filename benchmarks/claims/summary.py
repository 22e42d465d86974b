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

"""The arithmetic of the comparison: intervals over seeds, paired differences, curves by cost, forgetting. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student_t


AXES = ("forwards", "seconds")
# Budgets are in whole updates, so that equal ones differ by a part of an update.
EQUAL = 0.02

Scores = Mapping[str, float]


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` seeds, with its 95% t interval, which one seed does not have."""

    n: int
    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def verdict(self) -> str:
        """Of a difference: `positive` or `negative` where the interval has one sign, `open` where it has not or is missing."""
        if self.low is None or self.high is None:
            return "open"
        return "positive" if self.low > 0 else "negative" if self.high < 0 else "open"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95% t interval of at least one value."""
    mean = fmean(values)
    if len(values) < 2:
        return Estimate(len(values), mean)
    half = float(student_t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return Estimate(len(values), mean, mean - half, mean + half)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """`ours - theirs` over the seeds that both have; `None` where there is none."""
    seeds = sorted(set(ours) & set(theirs))
    return estimate([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None


def summarised(scores: Scores) -> dict[str, float]:
    """Scores of the tasks with the `worst` and the `mean` of them."""
    return {**scores, "worst": min(scores.values()), "mean": fmean(scores.values())}


def equal_costs(costs: Sequence[float]) -> bool:
    return max(costs) - min(costs) <= EQUAL * max(costs)


def own_scores(line: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, float]:
    """The verdicts that a line of a curve has, without the other figures of the evaluation."""
    return {task: line["scores"][f"{task}/{task}"] for task in tasks if f"{task}/{task}" in line["scores"]}


def stage_costs(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """
    The cost of each stage. A curve ends with its last evaluation, often before the last update: what several stages cost is
    their cost an update times their updates, scaled so that the sum is the whole cost, which was counted.
    """
    curves, total = result["curves"], result["cost"]
    if len(curves) == 1:
        return {name: {axis: total[axis] for axis in AXES} for name in curves}
    updates = {stage["name"]: stage["config"]["max_steps"] for stage in result["settings"]}
    raw = {
        name: {axis: curve[-1][axis] / curve[-1]["step"] * updates[name] for axis in AXES}
        for name, curve in curves.items()
    }
    sums = {axis: sum(costs[axis] for costs in raw.values()) for axis in AXES}
    return {name: {axis: costs[axis] * total[axis] / sums[axis] for axis in AXES} for name, costs in raw.items()}


def stage_starts(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The cost of all stages before each stage."""
    so_far, starts = dict.fromkeys(AXES, 0.0), {}
    for name, costs in stage_costs(result).items():
        starts[name] = dict(so_far)
        so_far = {axis: so_far[axis] + costs[axis] for axis in AXES}
    return starts


def cumulated(
    result: Mapping[str, Any], tasks: Sequence[str], before: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """
    The curves of all stages in one, at the cost since the first stage's start plus `before`.

    Returns:
        `list[dict]`: `stage`, `step`, `forwards`, `seconds`, and `scores`, of the tasks that the stage evaluates.
    """
    added = before or dict.fromkeys(AXES, 0.0)
    return [
        {"stage": name, "step": line["step"], "scores": own_scores(line, tasks)}
        | {axis: added[axis] + start[axis] + line[axis] for axis in AXES}
        for name, start in stage_starts(result).items()
        for line in result["curves"][name]
    ]


def forgetting(test_after: Mapping[str, Scores]) -> dict[str, dict[str, float]]:
    """`[task][later stage]`: a task's score after the stage minus what it was after its own. Stages are named by tasks."""
    stages = list(test_after)
    return {
        task: {later: test_after[later][task] - test_after[task][task] for later in stages[i + 1 :]}
        for i, task in enumerate(stages[:-1])
    }


def retention(base: Scores, teachers: Scores, student: Scores) -> dict[str, float]:
    """`(student - base) / (teacher - base)` of each task whose own teacher is better than the base."""
    return {
        task: (student[task] - base[task]) / (teachers[task] - base[task])
        for task in teachers
        if teachers[task] > base[task]
    }
