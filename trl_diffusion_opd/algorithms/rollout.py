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

"""
The one loop along a trajectory, the noise it starts from and adds, and who draws with which seed.

A seed is a list of words; the last one is the number of a sample or not there. Where there are others than seed, update, task and
sample, one of these constants takes a place, so that no two draws of a run share their numbers:

| what is drawn | words |
|---|---|
| noise of a walk in training, and noise and levels of fine-tuning | seed, update, task, sample |
| images of evaluations and reports | `DRAWING`, seed, task, sample |
| OPD: the trained steps of an update | seed, update, `STEP_DRAW` |
| OPD: noise of the walks whose loss is evaluated | seed, `STEP_DRAW`, task, sample |
| GRPO: the window of a round | seed, update, `WINDOW_DRAW` |
| NFT: noise that images are noised with again | seed, update, task, `FORWARD_NOISE`, sample |
| NFT: the trained levels of an update | seed, update, `LEVEL_DRAW` |
| SFT: images that teachers draw into a cache | seed, `CACHE_DRAW`, task, sample |
| SFT: noise of the loss in evaluations | seed, `EVAL_DRAW`, task, sample |
| comparing tasks: noise of the short walks | seed, 0, `TASKS_DRAW`, sample |
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .samplers import SamplerTable


# No run has so many updates or tasks. Trainers of two methods never share a run, so they may share a word.
STEP_DRAW = FORWARD_NOISE = 2**32 - 1
WINDOW_DRAW = LEVEL_DRAW = CACHE_DRAW = 2**32 - 2
EVAL_DRAW = 2**32 - 3
TASKS_DRAW = 2**32 - 4
# It comes first, so it takes two words: no run has a seed and an update like these.
DRAWING = 0xD1FF05ED_E7A15EED


def walk(
    velocity: Callable[[int, Tensor, Tensor | None], Tensor],
    x: Tensor,
    table: SamplerTable,
    noise: list[torch.Generator] | None = None,
) -> Tensor:
    """Walks from the first noise level of `table` to its last and keeps no state but the current one.

    Args:
        velocity (`Callable`):
            `velocity(j, x, z)` returns the velocity at step `j` and state `x`, detached, of `x`'s shape. `z`, of the same shape, is
            the noise that the walk is about to add with this step, `None` where it adds none. It may run a backward pass of its
            own: gradients are enabled or not inside it as they are around `walk`.
        x (`Tensor` of shape `(B, ...)`):
            State at `table.levels[0]`: for a grid that starts at 1, standard Gaussian noise.
        table (`SamplerTable`):
            The sampler. `table.head(n)` stops after `n` steps.
        noise (`list[torch.Generator]` of length `B`, *optional*):
            What the noise of each sample is drawn from, as [`gaussian`] does, before the velocity of a step that adds some. Not
            needed where `table` is deterministic.

    Returns:
        `Tensor` of shape `(B, ...)`: the state at `table.levels[-1]`.

    Raises:
        ValueError: if the sampler adds noise and `noise` is `None`.
    """
    if noise is None and not table.deterministic:
        raise ValueError(f"The sampler {table.name!r} adds noise, so `walk` needs `noise`.")
    # Python floats: a float64 tensor would widen the state, and one on another device would make every step wait.
    a, c, b, s, levels = (column.tolist() for column in (table.a, table.c, table.b, table.s, table.levels))
    previous_x0 = None
    for j in range(len(table)):
        z = None if noise is None or s[j] == 0 else gaussian(noise, x)
        v = velocity(j, x, z)
        with torch.no_grad():  # states are data: no gradient flows along the trajectory
            x_next = a[j] * x + c[j] * v
            if previous_x0 is not None:
                x_next += b[j] * previous_x0
            if z is not None:
                x_next += s[j] * z
            previous_x0 = x - levels[j] * v if j + 1 < len(table) and b[j + 1] != 0 else None
            x = x_next
    return x


def sample_generators(entropy: Sequence[int], indices: Iterable[int]) -> list[torch.Generator]:
    """One CPU generator a sample, seeded by what the sample is and not by where or when it is computed.

    Noise then does not depend on the number of processes, the micro-batch size, or a resume, and no two samples share it.

    Args:
        entropy (`Sequence[int]`):
            What the samples have in common, not negative: seed, global step and index of the task in training.
        indices (`Iterable[int]`):
            Index of each sample in the task's batch over all processes, not negative.

    Returns:
        `list[torch.Generator]`, one an index. Coordinates that differ only by zeros at their end count as the same, as
        `numpy.random.SeedSequence` defines it.
    """
    return [
        torch.Generator().manual_seed(int(np.random.SeedSequence([*entropy, index]).generate_state(1, np.uint64)[0]))
        for index in indices
    ]


def gaussian(generators: list[torch.Generator], x: Tensor) -> Tensor:
    """Standard Gaussian noise of `x`'s shape on `x`'s device, drawn in float32, row `i` from generator `i`.

    Raises:
        ValueError: if there is not one generator a row.
    """
    if len(generators) != len(x):
        raise ValueError(f"{len(x)} samples need as many generators, got {len(generators)}.")
    z = randn_tensor(tuple(x.shape), generator=generators, device=x.device, dtype=torch.float32)
    return z.to(torch.promote_types(x.dtype, torch.float32))
