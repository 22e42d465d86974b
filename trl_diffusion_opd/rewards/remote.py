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

import base64
import hashlib
import io
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal
from urllib.parse import urlsplit

import httpx2
from PIL.Image import Image

from ..guards.redaction import shown
from .base import Reward, Row
from .bounded_client import BoundedClient, RefusedAnswerError


logger = logging.getLogger(__name__)

OnError = Literal["raise", "none"]

_RETRIED_STATUSES = (408, 429, 500, 502, 503, 504)
# Maximum seconds between two tries, even if the server asks for more in Retry-After.
_LONGEST_PAUSE = 30.0
# Maximum bytes of base64 images in a call with more than one image, since a server holds a whole call in memory.
_CALL_BYTES = 12 * 2**20
# Maximum bytes of an answer: a fixed part for other content, and a part for each score, which has at most 25
# characters and some white space.
_ANSWER_BYTES = 2**20
_SCORE_BYTES = 64


class RemoteRewardError(RuntimeError):
    """A remote scorer could not be reached, or its answer was wrong."""


class RemoteReward(Reward):
    """
    Gets scores from another process: for a heavy reward on another device or machine, or one in another environment.

    Images are sent by `POST` as JSON with base64 PNGs, at most `batch_size` images and 12 MiB in a call.
    `examples/reward_server.py` is a server for this format:

    ```
    {"prompts": ["a cat", ...], "images": ["<PNG, base64>", ...], "columns": {"metadata": [...]}}
    {"scores": [0.5, null, ...]}
    ```

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
            score.
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
        self.timeout = timeout
        self.max_retries = max_retries
        self.on_error = on_error
        self.token_env = token_env
        self._client = BoundedClient(timeout, _ANSWER_BYTES + _SCORE_BYTES * batch_size)

    @property
    def fingerprint(self) -> str:
        """Contains a hash of the address: another address is another scorer, but it may name a private machine."""
        return f"{self.name}:{address_hash(self.url)}:{','.join(self.columns)}"

    def _score(self, prompts: list[str], images: list[Image], rows: list[Row]) -> Sequence[float | None]:
        encoded = [png_base64(image) for image in images]
        scores: list[float | None] = []
        for part in _parts([len(data) for data in encoded]):
            scores += self._score_part(prompts[part], encoded[part], rows[part])
        return scores

    def _score_part(self, prompts: list[str], encoded: list[str], rows: list[Row]) -> list[float | None]:
        body = {
            "prompts": prompts,
            "images": encoded,
            "columns": {name: [row[name] for row in rows] for name in self.columns},
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
        failed = f"Reward {self.name!r}: {self.url} "
        try:
            return _read_scores(failed, self._answer(data), count)
        except RemoteRewardError:
            raise
        except httpx2.TransportError as error:
            raise RemoteRewardError(f"{failed}cannot be reached: {error}.") from error
        except RefusedAnswerError as error:
            raise RemoteRewardError(f"{failed}gave {error}.") from error
        except Exception as error:  # an untrusted answer may cause any error
            raise RemoteRewardError(
                f"{failed}gave an answer that cannot be read ({type(error).__name__}: {shown(error)})."
            ) from error

    def _answer(self, data: str) -> httpx2.Response:
        """Posts the data, with retries. Returns the last answer."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.token_env is not None:
            # Read only now, so that no object holds the token. Checked again, since an error about a header would show
            # it.
            if problems := token_problems(self.token_env):
                raise RemoteRewardError(f"Reward {self.name!r}: {problems[0]}")
            headers["Authorization"] = f"Bearer {os.environ[self.token_env]}"
        tries = 0
        while True:
            response = None
            try:
                response = self._client.post(self.url, content=data, headers=headers)
            except httpx2.TransportError:
                if tries == self.max_retries:
                    raise
            if response is not None and (response.status_code not in _RETRIED_STATUSES or tries == self.max_retries):
                return response
            if pause := _pause(tries, response):
                time.sleep(pause)
            tries += 1


def _read_scores(failed: str, response: httpx2.Response, count: int) -> list[float | None]:
    """Reads the scores of an answer. Raises `RemoteRewardError` if it has none; the caller catches other errors."""
    if response.status_code != 200:
        raise RemoteRewardError(f"{failed}{status_shown(response)}")
    try:
        answer = json.loads(response.content)
    except json.JSONDecodeError as error:
        raise RemoteRewardError(f"{failed}answered no JSON: '{shown(response.content)}'") from error
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


def status_shown(response: httpx2.Response) -> str:
    """A failed answer of a server as text for a message."""
    where = f" to {shown(response.headers['Location'])}" if response.has_redirect_location else ""
    return f"answered {response.status_code} {shown(response.reason_phrase, 50)}{where}: '{shown(response.content)}'"


def _pause(again: int, response: httpx2.Response | None) -> float:
    """Seconds to wait before try number `again + 2`: 0 before the second, unless the server asks for more."""
    asked = None if response is None else _asked_pause(response.headers.get("Retry-After", "").strip())
    if asked is None:
        asked = 0.0 if again == 0 else 2.0 ** min(again - 1, 10)
    return min(asked, _LONGEST_PAUSE)


def _asked_pause(header: str) -> float | None:
    """Seconds that a `Retry-After` header asks for, as a number or a date; `None` if it is neither."""
    if header.isascii() and header.isdecimal():
        return float(header)
    try:
        date = parsedate_to_datetime(header)
    except (ValueError, TypeError, OverflowError):
        return None
    # By the standard, a date without a zone is in UTC.
    return max((date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)


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


def png_base64(image: Image) -> str:
    """The image as a (lossless) PNG in base64."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def address_hash(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:16]


def url_problems(option: str, url: str) -> list[str]:
    """Says why an address cannot be used. Does not repeat parts that may be secret."""
    try:
        httpx2.URL(url)
        parts = urlsplit(url)
    except (ValueError, httpx2.InvalidURL):
        return [f"{option} is not a valid address. Give one of the form http://host:port/path."]
    if "@" in parts.netloc or parts.query or parts.fragment:
        return [
            f"{option} is logged, so it must not have a user, a password, a query or a fragment. Give only scheme, "
            "host and path; a token belongs in an environment variable."
        ]
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return [f"{option}={url!r} is not of the form http://host:port/path."]
    return []


def token_problems(variable: str) -> list[str]:
    """Says why the token in an environment variable cannot be sent. Does not repeat it."""
    token = os.environ.get(variable)
    if not token:
        return [f"the environment variable {variable}, which should hold the token, is not set."]
    if not all("!" <= character <= "~" for character in token):
        return [
            f"the token in the environment variable {variable} has a space, a line break or another character that no "
            "token can have, often at its end. Set it again without it."
        ]
    return []


def call_problems(timeout: float, max_retries: int, on_error: str) -> list[str]:
    """Says what is wrong with the options of calls to a server, one sentence each."""
    problems = []
    if not 0 < timeout <= threading.TIMEOUT_MAX:
        problems.append(f"timeout={timeout}: it must be a positive, finite number of seconds.")
    if max_retries < 0:
        problems.append(f"max_retries={max_retries}: it must not be negative.")
    if on_error not in ("raise", "none"):
        problems.append(f'on_error={on_error!r}: it must be "raise" or "none".')
    return problems
