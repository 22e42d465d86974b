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

"""The base class of rewards that compare CLIP's embeddings of an image and its prompt, or of two images."""

import torch
import torch.nn.functional as F
from PIL.Image import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from .model_files import ModelFiles, read_tensors
from .model_reward import ModelReward, load_pretrained
from .open_clip_layout import from_open_clip


# Patterns for `find_files`. Weights may be one file or several shards.
CLIP_MODEL_FILES = (("config.json",), ("model*.safetensors",))
CLIP_PROCESSOR_FILES = (("preprocessor_config.json", "processor_config.json"), ("tokenizer.json", "vocab.json"))
CLIP_OPTIONAL_FILES = ("model.safetensors.index.json", "merges.txt", "*token*.json")


class ClipReward(ModelReward):
    """
    A reward computed from the cosine between CLIP's embeddings of the image and of the prompt, or of another image.

    Prompts are cut to the length of the text tower (77 tokens with the end token). PIL resizes, crops and normalises
    images as the processor's files say.

    Args:
        model_files (`ModelFiles`): files of the model.
        processor_files (`ModelFiles`): files of the tokenizer and the image processor.
        filename (`str`, *optional*): the file of the weights if they are in open_clip's layout. The configuration is
            then read from the processor's files.
        device, dtype, batch_size: see [`ModelReward`].
    """

    def __init__(
        self,
        model_files: ModelFiles,
        processor_files: ModelFiles,
        filename: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "float32",
        batch_size: int = 16,
    ):
        super().__init__((model_files, processor_files), device, dtype, batch_size)
        if filename is not None:
            self.identity += f" {filename}"
        self.tokenizer = CLIPTokenizer.from_pretrained(processor_files.folder)
        self.image_processor = CLIPImageProcessorPil.from_pretrained(processor_files.folder)
        if filename is None:
            model = load_pretrained(CLIPModel, model_files)
        else:
            tensors = from_open_clip(read_tensors(model_files, filename))
            config = CLIPConfig.from_pretrained(processor_files.folder)
            model = load_pretrained(CLIPModel, model_files, config, tensors)
        # Computed before the weights are rounded: in bfloat16 the exponential would be off by about a percent.
        self.logit_scale = float(model.logit_scale.detach().exp())
        self.model = self._placed(model)

    def _pixel_values(self, images: list[Image]) -> torch.Tensor:
        """The images as the model's input, float32, `[batch, 3, height, width]`."""
        return self.image_processor(images, return_tensors="pt").pixel_values

    def _image_features(self, images: list[Image]) -> torch.Tensor:
        """CLIP's projected embedding of each image, not normalised, float32, `[batch, projection]`."""
        pixels = self._pixel_values(images).to(self.device, self.dtype)
        return self.model.get_image_features(pixels).pooler_output.float()

    def _cosine(self, prompts: list[str], images: list[Image]) -> torch.Tensor:
        """The cosine of each image with its prompt, float32, `[batch]`."""
        tokens = self.tokenizer(
            prompts,
            padding="max_length",  # the same shape in every batch
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        text = self.model.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output
        image = self._image_features(images)
        return (F.normalize(image, dim=-1) * F.normalize(text.float(), dim=-1)).sum(-1)
