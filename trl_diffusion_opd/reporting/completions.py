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

"""Logs the student's images for fixed prompts after each evaluation: to files, to the console, and to trackers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import datasets
import numpy as np
from diffusers.utils import make_image_grid
from PIL import Image
from pyarrow.parquet import write_table

from ..guards.markdown import cell
from ..hub.files import COMPLETIONS_FOLDER
from .console import print_completions, reward_cell


if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


TABLE_NAME = "completions"
GRID_NAME = "completions_grid"
# Smaller images are enlarged by a whole factor until they have this many pixels on the shorter side.
_VISIBLE_SIZE = 128
_FEATURES = {
    "step": datasets.Value("int64"),
    "prompt": datasets.Value("string"),
    "task": datasets.Value("string"),
    "image": datasets.Image(),
}


@dataclass(frozen=True)
class Completion:
    """
    One image of the student.

    Attributes:
        prompt (`str`), task (`str`)
        image (`PIL.Image.Image`)
        rewards (`dict[str, float | None]`): the image's scores, by the name of the reward.
        columns (`dict`): values that rewards logged for the image with `log_extra`.
    """

    prompt: str
    task: str
    image: Image.Image
    rewards: dict[str, float | None]
    columns: dict[str, object] = field(default_factory=dict)


def log_completions(
    completions: Sequence[Completion],
    output_dir: str | Path,
    step: int,
    report_to: Sequence[str],
    writers: Sequence["SummaryWriter"],
) -> None:
    """
    Logs images of the student as a table with one row an image, and as a picture with one row a task.

    Both are saved in `completions/` in the output folder. The table is `completions_{global_step}.parquet`, with the
    columns `step`, `prompt`, `task`, `image`, one for each reward, and those that rewards logged with `log_extra`. The
    picture is `step_{global_step}.png`. Trackers in `report_to` that can show pictures (tensorboard, wandb, trackio)
    get both at the current update, as `completions` and `completions_grid`. Rewards are also printed. Call it on the
    main process.

    Args:
        completions (`list[Completion]`): images of one size, in the order in which they are shown.
        output_dir (`str` or `Path`), step (`int`): the run's output folder, and the current update.
        report_to (`list[str]`): names of the trackers.
        writers (`list`): TensorBoard's writers, as [`~trackers.tensorboard_writers`] finds them.
    """
    if not completions:
        return
    picture = _picture(completions)
    folder = Path(output_dir) / COMPLETIONS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"step_{step:06d}.png")
    rewards, extra = _reward_columns(completions), _extra_columns(completions)
    # Not to_parquet, which shows a progress bar for its one batch.
    write_table(_dataset(completions, rewards, extra, step).data.table, folder / f"completions_{step:05d}.parquet")
    if rewards:
        print_completions([(one.prompt, one.task) for one in completions], rewards, step)
    _send(completions, rewards, extra, picture, step, report_to, writers)


def _reward_columns(completions: Sequence[Completion]) -> dict[str, list[float | None]]:
    """For each reward, by name, one value for each image; `None` if the image's task has no such reward."""
    names = dict.fromkeys(name for completion in completions for name in completion.rewards)
    # A reward may have the name of one of our columns.
    return {
        f"reward_{name}" if name in _FEATURES else name: [completion.rewards.get(name) for completion in completions]
        for name in names
    }


def _extra_columns(completions: Sequence[Completion]) -> dict[str, list[str | None]]:
    """The columns that rewards logged, as text; `None` if an image has no value."""
    names = dict.fromkeys(name for completion in completions for name in completion.columns)
    return {
        f"extra_{name}"
        if name in _FEATURES or any(name in completion.rewards for completion in completions)
        else name: [
            str(completion.columns[name]) if name in completion.columns else None for completion in completions
        ]
        for name in names
    }


def _dataset(
    completions: Sequence[Completion],
    rewards: dict[str, list[float | None]],
    extra: dict[str, list[str | None]],
    step: int,
) -> datasets.Dataset:
    columns = {
        "step": [step] * len(completions),
        "prompt": [completion.prompt for completion in completions],
        "task": [completion.task for completion in completions],
        "image": [completion.image for completion in completions],
        **rewards,
        **extra,
    }
    kinds = dict.fromkeys(rewards, datasets.Value("float64")) | dict.fromkeys(extra, datasets.Value("string"))
    features = datasets.Features({**_FEATURES, **kinds})
    return datasets.Dataset.from_dict(columns, features=features)


def _picture(completions: Sequence[Completion]) -> Image.Image:
    rows: dict[str, list[Image.Image]] = {}
    for completion in completions:
        rows.setdefault(completion.task, []).append(completion.image)
    width, height = completions[0].image.size
    factor = math.ceil(_VISIBLE_SIZE / min(width, height))
    columns = max(map(len, rows.values()))
    blank = Image.new("RGB", (width, height), "white")
    cells = [image for images in rows.values() for image in images + [blank] * (columns - len(images))]
    # Nearest shows the pixels that were generated, without a blur between them.
    cells = [cell.convert("RGB").resize((width * factor, height * factor), Image.Resampling.NEAREST) for cell in cells]
    return make_image_grid(cells, rows=len(rows), cols=columns)


def _send(
    completions: Sequence[Completion],
    rewards: dict[str, list[float | None]],
    extra: dict[str, list[str | None]],
    picture: Image.Image,
    step: int,
    report_to: Sequence[str],
    writers: Sequence["SummaryWriter"],
) -> None:
    tasks = dict.fromkeys(completion.task for completion in completions)

    def media(tracker: ModuleType) -> dict[str, object]:
        """Table and picture as objects of wandb or trackio (same class names). The update is the x axis."""
        images = [tracker.Image(completion.image) for completion in completions]
        rows = [
            [completion.prompt, completion.task, image, *values]
            for completion, image, *values in zip(completions, images, *rewards.values(), *extra.values(), strict=True)
        ]
        return {
            TABLE_NAME: tracker.Table(columns=["prompt", "task", "image", *rewards, *extra], data=rows),
            GRID_NAME: tracker.Image(picture, caption=f"rows: {', '.join(tasks)}"),
            "train/global_step": step,
        }

    for writer in writers:
        writer.add_image(GRID_NAME, np.asarray(picture), step, dataformats="HWC")
        writer.add_text(TABLE_NAME, completions_table(completions, rewards), step)
    if "wandb" in report_to:
        import wandb

        if wandb.run is not None:
            wandb.log(media(wandb))
    if "trackio" in report_to:
        import trackio

        if trackio.context_vars.current_run.get() is not None:
            trackio.log(media(trackio), step=step)


def completions_table(completions: Sequence[Completion], rewards: dict[str, list[float | None]]) -> str:
    """Prompts and rewards as a table in Markdown, which TensorBoard shows."""
    lines = [["prompt", "task", *map(cell, rewards)], ["---", "---", *("---:" for _ in rewards)]]
    for completion, *values in zip(completions, *rewards.values(), strict=True):
        lines.append([cell(completion.prompt), cell(completion.task), *map(reward_cell, values)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
