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

"""A reward that is computed by an HTTP server."""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from functools import partial

from PIL.Image import Image

from ..guards.redaction import shown
from .base import SOURCE_IMAGES, Reward, Row, source_pictures
from .server_calls import (
    JSONServer,
    OnError,
    RemoteRewardError,
    address_hash,
    call_problems,
    png_base64,
    token_problems,
    url_problems,
)


logger = logging.getLogger(__name__)

# Maximum bytes of base64 images in a call with more than one image, since a server holds a whole call in memory.
_CALL_BYTES = 12 * 2**20
# Maximum bytes of an answer: a fixed part for other content, and a part for each score, which has at most 25
# characters and some white space.
_ANSWER_BYTES = 2**20
_SCORE_BYTES = 64


class RemoteReward(Reward):
    """
    Gets scores from another process: for a heavy reward on another device or machine, or one in another environment.

    Images are sent by `POST` as JSON with base64 PNGs, at most `batch_size` images and 12 MiB in a call.
    `examples/reward_server.py` is a server for this format:

    ```
    {"prompts": ["a cat", ...], "images": ["<PNG, base64>", ...], "columns": {"metadata": [...]}}
    {"scores": [0.5, null, ...]}
    ```

    With `columns=["source_images"]` the rows' source pictures are sent as well, as
    `"source_images": [["<PNG, base64>", ...], ...]`: a list for each image, which is empty for a row without any.

    An answer is valid if it has status 200 and, for each image, a finite number or `null` ("does not apply"). Failed
    or broken connections, timeouts and the statuses 408, 429, 500, 502, 503 and 504 are tried again: at once, then
    after 1, 2, 4, … seconds, or as long as the server's `Retry-After` asks for, up to 30 s. If a call still fails, it
    raises an error or gives its images no score, but never a score of 0.

    Answers of more than 1 MiB plus 64 bytes an image and compressed answers are refused. Redirects are not followed.

    Args:
        url (`str`): the address, `http` or `https`. It must not contain a user, password or query, since it is logged.
        name (`str`, *optional*, defaults to `"remote"`): name of the metric. Several remote scorers need different
            names.
        columns (`Sequence[str]`, *optional*): columns of the dataset to send. Samples without a value in one get no
            score, except that `source_images` may be empty.
        timeout (`float`, *optional*, defaults to `60`): maximum seconds of a try, from the connection to the answer's
            last byte.
        max_retries (`int`, *optional*, defaults to `3`): number of tries after the first one.
        on_error (`str`, *optional*, defaults to `"raise"`): `"raise"` an error if a call fails, or log a warning and
            give its samples no score (`"none"`).
        token_env (`str`, *optional*): name of an environment variable with a token, sent as `Authorization: Bearer …`.
        batch_size (`int`, *optional*, defaults to `16`): maximum number of images in a call.

    Raises:
        [`ValueError`]: if an argument is invalid.
        [`RemoteRewardError`]: by a call that failed.
    """

    name = "remote"
    bounds = (None, None)

    def __init__(
        self,
        url: str,
        name: str = "remote",
        columns: Sequence[str] = (),
        timeout: float = 60.0,
        max_retries: int = 3,
        on_error: OnError = "raise",
        token_env: str | None = None,
        batch_size: int = 16,
    ):
        super().__init__(batch_size)
        problems = url_problems("url", url) + call_problems(timeout, max_retries, on_error)
        if isinstance(columns, str):
            problems.append(f"columns={columns!r} is a string; give a list of names.")
        if token_env is not None:
            problems += token_problems(token_env)
        if problems:
            raise ValueError("\n".join(f"Reward {name!r}: {problem}" for problem in problems))
        self.name = name
        self.url = url
        self.columns = tuple(columns)
        self.on_error = on_error
        max_bytes = _ANSWER_BYTES + _SCORE_BYTES * batch_size
        self._server = JSONServer(name, url, timeout, max_retries, max_bytes, token_env)

    @property
    def fingerprint(self) -> str:
        """Contains a hash of the address: another address is another scorer, but it may name a private machine."""
        return f"{self.name}:{address_hash(self.url)}:{','.join(self.columns)}"

    def why_not(self, prompt: str, columns: Row) -> str | None:
        # A row without pictures is sent with an empty list: the server knows what to do with it.
        return super().why_not(prompt, {**columns, SOURCE_IMAGES: source_pictures(columns)})

    def _score(self, prompts: list[str], images: list[Image], rows: list[Row]) -> Sequence[float | None]:
        encoded = [png_base64(image) for image in images]
        sources = self._sources(rows)
        scores: list[float | None] = []
        for part in _parts([len(data) + sum(map(len, of_row)) for data, of_row in zip(encoded, sources, strict=True)]):
            scores += self._score_part(prompts[part], encoded[part], sources[part], rows[part])
        return scores

    def _sources(self, rows: list[Row]) -> list[list[str]]:
        """The source pictures of each row as PNGs in base64, if they are sent. A picture of several rows is encoded once."""
        if SOURCE_IMAGES not in self.columns:
            return [[] for _ in rows]
        pictures = {id(picture): picture for row in rows for picture in source_pictures(row)}
        encoded = {key: png_base64(picture.convert("RGB")) for key, picture in pictures.items()}
        return [[encoded[id(picture)] for picture in source_pictures(row)] for row in rows]

    def _score_part(
        self, prompts: list[str], encoded: list[str], sources: list[list[str]], rows: list[Row]
    ) -> list[float | None]:
        others = [name for name in self.columns if name != SOURCE_IMAGES]
        body = {
            "prompts": prompts,
            "images": encoded,
            **({SOURCE_IMAGES: sources} if SOURCE_IMAGES in self.columns else {}),
            "columns": {name: [row[name] for row in rows] for name in others},
        }
        try:
            data = json.dumps(body)
        except TypeError as error:
            raise ValueError(
                f"Reward {self.name!r}: columns {self.columns} cannot be sent as JSON: {error}"
            ) from error
        try:
            return self._call(data, len(encoded))
        except RemoteRewardError as error:
            if self.on_error == "raise":
                raise
            logger.warning("%s These %d images have no score.", error, len(encoded))
            return [None] * len(encoded)

    def _call(self, data: str, count: int) -> list[float | None]:
        return self._server.ask(f"Reward {self.name!r}: {self.url} ", data, partial(_read_scores, count))


def _read_scores(count: int, failed: str, content: bytes) -> list[float | None]:
    """Reads the scores of an answer. Raises `RemoteRewardError` if it has none; the caller catches other errors."""
    try:
        answer = json.loads(content)
    except json.JSONDecodeError as error:
        raise RemoteRewardError(f"{failed}answered no JSON: '{shown(content)}'") from error
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise RemoteRewardError(
            f'{failed}answered {shown(repr(answer))}, which is not of the form {{"scores": [...]}}.'
        )
    if len(scores) != count:
        raise RemoteRewardError(f"{failed}answered {len(scores)} scores for {count} images.")
    for value in scores:
        if value is not None and not _is_finite(value):
            raise RemoteRewardError(
                f"{failed}answered {shown(repr(value))} as a score; it must be a finite number or null."
            )
    return [None if value is None else float(value) for value in scores]


def _parts(sizes: Sequence[int]) -> Iterator[slice]:
    """Yields slices in order, each with one entry or with entries that fit into one call."""
    start = total = 0
    for i, size in enumerate(sizes):
        if i > start and total + size > _CALL_BYTES:
            yield slice(start, i)
            start, total = i, 0
        total += size
    yield slice(start, len(sizes))


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
