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

"""The base class of the package's rewards, and the names and parameters of any reward function."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL.Image import Image
from torch import nn

from ..data.pictured_prompt import SOURCE_IMAGES


if TYPE_CHECKING:
    from transformers import TrainerState


RewardFunc = Callable[..., object]  # its return value is checked at each call
Row = Mapping[str, Any]  # a row of a dataset: the values of its columns by name
Generated = Image | Sequence[Image]  # what a model has made: a picture, or the frames of a video


class Reward:
    """
    A reward function with a name and a range, which knows what it can score.

    It is called like any other reward function. Samples to which it does not apply get `None`. The others are scored
    in batches by [`_score`], which subclasses implement.

    Attributes:
        name (`str`): its name on command lines, in logs and in reports. It belongs to the class, unless instances
            differ (as remote scorers do) and the constructor sets another.
        bounds (`tuple`): the smallest and the largest possible score, `None` for no bound.
        columns (`tuple[str, ...]`): the dataset's columns that it reads besides `prompt`.
        takes_frames (`bool`): whether it scores videos, which are lists of frames. Others refuse them.

    Args:
        batch_size (`int`, *optional*, defaults to `16`): number of images that are scored at a time.
    """

    name: str
    bounds: tuple[float | None, float | None]
    columns: tuple[str, ...] = ()
    takes_frames: bool = False

    def __init__(self, batch_size: int = 16):
        if batch_size < 1:
            raise ValueError(f"Reward {self.name!r}: batch_size={batch_size}, it must be at least 1.")
        self.batch_size = batch_size

    @property
    def fingerprint(self) -> str:
        """Differs between rewards whose scores may differ. Stored scores are reused only with the same fingerprint."""
        return self.name

    @property
    def score_names(self) -> tuple[str, ...]:
        """Names of the scores that [`named_scores`] returns. The reward's own name comes first."""
        return (self.name,)

    def named_scores(
        self,
        prompts: Sequence[str],
        images: Sequence[Generated],
        completions: Sequence[Generated] | None = None,
        trainer_state: "TrainerState | None" = None,
        **columns: Sequence[object],
    ) -> dict[str, list[float | None]]:
        """
        All scores to log, by name: those of the reward itself and, if it has components, those of the components.
        """
        return {self.name: self(prompts, images, completions, trainer_state, **columns)}

    def why_not(self, prompt: str, columns: Row) -> str | None:
        """
        Says why a sample can't be scored; `None` if it can.

        Such a sample in the reward's own task is refused before the first step. In other tasks its score is `None`.
        """
        missing = [name for name in self.columns if columns.get(name) is None]
        return f"it has no value in column {missing[0]!r}" if missing else None

    def __call__(
        self,
        prompts: Sequence[str],
        images: Sequence[Generated],
        completions: Sequence[Generated] | None = None,
        trainer_state: "TrainerState | None" = None,
        **columns: Sequence[object],
    ) -> list[float | None]:
        """
        Scores images.

        Args:
            prompts (`list[str]`), images (`list[PIL.Image.Image]`): the images, each with its prompt. Videos are lists
                of frames, which only rewards with `takes_frames` score.
            completions, trainer_state: arguments that every reward function gets; not used here.
            columns (`list`): other columns of the dataset, with one value for each image.

        Returns:
            `list[float | None]`: one score for each image, `None` where the reward does not apply.

        Raises:
            [`ValueError`]: if one of the images is a video, and the reward scores pictures.
        """
        rows: list[Row] = [{name: values[i] for name, values in columns.items()} for i in range(len(images))]
        applicable = [i for i, row in enumerate(rows) if self.why_not(prompts[i], row) is None]
        scores: list[float | None] = [None] * len(images)
        for start in range(0, len(applicable), self.batch_size):
            batch = applicable[start : start + self.batch_size]
            values = self._score_batch(
                [prompts[i] for i in batch], [images[i] for i in batch], [rows[i] for i in batch]
            )
            for i, value in zip(batch, values, strict=True):
                scores[i] = value
        return scores

    def _score_batch(self, prompts: list[str], images: list[Generated], rows: list[Row]) -> Sequence[float | None]:
        """Scores a batch of images, in any mode, to which the reward applies."""
        return self._score(prompts, [self._picture(image).convert("RGB") for image in images], rows)

    def _picture(self, image: Generated) -> Image:
        if isinstance(image, Sequence):
            raise ValueError(
                f"Reward {self.name!r} scores pictures, and was given a video, a list of {len(image)} frames. Use "
                f"'frames({self.name})' on a command line, or frames(reward, every=8) of trl_diffusion_opd.rewards: it "
                "scores a video by its frames."
            )
        return image

    def _score(self, prompts: list[str], images: list[Image], rows: list[Row]) -> Sequence[float | None]:
        """Scores a batch of RGB images to which the reward applies. `rows` are their other columns."""
        raise NotImplementedError


def frames_of(image: Generated) -> Sequence[Image]:
    """The frames of a video. A picture is a video of one frame."""
    return [image] if isinstance(image, Image) else image


def source_pictures(row: Row) -> Sequence[Image]:
    """The pictures that a row's prompt edits or refers to, as they are; none if the column is missing or empty."""
    return row.get(SOURCE_IMAGES) or []


def parameters_of(function: RewardFunc) -> Mapping[str, inspect.Parameter] | None:
    """The parameters of a reward function by name; `None` if it has no signature (not written in Python)."""
    # A module accepts anything and passes it to its forward.
    given = function.forward if isinstance(function, nn.Module) else function
    try:
        return inspect.signature(given).parameters
    except ValueError:
        return None


def reward_name(function: RewardFunc) -> str:
    """The name under which a reward is logged."""
    if isinstance(function, Reward):
        return function.name
    if isinstance(function, functools.partial):
        return reward_name(function.func)
    return function.__name__ if inspect.isroutine(function) else type(function).__name__


def reward_fingerprint(function: RewardFunc) -> str:
    """
    A string that differs between rewards whose scores may differ. A plain function is known by where it is defined.
    """
    if isinstance(function, Reward):
        return function.fingerprint
    if isinstance(function, functools.partial):
        return f"{reward_fingerprint(function.func)}{function.args}{sorted(function.keywords.items())}"
    definition = function if inspect.isroutine(function) else type(function)
    return f"{definition.__module__}:{definition.__qualname__}"
