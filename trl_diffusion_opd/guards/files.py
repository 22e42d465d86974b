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

"""Names files so that every file system takes them, and writes them so that no reader sees half a file."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote


JSON = Any  # content of JSON or YAML from others, whose types must be checked

# In bytes. File systems allow 255. A quoted Chinese character has nine.
_LONGEST_NAME = 200
# Names that Windows reserves for devices.
_DEVICES = ("con", "prn", "aux", "nul", *(f"{kind}{n}" for kind in ("com", "lpt") for n in range(10)))


def file_name(task: str) -> str:
    """
    Returns a file name for a task: valid on every file system, and different for different tasks.

    A task may be called "a/b", ".." or "-f", or be longer than a file name may be. Some file systems don't tell "A"
    from "a".
    """
    content = task.encode("utf-8", "surrogatepass")
    name = quote(content, safe="").replace(".", "%2E").replace("~", "%7E")
    if name.startswith("-"):
        name = f"%2D{name[1:]}"
    if len(name) <= _LONGEST_NAME and task.lower() == task and task not in _DEVICES:
        return name
    # `quote` leaves no plus sign, so this name can't equal one without a hash.
    return f"{name[: _LONGEST_NAME - 17]}+{hashlib.sha256(content).hexdigest()[:16]}"


def write_file(path: Path, content: str) -> None:
    """Writes a text file in one step: readers see all of it or nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: object, **options: Any) -> None:
    """
    Writes a JSON file in one step: readers see all of it or nothing.

    Args:
        path (`Path`): the file.
        content: any value that JSON can hold.
        options: options of `json.dumps`. The default indent is 2.
    """
    write_file(path, json.dumps(content, **{"indent": 2, **options}) + "\n")


def read_json(path: Path) -> JSON:
    """Returns the content of a JSON file, or `None` if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
