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
Renders the model card of a student from the facts of its run, and from the reports and pictures in its folder. The facts
are kept in the folder, so that the card can be rendered again when the student is pushed.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict
from urllib.parse import quote

from huggingface_hub import EvalResult

from ..guards.files import JSON, read_json, write_json
from ..guards.redaction import last_part, public_text, shown
from ..hub.files import (
    ADAPTER_CONFIG_FILE,
    CARD_CONTENT_FILE,
    CARD_FILE,
    CURVES_PICTURE,
    RADAR_PICTURE,
    REPORT_FILE,
    RETENTION_PICTURE,
    SAMPLES_PICTURE,
)
from ..models.teacher_files import weights_in
from .cards import card_data, render, results_of, save
from .completions import last_completions
from .console import print_unwrapped
from .report import Report
from .videos import FPS


# The pictures of the card and their captions, in the card's order.
_PICTURES = {
    SAMPLES_PICTURE: "The same prompts and noise: base, teacher, student",
    RETENTION_PICTURE: "Score of the base, the teachers and this student on each task",
    RADAR_PICTURE: "All rewards of base, teachers and student",
    CURVES_PICTURE: "Training curves",
}
# The most images that the Hub's gallery shows, and at least one of each task.
_GALLERY = 12


class Content(TypedDict):
    """
    What a student's card is rendered from, besides its folder. All of it is public, and JSON can hold it.

    Attributes:
        model_name: The title; `None` for the name of the repository or the folder.
        base_id: The base on the Hub; `None` if it has no id.
        base_name: The base's id, or the name of its folder.
        is_tiny: Whether the base is the tiny world's.
        load_options: Further arguments of the base's `from_pretrained`.
        kind: How the student is loaded: `"lora"` by diffusers, `"pair"` for two experts, `"peft"`, or `"full"` for a whole network.
        is_video: Whether the pipeline returns videos, of which an image is one frame.
        films: Whether the student was trained on videos of more than one frame. Older cards have none.
        denoiser, denoiser_class: The pipeline's name for the trained network, and its class.
        tags, datasets: Tags, and Hub ids of the training data.
        facts, args: Facts of the run, and its arguments that are shown.
        call_options: Arguments of the pipeline, as Python literals.
        examples: What the student reads of a prompt of each task.
        templates: What the student reads in a task, with `{prompt}` in the prompt's place. Older cards have none.
        settings, versions: Rows of the table of settings, and versions of packages.
        checkpoint: The folder of the checkpoint that the card is of, while the training goes on.
    """

    model_name: str | None
    base_id: str | None
    base_name: str
    is_tiny: bool
    load_options: dict[str, str]
    kind: Literal["lora", "pair", "peft", "full"]
    is_video: bool
    films: NotRequired[bool]
    denoiser: str
    denoiser_class: str
    tags: list[str]
    datasets: list[str]
    facts: dict[str, Any]
    args: dict[str, Any]
    call_options: dict[str, str]
    examples: dict[str, str]
    templates: NotRequired[dict[str, str]]
    settings: dict[str, str]
    versions: dict[str, str]
    checkpoint: str | None


def render_student_card(folder: Path, content: Content, repository: str | None) -> None:
    """
    Writes `README.md` into a student's folder, and keeps `content` there.

    If the folder has the report `retention.json` of this student with its pictures, or images of the training, the card
    shows them. A report of other weights, such as those of an earlier run, is left out. The licence is copied from the
    base's card on the Hub; if that can't be read, the card names none.

    Args:
        folder (`Path`): the output folder.
        content ([`Content`]): the facts of the run.
        repository (`str`, *optional*): Hub id where the student is or will be.
    """
    name = content["model_name"] or (repository or last_part(str(folder))).split("/")[-1]
    completions, checkpoint = last_completions(folder), content["checkpoint"]
    report = None if checkpoint else _own_report(folder)
    # The Hub's gallery has no captions, so images of an earlier update would pass for the student's.
    has_gallery = completions is not None and str(completions["step"]) == content["settings"]["updates"]
    data = card_data(
        name,
        content["base_id"],
        relation="finetune" if content["kind"] == "full" else "adapter",
        tags=content["tags"],
        datasets=content["datasets"],
        results=student_results(report, content["datasets"]) if report else [],
        widget=_widget(completions) if has_gallery else None,
        is_video=content.get("films", False),
    )
    card = render(
        "model_card.md",
        data,
        **{"films": False, **content, "model_name": name},
        fps=FPS,
        repository=repository,
        folder_name="/".join(filter(None, (last_part(str(folder)), checkpoint))),
        report=report,
        completions=completions,
        has_gallery=has_gallery,
        pictures=_pictures(folder, report is not None, checkpoint is not None),
    )
    save(card, folder)
    write_json(folder / CARD_CONTENT_FILE, {"content": content, "sha256": _digest(folder / CARD_FILE)})


def _own_report(folder: Path) -> Report | None:
    """The report in a folder, if it is of the student there. Else one line says that it is left out."""
    report: Report | None = read_json(folder / REPORT_FILE)
    if report is None:
        return None
    measured = next(iter(report.get("weights_sha256", {}).values()), None)
    if measured is not None and measured == weights_in(folder):
        return report
    _say_that_it_is_left_out(str(folder), measured)
    return None


@cache  # once, though a card is written several times
def _say_that_it_is_left_out(folder: str, measured: str | None) -> None:
    print_unwrapped(
        f"The report in {folder} is not of the student there, so its card leaves it out. "
        "`trl-diffusion-opd evaluate` makes it anew."
    )


def _pictures(folder: Path, has_report: bool, goes_on: bool) -> dict[str, str]:
    """The pictures that belong to the student, with their captions."""
    left_out: tuple[str, ...] = () if has_report else (SAMPLES_PICTURE, RETENTION_PICTURE, RADAR_PICTURE)
    left_out += (CURVES_PICTURE,) if goes_on else ()
    return {name: text for name, text in _PICTURES.items() if name not in left_out and (folder / name).exists()}


def card_content(folder: Path) -> Content | None:
    """Returns what the card in a folder was rendered from; `None` if it was not made here."""
    kept = read_json(folder / CARD_CONTENT_FILE)
    return None if kept is None else kept["content"]


def rewrite_card(folder: Path, repository: str, base_id: str | None = None) -> str | None:
    """
    Renders a student's card again: with the name of its repository, and with reports that were made since.

    Args:
        folder (`Path`): the output folder.
        repository (`str`): Hub id where the student will be.
        base_id (`str`, *optional*): the base's Hub id, if the card has none.

    Returns:
        `str`, *optional*: why the card was left as it is, as a sentence; `None` if it was rendered.
    """
    kept = read_json(folder / CARD_CONTENT_FILE)
    if kept is None:
        return f"{CARD_FILE} is pushed as it is, if there is one: this folder has no facts to render a card from."
    if (folder / CARD_FILE).exists() and _digest(folder / CARD_FILE) != kept["sha256"]:
        return f"{CARD_FILE} was edited by hand, so it is pushed as it is: check the names in it yourself."
    content: Content = kept["content"] | {"checkpoint": None}  # the student of the folder itself is pushed
    if base_id is not None:
        content |= {"base_id": base_id, "is_tiny": False}
    render_student_card(folder, content, repository)
    return None


def name_base(folder: Path, base_id: str) -> None:
    """Writes the base's Hub id into the `adapter_config.json` of a saved student, if it has one."""
    config = read_json(folder / ADAPTER_CONFIG_FILE)
    if config is not None:
        write_json(folder / ADAPTER_CONFIG_FILE, config | {"base_model_name_or_path": base_id}, sort_keys=True)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _widget(completions: JSON) -> list[dict[str, Any]]:
    """The images of the Hub's gallery with their prompts, tasks in turn."""
    by_task: dict[str, list[dict[str, str]]] = {}
    for sample in completions["samples"]:
        by_task.setdefault(sample["task"], []).append(sample)
    of_each = max(1, _GALLERY // len(by_task))
    return [
        {"text": shown(public_text(sample["prompt"]), 1000), "output": {"url": quote(sample["file"])}}
        for samples in by_task.values()
        for sample in samples[:of_each]
    ]


def student_results(report: Report, datasets: list[str]) -> list[EvalResult]:
    """The student's score and retention on each task of a report, as results for the `model-index`."""
    results = []
    for task, row in report["tasks"].items():
        results += results_of(report, datasets, task, row["reward"], row["reward"], row["student"], None)
        interval = row["ci95"]
        results += results_of(
            report, datasets, task, "retention", "Retention of the teacher's gain", row["retention"], interval
        )
    return results
