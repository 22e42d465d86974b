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

"""Checks that a pipeline can use the pictures of a dataset's rows."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
from datasets import Dataset

from ..data.source_images import SOURCE_IMAGES, has_source_images, picture_numbers, picture_sizes
from ..data.tasks import SINGLE_TASK
from ..guards.redaction import shown
from .pictures import PICTURES
from .velocity import VelocityField


# Pictures of so many sizes are tried at most.
_MOST_SIZES = 32


def picture_problems(field: VelocityField, dataset: Dataset, rows: Mapping[str, np.ndarray], name: str) -> list[str]:
    """
    Says why a pipeline can't use the pictures of a dataset, one sentence each.

    Args:
        field ([`VelocityField`]): the pipeline.
        dataset ([`~datasets.Dataset`]), rows (`dict[str, np.ndarray]`): the dataset, and the rows of each task.
        name (`str`): how messages call the dataset.
    """
    of_pipeline = type(field.pipeline).__name__
    if not has_source_images(dataset):
        if not field.needs_pictures:
            return []
        return [
            f"{of_pipeline} draws nothing without a picture, and {name} has none. Give each row a list of them in the "
            f"column {SOURCE_IMAGES!r}, or the same to all with generation_kwargs={{{PICTURES!r}: ...}}."
        ]
    numbers = {task: picture_numbers(dataset, of_task) for task, of_task in rows.items()}
    most = max((number for of_task in numbers.values() for number in of_task), default=0)
    if most and not field.takes_pictures:
        return [f"{name} has pictures in {SOURCE_IMAGES!r}, but {of_pipeline} takes none. Remove the column."]
    if most and field.has_common_picture:
        return [
            f"{name} has pictures in {SOURCE_IMAGES!r}, but generation_kwargs has {PICTURES!r}, which all rows would get. "
            "Leave it out."
        ]
    problems = []
    if field.needs_pictures:
        problems += _missing(numbers, rows, name, of_pipeline)
    if most and (field.height is None or field.width is None):
        problems.append(
            f"{name} has pictures, but height and width are not set: {of_pipeline} would draw in a size that depends on "
            "the picture. Set both."
        )
    elif not problems:
        problems += _unfit_numbers(field, numbers, name)
    if most and not problems and not field.sized:
        problems += _unfit_sizes(field, dataset, rows, name)
    return problems


def _missing(
    numbers: Mapping[str, list[int]], rows: Mapping[str, np.ndarray], name: str, of_pipeline: str
) -> list[str]:
    problems = []
    for task, of_task in numbers.items():
        if none := [row for row, number in zip(rows[task].tolist(), of_task, strict=True) if number == 0]:
            called = "" if task == SINGLE_TASK and len(rows) == 1 else f" of task {task!r}"
            problems.append(
                f"{name} has {len(none)} of {len(of_task)} rows{called} without a picture in {SOURCE_IMAGES!r}, the first "
                f"is row {none[0]}. {of_pipeline} draws nothing without one: give each row one, or remove these rows."
            )
    return problems


def _unfit_numbers(field: VelocityField, numbers: Mapping[str, list[int]], name: str) -> list[str]:
    """Tries each number of pictures that occurs, as far as the denoiser's inputs."""
    problems = []
    for number in sorted({number for of_task in numbers.values() for number in of_task if number}):
        try:
            field.try_pictures([field.trial_size] * number)
        except (ValueError, RuntimeError, TypeError, IndexError, AssertionError) as error:
            count = sum(of_task.count(number) for of_task in numbers.values())
            problems.append(
                f"{name} has {count} row(s) with {number} picture(s), which {type(field.pipeline).__name__} can't take: "
                f"{shown(error, 200)}"
            )
    return problems


def _unfit_sizes(field: VelocityField, dataset: Dataset, rows: Mapping[str, np.ndarray], name: str) -> list[str]:
    """
    Tries each size of pictures that occurs with a pipeline whose call takes no size. Of all pictures it must draw one size:
    noise levels depend on it, and latents of a batch must have one shape.
    """
    of_pipeline, (width, height) = type(field.pipeline).__name__, field.trial_size
    unsized = f"{of_pipeline} takes no size, and draws in one that follows from the picture's."
    bring = "Bring all pictures to one size, and set width and height to it."
    counts = Counter(sizes for of_task in rows.values() for sizes in picture_sizes(dataset, of_task))
    if len(counts) > _MOST_SIZES:
        return [f"{name} has pictures of {len(counts)} sizes. {unsized} {bring}"]
    expected = field.try_pictures([(width, height)])
    for sizes, count in counts.items():
        if sizes != ((width, height),) and field.try_pictures(sizes) != expected:
            shown_sizes = ", ".join(f"{wide} x {high}" for wide, high in sizes)
            return [
                f"{name} has {count} row(s) with pictures of {shown_sizes} pixels, for which {of_pipeline} draws another size "
                f"than for {width} x {height}, which width and height say. {unsized} {bring}"
            ]
    return []
