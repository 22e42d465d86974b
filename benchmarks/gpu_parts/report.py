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

"""Where a part of `benchmarks/gpu.py` writes what it measured, after each check."""

import json
import platform
import re
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "diffusers", "transformers", "trl", "peft", "accelerate", "torchao")


def machine(device: str) -> dict[str, Any]:
    """The card, its driver and the versions that something was measured with, and the date."""
    facts: dict[str, Any] = {"date": date.today().isoformat(), "python": platform.python_version()}
    facts |= {name: version(name) for name in PACKAGES}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        facts |= {
            "card": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip(),
            "cuda": torch.version.cuda,
        }
    return facts


class Report:
    """
    The checks of a part.

    Args:
        part (`str`): its name.
        device (`str`): `"cuda"`, or `"cpu"` for everything in small.
        folder (`Path`): where `<part>.json` goes.
    """

    def __init__(self, part: str, device: str, folder: Path):
        self.part, self.device = part, device
        self.small = device == "cpu"
        self._file = folder / f"{part}.json"
        self._content: dict[str, Any] = {"part": part, "device": device, "machine": machine(device), "checks": {}}
        self._write()

    def check(self, name: str, measure: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
        """
        Runs `measure(*args)` and keeps what it returns. Its `"passed"` says whether what must hold does; where there is none,
        nothing must. What it raises is kept as its error: the checks after it go on.
        """
        begin = time.monotonic()
        try:
            found = {"passed": True, **measure(*args)}
        except Exception as error:  # a strange machine may raise anything, and must not hide the other checks
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
            found = {"passed": False, "error": without_paths(text)}
            traceback.print_exc()
        found["check_seconds"] = round(time.monotonic() - begin, 2)
        self._content["checks"][name] = found
        self._write()
        print(f"  {self.part} / {name}: {json.dumps(found)[:400]}", flush=True)
        return found

    def _write(self) -> None:
        self._file.write_text(json.dumps(self._content, indent=2) + "\n")


def without_paths(text: str) -> str:
    """A message without the folders of the machine that it comes from."""
    for folder in (str(ROOT), tempfile.gettempdir(), str(Path.home())):
        text = text.replace(folder, "…")
    return re.sub(r"/[\w./-]*site-packages", "…", text)[:2000]
