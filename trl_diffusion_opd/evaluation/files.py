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

"""Writes the files of an evaluation: the report, its tables, its pictures, and the page of samples."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from jinja2 import Environment

from ..data.readers import rows_of
from ..guards.extras import extra
from ..guards.files import file_name, write_file, write_json
from ..guards.redaction import visible
from ..hub.files import (
    PAGE_FILE,
    RADAR_PICTURE,
    REPORT_FILE,
    RETENTION_PICTURE,
    SAMPLES_PICTURE,
    SCORES_FILE,
    TABLES_FILE,
    TIMING_FILE,
)
from ..pipelines.images import Picture
from ..reporting.report import Report
from ..reporting.sources import SOURCE, source_of
from ..reporting.videos import encoded, still
from .measure import Measured
from .plan import Task
from .retention import fixed_states_table, retention_table, scores_table, settings_table
from .store import Store


if TYPE_CHECKING:
    from ..reporting.plots import SampleRow


# Images with fewer pixels a side than this are enlarged on the page.
_SMALL = 192


def write_results(
    store: Store, report: Report, measured: Measured, tasks: Mapping[str, Task], num_samples: int
) -> None:
    """
    Writes `retention.json` (the report), `retention.md` (its tables), `retention_scores.json` (the score of every
    image), `timing.json` (the time that this run took), `retention.png`, `radar.png` if it has three axes or more, and
    with samples `samples.png` and the page `samples.html`.

    A picture or page that cannot be made is left out with a warning.
    """
    from ..reporting import plots

    folder = store.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REPORT_FILE, report, allow_nan=False)
    write_json(folder / SCORES_FILE, measured.scores, indent=None, allow_nan=False)
    if measured.drawn or any(measured.seconds["rewards"].values()):  # not if an earlier run had done everything
        write_json(folder / TIMING_FILE, {"seconds": measured.seconds, "images_drawn": measured.drawn})
    if (folder / "images").is_dir():
        write_json(folder / "images" / "index.json", _folders(store, measured))
    tables = (retention_table(report), scores_table(report), fixed_states_table(report), settings_table(report))
    write_file(folder / TABLES_FILE, "\n\n".join(["# Retention", *filter(None, tables)]) + "\n")
    with extra(f"The picture {RETENTION_PICTURE}"):
        plots.plot_retention(report, folder / RETENTION_PICTURE)
    with extra(f"The picture {RADAR_PICTURE}"):
        if len(plots.radar_axes(report)) >= plots.MIN_RADAR_AXES:
            plots.plot_radar(report, folder / RADAR_PICTURE)
    if num_samples:
        with extra(f"The picture {SAMPLES_PICTURE}"):
            plots.plot_samples(_sample_rows(store, report, measured, tasks, num_samples), folder / SAMPLES_PICTURE)
        with extra(f"The page {PAGE_FILE}"):
            write_file(folder / PAGE_FILE, samples_page(store, report, measured, tasks, num_samples))


def _folders(store: Store, measured: Measured) -> dict[str, dict[str, str]]:
    """The folder of each model's images for each task. The folders' own names are digests."""
    folders: dict[str, dict[str, str]] = {}
    for (model, task), key in measured.keys.items():
        folder = store.path(key, task, 0).parent.relative_to(store.folder / "images")
        folders.setdefault(model, {})[task] = folder.as_posix()
    return folders


def _sample_rows(
    store: Store, report: Report, measured: Measured, tasks: Mapping[str, Task], num_samples: int
) -> "list[SampleRow]":
    """Rows of the picture: each prompt with the images of the base, its task's teacher, and the students."""
    from ..reporting.plots import SampleRow

    students = [name for name in measured.scores if name != "base" and not name.startswith("teacher/")]
    shown = []
    for task, part in tasks.items():
        reward = report["tasks"][task]["reward"]
        columns = {"base": "base", "teacher": f"teacher/{task}", **{name: name for name in students}}
        for n, row in enumerate(rows_of(part.rows(range(min(num_samples, part.num_images))))):
            source = source_of(row)
            images = {} if source is None else {SOURCE: source}
            images |= {
                label: still(store.load(measured.keys[model, task], task, n)) for label, model in columns.items()
            }
            scores: dict[str, float | None] = {SOURCE: None}
            scores |= {label: measured.scores[model][task][reward][n] for label, model in columns.items()}
            shown.append(SampleRow(task, str(row["prompt"]), images, scores))
    return shown


def _visible(value: object) -> object:
    """Replaces invisible marks in a text, such as those that would reverse the direction of the page's text."""
    return visible(value, keep="\n\t") if isinstance(value, str) else value


def samples_page(store: Store, report: Report, measured: Measured, tasks: Mapping[str, Task], num_samples: int) -> str:
    """The page: each prompt with the images of all models, and under each image every score that applies."""
    shown = {
        task: [
            {
                "prompt": row["prompt"],
                "cells": [
                    *_source_cells(store, row, task, n),
                    *(
                        {
                            "model": model,
                            "is_own": model == f"teacher/{task}",
                            **_shown_files(store, measured.keys[model, task], task, n),
                            "scores": {
                                name: values[n] for name, values in of_model[task].items() if values[n] is not None
                            },
                        }
                        for model, of_model in measured.scores.items()
                    ),
                ],
            }
            for n, row in enumerate(rows_of(part.rows(range(min(num_samples, part.num_images)))))
        ]
        for task, part in tasks.items()
    }
    template = files("trl_diffusion_opd.reporting") / "templates" / PAGE_FILE
    # Prompts and names come from datasets, so they are escaped.
    environment = Environment(autoescape=True, finalize=_visible)
    page = environment.from_string(template.read_text(encoding="utf-8"))
    first: Picture = store.load(measured.keys["base", next(iter(tasks))], next(iter(tasks)), 0)
    size = (first[0] if isinstance(first, list) else first).size
    return page.render(tasks=shown, report=report, pixelated=max(size) < _SMALL) + "\n"


def _source_cells(store: Store, row: Mapping[str, object], task: str, number: int) -> list[dict[str, object]]:
    """What the page shows of a row's source pictures, which are written; nothing if it has none."""
    source = source_of(row)
    if source is None:
        return []
    path = store.folder / "sources" / f"{file_name(task)}_{number}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    source.save(path)
    return [{"model": SOURCE, "is_own": False, "image": _address(store, path), "scores": {}}]


def _shown_files(store: Store, key: str, task: str, number: int) -> dict[str, str]:
    """
    Addresses on the page: the `"image"`, or of a video the `"image"` of its strip and the `"video"`, which are written.
    """
    path = store.path(key, task, number)
    if path.exists():
        return {"image": _address(store, path)}
    frames = store.load(key, task, number)
    assert isinstance(frames, list)
    strip, video = path.with_name(f"strip_{path.name}"), encoded(frames).write(path.with_suffix(""))
    still(frames).save(strip)
    return {"image": _address(store, strip), "video": _address(store, video)}


def _address(store: Store, path: Path) -> str:
    return quote(path.relative_to(store.folder).as_posix())
