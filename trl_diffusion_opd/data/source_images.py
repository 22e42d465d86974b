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
The column `source_images`: for each row a list of 0 to n pictures that its prompt is about. Datasets have them in several
forms; here they become one.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import xxhash
from datasets import Dataset, Image, List, Value
from datasets import Sequence as OldSequence
from PIL import UnidentifiedImageError

from ..guards.redaction import shown
from .pictured_prompt import SOURCE_IMAGES


# Pictures that are decoded whole before the first step. Of the others only the beginning is read.
MOST_DECODED = 2_000
_AT_A_TIME = 256
_TEXT, _BYTES = ("string", "large_string"), ("binary", "large_binary")


def plain_source_images(dataset: Any, column: str = SOURCE_IMAGES) -> Any:
    """
    Turns a column of pictures into lists of them, which are decoded to RGB as they are read, and calls it
    `source_images`. A dict of datasets is converted part by part.

    A row may have one picture, a list of pictures, or none; a picture may be a `datasets.Image`, the name of a file,
    or the bytes of one. Anything else is returned unchanged; [`source_image_problems`] says what is wrong with it.
    """
    if isinstance(dataset, dict):
        return {name: plain_source_images(part, column) for name, part in dataset.items()}
    if (
        not isinstance(dataset, Dataset)
        or column not in dataset.column_names
        or not _is_known(dataset.features[column])
    ):
        return dataset
    if not isinstance(dataset.features[column], List | OldSequence):
        dataset = dataset.cast_column(column, Image(decode=False))
        features = dataset.features.copy()
        features[column] = List(Image(decode=False))
        dataset = dataset.map(
            _as_lists, batched=True, features=features, fn_kwargs={"column": column}, desc="Pictures"
        )
    wanted = List(Image(mode="RGB"))
    if dataset.features[column] != wanted:
        dataset = dataset.cast_column(column, wanted)
    if column != SOURCE_IMAGES and SOURCE_IMAGES not in dataset.column_names:
        dataset = dataset.rename_column(column, SOURCE_IMAGES)
    return dataset


def beside(dataset: Dataset, folder: Path, column: str = SOURCE_IMAGES) -> Dataset:
    """Makes names of files in a column of pictures relative to a folder: that of the file with the prompts."""
    if column not in dataset.column_names:
        return dataset
    feature = dataset.features[column]
    of_text = feature.feature if isinstance(feature, List | OldSequence) else feature
    if not (isinstance(of_text, Value) and of_text.dtype in _TEXT):
        return dataset

    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(one) for one in value]
        return value and str(folder / value)

    names = [placed(value) for value in dataset[column]]
    features = dataset.features.copy()
    return dataset.map(
        lambda _, numbers: {column: [names[n] for n in numbers]}, with_indices=True, batched=True, features=features
    )


def _as_lists(columns: dict[str, list[Any]], column: str) -> dict[str, list[Any]]:
    return {column: [[] if one is None else [one] for one in columns[column]]}


def _is_known(feature: Any) -> bool:
    if isinstance(feature, List | OldSequence):
        return _is_known(feature.feature) or feature.feature == Value("null")
    return isinstance(feature, Image) or isinstance(feature, Value) and feature.dtype in (*_TEXT, *_BYTES)


def has_source_images(dataset: Any) -> bool:
    """Whether a dataset has a column of pictures that [`plain_source_images`] has converted."""
    return isinstance(dataset, Dataset) and dataset.features.get(SOURCE_IMAGES) == List(Image(mode="RGB"))


def encoded_rows(dataset: Dataset, rows: np.ndarray | Sequence[int]) -> Iterator[list[dict[str, Any]]]:
    """Yields the pictures of rows as they are stored, with `bytes` and `path`, without decoding any."""
    part = dataset.select(rows).select_columns([SOURCE_IMAGES]).with_format("arrow")
    for table in part.iter(_AT_A_TIME):
        for pictures in table[SOURCE_IMAGES].to_pylist():
            yield pictures or []


def pictures_digest(dataset: Dataset, rows: np.ndarray | Sequence[int]) -> str:
    """A hash of the pictures of rows, of the files' bytes. It tells no path."""
    digest = xxhash.xxh3_64()
    for pictures in encoded_rows(dataset, rows):
        digest.update(f"{len(pictures)} ".encode())
        for picture in pictures:
            digest.update(_content(picture))
    return digest.hexdigest()


def _content(picture: Mapping[str, Any]) -> bytes:
    return picture["bytes"] if picture["bytes"] is not None else Path(picture["path"]).read_bytes()


def _opened(picture: Mapping[str, Any]) -> PIL.Image.Image:
    """A picture of which only the beginning is read."""
    return PIL.Image.open(io.BytesIO(picture["bytes"]) if picture["bytes"] is not None else picture["path"])


def _size(picture: Mapping[str, Any]) -> tuple[int, int]:
    with _opened(picture) as image:
        return image.size


def _pixels(picture: Mapping[str, Any]) -> int:
    width, height = _size(picture)
    return width * height


def picture_numbers(dataset: Dataset, rows: np.ndarray | Sequence[int]) -> list[int]:
    """How many pictures each row has."""
    return [len(pictures) for pictures in encoded_rows(dataset, rows)]


def picture_sizes(dataset: Dataset, rows: np.ndarray | Sequence[int]) -> list[tuple[tuple[int, int], ...]]:
    """Width and height of each row's pictures. None is decoded."""
    return [tuple(_size(picture) for picture in pictures) for pictures in encoded_rows(dataset, rows)]


def most_pictured(dataset: Dataset, rows: Sequence[int]) -> int:
    """The first row with the most pictures; among rows with as many, that with the most pixels. None is decoded."""
    sizes = [(len(pictures), sum(map(_pixels, pictures))) for pictures in encoded_rows(dataset, rows)]
    return rows[sizes.index(max(sizes))]


def source_image_problems(dataset: Dataset, column: str, name: str) -> list[str]:
    """
    Says what is wrong with a dataset's pictures, one sentence each: no such column, of a kind that is none, missing, or
    broken.

    Args:
        dataset ([`~datasets.Dataset`]), name (`str`): as [`plain_source_images`] returned it, and how messages call it.
        column (`str`): the name that the column had before.
    """
    if column != SOURCE_IMAGES and column in dataset.column_names and SOURCE_IMAGES in dataset.column_names:
        return [
            f"{name} has the columns {column!r} and {SOURCE_IMAGES!r}. Remove the one that is not meant "
            "(source_images_column names the pictures)."
        ]
    if not has_source_images(dataset):
        if column in dataset.column_names:
            return [
                f"{name}: column {column!r} holds {shown(dataset.features[column], 80)}, but each row of it must have a "
                "picture or a list of pictures: datasets.Image, names of files, or bytes."
            ]
        if column == SOURCE_IMAGES:  # none are needed; who names a column means one that is there
            return []
        return [
            f"{name} has no column {column!r}, which source_images_column names; it has "
            f"{shown(dataset.column_names, 200)}."
        ]
    rows = range(len(dataset))
    step = max(1, sum(picture_numbers(dataset, rows)) // MOST_DECODED)
    broken: list[tuple[int, str]] = []
    with ThreadPoolExecutor() as pool:
        # Some rows at a time: their bytes may be in the dataset, which need not fit into memory.
        for first in range(0, len(dataset), _AT_A_TIME):
            numbers = rows[first : first + _AT_A_TIME]
            wholes = (row % step == 0 for row in numbers)
            found = pool.map(_problem_of, encoded_rows(dataset, numbers), wholes)
            broken += [(row, problem) for row, problem in zip(numbers, found, strict=True) if problem is not None]
    if not broken:
        return []
    row, problem = broken[0]
    others = f" (and {len(broken) - 1} other rows)" if len(broken) > 1 else ""
    return [f"{name}, column {column!r}, row {row}{others}: {problem}"]


def _problem_of(pictures: Sequence[Mapping[str, Any]], whole: bool) -> str | None:
    for number, picture in enumerate(pictures):
        where = f"picture {number + 1} of {len(pictures)}" if len(pictures) > 1 else "the picture"
        if picture is None or picture["bytes"] is None and picture["path"] is None:
            return f"{where} is empty. Leave it out of the row's list."
        file = f" {shown(Path(picture['path']).name, 80)!r}" if picture["bytes"] is None else ""
        try:
            with _opened(picture) as image:
                if whole:
                    image.load()
        except FileNotFoundError:
            return f"{where}: there is no file{file}. Names are relative to the working folder, or to the prompt file."
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            return f"{where}{file} can't be read: {shown(error, 120)}."
    return None
