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

"""The image processor of rewards whose authors prepare images with torchvision: it takes another middle than transformers'."""

from typing import Any

import numpy as np
from transformers import CLIPImageProcessorPil
from transformers.image_utils import SizeDict


class CenterCropProcessor(CLIPImageProcessorPil):
    """
    CLIP's image processor with the centre crop of torchvision (`transforms.functional.center_crop`), which begins at
    `round(margin / 2)` where transformers' begins at `margin // 2`: one pixel apart where the margin is 3, 7, 11…

    Both resize alike: the shorter side to the size, the longer one to `int(size * long / short)`, by PIL.
    """

    # What transformers calls it with contradicts what its base class declares.
    def center_crop(self, image: np.ndarray, size: SizeDict, **kwargs: Any) -> np.ndarray:  # type: ignore[override]
        """The middle of an image, `[channels, height, width]`. One that is smaller is padded as in transformers."""
        top, left = image.shape[-2] - size.height, image.shape[-1] - size.width
        if min(top, left) < 0:
            return super().center_crop(image, size, **kwargs)
        top, left = round(top / 2), round(left / 2)
        return image[..., top : top + size.height, left : left + size.width]
