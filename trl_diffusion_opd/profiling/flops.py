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

"""Counts the floating-point operations of an update, and measures how many the device can do a second."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode


# The parts of an update in which the network runs. All calls of a part cost the same.
NETWORK_PARTS = ("rollout", "teacher", "reference", "student", "backward", "fake", "fake_backward")


class FlopCount:
    """
    Counts the floating-point operations of each part of an update, while `counting` is true.

    It sees matrix products, convolutions and attention that PyTorch computes, but not kernels of other packages
    (attention backends, quantized products).
    """

    def __init__(self) -> None:
        self.counting = False
        self._flops: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        self._within: list[int] = []  # for each open part, the operations of its inner parts

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Counts the operations in its block for `part`, without those of parts inside it."""
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
        The operations of the network in an update. The forward that gradient checkpointing repeats is not included.

        Args:
            calls (`dict[str, int]`): how often the update entered each part.
            checkpointing (`bool`): whether gradient checkpointing is on, so that a backward repeats its
                forward.
        """

        def of(part: str) -> float:
            return self._flops[part] / self._calls[part] if self._calls[part] else 0.0

        flops = sum(calls.get(part, 0) * of(part) for part in NETWORK_PARTS)
        repeated = calls.get("backward", 0) * of("student") + calls.get("fake_backward", 0) * of("fake")
        return flops - checkpointing * repeated


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 4096, repeats: int = 20) -> float:
    """
    Measures the most floating-point operations a second that a CUDA device reaches in `dtype`, in products of large
    square matrices.
    """
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
