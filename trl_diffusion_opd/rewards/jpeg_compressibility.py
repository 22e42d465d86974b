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

"""How well an image compresses: a reward without a model, for trying out a setup."""

import io

from PIL.Image import Image

from .base import Reward, Row


class JPEGCompressibility(Reward):
    """
    Minus the size of the image as a JPEG file of quality 95, in kB (1000 bytes).

    A higher score is better, and all are below 0: at 512 x 512 px one flat colour has -5 and coloured noise -308.
    Compare only scores of the same resolution, since the size grows with the number of pixels. The prompt is ignored
    and no model is loaded. For the opposite, incompressibility, change the sign.

    The scale is that of [DDPO](https://huggingface.co/papers/2305.13301)'s code. Flow-GRPO's code divides it by 500.
    """

    name = "jpeg_compressibility"
    bounds = (None, 0.0)

    def _score(self, prompts: list[str], images: list[Image], rows: list[Row]) -> list[float]:
        return [-_jpeg_bytes(image) / 1000 for image in images]


def _jpeg_bytes(image: Image) -> int:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=95)
    return file.tell()
