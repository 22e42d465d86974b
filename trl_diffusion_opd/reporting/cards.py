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


"""Shared parts of the students' and the teachers' model cards: metadata, licence, results, rendering and saving."""

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from jinja2 import Template
from PIL.Image import Image
from transformers.utils.hub import hf_api

from ..guards.markdown import cell, code, inline, literal
from ..guards.redaction import public_text, public_value, shown
from ..hub.files import CARD_FILE
from ..tiny import BASE as TINY_BASE
from .report import Report


_SHOWN_PACKAGES = ("trl", "diffusers", "peft", "transformers", "torch", "datasets")
_TASK = "text-to-image"
_VIDEO_TASK = "text-to-video"


def render(template: str, data: ModelCardData, **fields: Any) -> ModelCard:
    # Names of tasks, rewards, layers and teachers can hold anything, and cards are public. So all text is escaped.
    shows: dict[str, Any] = {function.__name__: _public(function) for function in (inline, cell, code, literal)}
    values = {**data.to_dict(), "versions": framework_versions(), **shows, **fields}
    return ModelCard(_compiled(template).render(card_data=data.to_yaml(), **values))


@cache  # `ModelCard.from_template` compiles it anew for every card, which takes as long as a small update
def _compiled(template: str) -> Template:
    return Template((files(__package__) / "templates" / template).read_text(encoding="utf-8"))


def _public(show: Callable[..., str]) -> Callable[..., str]:
    return lambda value: show(public_text(value) if isinstance(value, str) else value)


@cache  # takes some 50 ms, and a card is written with every checkpoint
def framework_versions() -> dict[str, str]:
    found = {}
    with suppress(PackageNotFoundError):  # a checkout that is on the path but not installed
        found["trl-diffusion-opd"] = version("trl-diffusion-opd")
    return found | {name: version(name) for name in _SHOWN_PACKAGES}


def save(card: ModelCard, folder: Path) -> None:
    # Replaced at once: an upload in the background may be reading the card.
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{CARD_FILE}"
    card.save(unfinished)
    os.replace(unfinished, folder / CARD_FILE)


# Metadata


def card_data(
    name: str,
    base_id: str | None,
    relation: str,
    tags: list[str],
    datasets: list[str],
    results: list[EvalResult],
    widget: list[dict[str, Any]] | None = None,
    is_video: bool = False,
) -> ModelCardData:
    licence: dict[str, Any] = _base_license(base_id) if base_id else {}
    return ModelCardData(
        base_model=base_id,
        base_model_relation=relation if base_id else None,
        **licence,
        datasets=datasets or None,
        library_name="diffusers",
        pipeline_tag=_VIDEO_TASK if is_video else _TASK,
        tags=[shown(tag) for tag in dict.fromkeys(tags)],
        widget=widget or None,
        model_name=shown(name) if results else None,
        eval_results=results or None,
    )


def _base_license(base_id: str) -> dict[str, str]:
    """Reads `license`, `license_name` and `license_link` from the base's own card on the Hub."""
    try:
        card = hf_api().model_info(base_id, timeout=10).card_data
    except (HfHubHTTPError, httpx2.TransportError, OfflineModeIsEnabled):
        return {}
    found = {name: card.get(name) for name in ("license", "license_name", "license_link")} if card else {}
    named = {name: value for name, value in found.items() if isinstance(value, str)}
    if "license_link" in named and "://" not in named["license_link"]:
        named["license_link"] = f"https://huggingface.co/{base_id}/blob/main/{named['license_link'].lstrip('/')}"
    return named


def results_of(
    report: Report,
    datasets: list[str],
    task: str,
    metric: str,
    metric_name: str,
    value: float | None,
    interval: list[float] | None,
) -> list[EvalResult]:
    if value is None:
        return []
    num_images = report["tasks"][task].get("num_images", report["num_images"])
    task, metric, metric_name = (shown(public_text(text)) for text in (task, metric, metric_name))
    result = EvalResult(
        task_type=_TASK,
        task_name=f"Text to image: {task}",
        # The Hub requires a name, although held-out prompts are usually files.
        dataset_type=datasets[0] if len(datasets) == 1 else re.sub(r"[^A-Za-z0-9._-]+", "-", task),
        dataset_name=f"held-out prompts of {task}",
        dataset_config=task,
        dataset_args={"num_images": num_images},
        metric_type=metric,
        metric_name=metric_name,
        metric_value=round(value, 4),
        metric_args={"ci95": [round(bound, 4) for bound in interval]} if interval else None,
        verified=False,
    )
    return [result]


# Parts of the text


def as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def hub_id(name: str | None) -> str | None:
    """Returns `name` if it can be a Hub repository and is no local file or folder, else `None`."""
    if not name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def is_tiny(name: str | None) -> bool:
    """Whether a base is the one of the tiny world, which everybody has who has this package."""
    return name is not None and os.path.realpath(name) == os.path.realpath(TINY_BASE)


def unnamed_base(shown_name: str | None, option: str) -> str:
    """Says that a student's base has no Hub id, and what to do, for a message."""
    which = "was made in memory" if shown_name is None else f"is a folder of this machine ({shown_name!r})"
    return (
        f"its base {which}, so nobody else could load the student. Name the base's Hub id with {option} owner/name; "
        "if it is not on the Hub, push it there too (pipe.push_to_hub('owner/name'), before or after)."
    )


def literals(options: Mapping[str, object], secrets: list[str]) -> dict[str, str]:
    """Writes options as Python code. Pictures are loaded from files; other options without a literal are left out."""
    plain = {name: value for name, value in options.items() if isinstance(value, (str, bool, int, float))}
    # A prompt is never redacted as a path, even if it looks like one.
    public = {name: value if name == "prompt" else public_value(value, secrets) for name, value in plain.items()}
    code = {name: literal(value) for name, value in public.items()}
    code |= {name: _loaded(value) for name, value in options.items() if _is_pictures(value)}
    return {name: code[name] for name in options if name in code}


def _is_pictures(value: object) -> bool:
    return isinstance(value, Image) or isinstance(value, list) and bool(value) and all(map(_is_pictures, value))


def _loaded(pictures: object) -> str:
    if not isinstance(pictures, list):
        return 'load_image("source.png")'
    names = [f'load_image("source_{n}.png")' for n in range(1, len(pictures) + 1)]
    return f"[{', '.join(names)}]"
