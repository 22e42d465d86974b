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

"""Tries rewards on images of noise, and tells a reward's own errors from others."""

import inspect
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL.Image import Image

from ..guards.redaction import shown
from .base import Generated, RewardFunc, Row, reward_name
from .scoring import OnTimeout, RewardTimeout, Scorer, call_reward
from .server_calls import RemoteRewardError


if TYPE_CHECKING:
    from transformers import TrainerState


# Two images: one value, whatever the number of images, would be right for one by accident.
NUM_TRIED = 2
_PACKAGE = Path(__file__).parents[1]
# The files that call functions of a user, or subclasses of `Reward`.
_CALLERS = ("scoring.py", "base.py", "combined.py", "video.py")


def trial_error(
    function: RewardFunc,
    task: str,
    rows: Sequence[Row],
    image: Generated,
    timeout: float | None,
    on_timeout: OnTimeout = "raise",
    trainer_state: "TrainerState | None" = None,
) -> Exception | None:
    """
    Has a reward score [`NUM_TRIED`] images in one call.

    Args:
        function (reward function), task (`str`): the reward, and the images' task for messages.
        rows (`list[dict]`): the dataset's first rows of the task. If there are fewer than images, they are repeated.
        image (`PIL.Image.Image`, or a list of these): any image of the right size, or the frames of any video.
        timeout (`float`, *optional*), on_timeout (`str`, *optional*, defaults to `"raise"`), trainer_state
            ([`~transformers.TrainerState`], *optional*): as in [`Scorer`].

    Returns:
        The error of a reward that can't; `None` if it can.
    """
    tried = [rows[n % len(rows)] for n in range(NUM_TRIED)]
    try:
        with Scorer([function], trainer_state, timeout, on_timeout, task=task) as scorer:
            scorer.submit(tried, [_copied(image) for _ in tried])
            scorer.results()
    except Exception as error:  # whatever the function raises
        return error
    return None


def _copied(image: Generated) -> Generated:
    return image.copy() if isinstance(image, Image) else [frame.copy() for frame in image]


def trial_problem(function: RewardFunc, whose: str, row: Row, error: Exception) -> str:
    """
    Says in one sentence that a reward failed its trial.

    Args:
        function (reward function), whose (`str`): the reward, and whose images it was to score, such as `"of task 'a'"`.
        row (`dict`): the first row of the trial.
        error (`Exception`): as [`trial_error`] returned it.
    """
    own = own_frames(error)
    place = f" ({Path(own[0].filename).name}, line {own[0].lineno})" if own else ""
    return (
        f"reward {reward_name(function)!r} can't score an image {whose}, for the prompt '{shown(row['prompt'])}': "
        f"{type(error).__name__}: {shown(error, 500).rstrip('.')}{place}."
    )


def is_of_reward(error: BaseException) -> bool:
    """
    Whether an error is the end of a call of a reward function: a function of the user's has raised it, what it
    returned is refused, a reward's server failed, or a call took too long. An error inside of one of this package's
    own rewards is not.
    """
    if isinstance(error, RewardTimeout | RemoteRewardError):
        return True
    code = inspect.unwrap(call_reward).__code__
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    called = any(frame.f_code is code for frame, _ in traceback.walk_tb(error.__traceback__))
    ours = [Path(file).name for file in files if _PACKAGE in Path(file).parents]
    return called and ours[-1] in _CALLERS


def own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The places in a user's reward function, and in what it called, that an error passed: none of this package's."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [n for n, frame in enumerate(frames) if _PACKAGE in Path(frame.filename).parents]
    return list(frames[ours[-1] + 1 :] if ours else frames)
