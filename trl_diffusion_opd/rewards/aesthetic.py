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

"""LAION's aesthetic score: how pleasing an image is, regardless of its prompt."""

import torch
import torch.nn.functional as F
from PIL.Image import Image
from transformers import CLIPModel

from .center_crop import CenterCropProcessor
from .clip import CLIP_MODEL_FILES, CLIP_OPTIONAL_FILES, CLIP_PROCESSOR_FILES
from .mlp_head import load_head
from .model_files import find_files, read_tensors, sha256
from .model_reward import ModelReward, load_pretrained


_HEAD = ("birder-project/aesthetic-predictor", "openai-clip_aesthetic-predictor.pt")
# The hash of `sac+logos+ava1-l14-linearMSE.pth` in the predictor's own repository, which is not on the Hub.
_HEAD_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"


class Aesthetic(ModelReward):
    """
    LAION's improved aesthetic predictor v2 (`sac+logos+ava1-l14-linearMSE`): five linear layers on the normalised
    image embedding of CLIP ViT-L/14, trained on people's ratings from 1 to 10. It ignores the prompt.

    An image that is not square is cropped to its centre, as in the original code ([`CenterCropProcessor`]).

    Scores are mostly 4 to 7; Table 1 of DiffusionOPD has 5.36 for SD3.5-M with guidance. Source:
    https://github.com/christophschuhmann/improved-aesthetic-predictor.

    Args:
        model (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`): CLIP model with its image processor,
            a Hub id or a local folder.
        revision (`str`, *optional*): the model's branch, tag or commit. Defaults to a pinned commit for the default
            model, else to `main`.
        head (`str`, *optional*): the Hub id or local folder of the head. The default is a copy on the Hub, which must
            have the original's hash.
        head_filename (`str`, *optional*): the head's file: safetensors, or written by `torch.save` with only tensors
            in it. Required if `head` is given.
        head_revision (`str`, *optional*): the head's branch, tag or commit. Defaults to `main`.
        device, dtype, batch_size: see [`ModelReward`]. The head is float32.

    Raises:
        [`ValueError`]: if a model cannot be loaded completely, or the default head is not the original.
    """

    name = "aesthetic"
    bounds = (None, None)

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        revision: str | None = None,
        head: str = _HEAD[0],
        head_filename: str = _HEAD[1],
        head_revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "float32",
        batch_size: int = 16,
    ):
        files = find_files(
            self.name,
            model,
            revision,
            (*CLIP_MODEL_FILES, CLIP_PROCESSOR_FILES[0]),
            CLIP_OPTIONAL_FILES[:1],
        )
        head_files = find_files(self.name, head, head_revision, ((head_filename,),))
        super().__init__((files, head_files), device, dtype, batch_size)
        self.identity += f" {head_filename} torchvision crop"
        if (head, head_filename) == _HEAD and (digest := sha256(head_files.folder / head_filename)) != _HEAD_SHA256:
            raise ValueError(
                f"{head_files.shown}: {head_filename} is not LAION's predictor any more: its SHA-256 is {digest}, but "
                f"{_HEAD_SHA256} was expected. Download sac+logos+ava1-l14-linearMSE.pth from "
                "https://github.com/christophschuhmann/improved-aesthetic-predictor. Then give its folder as `head` "
                "and the file as `head_filename`."
            )
        self.image_processor = CenterCropProcessor.from_pretrained(files.folder)
        clip = load_pretrained(CLIPModel, files)
        # Without the text tower, which is not used.
        self.vision_model = self._placed(clip.vision_model)
        self.projection = self._placed(clip.visual_projection)
        self.head = self._placed(
            load_head(head_files, read_tensors(head_files, head_filename), clip.config.projection_dim), torch.float32
        )

    def _predict(self, prompts: list[str], images: list[Image]) -> torch.Tensor:
        pixels = self.image_processor(images, return_tensors="pt").pixel_values.to(self.device, self.dtype)
        embedding = self.projection(self.vision_model(pixels).pooler_output)
        return self.head(F.normalize(embedding.float(), dim=-1))[:, 0]
