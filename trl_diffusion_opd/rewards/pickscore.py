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

"""PickScore: predicts which of two images people would pick."""

import torch
from PIL.Image import Image

from .clip import CLIP_MODEL_FILES, CLIP_OPTIONAL_FILES, CLIP_PROCESSOR_FILES, ClipReward
from .model_files import find_files


class PickScore(ClipReward):
    """
    PickScore (Kirstain et al., 2023, arXiv 2305.01569, Eq. 1): the scaled cosine of a CLIP ViT-H/14 that was tuned on
    people's choices between two images of a prompt.

    The score is `exp(logit_scale) * cos(image, prompt)`, about 18 to 25 for generated images. This is the scale of the
    model itself and of Table 1 of DiffusionOPD (22.34 for SD3.5-M with guidance). Training code of the Flow-GRPO
    family divides it by 26 to bring it near 1; multiply such figures by 26 to compare them.

    Args:
        model (`str`, *optional*, defaults to `"yuvalkirstain/PickScore_v1"`): CLIP model, a Hub id or a local folder.
        revision (`str`, *optional*): the model's branch, tag or commit. Defaults to a pinned commit for the default
            model, else to `main`.
        processor (`str`, *optional*, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`): tokenizer and image
            processor, as the model's card says.
        processor_revision (`str`, *optional*): the same as `revision`, for the processor.
        device, dtype, batch_size: see [`ModelReward`].

    Raises:
        [`ValueError`]: if a model cannot be loaded completely; the message says which and why.
    """

    name = "pickscore"
    bounds = (-100.0, 100.0)  # CLIP caps the scale at 100

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        revision: str | None = None,
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        processor_revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "float32",
        batch_size: int = 16,
    ):
        super().__init__(
            find_files(self.name, model, revision, CLIP_MODEL_FILES, CLIP_OPTIONAL_FILES),
            find_files(self.name, processor, processor_revision, CLIP_PROCESSOR_FILES, CLIP_OPTIONAL_FILES[1:]),
            device=device,
            dtype=dtype,
            batch_size=batch_size,
        )

    def _predict(self, prompts: list[str], images: list[Image]) -> torch.Tensor:
        return self.logit_scale * self._cosine(prompts, images)
