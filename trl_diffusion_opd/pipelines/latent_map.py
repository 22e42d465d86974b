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
Finds out how a pipeline converts its latents for the VAE, and inverts it, so that images can be encoded.

Before decoding, a pipeline rearranges the latents of its loop, scales and shifts them: by one number, one number a
channel, or those of a batch norm. In all cases each number that the VAE gets is one number of the loop times a scale,
plus a shift. Decoding a few tensors of known numbers shows the positions, scales and shifts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


_BASE = 16  # smaller whole numbers are exact in every floating dtype and can be recovered after scale and shift


@dataclass(frozen=True, eq=False)
class LatentMap:
    """
    `vae = scale * x[index] + shift`, with `x` and `vae` flattened, one sample.

    Args:
        index (`Tensor` of shape `(n,)`, int64): a permutation.
        scale, shift (`Tensor` of shape `(n,)`, float32): factor and offset of each number.
        shape (`tuple[int]`): shape of one sample in the loop.
        vae_shape (`tuple[int]`): shape of one sample in the VAE.
        name (`str`): the pipeline's name, for messages.
    """

    index: Tensor
    scale: Tensor
    shift: Tensor
    shape: tuple[int, ...]
    vae_shape: tuple[int, ...]
    name: str

    @classmethod
    def find(cls, to_vae: Callable[[Tensor], Tensor], example: Tensor, name: str) -> "LatentMap":
        """
        Finds the map of a pipeline.

        Args:
            to_vae (`Callable`): converts latents of the loop to those that the VAE gets, as the pipeline does.
            example (`Tensor` of shape `(1, ...)`): random latents of the loop.
            name (`str`): the pipeline's name, for messages.

        Raises:
            [`ValueError`]: if the pipeline's conversion does not have this form.
        """
        refusal = ValueError(
            f"{name} prepares its latents for the VAE in a way that can't be inverted, so images can't be encoded for "
            "it. You can train on images that teachers generate, since these are latents from the start."
        )
        x = example.detach().float()
        n = x.numel()
        shift = to_vae(torch.zeros_like(x)).flatten()
        scale = to_vae(torch.ones_like(x)).flatten() - shift
        if len(shift) != n or not bool((scale.isfinite() & (scale != 0)).all()):
            raise refusal
        # Finds where each number goes: its position is sent through `to_vae` digit by digit.
        index, rest, place = torch.zeros_like(shift, dtype=torch.int64), torch.arange(n, device=x.device), 1
        while place < n:
            digit = (rest // place % _BASE).to(x.dtype).reshape(x.shape)
            index += place * ((to_vae(digit).flatten() - shift) / scale).round().long()
            place *= _BASE
        if not torch.equal(index.sort().values, rest):
            raise refusal
        vae = to_vae(x)
        found = cls(index, scale, shift, tuple(x.shape[1:]), tuple(vae.shape[1:]), name)
        if not torch.allclose(found.from_vae(vae), x, rtol=1e-3, atol=1e-3):
            raise refusal
        return found

    @property
    def of_video(self) -> bool:
        """Whether the VAE has an axis of frames."""
        return len(self.vae_shape) == 4

    def from_vae(self, latents: Tensor) -> Tensor:
        """
        Converts latents from the VAE's encoder to those of the pipeline's loop.

        Args:
            latents (`Tensor` of shape `(B, *vae_shape)`): encoded images.

        Returns:
            `Tensor` of shape `(B, *shape)`, float32.

        Raises:
            [`ValueError`]: if the latents have another shape.
        """
        if tuple(latents.shape[1:]) != self.vae_shape:
            raise ValueError(
                f"The VAE of {self.name} encodes an image to shape {tuple(latents.shape[1:])} and decodes one of "
                f"shape {self.vae_shape}. Set height and width to a size that it supports, and "
                "use_resolution_binning=False in generation_kwargs if the pipeline has it."
            )
        flat = (latents.float().flatten(1) - self.shift) / self.scale
        x = torch.empty_like(flat)
        x[:, self.index] = flat
        return x.reshape(len(x), *self.shape)
