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

"""
Prepares values and texts for others to see: removes secrets, shortens local paths to their last part, and makes
control characters visible.
"""

import os
import unicodedata
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import get_token

from .files import JSON
from .secret_text import SECRET, is_secret_name, without_secrets


if TYPE_CHECKING:
    from transformers import TrainingArguments


# Invisible but harmless: some scripts and emoji need them.
_JOINERS = "\u200c\u200d"
# Arguments that are paths even if they look like a Hub id, such as "outputs/demo".
_PATH_ARGUMENTS = (
    "output_dir",
    "logging_dir",
    "resume_from_checkpoint",
    "deepspeed",
    "fsdp_config",
    "prompt_cache_dir",
)


def public_value(value: object, secrets: Collection[str] = ()) -> JSON:
    """
    Returns a JSON value without secrets and local paths.

    Dict entries with the name of a secret (such as `api_key`) are left out. In strings, `secrets`, everything that
    looks like a secret, and credentials in URLs are replaced. A string that is a path becomes its last part. Objects
    that JSON cannot hold become the name of their type.

    Args:
        value: a value of the configuration.
        secrets (`Collection[str]`, *optional*): strings that must not be shown.
    """
    if isinstance(value, dict):
        return {
            public_text(str(key), secrets): public_value(entry, secrets)
            for key, entry in value.items()
            if not is_secret_name(str(key))
        }
    if isinstance(value, (list, tuple)):
        return [public_value(entry, secrets) for entry in value]
    if isinstance(value, str):
        return _without_paths(public_text(value, secrets))
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value) if isinstance(value, torch.dtype) else type(value).__name__


def public_text(text: str, secrets: Collection[str] = ()) -> str:
    """Returns a text with `secrets`, and everything that looks like a secret, replaced by `<secret>`."""
    for secret in secrets:
        text = text.replace(secret, SECRET)
    return without_secrets(text)


def _without_paths(text: str) -> str:
    is_url = "://" in text and not text.startswith("file://")
    is_path = os.path.isabs(text) or text.startswith(("~", "./", "../", "file://")) or os.path.isdir(text)
    return last_part(text) if is_path and not is_url else text.replace(str(Path.home()), "~")


def shown(text: object, limit: int = 200) -> str:
    """
    Returns a text from others in a form that is safe in a message: one line, no control characters, not long.

    Line breaks, terminal escape sequences and marks that change the direction of writing are shown as Python writes
    them, such as `\\x1b`. Bytes that are not UTF-8 are replaced.

    Args:
        text: a string, bytes, or any object (its `str` is used).
        limit (`int`, *optional*, defaults to `200`): maximum number of characters. The middle of a longer text becomes
            `…`.
    """
    # Cut first: a text may have a million characters. A character has at most four bytes.
    if isinstance(text, bytes | bytearray):
        whole = bytes(text) if len(text) <= 8 * limit else bytes(text[: 4 * limit]) + bytes(text[-4 * limit :])
        text = whole.decode("utf-8", "replace")
    line = str(text)
    if len(line) > 2 * limit:
        line = line[:limit] + line[-limit:]
    line = visible(line)
    if len(line) <= limit:
        return line
    end = limit // 3
    return f"{line[: limit - end - 1]}…{line[len(line) - end :]}"


def visible(text: str, keep: str = "") -> str:
    """
    Returns a text with its control characters, direction marks and other invisible characters as Python escapes.

    Args:
        text (`str`): any text.
        keep (`str`, *optional*): characters to leave as they are, such as a line break.
    """
    if text.isprintable():
        return text
    return "".join(
        character if _is_plain(character) or character in keep else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def _is_plain(character: str) -> bool:
    return character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs"


def last_part(path: str) -> str:
    """Returns the name of a file or folder without its parent folders."""
    return Path(path).expanduser().absolute().name


def public_name(name_or_path: str | None) -> str | None:
    """Returns a Hub id unchanged and a local folder or file as its name: saved files must not contain local paths."""
    if name_or_path is None or not os.path.exists(name_or_path):
        return name_or_path
    return Path(name_or_path).resolve().name


def public_arguments(args: "TrainingArguments") -> dict[str, JSON]:
    """Returns the arguments as JSON values, without tokens, and with local paths shortened to their last part."""
    arguments = args.to_dict()
    for name in _PATH_ARGUMENTS:
        if isinstance(arguments.get(name), str):
            arguments[name] = last_part(arguments[name])
    return public_value(arguments, known_tokens(args))


def known_tokens(args: "TrainingArguments") -> list[str]:
    """Returns the Hub tokens that this process uses. They must not be shown anywhere."""
    return [token for token in (args.hub_token, get_token()) if token]
