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
Writes what `benchmarks/gpu.py` measured into the page `docs/source/gpu.md`, between its markers.

    python benchmarks/gpu_page.py
"""

import json
from pathlib import Path
from typing import Any

from gpu import PARTS


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "source" / "gpu.md"
RESULTS = ROOT / "docs" / "source" / "results" / "gpu"
# Fields that say nothing about the GPU.
LEFT_OUT = ("passed", "check_seconds", "longest", "error")


def number(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if value == 0 or abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def figures(check: dict[str, Any], name: str = "") -> list[str]:
    """`name value` of every number of a check, nested ones with their path."""
    found = []
    for key, value in check.items():
        path = f"{name} {key}".strip().replace("_", " ")
        if key in LEFT_OUT:
            continue
        if isinstance(value, dict):
            found += figures(value, path)
        elif isinstance(value, list):
            found.append(f"{path} {', '.join(map(number, value))}")
        else:
            found.append(f"{path} {number(value)}")
    return found


def machine(facts: dict[str, Any]) -> str:
    libraries = ", ".join(f"{name} {facts[name]}" for name in ("torch", "diffusers", "peft", "transformers"))
    card = f"{facts['card']}, {facts['memory_gib']} GiB, driver {facts['driver']}, CUDA {facts['cuda']}"
    return f"{card}; Python {facts['python']}, {libraries}; {facts['date']}"


def section(part: str, report: dict[str, Any] | None) -> str:
    """What a part measured, as Markdown."""
    if report is None:
        return "**Not run on a GPU yet.**"
    ended = report.get("ended", "cut off")
    lines = [f"{machine(report['machine'])}. {ended[0].upper()}{ended[1:]}. ([JSON](results/gpu/{part}.json))", ""]
    if report["checks"]:
        lines += ["| check | holds | measured |", "| --- | --- | --- |"]
    for name, check in report["checks"].items():
        shown = "; ".join(figures(check)) or "–"
        if "error" in check:
            shown = check["error"].split("\n")[0]
        lines.append(f"| {name} | {number(check['passed'])} | {shown} |".replace("…", "..."))
    for name, check in report["checks"].items():
        if "longest" in check:
            lines += ["", f"{name}:", "", "| kernel | calls | share |", "| --- | ---: | ---: |"]
            lines += [f"| `{row['kernel'][:70]}` | {row['calls']} | {row['share']:.1%} |" for row in check["longest"]]
    if not report["checks"]:
        lines.append("No check ended before that.")
    return "\n".join(lines)


def drawn(page: str, results: Path = RESULTS) -> str:
    """The page with the sections of all parts drawn anew."""
    for part in PARTS:
        file = results / f"{part}.json"
        report = json.loads(file.read_text()) if file.exists() else None
        begin, end = f"<!-- part: {part} -->\n", "\n<!-- end -->"
        before, _, rest = page.partition(begin)
        if not rest:
            raise ValueError(f"{PAGE.name} has no marker {begin.strip()!r}.")
        page = before + begin + section(part, report) + end + rest.partition(end)[2]
    return page


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text()))
