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

"""Files of an output folder: names that fit every file system, and contents that are never seen in part."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote


JSON = Any  # what JSON or YAML of somebody else's holds, of which nothing is known until it is looked at

# File systems take 255 bytes; a Chinese character is nine of them here.
_LONGEST_NAME = 200
# What Windows takes for devices.
_DEVICES = ("con", "prn", "aux", "nul", *(f"{kind}{n}" for kind in ("com", "lpt") for n in range(10)))


def file_name(task: str) -> str:
    """
    A name for a task's files, on any file system, and another one for every task.

    A task may be called "a/b", ".." or "-f", or be longer than file names can be. Some file systems take "A" and "a" for one.
    """
    content = task.encode("utf-8", "surrogatepass")
    name = quote(content, safe="").replace(".", "%2E").replace("~", "%7E")
    if name.startswith("-"):
        name = f"%2D{name[1:]}"
    if len(name) <= _LONGEST_NAME and task.lower() == task and task not in _DEVICES:
        return name
    # A plus sign is in no name without a hash.
    return f"{name[: _LONGEST_NAME - 17]}+{hashlib.sha256(content).hexdigest()[:16]}"


def write_file(path: Path, content: str) -> None:
    """Writes a text file that is never seen in part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: object, **options: Any) -> None:
    """
    Writes a JSON file that is never seen in part.

    Args:
        path (`Path`), content: what JSON can hold.
        options: of `json.dumps`, indented by 2 if not said otherwise.
    """
    write_file(path, json.dumps(content, **{"indent": 2, **options}) + "\n")


def read_json(path: Path) -> JSON:
    """What a JSON file holds, `None` if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
