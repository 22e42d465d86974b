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

"""Floating-point operations of an update, and how many a device can do."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode


# The parts of an update in which the network works. All calls of one of them cost the same.
NETWORK_PARTS = ("rollout", "teacher", "reference", "student", "backward")


class FlopCount:
    """
    Floating-point operations of a call of each part, counted while `counting` is true and zero before.

    They are those of matrix products, convolutions and attention as PyTorch computes them; kernels of other packages
    (attention backends, quantised products) are not seen.
    """

    def __init__(self) -> None:
        self.counting = False
        self._flops: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        self._within: list[int] = []  # of each open part, what its inner parts had

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Counts what is computed within it, unless an inner part counts it."""
        if not self.counting:
            yield
            return
        self._within.append(0)
        with FlopCounterMode(display=False) as counter:
            yield
        total, within = counter.get_total_flops(), self._within.pop()
        self._flops[part] += total - within
        self._calls[part] += 1
        if self._within:
            self._within[-1] += total

    def of_network(self, calls: Mapping[str, int], checkpointing: bool) -> float:
        """
        What the network computes in an update, without what is computed twice.

        Args:
            calls (`dict[str, int]`): how often the update entered each part.
            checkpointing (`bool`): whether a backward repeats the student's forward first.
        """

        def of(part: str) -> float:
            return self._flops[part] / self._calls[part] if self._calls[part] else 0.0

        flops = sum(calls.get(part, 0) * of(part) for part in NETWORK_PARTS)
        return flops - checkpointing * calls.get("backward", 0) * of("student")


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 4096, repeats: int = 20) -> float:
    """Floating-point operations a second of large square matrix products of CUDA device `device` in `dtype`: the most it does."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        a @ b
    end.record()
    end.synchronize()
    return repeats * 2 * size**3 / begin.elapsed_time(end) * 1000
