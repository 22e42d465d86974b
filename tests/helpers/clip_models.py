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

"""Tiny CLIP models in the Hub's formats, and the scores that they should compute, written out in float64."""

import math
import string
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer


SIZE, PATCH, WIDTH, HEADS, LAYERS, PROJECTION, LENGTH = 16, 8, 16, 2, 2, 8, 12
_LETTERS = string.ascii_lowercase + string.digits
# The end of the text has the greatest id, and the config says 2, as in the published models of 2023.
WORDS = [*(letter + end for letter in _LETTERS for end in ("", "</w>")), "<|startoftext|>", "<|endoftext|>"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def make_config() -> CLIPConfig:
    tower = dict(hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
    text = dict(vocab_size=len(WORDS), max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=2, pad_token_id=1)
    return CLIPConfig(
        text_config={**tower, **text, "hidden_act": "gelu"},
        vision_config={**tower, "image_size": SIZE, "patch_size": PATCH, "hidden_act": "gelu"},
        projection_dim=PROJECTION,
    )


def make_clip(folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """Saves a model with its processor in transformers' formats, and returns its weights."""
    model = CLIPModel(make_config())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 0:
                parameter.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.2, generator=generator)
    model.save_pretrained(folder)
    make_processor(folder)
    return model.state_dict()


def make_processor(folder: Path) -> None:
    CLIPTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, merges=[]).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(
        folder
    )


def make_images(count: int = 4) -> list[Image.Image]:
    """
    Smooth noise of several sizes and shapes. Scaled to `SIZE`, the first two have a margin of 11 pixels, whose middle
    begins at the fifth or at the sixth, by the rule.
    """
    rng = np.random.default_rng(0)
    sizes = [(41, 24), (24, 41), (30, 30), (16, 16)]
    coarse = [Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)) for _ in range(count)]
    return [image.resize(sizes[i % 4], Image.Resampling.BILINEAR) for i, image in enumerate(coarse)]


def token_ids(prompt: str) -> list[int]:
    letters = [word[:-1] + (f"{word[-1]}</w>",) for word in map(tuple, prompt.lower().split())]
    ids = [WORDS.index(letter) for word in letters for letter in word][: LENGTH - 2]
    start, end = WORDS.index("<|startoftext|>"), WORDS.index("<|endoftext|>")
    return [start, *ids, end] + [end] * (LENGTH - 2 - len(ids))


def cropped(image: Image.Image, size: int = SIZE, rule: str = "torchvision") -> Image.Image:
    """
    Shorter side to `size`, bicubic; the middle. As torchvision's `Resize` and `CenterCrop` for PIL images do it, or
    with the crop of `"transformers"`.
    """
    width, height = image.size
    new = [int(size * side / min(image.size)) for side in (width, height)]
    left, top = (
        int(round((side - size) / 2.0)) if rule == "torchvision" else math.floor((side - size) / 2) for side in new
    )
    resized = image if tuple(new) == image.size else image.resize(tuple(new), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))


def cropped_pixels(image: Image.Image, size: int = SIZE, rule: str = "torchvision") -> torch.Tensor:
    """[`cropped`] and normalised. `[3, size, size]`."""
    crop = cropped(image, size, rule)
    pixels = (np.asarray(crop).astype(np.float64) / 255 - MEAN) / STD
    return torch.from_numpy(pixels.transpose(2, 0, 1))


def letterboxed_pixels(image: Image.Image) -> torch.Tensor:
    """Longer side to `SIZE`, bicubic in floats; black around it; normalised."""
    scale = SIZE / max(image.size)
    new = tuple(round(side * scale) for side in image.size)
    box = np.zeros((SIZE, SIZE, 3))
    left, top = (SIZE - new[0]) // 2, (SIZE - new[1]) // 2
    channels = np.asarray(image).astype(np.float32).transpose(2, 0, 1) / 255
    resized = [np.asarray(Image.fromarray(channel).resize(new, Image.Resampling.BICUBIC)) for channel in channels]
    box[top : top + new[1], left : left + new[0]] = np.stack(resized, -1)
    return torch.from_numpy(((box - MEAN) / STD).transpose(2, 0, 1))


def _attention(q, k, v, mask=None):
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(-3, -2) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2)


def _norm(x, weights, name):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def _linear(x, weights, name):
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _causal_mask() -> torch.Tensor:
    return torch.full((LENGTH, LENGTH), -torch.inf, dtype=torch.float64).triu(1)


def transformers_embeddings(weights: dict, pixels: torch.Tensor, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised embeddings of an image and a prompt from weights with transformers' names."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def tower(x, prefix, mask=None):
        for i in range(LAYERS):
            block = f"{prefix}.encoder.layers.{i}"
            h = _norm(x, w, f"{block}.layer_norm1")
            qkv = [_linear(h, w, f"{block}.self_attn.{part}_proj") for part in "qkv"]
            x = x + _linear(_attention(*qkv, mask), w, f"{block}.self_attn.out_proj")
            h = F.gelu(_linear(_norm(x, w, f"{block}.layer_norm2"), w, f"{block}.mlp.fc1"))
            x = x + _linear(h, w, f"{block}.mlp.fc2")
        return x

    patches = F.conv2d(pixels[None], w["vision_model.embeddings.patch_embedding.weight"], stride=PATCH)
    x = torch.cat([w["vision_model.embeddings.class_embedding"][None], patches[0].flatten(1).T])
    x = _norm(x + w["vision_model.embeddings.position_embedding.weight"], w, "vision_model.pre_layrnorm")
    x = _norm(tower(x, "vision_model")[0], w, "vision_model.post_layernorm")
    image = w["visual_projection.weight"] @ x

    ids = token_ids(prompt)
    x = w["text_model.embeddings.token_embedding.weight"][ids]
    x = tower(x + w["text_model.embeddings.position_embedding.weight"], "text_model", _causal_mask())
    x = _norm(x, w, "text_model.final_layer_norm")[ids.index(max(ids))]
    text = w["text_projection.weight"] @ x
    return image / image.norm(), text / text.norm()


def make_open_clip(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of the same model with open_clip's names and layout."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    def norm(name):
        return {f"{name}.weight": 1 + random(WIDTH), f"{name}.bias": random(WIDTH)}

    def linear(name, inputs, outputs):
        return {f"{name}.weight": random(outputs, inputs), f"{name}.bias": random(outputs)}

    weights = {
        "positional_embedding": random(LENGTH, WIDTH),
        "text_projection": random(WIDTH, PROJECTION),
        "logit_scale": torch.tensor(4.6),
        "visual.class_embedding": random(WIDTH),
        "visual.positional_embedding": random((SIZE // PATCH) ** 2 + 1, WIDTH),
        "visual.proj": random(WIDTH, PROJECTION),
        "visual.conv1.weight": random(WIDTH, 3, PATCH, PATCH),
        "token_embedding.weight": random(len(WORDS), WIDTH),
        **norm("visual.ln_pre"),
        **norm("visual.ln_post"),
        **norm("ln_final"),
    }
    for prefix in ("visual.", ""):
        for i in range(LAYERS):
            block = f"{prefix}transformer.resblocks.{i}"
            weights |= norm(f"{block}.ln_1") | norm(f"{block}.ln_2")
            weights[f"{block}.attn.in_proj_weight"] = random(3 * WIDTH, WIDTH)
            weights[f"{block}.attn.in_proj_bias"] = random(3 * WIDTH)
            weights |= linear(f"{block}.attn.out_proj", WIDTH, WIDTH)
            weights |= linear(f"{block}.mlp.c_fc", WIDTH, 24) | linear(f"{block}.mlp.c_proj", 24, WIDTH)
    return weights


def open_clip_embeddings(weights: dict, pixels: torch.Tensor, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised embeddings of an image and a prompt from weights with open_clip's names."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def tower(x, prefix, mask=None):
        for i in range(LAYERS):
            block = f"{prefix}transformer.resblocks.{i}"
            h = _norm(x, w, f"{block}.ln_1")[:, None]
            attended, _ = F.multi_head_attention_forward(
                h, h, h, WIDTH, HEADS, w[f"{block}.attn.in_proj_weight"], w[f"{block}.attn.in_proj_bias"], None, None,
                False, 0.0, w[f"{block}.attn.out_proj.weight"], w[f"{block}.attn.out_proj.bias"], attn_mask=mask,
            )  # fmt: skip
            x = x + attended[:, 0]
            x = x + _linear(
                F.gelu(_linear(_norm(x, w, f"{block}.ln_2"), w, f"{block}.mlp.c_fc")), w, f"{block}.mlp.c_proj"
            )
        return x

    patches = F.conv2d(pixels[None], w["visual.conv1.weight"], stride=PATCH)
    x = torch.cat([w["visual.class_embedding"][None], patches[0].flatten(1).T]) + w["visual.positional_embedding"]
    x = tower(_norm(x, w, "visual.ln_pre"), "visual.")
    image = _norm(x[0], w, "visual.ln_post") @ w["visual.proj"]

    ids = token_ids(prompt)
    x = tower(w["token_embedding.weight"][ids] + w["positional_embedding"], "", _causal_mask())
    text = _norm(x, w, "ln_final")[ids.index(max(ids))] @ w["text_projection"]
    return image / image.norm(), text / text.norm()


def make_head(width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of the five linear layers, with the names that dropout between them gives."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [width, 1024, 128, 64, 16, 1]
    weights = {}
    for position, inputs, outputs in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        weights[f"layers.{position}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        weights[f"layers.{position}.bias"] = torch.randn(outputs, generator=generator)
    return weights


def apply_head(weights: dict, x: torch.Tensor) -> float:
    for position in (0, 2, 4, 6, 7):
        x = weights[f"layers.{position}.weight"].double() @ x + weights[f"layers.{position}.bias"].double()
    return x.item()
