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

"""CLIPScore: how well an image fits its prompt."""

import torch
from PIL.Image import Image

from .clip import CLIP_MODEL_FILES, CLIP_OPTIONAL_FILES, CLIP_PROCESSOR_FILES, ClipReward
from .model_files import find_files


class CLIPScore(ClipReward):
    """
    The plain cosine between CLIP ViT-L/14's embeddings of the image and of the prompt.

    Scores are about 0.2 to 0.35 for images that fit. This is the scale of Table 1 of DiffusionOPD (0.285 for SD3.5-M
    with guidance) and of the Flow-GRPO family, which divides the model's logits by 100, its `exp(logit_scale)`. Other
    metrics with this name have other values: Hessel et al. (2021, arXiv 2104.08718) use `2.5 * max(cos, 0)` of a
    ViT-B/32 with "A photo depicts" before the text, others use `100 * max(cos, 0)`.

    Args:
        model (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`): CLIP model with its processor, a Hub
            id or a local folder.
        revision (`str`, *optional*): the model's branch, tag or commit. Defaults to a pinned commit for the default
            model, else to `main`.
        device, dtype, batch_size: see [`ModelReward`].

    Raises:
        [`ValueError`]: if the model cannot be loaded completely; the message says why.
    """

    name = "clipscore"
    bounds = (-1.0, 1.0)

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "float32",
        batch_size: int = 16,
    ):
        files = find_files(self.name, model, revision, CLIP_MODEL_FILES + CLIP_PROCESSOR_FILES, CLIP_OPTIONAL_FILES)
        super().__init__(files, files, device=device, dtype=dtype, batch_size=batch_size)

    def _predict(self, prompts: list[str], images: list[Image]) -> torch.Tensor:
        return self._cosine(prompts, images)
