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

"""Finds the results in a run's folder: the student, its card, its evaluation, and the images of its training."""

import logging
import re
from pathlib import Path

from ..guards.files import read_json
from ..hub.files import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    ARGUMENTS_FILE,
    CARD_CONTENT_FILE,
    CARD_FILE,
    COMPLETIONS_FOLDER,
    CONFIG_FILE,
    CURVES_PICTURE,
    EVALUATION_FILES,
    FULL_FILES,
    FULL_INDEX_FILE,
    HIGH_NOISE_LORA_FILE,
    LAST_COMPLETIONS_FILE,
    LORA_FILE,
    LOW_NOISE_LORA_FILE,
    MANIFEST_FILE,
    REFERENCES_FILE,
    REPORT_FILE,
)
from .run_folder import set_aside


logger = logging.getLogger(__name__)


def results(folder: Path, run: str) -> list[Path]:
    """
    Lists the results of earlier runs in a folder: the student, its card and curves, and what an evaluation has written.

    Files that other programs also write, such as `README.md`, are only listed beside one that shows whose they are.

    Args:
        folder (`Path`): the output folder.
        run (`str`): name of the run that begins or goes on. Its scores of base and teachers stay.
    """
    names = [ADAPTER_CONFIG_FILE, ADAPTER_FILE, LORA_FILE, HIGH_NOISE_LORA_FILE, LOW_NOISE_LORA_FILE]
    names += [ARGUMENTS_FILE, MANIFEST_FILE, CURVES_PICTURE]
    names += [CARD_CONTENT_FILE, *(EVALUATION_FILES if (folder / REPORT_FILE).is_file() else ())]
    found = [folder / name for name in names if (folder / name).is_file()]
    weights = sorted(folder.glob(FULL_FILES))
    if weights:
        beside = (folder / CONFIG_FILE, folder / FULL_INDEX_FILE)
        found += [*weights, *(path for path in beside if path.is_file())]
    if (folder / CARD_CONTENT_FILE).is_file() and (folder / CARD_FILE).is_file():
        found.append(folder / CARD_FILE)
    references = read_json(folder / REFERENCES_FILE)
    if references is not None and references["run"] != run:
        found.append(folder / REFERENCES_FILE)
    return found


def set_report_aside(folder: Path, weights: str | None) -> None:
    """
    Moves an evaluation's files aside if they are of another student than the one that the folder now gets. One process
    alone must call it.

    Args:
        folder (`Path`): the output folder.
        weights (`str`, *optional*): as [`~models.teacher_files.weights_in`] returns it for the new student.
    """
    report = read_json(folder / REPORT_FILE)
    if report is None or weights in report.get("weights_sha256", {}).values():
        return
    aside = set_aside([folder / name for name in EVALUATION_FILES if (folder / name).is_file()], folder)
    assert aside is not None
    logger.warning(
        f"The report in {folder} is of an earlier student. It was moved to {aside.name}; `trl-diffusion-opd evaluate` "
        "makes one of this student."
    )


def images_after(folder: Path, update: int | None) -> list[Path]:
    """
    Lists the images that a training has logged after an update.

    Args:
        folder (`Path`): the output folder.
        update (`int`, *optional*): the update. `None` lists all images, as their one folder.
    """
    completions = folder / COMPLETIONS_FOLDER
    last = read_json(completions / LAST_COMPLETIONS_FILE)
    if update is None:
        return [completions] if last is not None or _numbered(completions) else []
    found = [path for path, number in _numbered(completions).items() if number > update]
    if last is not None and last["step"] > update:
        found += [completions / LAST_COMPLETIONS_FILE, *sorted(completions.glob("sample_*"))]
    return found


def _numbered(completions: Path) -> dict[Path, int]:
    """The pictures and tables of the training's images, each with its update."""
    named = {
        path: re.fullmatch(r"(?:step|completions)_(\d+)\.(?:png|parquet)", path.name) for path in completions.glob("*")
    }
    return {path: int(match[1]) for path, match in sorted(named.items()) if match is not None}
