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

"""The seal: a checkpoint's last file. It marks it as complete, with hashes of its files and the run's name."""

import json
import os
from pathlib import Path
from typing import BinaryIO

import xxhash

from ..guards.files import JSON
from ..hub.files import SEAL_FILE


_CHUNK = 1 << 22


def seal(folder: Path, run: str, update: int) -> None:
    """
    Marks a checkpoint as complete, after all its other files are on the disk. A power cut must not leave empty files.

    The hashes protect against damage, not against forgery. XXH3 is faster than any disk.

    Args:
        folder (`Path`): the checkpoint.
        run (`str`): name of the run that it belongs to.
        update (`int`): number of updates done.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SEAL_FILE:
            with open(path, "rb") as file:
                files[path.relative_to(folder).as_posix()] = _digest(file)
                os.fsync(file.fileno())
    unfinished = folder / f"{SEAL_FILE}.part"
    with open(unfinished, "w", encoding="utf-8") as file:
        json.dump({"run": run, "update": update, "files": files}, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, folder / SEAL_FILE)


def is_sealed(folder: Path) -> bool:
    return (folder / SEAL_FILE).exists()


def run_of(folder: Path) -> str | None:
    """Returns the name of the run that a checkpoint belongs to; `None` if its seal can't be read."""
    content = _read(folder)
    return None if content is None else content["run"]


def update_of(folder: Path) -> int:
    """Returns the number of updates that an undamaged checkpoint was saved after."""
    content = _read(folder)
    assert content is not None
    return content["update"]


def damage(folder: Path, names: list[str] | None = None) -> list[str]:
    """
    Lists the files of a sealed checkpoint that have changed or disappeared since, a sentence each.

    Args:
        folder (`Path`): the checkpoint.
        names (`list[str]`, *optional*): the files to look at; all by default.
    """
    content = _read(folder)
    if content is None:
        return [f"{SEAL_FILE}, which holds the hashes of the other files, is damaged."]
    found = []
    for name, digest in content["files"].items():
        path = folder / name
        if names is not None and name not in names:
            continue
        if not path.is_file():
            found.append(f"{name} is missing.")
            continue
        with open(path, "rb") as file:
            if _digest(file) != digest:
                found.append(f"{name} is damaged: its content has changed since it was saved.")
    return found


def _digest(file: BinaryIO) -> str:
    digest = xxhash.xxh3_128()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _read(folder: Path) -> dict[str, JSON] | None:
    try:
        content = json.loads((folder / SEAL_FILE).read_text(encoding="utf-8"))
        return content if {"run", "update", "files"} <= content.keys() else None
    except (ValueError, AttributeError):  # not text, not JSON, or no object
        return None
