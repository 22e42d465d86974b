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

"""Logs the student's images for fixed prompts during training: to files, to the console, and to trackers."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import datasets
import numpy as np
from PIL import Image
from pyarrow.parquet import write_table

from ..guards.extras import extra
from ..guards.files import JSON, file_name, read_json, write_json
from ..guards.markdown import cell
from ..hub.files import COMPLETIONS_FOLDER, LAST_COMPLETIONS_FILE
from ..pipelines.images import Picture
from .console import print_completions, reward_cell
from .sources import SOURCE
from .videos import Clip, encoded, gif, still


if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


TABLE_NAME = "completions"
STUDENT_READ = "student_prompt"  # the column with what the student read, where that is not the prompt
GRID_NAME = "completions_grid"
VIDEO = "video"  # the table's column of encoded videos, if there are any
VIDEO_NAME = "completions_video"
_FEATURES = {
    "step": datasets.Value("int64"),
    "prompt": datasets.Value("string"),
    "task": datasets.Value("string"),
    "image": datasets.Image(),
}


@dataclass(frozen=True)
class Beside:
    """
    An image of a frozen model, shown beside the student's for the same prompt and noise.

    Attributes:
        image (`PIL.Image.Image`): or the list of a video's frames.
        rewards (`dict[str, float | None]`): the image's scores, by the name of the reward.
    """

    image: Picture
    rewards: Mapping[str, float | None]


@dataclass(frozen=True)
class Completion:
    """
    One image of the student.

    Attributes:
        prompt (`str`), task (`str`)
        image (`PIL.Image.Image`): or the list of a video's frames.
        rewards (`dict[str, float | None]`): the image's scores, by the name of the reward.
        columns (`dict`): values that rewards logged for the image with `log_extra`, and what the student read if that
            is not the prompt.
        label (`str`): how the picture names the student.
        beside (`dict[str, Beside]`): images of the base and the teachers, by the name that the picture shows, and the
            `"source"` pictures of an edit.
    """

    prompt: str
    task: str
    image: Picture
    rewards: dict[str, float | None]
    columns: dict[str, object] = field(default_factory=dict)
    label: str = "student"
    beside: Mapping[str, Beside] = field(default_factory=dict)


def log_completions(
    completions: Sequence[Completion],
    output_dir: str | Path,
    step: int,
    report_to: Sequence[str],
    writers: Sequence["SummaryWriter"],
) -> None:
    """
    Logs images of the student as a table with one row an image, and as a picture with one row a prompt.

    Both are saved in `completions/` in the output folder. The table is `completions_{global_step}.parquet`, with the
    columns `step`, `prompt`, `task`, `image`, one for each reward, and those that rewards logged with `log_extra`. The
    picture is `step_{global_step}.png`: for each prompt the images of base, teachers and student. Trackers in
    `report_to` that can show pictures (tensorboard, wandb, trackio) get both at the current update, as `completions`
    and `completions_grid`. Rewards are also printed. The student's images are also saved one by one for the model
    card, as `sample_{task}_{number}.png`; the next call overwrites them. Call it on the main process.

    A video is a strip of frames in all of these. It is also in the table's column `video`, beside the samples as
    `sample_{task}_{number}.mp4` or `.gif`, and in the trackers as `completions_video/{task}_{number}`.

    Args:
        completions (`list[Completion]`): the images, in the order in which they are shown.
        output_dir (`str` or `Path`), step (`int`): the run's output folder, and the current update.
        report_to (`list[str]`): names of the trackers.
        writers (`list`): TensorBoard's writers, as [`~trackers.tensorboard_writers`] finds them.
    """
    if not completions:
        return
    folder = Path(output_dir) / COMPLETIONS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    rewards, columns = _reward_columns(completions), _extra_columns(completions)
    clips = {n: encoded(one.image) for n, one in enumerate(completions) if isinstance(one.image, list)}
    # Not to_parquet, which shows a progress bar for its one batch.
    table = _dataset(completions, rewards, columns, step, clips).data.table
    write_table(table, folder / f"completions_{step:05d}.parquet")
    if rewards:
        print_completions([(one.prompt, one.task) for one in completions], rewards, step)
    picture = folder / f"step_{step:06d}.png"
    with extra(f"The picture {picture.name}"):
        _draw(completions, picture, step)
        videos = _save_samples(completions, folder, picture.name, step, clips)
        with Image.open(picture) as image:
            _send(completions, rewards, columns, image.convert("RGB"), step, report_to, writers, videos)


def last_completions(output_dir: str | Path) -> JSON:
    """
    Reads what [`log_completions`] has logged last in an output folder.

    Returns:
        `dict` or `None` if nothing was logged: `"step"`, `"beside"` (whether base or teachers are beside the student),
        `"picture"` (a file in the output folder), and `"samples"`, a list of `{"task", "prompt", "file"}`, whose
        prompts are what the student read.
    """
    return read_json(Path(output_dir) / COMPLETIONS_FOLDER / LAST_COMPLETIONS_FILE)


def _save_samples(
    completions: Sequence[Completion], folder: Path, picture: str, step: int, clips: Mapping[int, Clip]
) -> dict[str, Path]:
    """
    Saves the student's images one by one, and the list of them that the model card reads. Returns the files of its
    videos, by `{task}_{number}`.
    """
    counts: dict[str, int] = {}
    samples, videos = [], {}
    for i, completion in enumerate(completions):
        n = counts[completion.task] = counts.get(completion.task, 0) + 1
        stem = f"sample_{file_name(completion.task)}_{n}"
        name = f"{stem}.png"
        # Replaced at once: an upload in the background may be reading the image before.
        still(completion.image).save(folder / f".{name}", format="PNG")
        os.replace(folder / f".{name}", folder / name)
        if i in clips:
            videos[f"{completion.task}_{n}"] = path = clips[i].write(folder / stem)
            name = path.name
        read = completion.columns.get(STUDENT_READ, completion.prompt)
        samples.append({"task": completion.task, "prompt": read, "file": f"{folder.name}/{name}"})
    has_others = any(completion.beside.keys() - {SOURCE} for completion in completions)
    shown = {"step": step, "beside": has_others, "picture": f"{folder.name}/{picture}", "samples": samples}
    write_json(folder / LAST_COMPLETIONS_FILE, shown)
    return videos


def _taken(completions: Sequence[Completion]) -> set[str]:
    """The names of the table's own columns."""
    return {*_FEATURES, *([VIDEO] if any(isinstance(one.image, list) for one in completions) else [])}


def _reward_columns(completions: Sequence[Completion]) -> dict[str, list[float | None]]:
    """For each reward, by name, one value for each image; `None` if the image's task has no such reward."""
    names = dict.fromkeys(name for completion in completions for name in completion.rewards)
    # A reward may have the name of one of our columns.
    return {
        f"reward_{name}" if name in _taken(completions) else name: [
            completion.rewards.get(name) for completion in completions
        ]
        for name in names
    }


def _extra_columns(completions: Sequence[Completion]) -> dict[str, list[str | None]]:
    """The columns that rewards logged, as text; `None` if an image has no value."""
    names = dict.fromkeys(name for completion in completions for name in completion.columns)
    return {
        f"extra_{name}"
        if name in _taken(completions) or any(name in completion.rewards for completion in completions)
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
    clips: Mapping[int, Clip],
) -> datasets.Dataset:
    columns: dict[str, list] = {
        "step": [step] * len(completions),
        "prompt": [completion.prompt for completion in completions],
        "task": [completion.task for completion in completions],
        "image": [still(completion.image) for completion in completions],
        **rewards,
        **extra,
    }
    kinds = dict.fromkeys(rewards, datasets.Value("float64")) | dict.fromkeys(extra, datasets.Value("string"))
    if clips:
        columns[VIDEO] = [clips[n].data if n in clips else None for n in range(len(completions))]
        kinds[VIDEO] = datasets.Value("binary")
    features = datasets.Features({**_FEATURES, **kinds})
    return datasets.Dataset.from_dict(columns, features=features)


def _draw(completions: Sequence[Completion], path: Path, step: int) -> None:
    from . import plots  # matplotlib takes a second to import

    rows = []
    for completion in completions:
        models = {**completion.beside, completion.label: Beside(completion.image, completion.rewards)}
        reward = next(iter(completion.rewards), None)
        scores = {label: None if reward is None else model.rewards.get(reward) for label, model in models.items()}
        images = {label: still(model.image) for label, model in models.items()}
        rows.append(plots.SampleRow(completion.task, completion.prompt, images, scores, reward))
    plots.plot_samples(rows, path, title=f"update {step}")


def _send(
    completions: Sequence[Completion],
    rewards: dict[str, list[float | None]],
    columns: dict[str, list[str | None]],
    picture: Image.Image,
    step: int,
    report_to: Sequence[str],
    writers: Sequence["SummaryWriter"],
    videos: Mapping[str, Path],
) -> None:
    def media(tracker: ModuleType) -> dict[str, object]:
        """Table and picture as objects of wandb or trackio (same class names). The update is the x axis."""
        images = [tracker.Image(still(completion.image)) for completion in completions]
        rows = [
            [completion.prompt, completion.task, image, *values]
            for completion, image, *values in zip(
                completions, images, *rewards.values(), *columns.values(), strict=True
            )
        ]
        return {
            TABLE_NAME: tracker.Table(columns=["prompt", "task", "image", *rewards, *columns], data=rows),
            GRID_NAME: tracker.Image(picture),
            **{f"{VIDEO_NAME}/{name}": tracker.Video(str(path)) for name, path in videos.items()},
            "train/global_step": step,
        }

    for writer in writers:
        writer.add_image(GRID_NAME, np.asarray(picture), step, dataformats="HWC")
        writer.add_text(TABLE_NAME, completions_table(completions, rewards), step)
        _add_videos(writer, completions, step)
    if "wandb" in report_to:
        import wandb

        if wandb.run is not None:
            wandb.log(media(wandb))
    if "trackio" in report_to:
        import trackio

        if trackio.context_vars.current_run.get() is not None:
            trackio.log(media(trackio), step=step)


def _add_videos(writer: "SummaryWriter", completions: Sequence[Completion], step: int) -> None:
    """Adds videos as animated GIFs. `add_video` would need moviepy for the same."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    counts: dict[str, int] = {}
    for completion in completions:
        n = counts[completion.task] = counts.get(completion.task, 0) + 1
        frames = completion.image
        if isinstance(frames, list) and writer.file_writer is not None:
            image = Summary.Image(
                height=frames[0].height, width=frames[0].width, colorspace=3, encoded_image_string=gif(frames)
            )
            value = Summary.Value(tag=f"{VIDEO_NAME}/{completion.task}_{n}", image=image)
            writer.file_writer.add_summary(Summary(value=[value]), step)


def completions_table(completions: Sequence[Completion], rewards: dict[str, list[float | None]]) -> str:
    """Prompts and rewards as a table in Markdown, which TensorBoard shows."""
    lines = [["prompt", "task", *map(cell, rewards)], ["---", "---", *("---:" for _ in rewards)]]
    for completion, *values in zip(completions, *rewards.values(), strict=True):
        lines.append([cell(completion.prompt), cell(completion.task), *map(reward_cell, values)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
