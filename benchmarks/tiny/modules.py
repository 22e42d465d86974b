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

"""Builds the untrained tiny pipelines: a `StableDiffusion3Pipeline` that draws, and a `FluxKontextPipeline` that also
edits. Both have less than three million parameters."""

from __future__ import annotations

import string

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from trl_diffusion_opd.tiny.prompts import COUNTS
from trl_diffusion_opd.tiny.scenes import COLORS, SHAPES


WIDTH = 128
MAX_TOKENS = 12  # few, since text tokens dominate the cost: 24 of them (CLIP's 12 and T5's 12) beside 16 of the image
THINGS = (*COUNTS, *COLORS, *SHAPES, *(shape + "s" for shape in SHAPES))
WORDS = (
    *THINGS,
    *("left", "right", "of", "above", "below", "and", "painting", "the", "word"),
)
EDIT_WORDS = (
    *THINGS,
    *("and", "the", "make", "remove", "add", "at", "dusk", "it", "paint"),
)
EDIT_MAX_TOKENS = 10


def clip_tokenizer(words: tuple[str, ...] = WORDS, max_tokens: int = MAX_TOKENS) -> CLIPTokenizer:
    """A tokenizer with one token for each of the words, and one for each character of other words."""
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for character in string.ascii_lowercase + string.digits + "\"'.,!?-":
        vocab[character] = len(vocab)
        vocab[character + "</w>"] = len(vocab)
    merges: list[tuple[str, str]] = []
    # Words are merged from their end, so that merges of one word don't split another word, except in a common ending.
    for word in words:
        tail = word[-1] + "</w>"
        for character in reversed(word[:-1]):
            if (character, tail) not in merges:
                merges.append((character, tail))
            tail = character + tail
            vocab.setdefault(tail, len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_tokens)


def t5_tokenizer(words: tuple[str, ...] = WORDS, max_tokens: int = MAX_TOKENS) -> T5Tokenizer:
    """A unigram tokenizer with the same words. Capital letters are pieces of their own."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [("▁" + word, -1.0) for word in ("a", *words)]
    pieces += [(character, -4.0) for character in string.ascii_letters + string.digits + "\"'.,!?-"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_tokens)


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=32,
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def _clip_config(vocab_size: int, max_tokens: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH // 2,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=max_tokens,
        projection_dim=WIDTH // 2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        hidden_act="gelu",
    )


def _clip(vocab_size: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(_clip_config(vocab_size, MAX_TOKENS))


def _t5(vocab_size: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocab_size,
        d_model=WIDTH,
        d_kv=32,
        d_ff=WIDTH,
        num_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        is_encoder_decoder=False,
    )
    return T5EncoderModel(config)


def pipeline(autoencoder: AutoencoderKL) -> StableDiffusion3Pipeline:
    """A pipeline with the given VAE. All other parts get new weights from torch's global generator."""
    tokenizer, tokenizer_3 = clip_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        caption_projection_dim=WIDTH,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder,
        text_encoder=_clip(len(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=_clip(len(tokenizer)),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=_t5(len(tokenizer_3)),
        tokenizer_3=tokenizer_3,
    )


def edit_pipeline(autoencoder: AutoencoderKL) -> FluxKontextPipeline:
    """A pipeline that draws and edits, with the given VAE. All other parts get new weights, as in [`pipeline`]."""
    tokenizer = clip_tokenizer(EDIT_WORDS, EDIT_MAX_TOKENS)
    tokenizer_2 = t5_tokenizer(EDIT_WORDS, EDIT_MAX_TOKENS)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=32,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH // 2,
        axes_dims_rope=(8, 12, 12),
    )
    return FluxKontextPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder,
        text_encoder=CLIPTextModel(_clip_config(len(tokenizer), EDIT_MAX_TOKENS)),
        tokenizer=tokenizer,
        text_encoder_2=_t5(len(tokenizer_2)),
        tokenizer_2=tokenizer_2,
    )


def num_parameters(*modules: torch.nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
