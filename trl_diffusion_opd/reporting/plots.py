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

"""Draws the pictures of a run: bars and radar of the retention report, images side by side, training curves."""

import logging
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from PIL.Image import Image, Resampling

from ..guards.redaction import shown, visible
from .report import Report


logger = logging.getLogger(__name__)

# The colours of Okabe and Ito, which colour-blind people can tell apart too.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_BASE = "#8C8C8C"
_STUDENT = "#000000"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "legend.frameon": False,
    "savefig.dpi": 150,
    # Prompts and names are shown as they are: text between two dollar signs is no formula.
    "text.parse_math": False,
    "text.usetex": False,
}
# The largest width or height, in inches. matplotlib refuses pictures of 2^16 pixels a side or more.
_LARGEST = 400.0
# Fonts for prompts in scripts that matplotlib's own font lacks. The first installed ones are used.
_FURTHER_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Zen Hei"),
    *("PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Arial Unicode MS", "Noto Sans"),
)
# Longer prompts are cut, or they would leave no room for the images. The page of samples has them in full.
_PROMPT_LINES = 4
# Images up to this size are shown with their pixels.
_SMALL = 128
_TASKS_A_BAND, _IMAGES_A_BAND = 3, 15
MIN_RADAR_AXES = 3
# The worst model's distance from the centre on each axis. At the centre itself, all axes would meet.
_RADAR_FLOOR = 0.25


@dataclass(frozen=True)
class SampleRow:
    """
    Images of one prompt, from several models with the same noise.

    Args:
        task (`str`), prompt (`str`)
        images (`dict[str, PIL.Image.Image]`): images by the model's label, in the order in which they are shown.
        scores (`dict[str, float | None]`): the reward of each image, by the same labels.
        reward (`str`, *optional*): the reward's name, to show it with the task.
    """

    task: str
    prompt: str
    images: Mapping[str, Image]
    scores: Mapping[str, float | None]
    reward: str | None = None


def plot_retention(report: Report, path: str | Path) -> None:
    """
    Draws bars with intervals of base, teachers and students on every task, from the report of [`retention_report`].

    A task's own teacher has full colour, the other teachers are pale. The number on a student's bar is its retention.
    """
    tasks, scores = report["tasks"], report["scores"]
    teachers = [name for name in scores if name.startswith("teacher/")]
    students = [name for name in scores if name != "base" and name not in teachers]
    colors = _model_colors(report)
    with rc_context(STYLE):
        width = min(_LARGEST, 1.6 + max(2.0, 0.5 * len(scores)) * len(tasks))
        figure = Figure(figsize=(width, 3.6), layout="constrained")
        panels = figure.subplots(1, len(tasks), squeeze=False)[0]
        for axes, (task, entry) in zip(panels, tasks.items(), strict=True):
            reward = entry["reward"]
            for x, (name, color) in enumerate(colors.items()):
                mean = scores[name][task][reward]
                if mean is None:
                    continue
                axes.bar(
                    x, mean, 0.82, color=color, alpha=0.35 if name in teachers and name != f"teacher/{task}" else 1
                )
                bounds = report["scores_ci95"][name][task][reward]
                if bounds is not None:
                    whisker = axes.vlines(x, *bounds, color="#555555", linewidth=1.2)
                    whisker.set_path_effects([withStroke(linewidth=2.4, foreground="white")])
                top = mean if bounds is None else bounds[1]
                retention = (
                    entry.get("students", {students[0]: entry})[name]["retention"] if name in students else None
                )
                if retention is not None:
                    axes.annotate(
                        f"{retention:.0%}",
                        (x, top),
                        (0, 3),
                        textcoords="offset points",
                        ha="center",
                        fontweight="bold",
                        fontsize=10 if len(entry.get("students", [0])) == 1 else 8,  # of neighbouring bars
                    )
            _limit(axes, [scores[name][task][reward] for name in colors])
            axes.set_title(task)
            axes.set_ylabel(reward)
            axes.set_xticks([])
        handles = [Patch(color=color) for color in colors.values()]
        _legend(figure, handles, [_label(name) for name in colors])
        counts = sorted({entry["num_images"] for entry in tasks.values()})
        images = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        others = any(name != f"teacher/{task}" for name in teachers for task in tasks)
        pale = "; pale: teachers of other tasks" if others else ""
        note = f"mean over {images} images a task, with its 95% interval{pale}; the number is the student's retention"
        figure.supxlabel(textwrap.fill(note, int(15 * width)), fontsize=8, color="#555555")  # 15 letters an inch
        _save(figure, path)


def radar_axes(report: Report) -> list[tuple[str, str]]:
    """Lists the radar's axes: each task with each of its own rewards for which every model has a mean."""
    return [
        (task, reward)
        for task, entry in report["tasks"].items()
        for reward in entry["rewards"]
        if all(of_model[task][reward] is not None for of_model in report["scores"].values())
    ]


def plot_radar(report: Report, path: str | Path) -> None:
    """
    Draws a radar chart of all models on all tasks, as in Figure 1 of DiffusionOPD
    ([arXiv:2605.15055](https://huggingface.co/papers/2605.15055)), from the report of [`retention_report`].

    Each reward of a task is an axis; there must be at least three. Rewards have different units, so each axis runs
    from the worst model (inner ring) to the best one (outer ring). Its label says the best value.
    """
    axes_names, scores = radar_axes(report), report["scores"]
    values = np.array([[of_model[task][reward] for task, reward in axes_names] for of_model in scores.values()])
    low, high = values.min(axis=0), values.max(axis=0)
    spread = np.where(high > low, high - low, 1.0)
    radii = _RADAR_FLOOR + (1 - _RADAR_FLOOR) * np.where(high > low, (values - low) / spread, 1.0)
    angles = np.linspace(0, 2 * np.pi, len(axes_names), endpoint=False)
    colors = _model_colors(report)
    with rc_context(STYLE):
        figure = Figure(figsize=(7.6, 5.2), layout="constrained")
        axes: Any = figure.add_subplot(projection="polar")
        axes.set_theta_zero_location("N")
        axes.set_theta_direction(-1)
        handles: list[Artist] = []
        for (name, color), radius in zip(colors.items(), radii, strict=True):
            is_teacher, is_student = name.startswith("teacher/"), name != "base" and not name.startswith("teacher/")
            line = {"linewidth": 2.2 if is_student else 1.5, "linestyle": (0, (4, 1.5)) if is_teacher else "-"}
            closed = np.append(angles, angles[0]), np.append(radius, radius[0])
            # Students are on top, since readers look for them.
            handles += axes.plot(
                *closed, color=color, marker="o", markersize=4, label=_label(name), zorder=3 + is_student, **line
            )
            if color == _STUDENT:
                axes.fill(*closed, color=color, alpha=0.07, linewidth=0, zorder=1)
        for ring in (_RADAR_FLOOR, (1 + _RADAR_FLOOR) / 2, 1):
            axes.plot(
                np.append(angles, angles[0]), [ring] * (len(angles) + 1), color="#D0D0D0", linewidth=0.8, zorder=2
            )
        axes.vlines(angles, 0, 1, color="#D0D0D0", linewidth=0.8, zorder=2)
        axes.set_ylim(0, 1.04)
        axes.set_axis_off()
        for angle, (task, reward), best in zip(angles, axes_names, high, strict=True):
            side = np.sin(angle)
            axes.annotate(
                f"{task}\n{reward}\nbest {_value(best)}" if reward != task else f"{task}\nbest {_value(best)}",
                (angle, 1.04),
                (9 * side, 9 * np.cos(angle)),
                textcoords="offset points",
                ha="center" if abs(side) < 0.1 else "left" if side > 0 else "right",
                va="center" if abs(side) > 0.5 else "bottom" if np.cos(angle) > 0 else "top",
                fontsize=9,
            )
        _legend(figure, handles, [_label(name) for name in colors])
        figure.supxlabel("each axis from the worst model (inner ring) to the best", fontsize=8, color="#555555")
        _save(figure, path, bbox_inches="tight")  # the layout does not make room for the labels


def _value(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def _model_colors(report: Report) -> dict[str, str]:
    """The colour of each model: grey for the base, black for the first student, distinct colours for the others."""
    names = list(report["scores"])
    teachers = [name for name in names if name.startswith("teacher/")]
    students = [name for name in names if name != "base" and name not in teachers]
    colors = {"base": _BASE, **dict(zip(teachers, _cycle(len(teachers)), strict=True))}
    colors |= dict(zip(students, [_STUDENT, *_cycle(len(students) - 1, len(teachers))], strict=True))
    return {name: colors[name] for name in names}


def _limit(axes: Axes, means: Sequence[float | None]) -> None:
    values = [mean for mean in means if mean is not None]
    if values and 0 <= min(values) and max(values) <= 1:
        axes.set_ylim(0, 1.12)
        axes.set_yticks(np.linspace(0, 1, 6))
    elif values and min(values) > 0.5 * max(values):
        # A reward that starts at 20, such as PickScore: bars from 0 would all look alike.
        spread = max(values) - min(values) or 1.0
        axes.set_ylim(min(values) - spread, max(values) + 0.4 * spread)


def _label(name: str) -> str:
    return f"{name.removeprefix('teacher/')} teacher" if name.startswith("teacher/") else name


def _legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    # Labels are given separately, since matplotlib leaves out an artist's label if it begins with "_".
    figure.legend(handles, labels, loc="outside right upper")


def _cycle(count: int, start: int = 0) -> list[str]:
    return [COLORS[(start + i) % len(COLORS)] for i in range(count)]


def plot_samples(rows: Sequence[SampleRow], path: str | Path, title: str | None = None) -> None:
    """
    Draws images side by side: a row for each prompt, a column for each model, tasks beside each other. The score is
    under each image.

    Small images are enlarged by a whole factor. Where a row has fewer models than others, places stay empty.

    Args:
        rows (`list[SampleRow]`): the rows, at least one.
        path (`str` or `Path`): the PNG file to write.
        title (`str`, *optional*): a line above the whole picture.
    """
    by_task: dict[str, list[SampleRow]] = {}
    for row in rows:
        by_task.setdefault(row.task, []).append(row)
    models = max(len(row.images) for row in rows)
    columns = max(1, min(len(by_task), _TASKS_A_BAND, _IMAGES_A_BAND // models))
    bands = -(-len(by_task) // columns)
    deepest = max(map(len, by_task.values()))
    side = _side(rows)
    with rc_context({**STYLE, "font.family": _fonts()}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # one for each sign that no font has, at each picture
        height = bands * ((side + 0.65) * deepest + 0.7) + (0.4 if title else 0)
        size = (side * models * columns + 0.3 * columns, min(_LARGEST, height))
        figure = Figure(figsize=size, layout="constrained")
        if title:
            figure.suptitle(visible(title), fontweight="bold", fontsize=11)
        blocks = figure.subfigures(bands, columns, squeeze=False).ravel()
        for block, (task, of_task) in zip(blocks, by_task.items(), strict=False):
            block.suptitle(_heading(task, of_task[0].reward), fontweight="bold")
            for strip, row in zip(np.ravel(block.subfigures(deepest, 1)), of_task, strict=False):
                strip.suptitle(_caption(row.prompt, round(14 * side * models)), fontsize=8.5, style="italic")
                places = np.ravel(strip.subplots(1, models))
                for axes, (label, image) in zip(places, row.images.items(), strict=False):
                    _place(axes, image, label, row.scores[label])
                for axes in places[len(row.images) :]:
                    axes.set_axis_off()
        _save(figure, path)


@cache
def _fonts() -> list[str]:
    installed = set(fontManager.get_font_names())
    return ["DejaVu Sans", *(name for name in _FURTHER_FONTS if name in installed)]


def _side(rows: Sequence[SampleRow]) -> float:
    """The side of an image's place in inches: as wide as the images, within limits."""
    width = max(image.width for row in rows for image in row.images.values())
    return min(max(width / STYLE["savefig.dpi"], 1.35), 2.2)


def _place(axes: Axes, image: Image, label: str, score: float | None) -> None:
    # Small images show their pixels; large ones are shrunk smoothly.
    axes.imshow(np.asarray(_enlarged(image)), interpolation="none" if max(image.size) <= _SMALL else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    caption = textwrap.fill(visible(label), 18)
    axes.set_xlabel(caption if score is None else f"{caption}\n{_value(score)}", fontsize=8.5)


def _heading(task: str, reward: str | None) -> str:
    heading = shown(" ".join(task.split()), 60)
    return heading if reward in (None, task) else f"{heading} (score: {shown(reward, 40)})"


def _caption(prompt: str, width: int) -> str:
    # Cut first: a prompt may have a million characters. Invisible ones are shown as Python writes them.
    line = visible(" ".join(prompt[: 9 * _PROMPT_LINES * width].split())[: (_PROMPT_LINES + 1) * width])
    return textwrap.fill(line, width, max_lines=_PROMPT_LINES, placeholder=" …")


def _enlarged(image: Image, size: int = 256) -> Image:
    factor = size // max(image.size)
    if factor <= 1:
        return image.convert("RGB")
    return image.convert("RGB").resize((image.width * factor, image.height * factor), Resampling.NEAREST)


_Style = Literal["-", "--", ":", "-."]
_STYLES: tuple[_Style, ...] = ("-", "--", ":", "-.")


def plot_curves(log_history: Sequence[Mapping[str, float]], path: str | Path) -> None:
    """
    Draws training curves against updates, a line a task, what to look at first on the left.

    For distillation it is the velocity gap, for RL the reward and its spread, for fine-tuning the loss. Then come the
    KL and the rewards of evaluations. Panels without data are left out. If nothing of this was logged, for example in
    a run shorter than `logging_steps`, it only logs a warning.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`.
        path (`str` or `Path`): the PNG file to write.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for entry in log_history:
        for key, value in entry.items():
            if isinstance(value, int | float) and key != "step":
                series.setdefault(key, []).append((entry["step"], value))
    of_tasks = ("velocity_gap", "kl", "reward", "loss")
    named = [key.partition("/") for key in series]
    tasks = list(dict.fromkeys(task for prefix, _, task in named if task and prefix in of_tasks))
    colors = dict(zip(tasks, _cycle(len(tasks)), strict=True))
    gap, kl, trained, loss = (
        {f"{prefix}/{task}": (color, _STYLES[0]) for task, color in colors.items() if f"{prefix}/{task}" in series}
        for prefix in of_tasks
    )
    rewards: dict[str, tuple[str, _Style]] = {}
    for task, color in colors.items():
        # eval_<task>/<reward>, or eval_<split>_<task>/<reward>
        found = [key for key in series if re.fullmatch(rf"eval_(.+_)?{re.escape(task)}/.+", key)]
        rewards |= {key: (color, style) for key, style in zip(found, _STYLES * len(found), strict=False)}
    of_all: dict[str, dict[str, tuple[str, _Style]]] = {
        name: {name: (_BASE, _STYLES[0])} if name in series else {} for name in ("loss", "reward_std")
    }
    panels: list[tuple[str, dict[str, tuple[str, _Style]], bool]] = [
        ("velocity gap to the task's teacher", gap, False),
        ("reward in training", trained, False),
        ("spread of the reward", of_all["reward_std"], False),
        # The loss of a method that has one of these is another view of it, or says nothing (GRPO's is near 0).
        ("loss", loss or ({} if gap or trained else of_all["loss"]), not loss),
        ("KL to the base" if trained else "KL to the task's teacher", kl, True),
        ("reward in evaluation", rewards, False),
    ]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        logger.warning("No curves are drawn: nothing was logged. Is the run shorter than logging_steps?")
        return
    # parse_math, since a logarithmic axis writes its powers of ten as formulas.
    with rc_context({**STYLE, "text.parse_math": True}):
        figure = Figure(figsize=(3.6 * len(panels) + 1.4, 3.3), layout="constrained")
        places = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, lines, logarithmic) in zip(places, panels, strict=True):
            _plot_panel(axes, series, title, lines, logarithmic)
        entries = {task: Line2D([], [], color=color, linewidth=1.8) for task, color in colors.items()}
        if any(style != "-" for _, style in rewards.values()):
            entries |= {
                key.removeprefix("eval_"): Line2D([], [], color=color, linestyle=style)
                for key, (color, style) in rewards.items()
            }
        if entries:
            _legend(figure, list(entries.values()), [name.replace("$", r"\$") for name in entries])
        _save(figure, path)


def _plot_panel(
    axes: Axes,
    series: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    lines: Mapping[str, tuple[str, _Style]],
    logarithmic: bool,
) -> None:
    """One panel of curves. `lines` has the color and the style of each by the name of its series."""
    for key, (color, style) in lines.items():
        steps, values = zip(*series[key], strict=True)
        axes.plot(steps, values, style, color=color, linewidth=1.8, marker="o" if len(steps) < 30 else "", ms=3)
    # A logarithmic axis leaves out what is 0, such as a KL to the base at the first update.
    if logarithmic and any(value > 0 for key in lines for _, value in series[key]):
        axes.set_yscale("log")
    axes.set_title(title)
    axes.set_xlabel("updates")
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: str | Path, bbox_inches: str | None = None) -> None:
    # Without pyplot there is no window and no global state, and the user's backend does not matter.
    FigureCanvasAgg(figure)
    figure.savefig(str(path), format="png", bbox_inches=bbox_inches)
