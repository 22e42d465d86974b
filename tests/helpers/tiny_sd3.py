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

"""Builds a complete Stable Diffusion 3 pipeline with a few thousand random weights, offline, and LoRAs for it."""

import copy
import string
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5Tokenizer,
)


ATTENTION = [
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
]
_CHARACTERS = string.ascii_lowercase + string.digits + ".,!?'-"


# Of images, and of the text in tokens.
SIZE: dict[str, int] = dict(height=16, width=16, max_sequence_length=16)
TRANSFORMER = dict(
    sample_size=8,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    caption_projection_dim=16,
    joint_attention_dim=16,
    pooled_projection_dim=16,
    pos_embed_max_size=16,
)
LANGUAGE_MODEL = dict(intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)


def make_transformer(seed: int = 0, **config) -> SD3Transformer2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SD3Transformer2DModel(**{**TRANSFORMER, **config}).eval()


def vae_config(widths: tuple[int, ...], latent_channels: int = 4) -> dict[str, Any]:
    """Of an autoencoder that has one layer a block."""
    return dict(
        sample_size=32,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_vae(widths: tuple[int, ...], latent_channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(**vae_config(widths, latent_channels), shift_factor=0.06, scaling_factor=1.5).eval()


def clip(
    characters: str, hidden_act: str = "quick_gelu", model: type[Any] = CLIPTextModelWithProjection
) -> dict[str, Any]:
    """`text_encoder` and `tokenizer`, with a token a character; 8 dimensions."""
    words = ["<|startoftext|>", "<|endoftext|>", *(c + end for c in characters for end in ("", "</w>"))]
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=8,
        **LANGUAGE_MODEL,
        max_position_embeddings=77,
        projection_dim=8,
        hidden_act=hidden_act,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)
    return {"text_encoder": model(config).eval(), "tokenizer": tokenizer}


def t5(characters: str, model: type[Any] = T5EncoderModel) -> dict[str, Any]:
    """`text_encoder` and `tokenizer`, with a token a character; 16 dimensions."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((c, -2.0) for c in characters)]
    config = model.config_class(
        vocab_size=len(pieces), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return {"text_encoder": model(config).eval(), "tokenizer": T5Tokenizer(vocab=pieces, extra_ids=0)}


def numbered(*parts: dict[str, Any]) -> dict[str, Any]:
    """Components of several encoders: text_encoder, tokenizer, text_encoder_2, tokenizer_2, …"""
    suffixes = ("", "_2", "_3", "_4")
    return {
        name + suffix: value for part, suffix in zip(parts, suffixes, strict=False) for name, value in part.items()
    }


def make_pipeline(seed: int = 0) -> StableDiffusion3Pipeline:
    """Latents (4, h/2, w/2), prompts of lower-case letters and digits; images of `SIZE` are enough."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoders = numbered(clip(_CHARACTERS), clip(_CHARACTERS), t5(_CHARACTERS))
        vae = make_vae((4, 8))
    pipeline = StableDiffusion3Pipeline(
        transformer=make_transformer(seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        **encoders,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_lora(
    pipeline: StableDiffusion3Pipeline,
    folder: str | Path,
    seed: int,
    rank: int = 4,
    format: Literal["peft", "diffusers"] = "peft",
    **config,
) -> PeftModel:
    """
    Saves a random LoRA whose effect is of the size of the base's own weights; alpha is twice the rank.

    Returns the model that it was saved from (a copy of the base with the adapter), to compare with.
    """
    options = {"lora_alpha": 2 * rank, "target_modules": ATTENTION, **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(pipeline.transformer), LoraConfig(r=rank, **options))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
    if format == "peft":
        model.save_pretrained(str(folder))
    else:
        layers = get_peft_model_state_dict(model, save_embedding_layers=False)
        lora_config = model.peft_config["default"]
        type(pipeline).save_lora_weights(
            str(folder),
            transformer_lora_layers={key.removeprefix("base_model.model."): value for key, value in layers.items()},
            transformer_lora_adapter_metadata=lora_config.to_dict(),
        )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def forward(model: nn.Module, seed: int = 0) -> torch.Tensor:
    """Output (2, 4, 8, 8) of a transformer made here on random inputs."""
    generator = torch.Generator().manual_seed(seed)
    parameter = next(model.parameters())
    tensors = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 6, 16), (2, 16)))
    hidden_states, encoder_hidden_states, pooled_projections = (x.to(parameter.dtype) for x in tensors)
    return model(
        hidden_states=hidden_states,
        timestep=torch.tensor([300.0, 700.0]),
        encoder_hidden_states=encoder_hidden_states,
        pooled_projections=pooled_projections,
        return_dict=False,
    )[0]
