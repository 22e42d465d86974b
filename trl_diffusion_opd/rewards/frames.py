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

"""Makes a reward for videos from any reward for images."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from .base import Generated, Reward, RewardFunc, Row, reward_fingerprint
from .combined import load_reward
from .scoring import Scores, call_reward, rows_of, score_names
from .video import some_frames


if TYPE_CHECKING:
    from transformers import TrainerState


Reduce = Literal["mean", "min", "max"]

_REDUCE: Mapping[str, Callable[[list[float]], float]] = {"mean": statistics.fmean, "min": min, "max": max}


class Frames(Reward):
    """
    Scores a video by its frames, with any reward for images. `"frames(pickscore)"` is its name on a command line.

    Frames `0`, `every`, `2 * every`, … are scored as pictures with the video's prompt and columns, in the batches of
    the reward itself. The video's score is their mean, or the lowest or highest. It is `None` where the reward has no
    score for one of these frames, as a sum is. A picture counts as a video of one frame.

    Scores of components of a sum are reduced in the same way. Values that a function logs with `log_extra` have one
    entry a frame and are not shown.

    Args:
        reward (`str` or reward function): the reward for images: a name, an import path, a [`Reward`] or a function.
        every (`int`, *optional*, defaults to `8`): every how many frames one is scored. The first one always is.
        reduce (`str`, *optional*, defaults to `"mean"`): `"mean"`, `"min"` or `"max"` of the frames' scores.
        name (`str`, *optional*): name of the metric. Defaults to the reward's own.
        reward_kwargs (`dict`, *optional*): arguments of a reward that is given by name.

    Raises:
        [`ValueError`]: if the reward cannot be loaded or already scores videos, or an option is wrong.
    """

    name = "frames"
    takes_frames = True

    def __init__(
        self,
        reward: str | RewardFunc,
        every: int = 8,
        reduce: Reduce = "mean",
        name: str | None = None,
        reward_kwargs: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        problems = frames_problems(every, reduce)
        if not isinstance(reward, str) and reward_kwargs:
            problems.append("reward_kwargs are for a reward that is given by name.")
        if not problems:  # loading may take long
            reward = load_reward(reward, **(reward_kwargs or {})) if isinstance(reward, str) else reward
            if not callable(reward) or isinstance(reward, type):
                problems.append(f"{reward!r} is neither a name nor a reward function.")
            elif isinstance(reward, Reward) and reward.takes_frames:
                problems.append(f"{reward.name!r} scores videos already. Use it without frames(...).")
        if problems:
            raise ValueError("\n".join(f"Reward {name or self.name!r}: {problem}" for problem in problems))
        assert not isinstance(reward, str)  # loaded
        self.reward = reward
        self.every = every
        self.reduce = reduce
        inner, *parts = score_names(reward)
        self.name = name or inner
        # Of components too, which are named inner/part.
        self._names = {inner: self.name, **{part: f"{self.name}/{part.removeprefix(f'{inner}/')}" for part in parts}}
        self.bounds = reward.bounds if isinstance(reward, Reward) else (None, None)
        self.columns = reward.columns if isinstance(reward, Reward) else ()

    @property
    def fingerprint(self) -> str:
        return f"{self.name}:frames({reward_fingerprint(self.reward)}, every={self.every}, reduce={self.reduce})"

    @property
    def score_names(self) -> tuple[str, ...]:
        return tuple(self._names.values())

    def why_not(self, prompt: str, columns: Row) -> str | None:
        return self.reward.why_not(prompt, columns) if isinstance(self.reward, Reward) else None

    def __call__(
        self,
        prompts: Sequence[str],
        images: Sequence[Generated],
        completions: Sequence[Generated] | None = None,
        trainer_state: "TrainerState | None" = None,
        **columns: Sequence[object],
    ) -> list[float | None]:
        return self.named_scores(prompts, images, completions, trainer_state, **columns)[self.name]

    def named_scores(
        self,
        prompts: Sequence[str],
        images: Sequence[Generated],
        completions: Sequence[Generated] | None = None,
        trainer_state: "TrainerState | None" = None,
        **columns: Sequence[object],
    ) -> Scores:
        """The videos' scores under the reward's name, and those of its components as `name/component`."""
        videos = [some_frames(self.name, image)[:: self.every] for image in images]
        rows = [row for row, video in zip(rows_of(prompts, columns), videos, strict=True) for _ in video]
        scores = call_reward(self.reward, rows, [frame for video in videos for frame in video], trainer_state)
        lengths = [len(video) for video in videos]
        return {self._names[key]: self._of_videos(values, lengths) for key, values in scores.items()}

    def _of_videos(self, values: list[float | None], lengths: list[int]) -> list[float | None]:
        remaining = iter(values)
        return [self._reduced([next(remaining) for _ in range(length)]) for length in lengths]

    def _reduced(self, values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return _REDUCE[self.reduce](known) if len(known) == len(values) else None


def frames(reward: str | RewardFunc, every: int = 8, reduce: Reduce = "mean", name: str | None = None) -> Frames:
    """
    Makes a reward for videos from any reward for images. See [`Frames`].

    ```python
    frames("pickscore")                             # on a command line "frames(pickscore)"
    frames(my_reward, every=1, reduce="min", name="worst_frame")
    ```
    """
    return Frames(reward, every, reduce, name)


def frames_problems(every: object, reduce: object) -> list[str]:
    """Says what is wrong with the options of [`Frames`], one sentence each."""
    problems = []
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        problems.append(f"every={every!r}: it must be a whole number of at least 1.")
    if reduce not in _REDUCE:
        problems.append(f"reduce={reduce!r}: it must be one of {', '.join(map(repr, _REDUCE))}.")
    return problems
