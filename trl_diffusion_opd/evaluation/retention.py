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

"""Computes the retention report from scores: means, paired bootstrap intervals, tables. It needs no models."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..guards.markdown import cell, inline
from ..reporting.report import Intervals, Kept, KeptOverall, Means, Report, TaskReport


# If the teacher's gain is smaller than this, no retention is computed: the quotient would be noise.
MIN_GAIN = 0.05
NUM_RESAMPLES = 2000
# With fewer images a task than this, the resamples hold too few different values for an interval to cover 95%.
ENOUGH_IMAGES = 30

# scores[model][task][reward] is a list with one value for each image, None where the reward does not apply.
Scores = dict[str, dict[str, dict[str, list[float | None]]]]


def resample_counts(num_images: int, entropy: Sequence[int], num_resamples: int = NUM_RESAMPLES) -> np.ndarray:
    """
    Draws how often each image is in each bootstrap resample: an array of shape `(num_resamples, num_images)` whose
    rows sum to `num_images`.
    """
    generator = np.random.default_rng(np.random.SeedSequence(list(entropy)))
    return generator.multinomial(num_images, np.full(num_images, 1 / num_images), size=num_resamples).astype(float)


def resampled_means(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """
    Computes the means of the resamples, leaving out missing values.

    Args:
        values (`np.ndarray` of shape `(..., num_images)`): the scores, NaN where there is none. Every row uses the
            same resamples of images, so differences between rows are paired.
        counts (`np.ndarray` of shape `(num_resamples, num_images)`): as [`resample_counts`] makes it.

    Returns:
        `np.ndarray` of shape `(num_resamples, ...)`, NaN where a resample has no value.
    """
    present = ~np.isnan(values)
    total = np.tensordot(counts, np.where(present, values, 0.0), axes=(1, -1))
    size = np.tensordot(counts, present.astype(float), axes=(1, -1))
    return np.divide(total, size, out=np.full_like(total, np.nan), where=size > 0)


def interval(values: np.ndarray) -> list[float] | None:
    """The 95% percentile interval. `None` if more than 2.5% of the values are undefined: it would have no end."""
    undefined = np.isnan(values)
    if undefined.mean() > 0.025:
        return None
    return np.quantile(values[~undefined], [0.025, 0.975]).tolist()


def retention_of(base: np.ndarray, teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """`(student - base) / (teacher - base)` of means, or of arrays of them. NaN where the teacher has no gain."""
    gain, kept = np.asarray(teacher - base, dtype=float), np.asarray(student - base, dtype=float)
    return np.divide(kept, gain, out=np.full(np.broadcast_shapes(kept.shape, gain.shape), np.nan), where=gain > 0)


def retention_report(
    scores: Scores,
    teachers: Mapping[str, str],
    students: Sequence[str],
    seed: int = 0,
    own: Mapping[str, Sequence[str]] | None = None,
) -> Report:
    """
    Makes the report from scores.

    The first reward of a task is its score. Intervals are percentiles of a bootstrap, which resamples a task's images
    jointly for base, teacher and student.

    Args:
        scores (`dict`): `scores[model][task][reward]` is a list with one value for each image, `None` where the reward
            does not apply. One of the models is `"base"`.
        teachers (`dict[str, str]`): name of the model that is the teacher of each task.
        students (`Sequence[str]`): names of the models that are students. The report's main entries are the first
            one's.
        seed (`int`, *optional*, defaults to 0): seed of the bootstrap.
        own (`dict[str, Sequence[str]]`, *optional*): each task's own rewards, its score first. By default the first
            reward in `scores`. Other tasks' rewards show what a model does to images that they are not meant for.

    Returns:
        `dict`, ready for JSON:
        - `tasks`: for each task `reward` (the name of its score), `rewards` (its own rewards), `num_images`, the mean
          scores `base`, `teacher` and `student`, `retention` = (student - base) / (teacher - base), and its interval `ci95`.
          Retention is not clipped. Retention and interval are `None` if the teacher's gain is less than 0.05; the
          interval is also `None` if the bootstrap can't tell the gain from zero. With several students, `students` has
          `student`, `retention` and `ci95` of each.
        - `mean_retention`, `mean_ci95`: the mean over the tasks that have a retention, and its interval.
        - `num_images`: images a task, of the smallest task if they differ; `seed`.
        - `scores`, `scores_ci95`: mean and interval of every reward for every model on every task.
        - `fixed_state_kl`, only from [`evaluate_retention`]: for each task and model (`"base"` and the students)
          `on_trajectories` and `on_images`, the KL from the task's teacher on its own trajectories and on its noised
          images, and `kl`, the mean of both.
    """
    reports: dict[str, TaskReport] = {}
    means: Means = {model: {} for model in scores}
    intervals: Intervals = {model: {} for model in scores}
    kept: dict[str, list[tuple[float, np.ndarray]]] = {student: [] for student in students}
    for index, (task, teacher) in enumerate(teachers.items()):
        resampled: dict[str, dict[str, np.ndarray]] = {}
        for model, of_model in scores.items():
            values = np.array(list(of_model[task].values()), dtype=float)  # [reward, image]; None becomes NaN
            num_images = values.shape[1]
            if not resampled:  # the same resamples for all models
                counts = resample_counts(num_images, [seed, index])
            mean = resampled_means(values, np.ones((1, num_images)))[0]
            resampled[model] = dict(zip(of_model[task], resampled_means(values, counts).T, strict=True))
            means[model][task] = {name: _number(m) for name, m in zip(of_model[task], mean, strict=True)}
            intervals[model][task] = {name: interval(m) for name, m in resampled[model].items()}
        reward = next(iter(scores["base"][task]))
        base, goal = means["base"][task][reward], means[teacher][task][reward]
        entries: dict[str, Kept] = {}
        for student in students:
            mine = means[student][task][reward]
            entries[student] = {"student": mine, "retention": None, "ci95": None}
            if base is not None and goal is not None and mine is not None and goal - base >= MIN_GAIN:
                sampled = retention_of(*(resampled[model][reward] for model in ("base", teacher, student)))
                retention = (mine - base) / (goal - base)
                entries[student] = {"student": mine, "retention": retention, "ci95": interval(sampled)}
                kept[student].append((retention, sampled))
        rewards = list(own[task]) if own is not None else [reward]
        reports[task] = {
            "reward": reward,
            "rewards": rewards,
            "num_images": num_images,
            "base": base,
            "teacher": goal,
            **entries[students[0]],
        }
        if len(students) > 1:
            reports[task]["students"] = entries
    overall = {student: _overall(kept[student]) for student in students}
    report: Report = {
        "tasks": reports,
        **overall[students[0]],
        "students": overall,
        "num_images": min(entry["num_images"] for entry in reports.values()),
        "seed": seed,
        "scores": means,
        "scores_ci95": intervals,
    }
    if len(students) == 1:
        del report["students"]
    return report


def _overall(kept: list[tuple[float, np.ndarray]]) -> KeptOverall:
    if not kept:
        return {"mean_retention": None, "mean_ci95": None}
    points, sampled = zip(*kept, strict=True)
    return {"mean_retention": sum(points) / len(points), "mean_ci95": interval(np.mean(sampled, axis=0))}


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def retention_table(report: Report) -> str:
    """
    The report as a Markdown table, with a row for each task and student and one for the mean over tasks. A line below
    says what the intervals are.
    """
    several = "students" in report
    header = [
        "task",
        "reward",
        "base",
        "teacher",
        *(["model"] if several else []),
        "student",
        "retention",
        "95% interval",
    ]
    rows = []
    for name in report["students"] if several else [None]:
        for task, entry in report["tasks"].items():
            mine = entry if name is None else entry["students"][name]
            names = [cell(task), cell(entry["reward"])]
            cells = [*names, _cell(entry["base"]), _cell(entry["teacher"]), *([cell(name)] if name else [])]
            rows.append([*cells, _cell(mine["student"]), _cell(mine["retention"]), _range(mine["ci95"])])
        overall = report if name is None else report["students"][name]
        blank = ["**mean**", "", "", "", *([cell(name)] if name else []), ""]
        rows.append([*blank, f"**{_cell(overall['mean_retention'])}**", _range(overall["mean_ci95"])])
    return f"{_table(header, rows, to_the_left=('task', 'reward', 'model'))}\n\n{_caption(report)}"


def _caption(report: Report) -> str:
    """Says over what the intervals are."""
    counts = {entry["num_images"] for entry in report["tasks"].values()}
    images = f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,}"
    whole = len(report["tasks"])
    overall = [report, *report.get("students", {}).values()]
    if all(one["mean_retention"] is None for one in overall):
        mean = "No teacher gains 0.05 or more over the base, so there is no retention."
    else:
        kept = sum(entry["teacher"] is not None and _has_gain(entry) for entry in report["tasks"].values())
        of = f"all {whole} tasks" if kept == whole else f"the {kept} of {whole} tasks whose teacher gains 0.05 or more"
        mean = f"The mean is over {'the task' if whole == 1 else of}; its interval resamples each task's images."
    return (
        f"95% intervals: the spread over {NUM_RESAMPLES:,} resamples of a task's images ({images} a task), the same for "
        f"base, teacher and student. They do not cover other seeds of training. {mean}{_too_few(report)}"
    )


def _too_few(report: Report) -> str:
    """Says which tasks have too few images for their intervals to mean much."""
    few = {task: entry["num_images"] for task, entry in report["tasks"].items() if entry["num_images"] < ENOUGH_IMAGES}
    if not few:
        return ""
    counts = sorted(set(few.values()))
    images = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    of = "" if len(few) == len(report["tasks"]) else f" of {', '.join(map(inline, few))}"
    noun = "image" if counts == [1] else "images"
    return f" **{images} {noun}{of}: too few for an interval.** Use {ENOUGH_IMAGES} or more."


def _has_gain(entry: TaskReport) -> bool:
    base, teacher = entry["base"], entry["teacher"]
    return base is not None and teacher is not None and teacher - base >= MIN_GAIN


def fixed_states_table(report: Report) -> str:
    """How far base and students are from each task's teacher on states of its own, as Markdown."""
    rows = [
        [cell(task), cell(model), *(f"{kl:.2e}" for kl in (of_model["on_trajectories"], of_model["on_images"]))]
        for task, of_task in report.get("fixed_state_kl", {}).items()
        for model, of_model in of_task.items()
    ]
    if not rows:
        return ""
    header = ["task", "model", "on trajectories", "on noised images"]
    return (
        f"## Fixed states\n\n{_table(header, rows, to_the_left=('task', 'model'))}\n\nThe KL from the task's teacher "
        "(Equation 12, a latent dimension), on the teacher's own trajectories and on its images, noised to each level. "
        "0 is a perfect copy."
    )


def settings_table(report: Report) -> str:
    """How the images of the report were drawn, as Markdown: each setting with where it came from."""
    settings = {name: one for name, one in report.get("settings", {}).items() if one["value"] is not None}
    scales = {f"guidance of {model}": one for model, one in report.get("guidance_scales", {}).items()}
    rows = [[cell(name), cell(one["value"]), cell(one["source"])] for name, one in {**settings, **scales}.items()]
    if not rows:
        return ""
    return f"## Settings\n\n{_table(['setting', 'value', 'from'], rows, to_the_left=('setting', 'value', 'from'))}"


def scores_table(report: Report) -> str:
    """
    All scores as Markdown: for each task a table of models and rewards, with 95% intervals.

    A task's own rewards are in bold. Rewards that apply to none of its images are left out.
    """
    tables = []
    for task, entry in report["tasks"].items():
        of_models = {model: of_model[task] for model, of_model in report["scores"].items()}
        names = [name for name in of_models["base"] if any(of[name] is not None for of in of_models.values())]
        header = ["model", *(f"**{cell(name)}**" if name in entry["rewards"] else cell(name) for name in names)]
        rows = []
        for model, means in of_models.items():
            bounds = report["scores_ci95"][model][task]
            cells = [_cell(means[name]) + (f" ({_range(bounds[name])})" if bounds[name] else "") for name in names]
            rows.append([cell(model), *cells])
        tables.append(f"## {inline(task)}\n\n{_table(header, rows, to_the_left=('model',))}")
    return "\n\n".join(tables)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], to_the_left: Sequence[str]) -> str:
    """Makes a Markdown table of Markdown cells. Its columns are aligned in plain text too."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    left = [name in to_the_left for name in header]
    rule = ["-" * width if is_left else "-" * (width - 1) + ":" for width, is_left in zip(widths, left, strict=True)]
    return "\n".join(
        "| "
        + " | ".join(
            text.ljust(width) if is_left else text.rjust(width)
            for text, width, is_left in zip(row, widths, left, strict=True)
        )
        + " |"
        for row in [cells[0], rule, *cells[1:]]
    )


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _range(bounds: Sequence[float] | None) -> str:
    return "–" if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}"
