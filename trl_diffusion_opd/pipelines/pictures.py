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

"""How a pipeline takes pictures beside its prompts, and what it has made of them before its loop."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from inspect import Parameter
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from PIL.Image import Image
from torch import Tensor

from ..data.pictured_prompt import PicturedPrompt, pictures_of
from .nested import nbytes, on_device


# The argument of a pipeline's `__call__` for pictures to edit or to refer to.
PICTURES = "image"
# With one of these, that argument is something else: where the walk begins, or what is drawn around.
_OTHER_USES = ("strength", "mask_image", "control_image")


def takes_pictures(parameters: Collection[str]) -> bool:
    """Whether a `__call__` with these parameters takes pictures to edit or to refer to."""
    return PICTURES in parameters and not any(other in parameters for other in _OTHER_USES)


def needs_pictures(
    pipeline: DiffusionPipeline, parameters: Mapping[str, Parameter], draw: Callable[[], object]
) -> bool:
    """
    Whether it draws nothing from a text alone.

    diffusers lists pipelines that do: FLUX.2 and Kontext are among them, Qwen-Image-Edit is not. The list has gaps (Bria
    FIBO 2), so others are tried: `draw()` asks the pipeline for an image of a text alone.
    """
    if not takes_pictures(parameters) or isinstance(pipeline, tuple(AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values())):
        return False
    if parameters[PICTURES].default is Parameter.empty:
        return True
    try:
        draw()
    # What a call stumbles over that opens the picture it has not got.
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return True
    return False


def picture_argument(prompts: Sequence[str]) -> Image | list[Image]:
    """Pictures as a pipeline takes them: all those of one prompt, or one for each of several prompts."""
    pictures = [picture for prompt in prompts for picture in pictures_of(prompt)]
    return pictures[0] if len(prompts) == len(pictures) == 1 else pictures


def digest_of(prompts: Sequence[str]) -> str:
    """Stands for the pictures of a batch; empty if there are none."""
    return " ".join(prompt.digest for prompt in prompts if isinstance(prompt, PicturedPrompt))


def are_alike(prompts: Sequence[str]) -> bool:
    """Whether each prompt has one picture, all of the same size."""
    pictures = [pictures_of(prompt) for prompt in prompts]
    return all(len(of_one) == 1 for of_one in pictures) and len({one.size for (one,) in pictures}) == 1


def same_rows(together: Mapping[str, Any], apart: Sequence[Mapping[str, Any]]) -> bool:
    """
    Whether a network's inputs for a batch are those for its samples one by one. Inputs that are equal for all samples
    (position ids) may be there once.
    """

    def is_same(name: str, value: Any) -> bool:
        each = [inputs[name] for inputs in apart]
        if not isinstance(value, Tensor):
            return all(value == one for one in each) if isinstance(value, str | int | float | bool | None) else False
        if all(value.shape == one.shape and torch.equal(value, one) for one in each):
            return True
        shapes = {one.shape[1:] for one in each}
        # Encoders in half precision round a picture differently alone and in a batch.
        return (
            shapes == {value.shape[1:]}
            and len(value) == sum(map(len, each))
            and torch.allclose(value.float(), torch.cat(each).float(), rtol=2e-2, atol=2e-2)
        )

    return all(inputs.keys() == together.keys() for inputs in apart) and all(
        is_same(name, value) for name, value in together.items() if value is not None and not isinstance(value, dict)
    )


def joined(parts: Sequence[Any]) -> Any:
    """Images of several decodings as those of one: lists, arrays or tensors."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else [image for part in parts for image in part]


class PictureCache:
    """
    Remembers what a pipeline makes of pictures before its loop: their latents and position ids. Beyond `max_bytes` it
    drops the entry that was used longest ago.

    Args:
        max_bytes (`int`, *optional*, defaults to 1 GiB): maximum size of the entries in host memory.

    Attributes:
        in_batches (`bool`, *optional*): whether the pipeline takes the pictures of several prompts at once; `None` until
            that is tried.
    """

    in_batches: bool | None = None

    def __init__(self, max_bytes: int = 1024**3):
        self.max_bytes = max_bytes
        self._entries: OrderedDict[tuple, Any] = OrderedDict()
        self._bytes = 0

    @torch.no_grad()
    def remembered(self, key: tuple, device: torch.device, make: Callable[[], Any]) -> Any:
        """The entry of this key, on a device. If there is none, `make` makes it."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return on_device(self._entries[key], device)
        made = make()
        self._entries[key] = on_device(made, "cpu")
        self._bytes += nbytes(made)
        while self._bytes > self.max_bytes and len(self._entries) > 1:
            self._bytes -= nbytes(self._entries.popitem(last=False)[1])
        return made
