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

"""Which part of the latents that a pipeline prepares its loop denoises."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DenoisedPart:
    """
    The part of prepared latents that a pipeline's loop hands to its scheduler. The rest is of a picture and stays as it is:
    the first frame of a video, or channels beside those of the noise.

    Args:
        shape (`tuple[int]`): of one sample's part.
        stride (`tuple[int]`): how far apart its numbers are in the latents, along each axis.
        offset (`int`): where its first number is in them.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def find(cls, sample: Tensor, prepared: Tensor) -> "DenoisedPart | None":
        """
        The part that a pipeline has cut out of its latents, without copying them; `None` if it has not.

        Args:
            sample (`Tensor` of shape `(1, ...)`): what the scheduler gets.
            prepared (`Tensor` of shape `(1, ...)`): contiguous latents, with which the loop began.
        """
        is_cut = sample.numel() < prepared.numel() and sample.data_ptr() >= prepared.data_ptr()
        if not is_cut or sample.untyped_storage().data_ptr() != prepared.untyped_storage().data_ptr():
            return None
        offset = int(sample.storage_offset() - prepared.storage_offset())
        return cls(tuple(sample.shape[1:]), tuple(sample.stride()[1:]), offset)

    def of(self, prepared: Tensor) -> Tensor:
        """The part of latents `(B, ...)`, as a tensor of its own."""
        return self._view(prepared.contiguous()).clone()

    def within(self, x: Tensor, prepared: Tensor) -> Tensor:
        """Latents with `x` in place of their part."""
        latents = prepared.to(x.dtype, copy=True).contiguous()
        self._view(latents).copy_(x)
        return latents

    def _view(self, latents: Tensor) -> Tensor:
        stride: Sequence[int] = (latents[0].numel(), *self.stride)
        return latents.as_strided((len(latents), *self.shape), stride, latents.storage_offset() + self.offset)


def own_output(output: Tensor, sample: Tensor | None, x: Tensor | None) -> Tensor:
    """
    What a scheduler gets for the state `x`. Some pipelines (JoyImage) put latents of pictures before it along one axis,
    and step with all.

    Args:
        output (`Tensor`), sample (`Tensor`, *optional*): what the scheduler gets.
        x (`Tensor`, *optional*): the state that the pipeline was given.

    Returns:
        `Tensor` of `x`'s shape; `output` itself if `x` is not found among the latents.
    """
    if sample is None or x is None or output.shape != sample.shape or sample.ndim != x.ndim:
        return output
    others = [axis for axis, (size, own) in enumerate(zip(sample.shape, x.shape, strict=True)) if size != own]
    if len(others) != 1:
        return output
    axis, size = others[0], x.shape[others[0]]
    for first in reversed(range(sample.shape[axis] - size + 1)):
        if torch.equal(sample.narrow(axis, first, size), x):
            return output.narrow(axis, first, size)
    return output
