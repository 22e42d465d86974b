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

"""A reward that an HTTP server computes."""

import base64
import hashlib
import io
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

import requests
from PIL.Image import Image
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3.exceptions import InvalidHeader, MaxRetryError
from urllib3.util import Retry

from .base import Reward


logger = logging.getLogger(__name__)

OnError = Literal["raise", "none"]

_RETRIED_STATUSES = (408, 429, 500, 502, 503, 504)
_BACKOFF_FACTOR = 0.5
# Seconds between two tries, also if the server asks for more in Retry-After.
_LONGEST_PAUSE = 30.0


class RemoteRewardError(RuntimeError):
    """A scorer elsewhere could not be asked, or did not answer as it should."""


class RemoteReward(Reward):
    """
    Scores that another process computes: a heavy reward on another device or machine, or one in another environment.

    Images are sent in batches by `POST`, as JSON; `examples/reward_server.py` is a server that speaks this format:

    ```
    {"prompts": ["a cat", ...], "images": ["<PNG, base64>", ...], "columns": {"metadata": [...]}}
    {"scores": [0.5, null, ...]}
    ```

    Status 200 with a finite number or `null` ("does not apply") an image is an answer, everything else is a failure.
    Failed connections, timeouts and the statuses 408, 429, 500, 502, 503 and 504 are tried again: at once, then after 1,
    2, 4, … seconds, or as long as the server's `Retry-After` asks for, up to 30 s. What still fails is an error, or no score for
    the images of its batch. It is never a score of 0.

    Args:
        url (`str`): where to post, `http` or `https`. User, password and query don't belong in it, since it is logged.
        name (`str`, *optional*, defaults to `"remote"`): of the metric. Several remote scorers need different names.
        columns (`Sequence[str]`, *optional*): columns of the dataset to send. Samples without a value there are not scored.
        timeout (`float`, *optional*, defaults to `60`): seconds to wait for the connection, and for each answer.
        max_retries (`int`, *optional*, defaults to `3`): tries after the first one.
        on_error (`str`, *optional*, defaults to `"raise"`): `"raise"` an error when a call fails, or log a warning and give
            its samples `"none"`.
        token_env (`str`, *optional*): environment variable with a token to send as `Authorization: Bearer …`.
        batch_size (`int`, *optional*, defaults to `16`): images a call.

    Raises:
        [`ValueError`]: if an argument cannot be used.
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
        if token_env is not None and not os.environ.get(token_env):
            problems.append(f"the environment variable {token_env}, which is to hold the token, is not set.")
        if problems:
            raise ValueError("\n".join(f"Reward {name!r}: {problem}" for problem in problems))
        self.name = name
        self.url = url
        self.columns = tuple(columns)
        self.timeout = timeout
        self.on_error = on_error
        self._session = requests.Session()
        if token_env is not None:
            self._session.auth = _BearerToken(token_env)
        retries = _BoundedRetry(
            total=max_retries,
            status_forcelist=_RETRIED_STATUSES,
            allowed_methods=None,  # whatever the method: scoring twice changes nothing
            backoff_factor=_BACKOFF_FACTOR,
            backoff_max=_LONGEST_PAUSE,
            raise_on_status=False,  # the last answer says more than "too many"
        )
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=retries))

    @property
    def fingerprint(self) -> str:
        """Another address is another scorer. It is hashed, since it may name a machine of the user's."""
        return f"{self.name}:{address_hash(self.url)}:{','.join(self.columns)}"

    def _score(self, prompts: list[str], images: list[Image], rows: list[dict[str, Any]]) -> Sequence[float | None]:
        body = {
            "prompts": prompts,
            "images": [png_base64(image) for image in images],
            "columns": {name: [row[name] for row in rows] for name in self.columns},
        }
        try:
            data = json.dumps(body)
        except TypeError as error:
            raise ValueError(
                f"Reward {self.name!r}: columns {self.columns} cannot be sent as JSON: {error}"
            ) from error
        try:
            return self._call(data, len(images))
        except RemoteRewardError as error:
            if self.on_error == "raise":
                raise
            logger.warning("%s These %d images have no score.", error, len(images))
            return [None] * len(images)

    def _call(self, data: str, count: int) -> list[float | None]:
        failed = f"Reward {self.name!r}: {self.url} "
        try:
            response = self._session.post(
                self.url,
                data=data,
                headers={"Content-Type": "application/json", "Accept": "application/json"},
                timeout=self.timeout,
                allow_redirects=False,  # a redirected POST arrives as a GET
            )
        except requests.RequestException as error:
            cause = error.args[0] if error.args else error
            raise RemoteRewardError(
                f"{failed}cannot be reached: {cause.reason if isinstance(cause, MaxRetryError) else cause}"
            ) from error
        if response.status_code != 200:
            where = f" to {response.headers['Location']}" if response.is_redirect else ""
            raise RemoteRewardError(
                f"{failed}answered {response.status_code} {response.reason}{where}: {response.text!r:.200}"
            )
        try:
            answer = response.json()
        except requests.JSONDecodeError as error:
            raise RemoteRewardError(f"{failed}answered no JSON: {response.text!r:.200}") from error
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise RemoteRewardError(f'{failed}answered {answer!r:.200}, which is not of the form {{"scores": [...]}}.')
        if len(scores) != count:
            raise RemoteRewardError(f"{failed}answered {len(scores)} scores for {count} images.")
        for value in scores:
            if value is not None and not _is_finite(value):
                raise RemoteRewardError(
                    f"{failed}answered {value!r:.200} as a score; it must be a finite number or null."
                )
        return [None if value is None else float(value) for value in scores]


class _BearerToken(AuthBase):
    """Reads the token when it is sent, so that no object holds it. As `auth` it also wins over a .netrc."""

    def __init__(self, variable: str):
        self.variable = variable

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {os.environ[self.variable]}"
        return request


class _BoundedRetry(Retry):
    """Waits no longer than so, whatever the server asks for."""

    def get_retry_after(self, response: Any) -> float | None:
        try:
            seconds = super().get_retry_after(response)
        except InvalidHeader:  # neither seconds nor a date: as if it weren't there
            return None
        return None if seconds is None else min(seconds, _LONGEST_PAUSE)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def png_base64(image: Image) -> str:
    """The image as PNG, which loses nothing, in base64."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def address_hash(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:16]


def url_problems(option: str, url: str) -> list[str]:
    """Why an address cannot be used. What may be secret in it is not repeated."""
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        return [
            f"{option} has a user, a password, a query or a fragment, and it is logged. Give scheme, host and path alone; a "
            "token belongs in an environment variable."
        ]
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return [f"{option}={url!r} is not of the form http://host:port/path."]
    return []


def call_problems(timeout: float, max_retries: int, on_error: str) -> list[str]:
    """What is wrong with the options that calls of a server have in common."""
    problems = []
    if not timeout > 0:
        problems.append(f"timeout={timeout}: it must be a positive number of seconds.")
    if max_retries < 0:
        problems.append(f"max_retries={max_retries}: it must not be negative.")
    if on_error not in ("raise", "none"):
        problems.append(f'on_error={on_error!r}: it must be "raise" or "none".')
    return problems
