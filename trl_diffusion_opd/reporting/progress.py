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

"""One line of text for an interval of training: where the run is, how far it has come, and when it will end."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from ..guards.redaction import shown


# The longest line, in characters. A terminal that is narrower gets shorter ones.
WIDTH = 120
# Tasks' names are cut to these lengths, one after the other, until the line fits.
_NAME_LENGTHS = (40, 12, 8)

Log = Mapping[str, float]


@dataclass(frozen=True)
class Measure:
    """
    What a method's line shows of each task.

    Attributes:
        prefix (`str`): the metric's prefix, before the task.
        title (`str`): what the line calls it.
        whole (`str`): the metric of all tasks.
        rises (`bool`): whether it should rise in training.
    """

    prefix: str
    title: str
    whole: str
    rises: bool = False


# The first one that a log has is shown. Distillation has a velocity gap, RL a reward, fine-tuning a loss for each task.
_MEASURES = (
    Measure("velocity_gap/", "gap", "kl"),
    Measure("reward/", "reward", "reward", rises=True),
    Measure("loss/", "loss", "loss"),
)


def number(value: float) -> str:
    """A number in few characters, such as `.31`, `2.1e-3` or `22.3`."""
    size = abs(value)
    if not math.isfinite(value) or size >= 1e5 or 0 < size < 0.00995:
        mantissa, e, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}" if e else mantissa
    digits = ".2g" if size < 0.0995 else ".2f" if size < 10 else ".1f" if size < 100 else ".0f"
    text = f"{value:{digits}}"
    return "0" if value == 0 else text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def duration(seconds: float) -> str:
    """A time in few characters, such as `45 s`, `17 min` or `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def measure_of(log: Log) -> Measure | None:
    """Returns what the line shows of each task, or `None` if the log has nothing of single tasks."""
    return next((measure for measure in _MEASURES if any(name.startswith(measure.prefix) for name in log)), None)


def of_tasks(log: Log, prefix: str) -> dict[str, float]:
    """Returns the metrics whose names begin with `prefix`, by the rest of their names: the tasks."""
    return {name.removeprefix(prefix): value for name, value in log.items() if name.startswith(prefix)}


def progress_line(step: int, steps: int, log: Log, first: Log, left: str, width: int = WIDTH) -> str:
    """
    Makes the line of an interval.

    If the tasks do not fit, their names are cut; if they still do not, those that do worst come first, and the line
    says how many more there are.

    Args:
        step (`int`), steps (`int`): the update, and the number of updates of the run.
        log (`dict[str, float]`): the metrics of the interval.
        first (`dict[str, float]`): those of the run's first interval. Changes are shown against them.
        left (`str`): how long the rest of the run takes.
        width (`int`, *optional*, defaults to 120): the most characters of the line.
    """
    measure = measure_of(log)
    head, tail = [f"{step}/{steps}"], [left] if left else []
    if "step_time" in log:
        tail.insert(0, duration(log["step_time"]))
    rate = [f"lr {number(log['learning_rate'])}"] if "learning_rate" in log else []
    if measure is None:
        head.append(_changed("loss", log, first, rises=False))
        return _first_that_fits([[*head, *rate, *tail], [*head, *tail], head], width)
    head.append(_changed(measure.whole, log, first, measure.rises))
    if measure.rises:
        head += [f"spread {number(log['reward_std'])}"] if "reward_std" in log else []
        head += [f"kl {number(log['kl'])}"] if "kl" in log else []
    tasks = of_tasks(log, measure.prefix)
    title = "" if measure.whole == measure.title else f"{measure.title} "
    if len(tasks) == 1:  # the mean over tasks says it, unless it is of another metric
        own = [f"{title}{number(*tasks.values())}"] if title else []
        return _first_that_fits([[*head, *own, *rate, *tail], [*head, *own, *tail], [*head, *own], head], width)
    texts = [f"{title}{text}" for text in _task_texts(tasks, of_tasks(first, measure.prefix), measure.rises)]
    lines = [[*head, text, *rate, *tail] for text in texts]
    return _first_that_fits([*lines, [*head, texts[-1], *tail], [*head, *tail], head], width)


def _first_that_fits(lines: Sequence[Sequence[str]], width: int) -> str:
    joined = ["  ".join(filter(None, parts)) for parts in lines]
    return next((line for line in joined if cell_len(line) <= width), joined[-1][:width])


def _task_texts(tasks: Mapping[str, float], first: Mapping[str, float], rises: bool) -> Iterator[str]:
    """Yields texts for all tasks, each shorter than the one before."""
    for length in _NAME_LENGTHS:
        yield " ".join(_named(task, value, length) for task, value in tasks.items())
    ordered = worst_first(tasks, first, rises)
    for count in range(len(tasks) - 1, 0, -1):
        some = " ".join(_named(task, tasks[task], _NAME_LENGTHS[1]) for task in ordered[:count])
        yield f"{some} +{len(tasks) - count} more"


def worst_first(tasks: Mapping[str, float], first: Mapping[str, float], rises: bool) -> list[str]:
    """
    Sorts tasks, those that do worst first. Rewards of tasks can have different units, so there it is the task with the
    least relative gain since `first`.
    """
    if not rises:
        return sorted(tasks, key=lambda task: -tasks[task])
    return sorted(tasks, key=lambda t: (tasks[t] - first.get(t, tasks[t])) / (abs(first.get(t, 0)) or 1))


def _named(task: str, value: float, length: int) -> str:
    name = shown(task)
    if len(name) > length:  # names of one kind often differ only at their ends
        half = length // 2
        name = f"{name[:half]}…{name[half + 1 - length :]}"
    return f"{name} {number(value)}"


def _changed(name: str, log: Log, first: Log, rises: bool) -> str:
    """A metric with its change since the run's first interval: in percent, or of a reward the difference."""
    if name not in log:
        return ""
    value, before = log[name], first.get(name, math.nan)
    text = f"{name} {number(value)}"
    if value == before or not math.isfinite(before) or not math.isfinite(value):
        return text
    if rises:
        return f"{text} ({'+' if value > before else ''}{number(value - before)})"
    if before <= 0:
        return text
    ratio = value / before
    return f"{text} ({ratio - 1:+.0%})" if ratio < 10 else f"{text} (x{ratio:.0f})"


def timing_line(log: Log, width: int = WIDTH) -> str:
    """
    Says in one line what an update takes: its seconds, and the shares of its parts. The smallest parts are counted as
    `other` if the line is too long.

    Args:
        log (`dict[str, float]`): the metrics of an interval, with `step_time` and `time/<part>`.
        width (`int`, *optional*, defaults to 120): the most characters of the line.
    """
    whole = log["step_time"]
    parts = {name: value for name, value in of_tasks(log, "time/").items() if value >= whole / 100}
    rate = ""
    if "samples_per_second" in log:
        rate = f" {number(log['samples_per_second'])} samples/s"
        rate += f", {number(log['peak_memory_gib'])} GiB." if "peak_memory_gib" in log else "."
    while True:
        ordered = sorted(parts, key=lambda name: (name == "other", -parts[name]))
        shares = ", ".join(f"{name.replace('_', ' ')} {parts[name] / whole:.0%}" for name in ordered)
        line = f"An update takes {duration(whole)}: {shares}.{rate}"
        named = [name for name in ordered if name != "other"]
        if cell_len(line) <= width or len(named) < 2:
            return line
        parts["other"] = parts.get("other", 0.0) + parts.pop(named[-1])
