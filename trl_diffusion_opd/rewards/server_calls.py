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

"""What rewards that ask a server share: calls with retries, errors for people, and pictures as text."""

import base64
import hashlib
import io
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal, TypeVar
from urllib.parse import urlsplit

import httpx2
from PIL.Image import Image

from ..guards.redaction import shown
from .bounded_client import BoundedClient, RefusedAnswerError


T = TypeVar("T")

OnError = Literal["raise", "none"]

_RETRIED_STATUSES = (408, 429, 500, 502, 503, 504)
# Maximum seconds between two tries, even if the server asks for more in Retry-After.
_LONGEST_PAUSE = 30.0


class RemoteRewardError(RuntimeError):
    """A remote scorer could not be reached, or its answer was wrong."""


class JSONServer:
    """
    A server that a reward asks by `POST` with JSON. Limits are those of [`BoundedClient`].

    Failed or broken connections, timeouts and the statuses 408, 429, 500, 502, 503 and 504 are tried again: at once,
    then after 1, 2, 4, … seconds, or as long as the server's `Retry-After` asks for, up to 30 s.

    Args:
        reward (`str`), url (`str`): the reward's name for messages, and the address.
        timeout (`float`), max_retries (`int`): maximum seconds of a try, and the number of tries after the first one.
        max_bytes (`int`): maximum size of an answer.
        token_env (`str`, *optional*): name of an environment variable with a token, sent as `Authorization: Bearer …`.
    """

    def __init__(
        self, reward: str, url: str, timeout: float, max_retries: int, max_bytes: int, token_env: str | None = None
    ):
        self.reward = reward
        self.url = url
        self.max_retries = max_retries
        self.token_env = token_env
        self._client = BoundedClient(timeout, max_bytes)

    def ask(self, whose: str, data: str, read: Callable[[str, bytes], T]) -> T:
        """
        Posts JSON and reads the answer, which has to have status 200.

        Args:
            whose (`str`): how messages begin: the reward and its server.
            data (`str`): the JSON.
            read (*optional*): gets `whose` and the answer's body, and returns what this method returns. It raises
                [`RemoteRewardError`] for an answer that it refuses. Any other error of it is reported as one.

        Raises:
            [`RemoteRewardError`]: if it fails, whatever the server does.
        """
        try:
            response = self._post(data)
            if response.status_code != 200:
                raise RemoteRewardError(f"{whose}{status_shown(response, self._token())}")
            return read(whose, response.content)
        except RemoteRewardError:
            raise
        except httpx2.TransportError as error:
            raise RemoteRewardError(f"{whose}cannot be reached: {error}.") from error
        except RefusedAnswerError as error:
            raise RemoteRewardError(f"{whose}gave {error}.") from error
        except Exception as error:  # an untrusted answer may cause any error
            raise RemoteRewardError(
                f"{whose}gave an answer that cannot be read ({type(error).__name__}: {shown(error)})."
            ) from error

    def _token(self) -> str:
        # Read only when it is sent, so that no object holds it.
        return "" if self.token_env is None else os.environ.get(self.token_env, "")

    def _post(self, data: str) -> httpx2.Response:
        """Posts the data, with retries. Returns the last answer."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.token_env is not None:
            # Checked again, since an error about a header would show it.
            if problems := token_problems(self.token_env):
                raise RemoteRewardError(f"Reward {self.reward!r}: {problems[0]}")
            headers["Authorization"] = f"Bearer {self._token()}"
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


def status_shown(response: httpx2.Response, token: str = "") -> str:
    """A failed answer of a server as text for a message. It does not repeat `token`."""
    content = response.content.replace(token.encode(), b"<token>") if token else response.content
    where = f" to {shown(response.headers['Location'])}" if response.has_redirect_location else ""
    return f"answered {response.status_code} {shown(response.reason_phrase, 50)}{where}: '{shown(content)}'"


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


def png_base64(image: Image) -> str:
    """The image as a (lossless) PNG in base64."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def png_url(image: Image) -> str:
    """The image as a `data:` URL with a PNG."""
    return f"data:image/png;base64,{png_base64(image)}"


def address_hash(url: str) -> str:
    """Tells addresses apart without naming a machine, which may be private."""
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
