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

"""What rewards that ask a chat model share: several questions at a time, and numbers in answers."""

import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL.Image import Image

from .base import Reward, Row
from .server_calls import OnError, RemoteRewardError


logger = logging.getLogger(__name__)

# Maximum bytes of an answer: a fixed part, and a part for each token, which has some bytes, with up to six in JSON for
# each.
ANSWER_BYTES = 2**16
TOKEN_BYTES = 64


class ChatReward(Reward):
    """
    A reward that asks a chat model about one image at a time. Subclasses implement [`_ask`].

    Args:
        max_concurrency (`int`): maximum number of simultaneous questions.
        on_error (`str`): `"raise"` an error if a question fails, or log a warning and give the image no score
            (`"none"`).
    """

    def __init__(self, max_concurrency: int, on_error: OnError):
        # More images than simultaneous requests, so that one slow answer rarely leaves the others idle.
        super().__init__(batch_size=max(8 * max_concurrency, 1))
        self.max_concurrency = max_concurrency
        self.on_error = on_error

    def _score(self, prompts: list[str], images: list[Image], rows: list[Row]) -> Sequence[float | None]:
        # Threads, since async clients need an event loop, and a notebook already runs one in this thread.
        with ThreadPoolExecutor(self.max_concurrency) as threads:
            return list(threads.map(self._score_one, prompts, images, rows))

    def _score_one(self, prompt: str, image: Image, row: Row) -> float | None:
        try:
            return self._ask(prompt, image, row)
        except RemoteRewardError as error:
            if self.on_error == "raise":
                raise
            logger.warning("%s The image has no score.", error)
            return None

    def _ask(self, prompt: str, image: Image, row: Row) -> float:
        """The score of an image. Raises [`RemoteRewardError`] if there is none."""
        raise NotImplementedError


def first_choice(answer: bytes) -> tuple[str, bool]:
    """The text of a completion, and whether it was cut off."""
    choice = json.loads(answer)["choices"][0]
    text = choice["message"]["content"] or ""
    if not isinstance(text, str):
        raise TypeError(f"the content is a {type(text).__name__}")
    return text, choice.get("finish_reason") == "length"


def number_pattern(sign: str = "") -> str:
    """
    A verbose regular expression for a number, and for the scale behind it as in "7/10" or "7 out of 10", two groups.

    It never takes a part of a number such as "10", "4,5" or "1-5". Possessive quantifiers ("++") prevent backtracking,
    so that even a hundred thousand spaces are read once.

    Args:
        sign (`str`, *optional*): an expression for a sign in front of the number.
    """
    return rf"""(?<![\w.]) ({sign}\d++(?:\.\d++)?+) (?![ ]*+[,.–-]?+[ ]*+\d)
        (?:[\s*_`\]]*+ (?:/|out\s++of) \s*+ (\d++))?+"""
