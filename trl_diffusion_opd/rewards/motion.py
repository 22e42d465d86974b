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

"""How much moves in a video: a reward without a model."""

import numpy as np
from PIL.Image import Image

from .base import Row
from .video import VideoReward


class Motion(VideoReward):
    """
    How much a video changes from frame to frame: the mean absolute difference of neighbouring frames, from 0 to 1.

    For frames `x_1 … x_n` of RGB values from 0 to 1 it is the mean of `|x_(i+1) - x_i|` over pixels, channels and the
    `n - 1` pairs. 0 is a still, and also a video of one frame; 1 flickers between opposite colours. It reads pixels
    alone: noise, flicker and cuts count like a thing that moves, and a large thing more than a small one. Use it beside
    a reward for what is to be seen, to notice a student whose videos stand still.
    """

    name = "motion"
    bounds = (0.0, 1.0)

    def _score_videos(self, prompts: list[str], videos: list[list[Image]], rows: list[Row]) -> list[float]:
        return [self._of(video) for video in videos]

    def _of(self, frames: list[Image]) -> float:
        sizes = list(dict.fromkeys(frame.size for frame in frames))
        if len(sizes) > 1:
            raise ValueError(f"Reward {self.name!r}: the frames of a video have different sizes, {sizes[:4]}.")
        # One pair at a time, since a whole video in floats takes gigabytes.
        before, total = np.asarray(frames[0], np.int16), 0.0
        for frame in frames[1:]:
            after = np.asarray(frame, np.int16)
            total += float(np.abs(after - before).mean(dtype=np.float64)) / 255
            before = after
        return total / max(len(frames) - 1, 1)
