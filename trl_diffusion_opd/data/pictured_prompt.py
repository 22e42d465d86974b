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

"""A prompt that comes with pictures: to edit, to refer to, or to begin a video with."""

import hashlib
from collections.abc import Sequence

from PIL.Image import Image


# The column of pictures that a row's prompt edits or refers to, a list of 0 or more. Rewards read it and must not wait for
# `datasets`, hence here.
SOURCE_IMAGES = "source_images"


class PicturedPrompt(str):
    """
    A text with its pictures. It goes wherever a prompt goes, and equals another one only if their pictures are equal,
    too.

    `str(prompt)` is the text alone, which is what a pipeline's text encoder and a log read.

    Args:
        text (`str`): the text.
        pictures (`list[PIL.Image.Image]`): at least one picture.

    Attributes:
        pictures (`tuple[PIL.Image.Image, ...]`): the pictures, in their order.
        digest (`str`): a hash of their sizes, modes and pixels.
    """

    pictures: tuple[Image, ...]
    digest: str

    def __new__(cls, text: str, pictures: Sequence[Image]) -> "PicturedPrompt":
        prompt = super().__new__(cls, text)
        prompt.pictures = tuple(pictures)
        content = hashlib.blake2b(digest_size=16)
        for picture in prompt.pictures:
            content.update(f"{picture.mode} {picture.size}".encode())
            content.update(picture.tobytes())
        prompt.digest = content.hexdigest()
        return prompt

    def with_text(self, text: str) -> "PicturedPrompt":
        """Another text with the same pictures, which are not hashed again."""
        other = str.__new__(type(self), text)
        other.pictures, other.digest = self.pictures, self.digest
        return other

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PicturedPrompt) and self.digest == other.digest and str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:  # str's own would compare the texts alone
        return not self == other

    def __hash__(self) -> int:
        return hash((str(self), self.digest))

    def __reduce__(self) -> tuple[type["PicturedPrompt"], tuple[str, tuple[Image, ...]]]:
        return type(self), (str(self), self.pictures)


def with_pictures(text: str, pictures: Sequence[Image] | None) -> str:
    """The text with its pictures; the text itself if there are none."""
    return PicturedPrompt(text, pictures) if pictures else text


def pictures_of(prompt: str) -> tuple[Image, ...]:
    """The pictures of a prompt; none of a mere text."""
    return prompt.pictures if isinstance(prompt, PicturedPrompt) else ()
