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

"""Pipelines that edit pictures or refer to them, each with rows whose pictures differ in number, size and content."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from helpers.families import JOINT, TRUE_CFG, Family, flux, flux2_klein, flux2_without_encoder, qwen_image_edit
from PIL import Image


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    """Noise, the same for a seed."""
    return Image.fromarray((np.random.default_rng(seed).random((height, width, 3)) * 255).astype("uint8"))


@contextmanager
def small_pictures() -> Iterator[None]:
    """Context in which Qwen-Image-Edit brings pictures to 128 pixels a side, not to a million, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        sized = pipeline_qwenimage_edit.calculate_dimensions
        patch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: sized(128 * 128, ratio))
        patch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 128 * 128)
        patch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", 128 * 128)
        yield


@dataclass(frozen=True)
class EditFamily:
    """
    One family.

    Args:
        family ([`Family`]): its pipeline and the arguments that all its rows share.
        numbers (`tuple[int]`): how many pictures a row may have.
        in_batches (`bool`): whether it takes the pictures of several prompts at once.
        sizes (`tuple[tuple[int, int]]`): width and height of the pictures, one after the other.
        context (`Callable`): the context in which the pipeline is small.
        is_video (`bool`): whether a video begins with the picture.
    """

    family: Family
    numbers: tuple[int, ...]
    in_batches: bool = False
    sizes: tuple[tuple[int, int], ...] = ((64, 64), (128, 64))
    context: Callable[[], AbstractContextManager[None]] = nullcontext
    is_video: bool = False

    def rows(self) -> list[tuple[str, list[Image.Image]]]:
        """A row for each possible number of pictures, and one more with another picture, of another size if it can."""
        numbers = [*self.numbers, self.numbers[-1]]
        return [
            (
                f"{number} cats, row {i}",
                [picture(10 * i + j, *self.sizes[(i + j) % len(self.sizes)]) for j in range(number)],
            )
            for i, number in enumerate(numbers)
        ]

    def call_kwargs(self, scale: float, prompt: str, pictures: list[Image.Image]) -> dict[str, Any]:
        """Arguments of the pipeline's own `__call__` for one row."""
        given = {} if not pictures else {"image": pictures if len(pictures) > 1 else pictures[0]}
        return {**self.family.call_kwargs(scale, (prompt,)), **given}


_KLEIN = dict(generation_kwargs={"text_encoder_out_layers": (1, 2, 3)})
_KONTEXT = {"guidance_scale": 3.5, "max_area": 16 * 16, "_auto_resize": False}

EDIT_FAMILIES: dict[str, EditFamily] = {
    "flux_kontext": EditFamily(
        Family(lambda: flux(diffusers.FluxKontextPipeline), JOINT, generation_kwargs=_KONTEXT, **TRUE_CFG),
        numbers=(0, 1),
        in_batches=True,
    ),
    "flux2": EditFamily(
        Family(flux2_without_encoder, JOINT, guidance_scale=1.0, guidance_name=None, max_sequence_length=None),
        numbers=(0, 1, 2),
    ),
    "flux2_klein": EditFamily(Family(flux2_klein, JOINT, **_KLEIN), numbers=(0, 1, 2)),
    "qwen_image_edit": EditFamily(Family(qwen_image_edit, JOINT, size=128, **TRUE_CFG), numbers=(1,)),
    "qwen_image_edit_plus": EditFamily(
        Family(lambda: qwen_image_edit(plus=True), JOINT, size=128, **TRUE_CFG), numbers=(1, 2)
    ),
}
