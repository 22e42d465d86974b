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

"""HPS v2.1: predicts which generated image of a prompt people prefer."""

import html

import ftfy
import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image

from .clip import CLIP_MODEL_FILES, CLIP_OPTIONAL_FILES, CLIP_PROCESSOR_FILES, ClipReward
from .model_files import find_files


class HPSv2(ClipReward):
    """
    Human Preference Score v2.1 (Wu et al., 2023, arXiv 2306.09341): the cosine of a CLIP ViT-H/14 that was tuned on
    people's choices among generated images.

    Scores are about 0.2 to 0.4. This is the scale of the authors' code and of Table 1 of DiffusionOPD (0.279 for
    SD3.5-M with guidance); the authors' leaderboard multiplies it by 100. As in their code, the longer side of an
    image is scaled to the model's size and the rest is black, so nothing is cropped. Prompts are prepared as there
    too: see [`clean_prompt`].

    Args:
        model (`str`, *optional*, defaults to `"xswu/HPSv2"`): the Hub id or local folder of the weights.
        filename (`str`, *optional*, defaults to `"HPS_v2.1_compressed.pt"`): the file of the weights in open_clip's
            layout: safetensors, or written by `torch.save` with only tensors in it. `None` for a model in
                transformers' layout.
        revision (`str`, *optional*): the model's branch, tag or commit. Defaults to a pinned commit for the default
            model, else to `main`.
        processor (`str`, *optional*, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`): the model that this one
            was tuned from. It gives the configuration, the tokenizer, and mean and deviation of the pixels.
        processor_revision (`str`, *optional*): the same as `revision`, for the processor.
        device, dtype, batch_size: see [`ModelReward`].

    Raises:
        [`ValueError`]: if a model cannot be loaded completely. The message says which and why.
    """

    name = "hpsv2"
    bounds = (-1.0, 1.0)

    def __init__(
        self,
        model: str = "xswu/HPSv2",
        filename: str | None = "HPS_v2.1_compressed.pt",
        revision: str | None = None,
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        processor_revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "float32",
        batch_size: int = 16,
    ):
        needed = CLIP_MODEL_FILES if filename is None else ((filename,),)
        super().__init__(
            find_files(self.name, model, revision, needed),
            find_files(
                self.name,
                processor,
                processor_revision,
                (("config.json",), *CLIP_PROCESSOR_FILES),
                CLIP_OPTIONAL_FILES[1:],
            ),
            filename,
            device,
            dtype,
            batch_size,
        )
        self.identity += " open_clip prompts"

    def _pixel_values(self, images: list[Image]) -> torch.Tensor:
        size = self.model.config.vision_config.image_size
        mean, std = (
            torch.tensor(x).view(3, 1, 1) for x in (self.image_processor.image_mean, self.image_processor.image_std)
        )
        return torch.stack([(fit_square(image, size) - mean) / std for image in images])

    def _predict(self, prompts: list[str], images: list[Image]) -> torch.Tensor:
        return self._cosine([clean_prompt(prompt) for prompt in prompts], images)


def clean_prompt(prompt: str) -> str:
    """
    Prepares a prompt like open_clip's tokenizer, with which the authors train and score (`basic_clean`,
    `whitespace_clean` and `lower` of its `tokenizer.py`).

    Typographic quotes become straight, wrongly decoded letters are repaired, HTML entities become their letters, and a
    run of white space becomes one space. The tokenizer of transformers only handles white space and, letter by letter,
    lower case.
    """
    unescaped = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(unescaped.split()).lower()


def fit_square(image: Image, size: int) -> torch.Tensor:
    """
    Puts an image in the middle of a black square. Its longer side is scaled to the square's side by bicubic
    interpolation with antialiasing, in float32.

    Args:
        image (`PIL.Image.Image`): an RGB image.
        size (`int`): side of the square in pixels.

    Returns:
        [`torch.Tensor`]: `[3, size, size]`, in [0, 1] except where the interpolation overshoots.
    """
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / np.float32(255))
    scale = size / max(image.size)
    height, width = (max(1, round(length * scale)) for length in pixels.shape[1:])
    if scale != 1:
        pixels = F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True, align_corners=False)[0]
    left, top = (size - width) // 2, (size - height) // 2
    return F.pad(pixels, (left, size - width - left, top, size - height - top))
