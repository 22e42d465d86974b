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

"""What may be shown to others: values without secrets, and without what a path says of a machine and its user."""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch


_SECRET_NAMES = ("token", "api_key", "password", "secret", "authorization", "cookie", "credentials")
_SECRET = "<secret>"
# A token of the Hub, wherever it is written.
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_URL_USER = re.compile(r"(?<=://)[^/\s@]+@")
_URL_QUERY = re.compile(r"([?&][^=&#\s]*(?:token|key|secret|password|signature)[^=&#\s]*=)[^&#\s]+", re.IGNORECASE)


def public_value(value: Any, secrets: Collection[str] = ()) -> Any:
    """
    A JSON value that says the same without secrets and local paths.

    Entries of dicts whose name is that of a secret are left out. In strings, tokens of the Hub, the credentials of URLs and
    `secrets` are blotted out. A string that is a path becomes its last part. Other objects become the name of their type.

    Args:
        value: what was configured.
        secrets (`Collection[str]`, *optional*): strings that must not be shown.
    """
    if isinstance(value, dict):
        return {str(key): public_value(entry, secrets) for key, entry in value.items() if not _is_secret(str(key))}
    if isinstance(value, (list, tuple)):
        return [public_value(entry, secrets) for entry in value]
    if isinstance(value, str):
        return _public_text(value, secrets)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value) if isinstance(value, torch.dtype) else type(value).__name__


def _public_text(text: str, secrets: Collection[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, _SECRET)
    text = _TOKEN.sub(_SECRET, text)
    if "://" in text and not text.startswith("file://"):
        return _URL_QUERY.sub(rf"\1{_SECRET}", _URL_USER.sub("", text))
    is_path = os.path.isabs(text) or text.startswith(("~", "./", "../", "file://")) or os.path.isdir(text)
    return last_part(text) if is_path else text.replace(str(Path.home()), "~")


def _is_secret(name: str) -> bool:
    return name.lower().endswith(_SECRET_NAMES)


def shown(text: object, limit: int = 200) -> str:
    """
    What a stranger wrote, as it may stand in a message: on one line, without control characters, and not long.

    A line break, an escape sequence of a terminal or a mark that turns the direction of writing is shown as Python writes
    it, such as `\\x1b`. Of bytes those that are no UTF-8 are replaced.

    Args:
        text: a string, bytes, or anything else by its `str`.
        limit (`int`, *optional*, defaults to `200`): characters at most. What is cut ends in `…`.
    """
    # Cut before it is looked through, since a text may have a million characters. One has four bytes at most.
    if isinstance(text, bytes | bytearray):
        text = text[: 4 * (limit + 1)].decode("utf-8", "replace")
    line = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in str(text)[: limit + 1]
    )
    return line if len(line) <= limit else line[: limit - 1] + "…"


def last_part(path: str) -> str:
    """The name of a file or folder without where it lies."""
    return Path(path).expanduser().absolute().name
