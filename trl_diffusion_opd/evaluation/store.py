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

"""Keeps the images and scores of an evaluation on disk, so that it can be interrupted at any time and continued."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO
from zipfile import BadZipFile, ZipFile

from PIL import Image

from ..guards.files import file_name
from ..pipelines.images import Picture


# Scores by (key of the images, name of the score, digest of the reward), then by the image's number.
KnownScores = dict[tuple[str, str, str], dict[int, float | None]]


class Store:
    """
    A folder with images, `images/<key>/<task>/<number>.png`, and journals of scores, `scores/<process>.jsonl`. A video
    is `<number>.zip`, with each frame as a PNG, so it is read as it was drawn.

    Only whole results are read: images are written under another name and then renamed, and an unfinished line of a
    journal is skipped.

    Args:
        folder (`Path`): the output folder of the evaluation.
        process_index (`int`): index of this process, which writes a journal of its own.
    """

    def __init__(self, folder: Path, process_index: int):
        self.folder = folder
        self._journal = folder / "scores" / f"{process_index}.jsonl"

    def path(self, key: str, task: str, number: int, suffix: str = ".png") -> Path:
        return self.folder / "images" / key / file_name(task) / f"{number:05d}{suffix}"

    def numbers(self, key: str, task: str) -> set[int]:
        """Returns the numbers of the images that are there and readable to the end."""
        folder = self.path(key, task, 0).parent
        videos = {int(path.stem) for path in folder.glob("[0-9]*.zip") if _is_whole_video(path)}
        return videos | {int(path.stem) for path in folder.glob("[0-9]*.png") if _is_whole(path)}

    def load(self, key: str, task: str, number: int) -> Picture:
        path = self.path(key, task, number)
        if not path.exists():
            with ZipFile(path.with_suffix(".zip")) as file:
                return [_read(file, name) for name in file.namelist()]
        with Image.open(path) as image:
            return image.convert("RGB")

    def save(self, key: str, task: str, images: Mapping[int, Picture]) -> None:
        """Saves images, or videos, by number."""
        finished = []
        for number, image in images.items():
            path = self.path(key, task, number, ".zip" if isinstance(image, list) else ".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.stem}.tmp")  # no other process draws this image
            if isinstance(image, list):
                _write_frames(temporary, image)
            else:
                _write_png(image, temporary)
            finished.append((temporary, path))
        # All are renamed at the end, so an interrupted batch is hardly ever there in part.
        for temporary, path in finished:
            os.replace(temporary, path)

    def scores(self) -> KnownScores:
        """Reads the scores of all earlier runs in this folder, from the journals of all processes."""
        known: KnownScores = {}
        for journal in sorted(self._journal.parent.glob("*.jsonl")):
            for line in journal.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # the process was killed while writing this line
                    continue
                values = zip(entry["numbers"], entry["values"], strict=True)
                known.setdefault((entry["images"], entry["score"], entry["reward"]), {}).update(values)
        return known

    def record(self, identity: tuple[str, str, str], values: Mapping[int, float | None]) -> None:
        """Appends scores of images, by number, to the journal. Threads may call it at the same time."""
        images, score, reward = identity
        entry = {"images": images, "score": score, "reward": reward, "numbers": list(values)}
        self._journal.parent.mkdir(parents=True, exist_ok=True)
        # One write at the end of the file, on a new line: a killed process may have left half a line.
        with open(self._journal, "ab", buffering=0) as file:
            file.write(f"\n{json.dumps({**entry, 'values': list(values.values())})}\n".encode())


def _write_png(image: Image.Image, file: Path | IO[bytes]) -> None:
    image.save(file, "PNG", compress_level=1)  # a quarter of the time for a tenth more bytes


def _write_frames(path: Path, frames: list[Image.Image]) -> None:
    with ZipFile(path, "w") as file:  # not compressed again
        for i, frame in enumerate(frames):
            with file.open(f"{i:05d}.png", "w") as one:
                _write_png(frame, one)


def _read(file: ZipFile, name: str) -> Image.Image:
    with file.open(name) as one, Image.open(one) as image:
        return image.convert("RGB")


def _is_whole_video(path: Path) -> bool:
    try:
        with ZipFile(path) as file:
            return file.testzip() is None  # reads to the end
    except (OSError, BadZipFile):
        return False


def _is_whole(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.verify()  # reads to the end, without decoding
    except (OSError, SyntaxError):  # Pillow raises a SyntaxError for a broken PNG
        return False
    return True


def merge(known: KnownScores, more: Iterable[KnownScores]) -> None:
    """Adds scores to `known`."""
    for scores in more:
        for identity, values in scores.items():
            known.setdefault(identity, {}).update(values)
