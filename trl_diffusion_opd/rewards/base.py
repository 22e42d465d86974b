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

"""What the rewards of this package have in common."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL.Image import Image
from torch import nn


if TYPE_CHECKING:
    from transformers import TrainerState


RewardFunc = Callable[..., object]  # what it returns is checked when it is called
Row = Mapping[str, Any]  # of a dataset: its columns by name, whatever they hold


class Reward:
    """
    A reward function with a name, a range, and an opinion on what it can score.

    It is called as any other reward function. Samples that it does not apply to get `None`; the others are scored in
    batches by [`_score`], which subclasses implement.

    Attributes:
        name (`str`): its name on command lines, in logs and in reports. A class has one; where its instances differ, as
            several remote scorers do, the constructor sets another.
        bounds (`tuple`): the least and the greatest value it can have, `None` where there is no bound.
        columns (`tuple[str, ...]`): columns of the dataset that it reads besides `prompt`.

    Args:
        batch_size (`int`, *optional*, defaults to `16`): images at a time.
    """

    name: str
    bounds: tuple[float | None, float | None]
    columns: tuple[str, ...] = ()

    def __init__(self, batch_size: int = 16):
        if batch_size < 1:
            raise ValueError(f"Reward {self.name!r}: batch_size={batch_size}, it must be at least 1.")
        self.batch_size = batch_size

    @property
    def fingerprint(self) -> str:
        """Tells two rewards apart whose scores may differ: stored scores of another fingerprint are not used again."""
        return self.name

    @property
    def score_names(self) -> tuple[str, ...]:
        """Names of the values that [`named_scores`] returns. The reward's own comes first."""
        return (self.name,)

    def named_scores(
        self,
        prompts: Sequence[str],
        images: Sequence[Image],
        completions: Sequence[Image] | None = None,
        trainer_state: "TrainerState | None" = None,
        **columns: Sequence[object],
    ) -> dict[str, list[float | None]]:
        """Everything that is to be logged of this reward, by name: a call's values and, where it has parts, theirs."""
        return {self.name: self(prompts, images, completions, trainer_state, **columns)}

    def why_not(self, prompt: str, columns: Row) -> str | None:
        """
        Why a sample can't be scored, `None` if it can.

        On a task of its own this is refused before the first step; on another task's prompt the score is `None`.
        """
        missing = [name for name in self.columns if columns.get(name) is None]
        return f"it has no value in column {missing[0]!r}" if missing else None

    def __call__(
        self,
        prompts: Sequence[str],
        images: Sequence[Image],
        completions: Sequence[Image] | None = None,
        trainer_state: "TrainerState | None" = None,
        **columns: Sequence[object],
    ) -> list[float | None]:
        """
        Scores images.

        Args:
            prompts (`list[str]`), images (`list[PIL.Image.Image]`): one prompt an image.
            completions, trainer_state: as every reward function is given them; not used.
            columns (`list`): other columns of the dataset, a value an image.

        Returns:
            `list[float | None]`: a value an image, `None` where the reward does not apply.
        """
        rows: list[Row] = [{name: values[i] for name, values in columns.items()} for i in range(len(images))]
        applicable = [i for i, row in enumerate(rows) if self.why_not(prompts[i], row) is None]
        scores: list[float | None] = [None] * len(images)
        for start in range(0, len(applicable), self.batch_size):
            batch = applicable[start : start + self.batch_size]
            values = self._score(
                [prompts[i] for i in batch], [images[i].convert("RGB") for i in batch], [rows[i] for i in batch]
            )
            for i, value in zip(batch, values, strict=True):
                scores[i] = value
        return scores

    def _score(self, prompts: list[str], images: list[Image], rows: list[Row]) -> Sequence[float | None]:
        """Scores of RGB images that the reward applies to."""
        raise NotImplementedError


def parameters_of(function: RewardFunc) -> Mapping[str, inspect.Parameter] | None:
    """What a reward function can be given, by name; `None` of one that is not written in Python."""
    # Every module takes anything, and hands it to its forward.
    given = function.forward if isinstance(function, nn.Module) else function
    try:
        return inspect.signature(given).parameters
    except ValueError:
        return None


def reward_name(function: RewardFunc) -> str:
    """Name under which a reward is logged."""
    if isinstance(function, Reward):
        return function.name
    if isinstance(function, functools.partial):
        return reward_name(function.func)
    return function.__name__ if inspect.isroutine(function) else type(function).__name__


def reward_fingerprint(function: RewardFunc) -> str:
    """What tells a reward from others whose scores may differ. Of a plain function that is where it is defined."""
    if isinstance(function, Reward):
        return function.fingerprint
    if isinstance(function, functools.partial):
        return f"{reward_fingerprint(function.func)}{function.args}{sorted(function.keywords.items())}"
    definition = function if inspect.isroutine(function) else type(function)
    return f"{definition.__module__}:{definition.__qualname__}"
