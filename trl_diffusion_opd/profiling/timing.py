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

"""Where the time of an update goes, what it computes and what memory it takes, without making the device wait."""

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
Instant = Any  # an event of CUDA, or seconds: all instants of a device are of one kind


def instant(device: torch.device) -> Instant:
    """
    This instant, for [`seconds_between`]: on CUDA an event in the stream, for which nothing waits; elsewhere the wall
    clock's, once the device has done what it was given.
    """
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def seconds_between(begin: Instant, end: Instant) -> float:
    """Seconds between two [`instant`]s. Waits for the second."""
    if isinstance(begin, torch.cuda.Event):
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    return end - begin


def _is_over(one: Instant) -> bool:
    return one.query() if isinstance(one, torch.cuda.Event) else True


@dataclass
class Update:
    """
    What is known of an update.

    Attributes:
        seconds (`dict[str, float]`): by part. They add up to the update.
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
    Seconds of an update by part.

    At every instant one part runs, the innermost: what is timed within another part is not counted there, and what is
    timed in none is [`OTHER`]. So the parts add up to the update. The instants are [`instant`]s: on CUDA a part has the time
    that the device spent on it or waited for it. Outside of an update nothing is timed.

    Args:
        parts (`tuple[str, ...]`): the parts that there are, besides [`OTHER`]. An update has a time for each, 0 where it
            did not occur.
        device (`torch.device`)
    """

    def __init__(self, parts: tuple[str, ...], device: torch.device):
        self.parts = (*parts, OTHER)
        self._device = device
        self._open: list[str] = []  # the parts that run, the innermost last
        self._marks: list[tuple[str, Instant]] = []  # what ran from when
        self._calls: Counter[str] = Counter()
        self._ended: deque[tuple[list[tuple[str, Instant]], Counter[str]]] = deque()
        self._updates: list[Update] = []

    def start(self) -> None:
        """Begins an update. One that was left unfinished is forgotten."""
        self._open, self._marks, self._calls = [OTHER], [], Counter()
        self._mark()

    def stop(self) -> None:
        """Ends the update."""
        if self._open:
            self._mark()
            self._ended.append((self._marks, self._calls))
            self._open = []
        # The events of many updates would pile up where logs are rare.
        while self._ended and _is_over(self._ended[0][0][-1][1]):
            self._add_up()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Within it `part` is timed."""
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
        """From here on, what is timed in no other part is of `part`, to the end of the update."""
        if self._open:
            self._open[0] = part
            self._calls[part] += 1
            self._mark()

    def updates(self) -> list[Update]:
        """The updates that have ended since the last call. Waits for a device that is still at one of them."""
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
    """Bytes: on CUDA the most that was allocated since its counter was reset, else the process's highest resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class UpdateCost:
    """
    Seconds by part, samples a second, memory and, on CUDA, the use of the device's arithmetic: of one process's updates.

    Args:
        parts (`tuple[str, ...]`): as [`UpdateClock`] takes them.
        device (`torch.device`)
    """

    def __init__(self, parts: tuple[str, ...], device: torch.device):
        self.clock, self.flops = UpdateClock(parts, device), FlopCount()
        self._device = device
        self._rate = 0.0
        self._updates_a_round = 1
        self._peak = self._updates = 0

    def begin(self, flops_a_second: float, updates_a_round: int) -> None:
        """
        Begins a run.

        Args:
            flops_a_second (`float`): what `mfu` is a share of; 0 without one.
            updates_a_round (`int`): one update in so many has what the others do not, such as a rollout.
        """
        self._rate, self._updates_a_round, self._updates = flops_a_second, updates_a_round, 0

    def start(self) -> None:
        """An update begins."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        # All updates of a round. Not the first of a run: compiled parts of the network would not be compiled meanwhile.
        self.flops.counting = self._rate > 0 and 1 <= self._updates <= self._updates_a_round
        self.clock.start()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within it `name` is what the update does."""
        with self.clock(name), self.flops(name):
            yield

    def stop(self) -> None:
        """The update ends."""
        self.clock.stop()
        self.flops.counting = False
        self._updates += 1
        self._peak = max(self._peak, peak_memory(self._device))

    def metrics(self, samples: int, checkpointing: bool) -> dict[str, float]:
        """
        What is to be logged of the updates since the last call: means over them, but the peak of memory.

        Args:
            samples (`int`): of an update, over all processes.
            checkpointing (`bool`): as [`FlopCount.of_network`] takes it.
        """
        updates = self.clock.updates()
        if not updates:
            return {}
        seconds = sum(update.total for update in updates)
        metrics = {"step_time": seconds / len(updates)}
        for part in self.clock.parts:
            metrics[f"time/{part}"] = sum(update.seconds[part] for update in updates) / len(updates)
        metrics["samples_per_second"] = samples * len(updates) / seconds
        metrics["peak_memory_gib"] = self._peak / 2**30
        self._peak = 0
        flops = sum(self.flops.of_network(update.calls, checkpointing) for update in updates)
        if flops > 0:
            metrics["mfu"] = flops / seconds / self._rate
        return metrics
