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
import unicodedata
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import get_token

from .files import JSON
from .secret_text import SECRET, is_secret_name, without_secrets


# Of a problem's line in a message: long enough for whatever a message says by itself.
if TYPE_CHECKING:
    from transformers import TrainingArguments


_LONGEST_LINE = 2000
# They make no writing and turn no direction: scripts and emoji need them.
_JOINERS = "\u200c\u200d"
# They are paths even where they look like a Hub id: "outputs/demo".
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
    A JSON value that says the same without secrets and local paths.

    Entries of dicts whose name is that of a secret are left out. In strings, what looks like a secret, the credentials of
    URLs and `secrets` are blotted out. A string that is a path becomes its last part. Other objects become the name of
    their type.

    Args:
        value: what was configured.
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
    """A text in which `secrets`, and what looks like one, are blotted out."""
    for secret in secrets:
        text = text.replace(secret, SECRET)
    return without_secrets(text)


def _without_paths(text: str) -> str:
    is_url = "://" in text and not text.startswith("file://")
    is_path = os.path.isabs(text) or text.startswith(("~", "./", "../", "file://")) or os.path.isdir(text)
    return last_part(text) if is_path and not is_url else text.replace(str(Path.home()), "~")


def shown(text: object, limit: int = 200) -> str:
    """
    What a stranger wrote, as it may stand in a message: on one line, without control characters, and not long.

    A line break, an escape sequence of a terminal or a mark that turns the direction of writing is shown as Python writes
    it, such as `\\x1b`. Of bytes those that are no UTF-8 are replaced.

    Args:
        text: a string, bytes, or anything else by its `str`.
        limit (`int`, *optional*, defaults to `200`): characters at most. Of a longer text the middle is `…`.
    """
    # Cut before it is looked through, since a text may have a million characters. One has four bytes at most.
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
    A text whose control characters, marks of direction and other characters that only act are shown as Python writes them.

    Args:
        text (`str`)
        keep (`str`, *optional*): characters that are left as they are, such as a line break.
    """
    if text.isprintable():
        return text
    return "".join(
        character if _is_plain(character) or character in keep else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def _is_plain(character: str) -> bool:
    return character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs"


def listed(problems: Iterable[str]) -> str:
    """
    The lines of the one message: a bullet a problem, each once. What of a stranger's text is in them acts on no terminal, and
    none is without end.
    """
    return "\n".join(f"- {_line(problem)}" for problem in dict.fromkeys(problems))


def _line(problem: str) -> str:
    lines = (visible(line, keep="\t") for line in problem.split("\n"))
    return "\n".join(line if len(line) <= _LONGEST_LINE else shown(line, _LONGEST_LINE) for line in lines)


def last_part(path: str) -> str:
    """The name of a file or folder without where it lies."""
    return Path(path).expanduser().absolute().name


def public_name(name_or_path: str | None) -> str | None:
    """A model's Hub id as it is, a local folder as its name alone: paths of a machine don't belong into files."""
    if name_or_path is None or not os.path.isdir(name_or_path):
        return name_or_path
    return Path(name_or_path).resolve().name


def public_arguments(args: "TrainingArguments") -> dict[str, JSON]:
    """The arguments as JSON values, without tokens, and with local paths reduced to their last part."""
    arguments = args.to_dict()
    for name in _PATH_ARGUMENTS:
        if isinstance(arguments.get(name), str):
            arguments[name] = last_part(arguments[name])
    return public_value(arguments, known_tokens(args))


def known_tokens(args: "TrainingArguments") -> list[str]:
    """The tokens that this process uses, which must not be shown wherever they turn up."""
    return [token for token in (args.hub_token, get_token()) if token]
