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
An image processor that crops like torchvision, for rewards whose authors used it. transformers crops other pixels.
"""

from typing import Any

import numpy as np
from transformers import CLIPImageProcessorPil
from transformers.image_utils import SizeDict


class CenterCropProcessor(CLIPImageProcessorPil):
    """
    CLIP's image processor with torchvision's centre crop (`transforms.functional.center_crop`). The crop starts at
    `round(margin / 2)`, and that of transformers at `margin // 2`. They differ by one pixel for margins of 3, 7, 11…

    Both resize in the same way with PIL: the shorter side to the size, the longer side to `int(size * long / short)`.
    """

    # transformers passes a `SizeDict` here, although its base class declares another type.
    def center_crop(self, image: np.ndarray, size: SizeDict, **kwargs: Any) -> np.ndarray:  # type: ignore[override]
        """The centre of an image, `[channels, height, width]`. A smaller image is padded as in transformers."""
        top, left = image.shape[-2] - size.height, image.shape[-1] - size.width
        if min(top, left) < 0:
            return super().center_crop(image, size, **kwargs)
        top, left = round(top / 2), round(left / 2)
        return image[..., top : top + size.height, left : left + size.width]
