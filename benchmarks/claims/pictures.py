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

"""The pictures of the comparison, in the colours of the package's own."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from summary import Estimate

from trl_diffusion_opd.reporting.plots import COLORS, STYLE


# Label, x and y: points of one seed.
Line = tuple[str, Sequence[float], Sequence[float]]
_MARKERS = "osD^vPX"
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), "-.")


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    # No version of matplotlib in the file: the same results give the same bytes.
    figure.savefig(str(path), format="png", metadata={"Software": None})


def _look(axes: Axes) -> None:
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)


def plot_lines(panels: Mapping[tuple[str, str, str], Sequence[Line]], path: Path, columns: int) -> None:
    """
    Panels of lines, a legend beside them.

    Args:
        panels (`dict`): lines by title, label of x and label of y. Lines of one label, of different seeds, look alike.
    """
    labels = list(dict.fromkeys(label for lines in panels.values() for label, _, _ in lines))
    rows = -(-len(panels) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(3.6 * columns + 2.2, 3.1 * rows), layout="constrained")
        handles = {}
        for axes, ((title, x_label, y_label), lines) in zip(
            figure.subplots(rows, columns, squeeze=False).ravel(), panels.items(), strict=False
        ):
            for label, x, y in lines:
                i = labels.index(label)
                (handles[label],) = axes.plot(
                    x,
                    y,
                    color=COLORS[i % len(COLORS)],
                    linestyle=_DASHES[i % 4],
                    marker=_MARKERS[i % 7],
                    ms=4,
                    lw=1.5,
                )
            axes.set_title(title)
            axes.set_xlabel(x_label)
            axes.set_ylabel(y_label)
            _look(axes)
        figure.legend([handles[label] for label in labels], labels, loc="outside right upper")
        _save(figure, path)


def plot_bars(groups: Mapping[str, Mapping[str, Estimate]], y_label: str, path: Path) -> None:
    """Bars of `groups[label][x]`, with intervals where there are any."""
    names = list(dict.fromkeys(x for bars in groups.values() for x in bars))
    width = 0.84 / len(groups)
    with rc_context(STYLE):
        figure = Figure(figsize=(1.3 * len(names) + 4.2, 3.4), layout="constrained")
        axes = figure.subplots()
        for i, (label, bars) in enumerate(groups.items()):
            places = [names.index(x) + (i - (len(groups) - 1) / 2) * width for x in bars]
            axes.bar(places, [bar.mean for bar in bars.values()], 0.92 * width, color=COLORS[i % 7], label=label)
            for place, bar in zip(places, bars.values(), strict=True):
                if bar.low is not None:
                    axes.vlines(place, bar.low, bar.high, color="#333333", linewidth=1.2)
        axes.axhline(0, color="#333333", linewidth=0.8)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel(y_label)
        _look(axes)
        figure.legend(loc="outside right upper")
        _save(figure, path)
