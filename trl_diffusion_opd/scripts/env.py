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

"""Prints versions and devices for a bug report, and nothing that identifies the machine."""

import argparse
import platform
import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version


_DISTRIBUTION = "trl-diffusion-opd"
_PACKAGES = (
    _DISTRIBUTION,
    "trl",
    "transformers",
    "diffusers",
    "accelerate",
    "peft",
    "datasets",
    "huggingface_hub",
    "torch",
)


def report() -> str:
    """Returns the report, one line for each package, device and extra."""
    lines = {name: _version(name) for name in _PACKAGES}
    lines |= {"python": platform.python_version(), "platform": platform.platform(), "GPUs": _devices()}
    for extra, packages in _extras().items():
        missing = [name for name in packages if _version(name) == "not installed"]
        lines[f"[{extra}]"] = f"lacks {', '.join(missing)}" if missing else "installed"
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return (
            ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
            + f" (CUDA {torch.version.cuda})"
        )
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "none" if kind is None else f"{torch.accelerator.device_count()} x {kind.type}"


def _extras() -> dict[str, list[str]]:
    """The packages of each extra, except those for developers."""
    extras: dict[str, list[str]] = {}
    for requirement in requires(_DISTRIBUTION) or []:
        found = re.fullmatch(r"([\w.-]+)[^;]*;\s*extra == [\"']([\w-]+)[\"']", requirement)
        if found and found[2] not in ("dev", "docs"):
            extras.setdefault(found[2], []).append(found[1])
    return extras


def main(arguments: Sequence[str]) -> None:
    argparse.ArgumentParser(prog=f"{_DISTRIBUTION} env", description=__doc__).parse_args(arguments)
    print(report())


if __name__ == "__main__":
    main(sys.argv[1:])
