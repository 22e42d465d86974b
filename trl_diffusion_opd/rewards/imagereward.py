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

"""ImageReward: predicts how much people like an image of a prompt, from BLIP's features of both."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL.Image import Image
from transformers import (
    BertConfig,
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)

from .center_crop import CenterCropProcessor
from .mlp_head import load_head
from .model_files import ModelFiles, check_loaded, find_files, read_tensors
from .model_reward import ModelReward, load_pretrained


# Mean and deviation of the raw score over the authors' training images. They normalise scores with them.
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
_MAX_LENGTH = 35
_HEAD_WIDTH = 64  # of an attention head, in the ViTs of every size

# Tensors in the file that are ignored: parts of BLIP that the score does not use, and position ids.
_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")

# Names in BLIP's vision transformer -> names in transformers. Names in the text encoder are the same.
_VISION_NAMES = [
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
]


class ImageReward(ModelReward):
    """
    ImageReward v1.0 (Xu et al., 2023, arXiv 2304.05977): BLIP's text encoder reads the prompt with attention to the
    image, and five linear layers turn its first token into a score. Trained on people's rankings of generated images.

    Scores are about -2 to 2, with mean 0 and deviation 1 over its training images; Table 1 of DiffusionOPD has 0.85
    for SD3.5-M with guidance. As in the authors' code, prompts are cut to 35 tokens, and an image that is not square
    is cropped to its centre ([`CenterCropProcessor`]).

    Args:
        model (`str`, *optional*, defaults to `"zai-org/ImageReward"`): the Hub id or local folder of the weights and
            of `med_config.json`. Its earlier name on the Hub was `THUDM/ImageReward`.
        filename (`str`, *optional*, defaults to `"ImageReward.pt"`): the file of the weights in the authors' layout:
            safetensors, or written by `torch.save` with only tensors in it.
        revision (`str`, *optional*): the model's branch, tag or commit. Defaults to a pinned commit for the default
            model, else to `main`.
        tokenizer (`str`, *optional*, defaults to `"google-bert/bert-base-uncased"`): a Hub id or a local folder.
        tokenizer_revision (`str`, *optional*): the same as `revision`, for the tokenizer.
        device, dtype, batch_size: see [`ModelReward`]. The last layers are always float32.

    Raises:
        [`ValueError`]: if the model cannot be loaded completely. The message says why.
    """

    name = "imagereward"
    bounds = (None, None)

    def __init__(
        self,
        model: str = "zai-org/ImageReward",
        filename: str = "ImageReward.pt",
        revision: str | None = None,
        tokenizer: str = "google-bert/bert-base-uncased",
        tokenizer_revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "float32",
        batch_size: int = 16,
    ):
        files = find_files(self.name, model, revision, ((filename,), ("med_config.json",)))
        tokenizer_files = find_files(
            self.name, tokenizer, tokenizer_revision, (("tokenizer.json", "vocab.txt"),), ("*token*.json",)
        )
        super().__init__((files, tokenizer_files), device, dtype, batch_size)
        self.identity += f" {filename} torchvision crop"
        self.tokenizer = BertTokenizer.from_pretrained(tokenizer_files.folder)
        parts = split_parts(files, read_tensors(files, filename))
        vision_config = _vision_config(files, parts["visual_encoder"])
        text_config = _text_config(files.folder / "med_config.json", vision_config.hidden_size)
        side = vision_config.image_size
        assert isinstance(side, int)  # `_vision_config` sets one number, for a square
        self.image_processor = CenterCropProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
        self.vision_model = self._placed(
            load_pretrained(BlipVisionModel, files, vision_config, _renamed(parts["visual_encoder"]))
        )
        self.text_model = self._placed(
            load_pretrained(BlipTextModel, files, text_config, parts["text_encoder"], add_pooling_layer=False)
        )
        self.head = self._placed(load_head(files, parts["mlp"], text_config.hidden_size), torch.float32)

    def _predict(self, prompts: list[str], images: list[Image]) -> torch.Tensor:
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=_MAX_LENGTH, return_tensors="pt"
        ).to(self.device)
        pixels = self.image_processor(images, return_tensors="pt").pixel_values.to(self.device, self.dtype)
        states = self.text_model(
            tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=self.vision_model(pixels).last_hidden_state,
        ).last_hidden_state
        return (self.head(states[:, 0].float())[:, 0] - _MEAN) / _STD


def split_parts(files: ModelFiles, tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """
    Splits the tensors of the authors' file by the parts of the model: `"visual_encoder"`, `"text_encoder"` and
    `"mlp"`. Their names lose the part's prefix.

    Raises:
        [`ValueError`]: if a tensor belongs to no part.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {"visual_encoder": {}, "text_encoder": {}, "mlp": {}}
    unexpected = []
    for name, tensor in tensors.items():
        part, _, rest = name.removeprefix("blip.").partition(".")
        if (
            name == f"{'' if part == 'mlp' else 'blip.'}{part}.{rest}"
            and part in parts
            and not _UNUSED.fullmatch(name)
        ):
            parts[part][rest] = tensor
        elif not _UNUSED.fullmatch(name):
            unexpected.append(name)
    check_loaded(files, [], unexpected, [])
    return parts


def _renamed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _VISION_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _vision_config(files: ModelFiles, tensors: Mapping[str, torch.Tensor]) -> BlipVisionConfig:
    """The config of the vision transformer, derived from the shapes of its weights, since no file contains it."""
    needed = ("pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    check_loaded(files, [f"blip.visual_encoder.{name}" for name in needed if name not in tensors], [], [])
    positions, patches, mlp = (tensors[name] for name in needed)
    width, patch_size = patches.shape[0], patches.shape[-1]
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=mlp.shape[0],
        num_hidden_layers=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        num_attention_heads=width // _HEAD_WIDTH,
        image_size=math.isqrt(positions.shape[1] - 1) * patch_size,
        patch_size=patch_size,
        layer_norm_eps=1e-6,
    )


def _text_config(path: Path, encoder_width: int) -> BlipTextConfig:
    """The config of BLIP's text encoder: a BERT, as in the file, with cross-attention to the image."""
    bert = BertConfig.from_json_file(path).to_dict()
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
        "max_position_embeddings", "layer_norm_eps", "pad_token_id",
    )  # fmt: skip
    # `is_decoder` adds the cross-attention. Whether tokens see later ones is an argument of the call.
    return BlipTextConfig(**{name: bert[name] for name in names}, encoder_hidden_size=encoder_width, is_decoder=True)
