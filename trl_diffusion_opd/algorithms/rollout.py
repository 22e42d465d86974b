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
The loop that samples a trajectory (`walk`), the noise that it starts from and adds, and the seeds of all draws of a
run.

A seed is a list of numbers (words). The last is the number of a sample, except for draws that have no sample. The
constants below mark what a seed is for, so that no two draws of a run use the same random numbers:

| what is drawn | words of the seed |
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
| DMD: the step, level and noise at which a sample is trained | seed, update, task, `RENOISE_DRAW`, sample |
| DMD: levels and noise of the fake's training | seed, update, task, `FAKE_DRAW`, sample |
| comparing tasks: noise of the short walks | seed, 0, `TASKS_DRAW`, sample |
| teachers' fixed states, in evaluations and reports | seed, `FIXED_DRAW`, task, sample |
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .samplers import SamplerTable


# Larger than any number of updates or tasks. Two methods never share a run, so they may share a word.
STEP_DRAW = FORWARD_NOISE = 2**32 - 1
WINDOW_DRAW = LEVEL_DRAW = CACHE_DRAW = 2**32 - 2
EVAL_DRAW = 2**32 - 3
TASKS_DRAW = 2**32 - 4
RENOISE_DRAW = 2**32 - 5
FAKE_DRAW = 2**32 - 6
FIXED_DRAW = 2**32 - 7
# Comes first, so it is as long as two words: no run has this pair as its seed and update.
DRAWING = 0xD1FF05ED_E7A15EED


def walk(
    velocity: Callable[[int, Tensor, Tensor | None], Tensor],
    x: Tensor,
    table: SamplerTable,
    noise: list[torch.Generator] | None = None,
) -> Tensor:
    """Samples from the first noise level of `table` to its last. Keeps only the current state in memory.

    Args:
        velocity (`Callable`):
            `velocity(j, x, z)` returns the velocity at step `j` and state `x`, detached, of `x`'s shape. `z`, of the
            same shape, is the noise that this step will add, or `None` if it adds none. The function may run a
            backward pass: gradients are enabled in it if they are enabled around `walk`.
        x (`Tensor` of shape `(B, ...)`):
            State at `table.levels[0]`: for a grid that starts at 1, standard Gaussian noise.
        table (`SamplerTable`):
            The sampler. `table.head(n)` stops after `n` steps.
        noise (`list[torch.Generator]` of length `B`, *optional*):
            One generator a sample, for [`gaussian`]. Noise is drawn only at steps that add some, before the velocity
            is computed. Not needed if `table` is deterministic.

    Returns:
        `Tensor` of shape `(B, ...)`: the state at `table.levels[-1]`.

    Raises:
        ValueError: if the sampler adds noise and `noise` is `None`.
    """
    if noise is None and not table.deterministic:
        raise ValueError(f"The sampler {table.name!r} adds noise, so `walk` needs `noise`.")
    # Python floats: a float64 tensor would turn the state into float64, and one on another device would delay every
    # step.
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
    """Returns one CPU generator a sample. The seed depends on which sample it is, not on where or when it is computed.

    The noise is therefore the same for any number of processes, any micro-batch size and after a resume, and no two
    samples share it.

    Args:
        entropy (`Sequence[int]`):
            The words of the seed that the samples share, not negative. In training: seed, global step, index of the
            task.
        indices (`Iterable[int]`):
            Index of each sample in the task's batch over all processes, not negative.

    Returns:
        `list[torch.Generator]`, one an index. Seeds that differ only by zeros at their end are equal, as
        `numpy.random.SeedSequence` defines it.
    """
    return [
        torch.Generator().manual_seed(int(np.random.SeedSequence([*entropy, index]).generate_state(1, np.uint64)[0]))
        for index in indices
    ]


def gaussian(generators: list[torch.Generator], x: Tensor) -> Tensor:
    """Standard Gaussian noise of `x`'s shape, on `x`'s device. Row `i` is drawn in float32 from generator `i`.

    Raises:
        ValueError: if there is not one generator a row.
    """
    if len(generators) != len(x):
        raise ValueError(f"{len(x)} samples need as many generators, got {len(generators)}.")
    z = randn_tensor(tuple(x.shape), generator=generators, device=x.device, dtype=torch.float32)
    return z.to(torch.promote_types(x.dtype, torch.float32))
