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

"""How much of the text that a prompt quotes can be read in the image."""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from .base import Reward, Row
from .quoted_text import folded, quoted_text, why_no_target


try:
    import onnxruntime  # noqa: F401  (what rapidocr computes with, and imports late)
    from Levenshtein import distance
    from rapidocr import RapidOCR
except ImportError as error:
    raise ImportError(
        f'Reward "ocr" needs the package {error.name!r}. Install it with `pip install ".[ocr]"` in a checkout of '
        "trl-diffusion-opd."
    ) from error


# Digits that may look like a letter. 1 is left out, since it may be an I or an L.
_LETTER_OF_DIGIT = str.maketrans("0258", "ozsb")
# Maximum size in pixels at which the text detector sees an image, unless the reward's own size is larger.
_DETECTOR_SIZE = 320
# Below this confidence there is often no text: coloured discs and squares are read as letters and signs.
_MIN_CONFIDENCE = 0.8
# Size of the first reading, which is mostly enough and takes half the time of the second.
_GLANCE_SIZE = 160
# The last reading is for very bold, square letters, which are misread at full size. Blur rounds them, and needs a
# lower confidence.
_AFAR_SIZE, _AFAR_BLUR, _AFAR_MIN_CONFIDENCE = 64, 4.0, 0.5


def text_score(target: str, read: str) -> float:
    """
    Scores a reading, in [0, 1]: 1 if the text that was read contains the target, else 1 - distance / length, at least
    0.

    The distance is Levenshtein's, and the length is the target's. Both texts are [`folded`] first. If the target has
    no digits, a digit that was read counts as the letter it looks like.

    Args:
        target (`str`): the text that the image should show, not blank.
        read (`str`): the text that was read in it.
    """
    target, read = folded(target), folded(read)
    if not any(c.isdigit() for c in target):
        read = read.translate(_LETTER_OF_DIGIT)
    if target in read:
        return 1.0
    return 1.0 - min(distance(target, read), len(target)) / len(target)


class OCR(Reward):
    """
    The share of the quoted text that can be read in the image, in [0, 1].

    The target is the text between the prompt's first two quotation marks.
    [RapidOCR](https://github.com/RapidAI/RapidOCR) reads the image on one CPU thread. The texts of all lines are
    joined and scored by [`text_score`], the formula of [Flow-GRPO](https://huggingface.co/papers/2505.05470)'s code,
    which DiffusionOPD reports. An image is read up to three times, small, at `size`, and blurred, until the target is
    found. The best reading counts.

    Args:
        size (`int`, *optional*, defaults to `256`):
            Pixels of the longer side to which images of any size are scaled for the second reading. Raise it for small
            print. The time grows with its square.
        batch_size (`int`, *optional*, defaults to `16`): number of images in a batch. They are read one by one anyway.
    """

    name = "ocr"
    bounds = (0.0, 1.0)

    def __init__(self, size: int = 256, batch_size: int = 16):
        super().__init__(batch_size)
        if size < _AFAR_SIZE:
            raise ValueError(f"Reward 'ocr': size={size}, it must be at least {_AFAR_SIZE}.")
        self.size = size
        self._engine = RapidOCR(
            params={
                "Global.log_level": "critical",
                "Det.limit_type": "max",
                "Det.limit_side_len": max(_DETECTOR_SIZE, size),
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            }
        )
        blank = np.zeros((_AFAR_SIZE, _AFAR_SIZE, 3), np.uint8)
        for detect in (False, True):  # loads recogniser and detector now instead of during the run
            self._engine(blank, use_det=detect, use_cls=False)

    @property
    def fingerprint(self) -> str:
        return f"{self.name} size={self.size} rapidocr={version('rapidocr')}"

    def why_not(self, prompt: str, columns: Row) -> str | None:
        return why_no_target(prompt)

    def readings(self, image: Image.Image) -> Iterator[str]:
        """Yields the text of all lines in an image, from top to bottom, once for each reading."""
        if self.size > _GLANCE_SIZE:
            yield self._read(_fitted(image, _GLANCE_SIZE), _MIN_CONFIDENCE)
        yield self._read(_fitted(image, self.size), _MIN_CONFIDENCE)
        blurred = _fitted(image, _AFAR_SIZE).filter(ImageFilter.GaussianBlur(_AFAR_BLUR))
        yield self._read(blurred, _AFAR_MIN_CONFIDENCE)

    def _read(self, image: Image.Image, min_confidence: float) -> str:
        pixels = np.asarray(image)[:, :, ::-1]  # it expects BGR, like OpenCV
        output: Any = self._engine(pixels, use_cls=False, text_score=min_confidence)
        return "".join(output.txts or ())

    def _score(self, prompts: list[str], images: list[Image.Image], rows: list[Row]) -> list[float]:
        return [self._score_one(prompt, image) for prompt, image in zip(prompts, images, strict=True)]

    def _score_one(self, prompt: str, image: Image.Image) -> float:
        target = quoted_text(prompt)
        assert target is not None  # why_not refused the others
        best = 0.0
        for read in self.readings(image):
            best = max(best, text_score(target, read))
            if best == 1.0:
                break
        return best


def _fitted(image: Image.Image, size: int) -> Image.Image:
    """The image as RGB, with its longer side scaled to `size` and its aspect ratio kept."""
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
