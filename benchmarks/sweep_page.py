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
Writes what `benchmarks/sweep.py` found into the page `docs/source/pipelines_table.md`.

    python benchmarks/sweep_page.py

`--check` writes nothing, and fails if the page says something else.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from sweep_parts.classes import Rule  # noqa: E402


RESULTS = ROOT / "docs" / "source" / "results" / "sweep.json"
PAGE = ROOT / "docs" / "source" / "pipelines_table.md"
OUTCOMES = ("works", "refused", "fails", "not built")
_WIDTH = 119
_HEAD = """# All pipelines of diffusers

This page says which text-to-image, text-to-video, editing and image-to-video pipelines of diffusers {version} can be
trained, and why the others cannot. Read it before you train another model than the usual ones. It is written by
`benchmarks/sweep_page.py` from what `benchmarks/sweep.py` measured.

The sweep asks every pipeline class that diffusers offers. Each that makes images or videos of a text alone is built
with small random parts, in float32 on a CPU, and tried (videos with one frame, and [with several](#videos)):

- **velocity**: the largest difference from what the pipeline's own loop hands to its scheduler, over the largest of
  its values, at every step, without and with guidance. For models that predict noise or v it is taken after the change
  of variables. It must be at most 1e-5.
- **walk**: the largest difference from the pipeline's own image, of values in [0, 1], after a walk of four steps. It
  must be at most 1e-4.
- **student**: one update with a random LoRA as the teacher, then a fresh pipeline that has loaded the saved student:
  the largest difference of its image from the trained one's. It must be at most 1e-5, while the update itself moves
  the image by far more.

[Pictures](#pictures) has the same for those that take pictures beside the text: to edit, to refer to, or to begin a
video with.

Small random models say nothing about quality or memory at full size. See [Any pipeline](any_pipeline) for how this
works, and for the checks to run on a real model.

"""


_PICTURES = """The same three differences for [rows with pictures of their own](dataset_formats#pictures-to-edit): a row for
each number of pictures in the table, and one more with another picture, of another size where the pipeline can. The
velocity is of a batch of all rows against the pipeline's own loop for each of them; the last two are of all rows.
Encoders of pictures add no noise here: some pipelines (LTX, CogVideoX, Kandinsky 5, JoyImage) draw it with the seed of
the image, and in training a picture is encoded once, with one seed."""
_TITLES = {"refused": "Refused", "fails": "Failing", "not built": "Not built"}


def number(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.0e}"


def differences(found: dict[str, Any]) -> str:
    """The cells of a table's row that have what was measured."""
    return " | ".join(number(found.get(key)) for key in ("velocity", "walk", "image"))


def loader(found: dict[str, Any]) -> str:
    return "PEFT" if "PEFT" in found.get("reason", "") else "diffusers"


def failing(count: int) -> str:
    return f"{count} fails" if count == 1 else f"{count} fail"


def wrapped(text: str, indent: str = "") -> list[str]:
    """Words in lines of the page's width, all but the first after `indent`."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > _WIDTH:
            lines.append(indent + word)
        else:
            lines[-1] += (" " if lines[-1] else "") + word
    return lines


def page(report: dict[str, Any]) -> str:
    """The whole page."""
    pipelines: dict[str, dict[str, Any]] = report["pipelines"]
    counts = Counter(found["outcome"] for found in pipelines.values())
    built = sum(counts.values()) - counts["not built"]
    says = (
        f"Of {len(pipelines)} classes, {built} are built small. {counts['works']} of these work "
        f"({counts['works'] / built:.0%}), {counts['refused']} are refused before the first step, and "
        f"{failing(counts['fails'])}."
    )
    lines = [*wrapped(says), "", "## Those that work", ""]
    lines += ["| pipeline | velocity | walk | student | loaded by |", "| --- | ---: | ---: | ---: | --- |"]
    for name, found in pipelines.items():
        if found["outcome"] == "works":
            lines.append(f"| {name} | {differences(found)} | {loader(found)} |")
    lines += ["", "## Videos", ""]
    lines += wrapped(
        "The same three differences with more than one frame, which `generation_kwargs` sets. The last is of videos."
    )
    lines += ["", "| pipeline | argument | velocity | walk | student |", "| --- | --- | ---: | ---: | ---: |"]
    for name, found in report["videos"].items():
        lines.append(f"| {name} | `{found['argument']}={found['frames']}` | {differences(found)} |")
    lines += pictures(report["pictures"])
    titles = {"refused": "Those that are refused", "fails": "Those that fail", "not built": "Those that are not built"}
    for outcome, title in titles.items():
        if counts[outcome]:
            lines += ["", f"## {title}", ""]
        for name, found in pipelines.items():
            if found["outcome"] == outcome:
                seen = f" Its velocity is right ({number(found['velocity'])})." if "velocity" in found else ""
                lines += wrapped(f"- **{name}**: {found['reason']}{seen}", "  ")
    lines += ["", "## Those that are left out", ""]
    for rule in Rule:
        names = [name for name, of in report["left_out"].items() if of == rule.name]
        if names:
            lines += [*wrapped(f"- {rule.value[0].upper()}{rule.value[1:]}: {', '.join(names)}.", "  ")]
    return _HEAD.format(version=report["diffusers"]) + "\n".join(lines) + "\n"


def pictures(found: dict[str, dict[str, Any]]) -> list[str]:
    """The section on pipelines that take pictures beside the prompt."""
    counts = Counter(one["outcome"] for one in found.values())
    lines = ["", "## Pictures", "", *wrapped(_PICTURES), ""]
    lines += wrapped(
        f"Of {len(found)} classes, {counts['works']} work, {counts['refused']} are refused before the first step, "
        f"{failing(counts['fails'])}, and {counts['not built']} are not built. A class that draws from a text alone, too, is "
        "also in the tables above."
    )
    lines += ["", "| pipeline | draws | pictures a row | velocity | walk | student | loaded by |"]
    lines += ["| --- | --- | --- | ---: | ---: | ---: | --- |"]
    for name, one in found.items():
        if one["outcome"] == "works":
            numbers = ", ".join(map(str, one["numbers"]))
            drawn = "video" if one["video"] else "image"
            lines.append(f"| {name} | {drawn} | {numbers} | {differences(one)} | {loader(one)} |")
    for outcome in OUTCOMES[1:]:
        names = [name for name, one in found.items() if one["outcome"] == outcome]
        if names:
            lines += ["", f"{_TITLES[outcome]}:", ""]
        for name in names:
            lines += wrapped(f"- **{name}**: {found[name]['reason']}", "  ")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = page(json.loads(RESULTS.read_text()))
    if not args.check:
        PAGE.write_text(text)
    elif PAGE.read_text() != text:
        raise SystemExit(f"{PAGE.name} does not say what {RESULTS.name} does: run python benchmarks/sweep_page.py")


if __name__ == "__main__":
    main()
