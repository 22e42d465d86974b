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

"""The base class of rewards that look at all frames of a video."""

from collections.abc import Sequence

from PIL.Image import Image

from .base import Generated, Reward, Row, frames_of


class VideoReward(Reward):
    """
    A reward that scores videos, as lists of frames. Subclasses implement [`_score_videos`].

    A picture counts as a video of one frame. A video without frames is refused.

    Args:
        batch_size (`int`, *optional*, defaults to `16`): number of videos that are scored at a time.
    """

    takes_frames = True

    def _score_batch(self, prompts: list[str], images: list[Generated], rows: list[Row]) -> Sequence[float | None]:
        return self._score_videos(
            prompts, [[frame.convert("RGB") for frame in some_frames(self.name, image)] for image in images], rows
        )

    def _score_videos(self, prompts: list[str], videos: list[list[Image]], rows: list[Row]) -> Sequence[float | None]:
        """Scores a batch of videos of RGB frames to which the reward applies. `rows` are their other columns."""
        raise NotImplementedError


def some_frames(reward: str, image: Generated) -> Sequence[Image]:
    """The frames of a video, which must have one. `reward` is the name for the message."""
    frames = frames_of(image)
    if not frames:
        raise ValueError(f"Reward {reward!r}: a video has no frames.")
    return frames
