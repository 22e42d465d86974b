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

"""The line of an interval: its numbers, its changes, and that it never is longer than the console."""

import math
import re

import pytest
from rich.cells import cell_len

from trl_diffusion_opd.reporting.progress import duration, number, progress_line, timing_line, worst_first


DISTILLED = {
    "loss": 1.0,
    "kl": 2.1e-3,
    "velocity_gap/compose": 0.31,
    "velocity_gap/letters": 0.12,
    "velocity_gap/style": 0.08,
    "learning_rate": 3e-4,
    "step_time": 1.2,
}
REWARDED = {
    "loss": 0.0,
    "reward": 0.62,
    "reward_std": 0.21,
    "reward/a": 0.3,
    "reward/b": 0.94,
    "kl": 1e-4,
    "learning_rate": 1e-3,
    "step_time": 30.0,
}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.31, ".31"),
        (0.1, ".10"),
        (0.0167, ".017"),
        (0.08, ".08"),
        (-0.2, "-.20"),
        (0.996, "1.00"),
        (1.5, "1.50"),
        (22.345, "22.3"),
        (1520.4, "1520"),
        (0.0031, "3.1e-3"),
        (3e-4, "3e-4"),
        (0.0, "0"),
        (1e6, "1e6"),
        (math.nan, "nan"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_durations():
    texts = [duration(seconds) for seconds in (0.31, 1.23, 9.97, 45, 89, 1020, 9000, 3e5)]
    assert texts == ["0.31 s", "1.2 s", "10 s", "45 s", "89 s", "17 min", "2.5 h", "3.5 days"]


def test_distillation():
    line = progress_line(120, 1000, DISTILLED, {**DISTILLED, "kl": 3.4e-3}, "ETA 17 min")
    expected = "120/1000  kl 2.1e-3 (-38%)  gap compose .31 letters .12 style .08  lr 3e-4  1.2 s  ETA 17 min"
    assert line == expected and len(line) <= 120


def test_reward():
    line = progress_line(5, 10, REWARDED, {**REWARDED, "reward": 0.5}, "ETA 3 min")
    expected = "5/10  reward .62 (+.12)  spread .21  kl 1e-4  a .30 b .94  lr 1e-3  30 s  ETA 3 min"
    assert line == expected
    of_one = {name: value for name, value in REWARDED.items() if name not in ("reward/b", "kl")}
    line = progress_line(5, 10, of_one, of_one, "")
    assert line == "5/10  reward .62  spread .21  lr 1e-3  30 s"


def test_loss():
    log = {"loss": 0.5, "loss/a": 0.4, "loss/b": 0.6, "learning_rate": 1e-3}
    assert progress_line(5, 10, log, {**log, "loss": 1.0}, "") == "5/10  loss .50 (-50%)  a .40 b .60  lr 1e-3"
    assert progress_line(5, 10, {"loss": 0.5}, {"loss": 0.01}, "") == "5/10  loss .50 (x50)"  # nothing of single tasks


def test_a_first_value_of_zero_or_nan_gives_no_change():
    for first in (0.0, math.nan):
        assert progress_line(1, 9, {"loss": 0.5}, {"loss": first}, "") == "1/9  loss .50"


@pytest.mark.parametrize("width", [120, 80, 60, 40, 20, 8])
@pytest.mark.parametrize("tasks", [1, 3, 5, 20])
@pytest.mark.parametrize(
    "name", ["task {}", "{} " + "long name " * 9, "日本語の長い名前です{}", "two\nlines \x1b[31m {}"]
)
def test_it_fits(width, tasks, name):
    log = {f"velocity_gap/{name.format(i)}": 0.1 + 0.01 * i for i in range(tasks)}
    log |= {"kl": 1.0, "loss": 1.0, "learning_rate": 3e-4, "step_time": 2.0}
    line = progress_line(99000, 100000, log, {**log, "kl": 2.0}, "ETA 17 min", width)
    assert cell_len(line) <= width and line.isprintable()
    assert line.startswith("99000/100000"[:width])
    if tasks == 20 and width == 120:  # the worst first
        assert f"+{20 - line.count(' .2')} more" in line


def test_the_worst_tasks():
    assert worst_first({"a": 0.1, "b": 0.3, "c": 0.2}, {}, rises=False) == ["b", "c", "a"]
    # Rewards have different units: the gain counts, as a share of where it began.
    assert worst_first({"big": 22.5, "small": 0.5}, {"big": 22.0, "small": 0.1}, rises=True) == ["big", "small"]


def test_what_an_update_takes():
    log = {
        "step_time": 2.0,
        "time/student": 0.5,
        "time/backward": 0.9,
        "time/noise_floor": 0.3,
        "time/data": 0.001,
        "time/other": 0.29,
        "samples_per_second": 24.0,
        "peak_memory_gib": 0.76,
    }
    expected = "An update takes 2 s: backward 45%, student 25%, noise floor 15%, other 14%. 24.0 samples/s, .76 GiB."
    assert timing_line(log) == expected


def test_many_parts_of_an_update_fit_a_line():
    parts = {f"time/part_number_{i}": float(i + 1) for i in range(12)}
    log = {"step_time": 80.0, "time/other": 2.0, **parts, "samples_per_second": 3.0, "peak_memory_gib": 20.0}
    line = timing_line(log)
    assert len(line) <= 120 and line.startswith("An update takes 80 s: part number 11 15%, part number 10 14%")
    shares = [int(share) for share in re.findall(r" (\d+)%", line)]
    assert sum(shares) == pytest.approx(100, abs=len(shares))
    assert line.endswith("%. 3.00 samples/s, 20.0 GiB.")
