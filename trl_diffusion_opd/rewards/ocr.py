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

"""Whether an image shows the text that its prompt quotes."""

import re
import unicodedata
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from .base import Reward, Row


try:
    import onnxruntime  # noqa: F401  (what rapidocr computes with, and imports late)
    from Levenshtein import distance
    from rapidocr import RapidOCR
except ImportError as error:
    raise ImportError(
        f'Reward "ocr" needs the package {error.name!r}. Install it with `pip install "trl-diffusion-opd[ocr]"`.'
    ) from error


_QUOTED = re.compile('["“”„]([^"“”„]*)["“”]')
# Digits that a font may draw like a letter. A 1 is not among them: it may be an I or an L.
_LETTER_OF_DIGIT = str.maketrans("0258", "ozsb")
# The text detector sees an image at this size at most, or at the reward's own.
_DETECTOR_SIZE = 320
# What is less sure is often no text: coloured discs and squares are read as letters and signs.
_MIN_CONFIDENCE = 0.8
# The first look, which mostly suffices, in half the time of the second.
_GLANCE_SIZE = 160
# The last look, for letters so bold and square that near by they read as others, or not at all. Blur rounds them; what it
# leaves is read with less confidence.
_AFAR_SIZE, _AFAR_BLUR, _AFAR_MIN_CONFIDENCE = 64, 4.0, 0.5


def quoted_text(prompt: str) -> str | None:
    """The text between the first two quotation marks of a prompt, straight or curly, `None` without."""
    match = _QUOTED.search(prompt)
    return match[1] if match else None


def folded(text: str) -> str:
    """Text as it is compared: without case, spaces and accents."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c for c in plain if not (c.isspace() or unicodedata.combining(c)))


def text_score(target: str, read: str) -> float:
    """
    Score of a reading, in [0, 1]: 1 where the target is part of what is read, else 1 - distance / length, at least 0.

    The distance is Levenshtein's, the length the target's. Both texts are compared [`folded`]. Where the target has no
    digits, a digit in the reading counts as the letter it looks like.

    Args:
        target (`str`): what the image should show; not blank.
        read (`str`): what is read in it.
    """
    target, read = folded(target), folded(read)
    if not any(c.isdigit() for c in target):
        read = read.translate(_LETTER_OF_DIGIT)
    if target in read:
        return 1.0
    return 1.0 - min(distance(target, read), len(target)) / len(target)


class OCR(Reward):
    """
    Share of the quoted text that is legible in the image, in [0, 1].

    The target is what the prompt has between its first two quotation marks. The image is read by
    [RapidOCR](https://github.com/RapidAI/RapidOCR) on the CPU, on one thread; the texts of all lines are joined, and scored
    by [`text_score`], the formula of [Flow-GRPO](https://huggingface.co/papers/2505.05470)'s code, which DiffusionOPD
    reports. An image is looked at up to three times, at a glance, near by and from afar, until it reads as asked for; the
    best reading counts.

    Args:
        size (`int`, *optional*, defaults to `256`):
            Pixels of the longer side at which images are looked at near by, of whatever size they are. More for small
            print: the time grows with the square.
        batch_size (`int`, *optional*, defaults to `16`): images at a time. They are read one by one in any case.
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
        for detect in (False, True):  # loads recogniser and detector now, not in the middle of a run
            self._engine(blank, use_det=detect, use_cls=False)

    @property
    def fingerprint(self) -> str:
        return f"{self.name} size={self.size} rapidocr={version('rapidocr')}"

    def why_not(self, prompt: str, columns: Row) -> str | None:
        target = quoted_text(prompt)
        if target is None:
            return 'it quotes no text to look for; write it as in: a sign that says "OPEN"'
        return None if folded(target) else "there is nothing between its first two quotation marks"

    def readings(self, image: Image.Image) -> Iterator[str]:
        """The text of all lines in an image, from top to bottom, as each look reads it."""
        if self.size > _GLANCE_SIZE:
            yield self._read(_fitted(image, _GLANCE_SIZE), _MIN_CONFIDENCE)
        yield self._read(_fitted(image, self.size), _MIN_CONFIDENCE)
        blurred = _fitted(image, _AFAR_SIZE).filter(ImageFilter.GaussianBlur(_AFAR_BLUR))
        yield self._read(blurred, _AFAR_MIN_CONFIDENCE)

    def _read(self, image: Image.Image, min_confidence: float) -> str:
        pixels = np.asarray(image)[:, :, ::-1]  # it takes BGR, as OpenCV has it
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
    """An RGB image, its longer side brought to `size`, its shape kept."""
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
