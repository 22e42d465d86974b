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

"""Measures the time of each part of an update, its arithmetic and its memory, without slowing down the device."""

import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from .flops import FlopCount


if sys.platform != "win32":
    import resource

OTHER = "other"
Instant = Any  # a CUDA event, or seconds: all instants of a device have the same type


def instant(device: torch.device) -> Instant:
    """
    Marks this instant for [`seconds_between`]. On CUDA it is an event in the stream, and nothing waits for it. On
    other devices it is the wall clock's time after the device has finished its work.
    """
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def seconds_between(begin: Instant, end: Instant) -> float:
    """Seconds between two [`instant`]s. Waits until the second one has passed."""
    if isinstance(begin, torch.cuda.Event):
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    return end - begin


def _is_over(one: Instant) -> bool:
    return one.query() if isinstance(one, torch.cuda.Event) else True


@dataclass
class Update:
    """
    Times of one update.

    Attributes:
        seconds (`dict[str, float]`): seconds of each part. Their sum is the time of the update.
        calls (`Counter[str]`): how often each part was entered.
    """

    seconds: dict[str, float]
    calls: Counter[str]

    @property
    def total(self) -> float:
        """Seconds of the update."""
        return sum(self.seconds.values())


class UpdateClock:
    """
    Measures the seconds of each part of an update.

    Time counts for the innermost part that is open, or for [`OTHER`] if none is, so the parts add up to the update. On
    CUDA, a part's time is the time that the device worked on it or waited for it. Nothing is timed outside of an
    update.

    Args:
        parts (`tuple[str, ...]`): names of the parts, without [`OTHER`]. A part that an update does not enter has 0
            seconds.
        device (`torch.device`): the device that is timed.
    """

    def __init__(self, parts: tuple[str, ...], device: torch.device):
        self.parts = (*parts, OTHER)
        self._device = device
        self._open: list[str] = []  # the open parts, the innermost last
        self._marks: list[tuple[str, Instant]] = []  # each part that ran, and from when
        self._calls: Counter[str] = Counter()
        self._ended: deque[tuple[list[tuple[str, Instant]], Counter[str]]] = deque()
        self._updates: list[Update] = []

    def start(self) -> None:
        """Begins an update. An unfinished one is dropped."""
        self._open, self._marks, self._calls = [OTHER], [], Counter()
        self._mark()

    def stop(self) -> None:
        """Ends the update."""
        if self._open:
            self._mark()
            self._ended.append((self._marks, self._calls))
            self._open = []
        # If logs are rare, the events of many updates would pile up.
        while self._ended and _is_over(self._ended[0][0][-1][1]):
            self._add_up()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Times its block as `part`."""
        if not self._open:
            yield
            return
        self._open.append(part)
        self._calls[part] += 1
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def go_on_with(self, part: str) -> None:
        """Until the end of the update, time outside of other parts counts for `part` instead of [`OTHER`]."""
        if self._open:
            self._open[0] = part
            self._calls[part] += 1
            self._mark()

    def updates(self) -> list[Update]:
        """The updates that have ended since the last call. Waits until the device has finished them."""
        while self._ended:
            self._add_up()
        updates, self._updates = self._updates, []
        return updates

    def _mark(self) -> None:
        self._marks.append((self._open[-1], instant(self._device)))

    def _add_up(self) -> None:
        marks, calls = self._ended.popleft()
        seconds = dict.fromkeys(self.parts, 0.0)
        for (part, begin), (_, end) in zip(marks, marks[1:], strict=False):
            seconds[part] += seconds_between(begin, end)
        self._updates.append(Update(seconds, calls))


def peak_memory(device: torch.device) -> int:
    """
    The peak memory in bytes. On CUDA it is the peak of allocated memory since the counter's reset, elsewhere the
    process's peak of resident memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class UpdateCost:
    """
    Measures the updates of one process: seconds of each part, samples a second, memory and, on CUDA, the share of the
    device's arithmetic that is used (`mfu`).

    Args:
        parts (`tuple[str, ...]`): names of the parts, as in [`UpdateClock`].
        device (`torch.device`): the device that is measured.
    """

    def __init__(self, parts: tuple[str, ...], device: torch.device):
        self.clock, self.flops = UpdateClock(parts, device), FlopCount()
        self._device = device
        self._rate = 0.0
        self._updates_a_round = 1
        self._peak = self._updates = 0
        self._entered = {OTHER}

    def begin(self, flops_a_second: float, updates_a_round: int) -> None:
        """
        Begins a run.

        Args:
            flops_a_second (`float`): operations a second that count as 100% of `mfu`. 0 turns `mfu` off.
            updates_a_round (`int`): updates in a round. One of them has extra parts, such as a rollout.
        """
        self._rate, self._updates_a_round, self._updates = flops_a_second, updates_a_round, 0

    def start(self) -> None:
        """Call it when an update begins."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        # Counts one whole round, without the first update of a run: counting would keep blocks from being compiled in
        # it.
        self.flops.counting = self._rate > 0 and 1 <= self._updates <= self._updates_a_round
        self.clock.start()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measures its block as the part `name`."""
        with self.clock(name), self.flops(name):
            yield

    def stop(self) -> None:
        """Call it when an update ends."""
        self.clock.stop()
        self.flops.counting = False
        self._updates += 1
        self._peak = max(self._peak, peak_memory(self._device))

    def metrics(self, samples: int, checkpointing: bool) -> dict[str, float]:
        """
        The metrics of the updates since the last call: means over the updates, and the peak of memory. Parts that no
        update has entered so far are left out.

        Args:
            samples (`int`): number of samples in an update, over all processes.
            checkpointing (`bool`): whether gradient checkpointing is on.
        """
        updates = self.clock.updates()
        if not updates:
            return {}
        seconds = sum(update.total for update in updates)
        metrics = {"step_time": seconds / len(updates)}
        self._entered.update(*(update.calls for update in updates))
        for part in filter(self._entered.__contains__, self.clock.parts):
            metrics[f"time/{part}"] = sum(update.seconds[part] for update in updates) / len(updates)
        metrics["samples_per_second"] = samples * len(updates) / seconds
        metrics["peak_memory_gib"] = self._peak / 2**30
        self._peak = 0
        flops = sum(self.flops.of_network(update.calls, checkpointing) for update in updates)
        if flops > 0:
            metrics["mfu"] = flops / seconds / self._rate
        return metrics
