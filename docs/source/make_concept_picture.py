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

"""Draws images/concept.png: a student's walk, and what the teacher of its task says at every state.

python docs/source/make_concept_picture.py
"""

from pathlib import Path

import matplotlib
import numpy as np


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D


# Colours that people with colour-blindness can tell apart (Okabe and Ito).
STUDENT, GAP = "#000000", "#D55E00"
# A task, the colour of its teacher, and where that teacher's images lie. The student still goes between the two.
TASKS = (
    ("letters", 'prompt of task "letters"', "#0072B2", np.array([6.0, 2.3])),
    ("style", 'prompt of task "style"', "#009E73", np.array([6.0, -2.3])),
)
STEPS = 5
START = {"letters": np.array([-1.0, 1.0]), "style": np.array([-1.0, -1.0])}


def velocity(state: np.ndarray, goal: np.ndarray, step: int) -> np.ndarray:
    """Straight to a goal, in the steps that are left."""
    return (goal - state) / (STEPS - step)


def draw_walk(axes: Axes, name: str, label: str, colour: str, goal: np.ndarray) -> None:
    x = START[name]
    states = [x]
    for step in range(STEPS):
        bend = np.array([0.0, -0.35]) * np.sign(goal[1]) * (1 - step / STEPS)
        student = velocity(x, goal * [1, 0.5], step) + bend
        teacher = velocity(x, goal, step)
        if step < STEPS - 1:
            arrow = dict(width=0.022, head_width=0.13, head_length=0.16, length_includes_head=True, zorder=3)
            axes.arrow(*x, *(0.8 * teacher), color=colour, **arrow)
            axes.arrow(*x, *(0.8 * student), color=STUDENT, **arrow)
            ends = np.stack([x + 0.8 * student, x + 0.8 * teacher])
            axes.plot(*ends.T, color=GAP, linewidth=2.2, linestyle=(0, (1, 1)), zorder=2)
        x = x + student
        states.append(x)
    path = np.stack(states)
    axes.plot(*path.T, color="#999999", linewidth=1, zorder=1)
    axes.plot(*path[:-1].T, "o", color=STUDENT, markersize=7, zorder=4)
    axes.plot(*path[-1], "s", color=STUDENT, markersize=9, zorder=4)
    axes.plot(*goal, "*", color=colour, markersize=20, zorder=4)
    side = np.sign(goal[1])
    axes.annotate(f'teacher of "{name}":\nits images', goal, (goal[0] + 0.25, goal[1]), va="center", color=colour)
    axes.annotate(label, path[0], (path[0][0] - 0.15, path[0][1] + 0.6 * side), ha="center", va="center")
    axes.annotate("the student's\nimage", path[-1], (path[-1][0] + 0.25, path[-1][1]), va="center")


def main() -> None:
    figure, axes = plt.subplots(figsize=(10, 4.4), layout="constrained")
    for task in TASKS:
        draw_walk(axes, *task)
    axes.annotate("noise", (-1.0, 0), ha="center", va="center", fontsize=12)
    axes.annotate("noise level 1", (-1.0, -3.05), ha="center", color="#555555")
    axes.annotate("noise level 0", (6.0, -3.05), ha="center", color="#555555")
    axes.annotate("", (5.4, -2.98), (-0.4, -2.98), arrowprops={"arrowstyle": "->", "color": "#999999"})
    lines = [
        Line2D([], [], color=STUDENT, marker="o", label="the student: a state it visits, and its velocity there"),
        Line2D([], [], color=TASKS[0][2], linewidth=2.5, label='velocity of the teacher of "letters" at that state'),
        Line2D([], [], color=TASKS[1][2], linewidth=2.5, label='velocity of the teacher of "style" at that state'),
        Line2D([], [], color=GAP, linestyle=(0, (1, 1)), linewidth=2.5, label="the gap; the loss is its square"),
    ]
    axes.legend(handles=lines, frameon=False, loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.12))
    axes.set(xlim=(-2.2, 8.1), ylim=(-3.3, 2.9))
    axes.axis("off")
    path = Path(__file__).parent / "images" / "concept.png"
    figure.savefig(path, dpi=130)
    print(f"Wrote {path.name}")


if __name__ == "__main__":
    main()
