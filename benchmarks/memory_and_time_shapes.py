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

"""What memory_and_time.py counts: released networks, also quantized ones, without their weights, from shapes alone."""

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any

import bitsandbytes
import scaling_shapes as shapes
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLWan,
    Flux2Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from peft import PeftModel, get_peft_model
from scaling_formulas import BASE_BYTES, BF16
from scaling_shapes import Released
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import Qwen3Config, Qwen3Model, UMT5Config, UMT5EncoderModel

from trl_diffusion_opd.models.student import default_lora_config


def klein_inputs(rows: int, side: int, tokens: int) -> dict[str, Any]:
    patches = (side // 16) ** 2
    return {
        "hidden_states": torch.empty(rows, patches, 128, device="meta"),
        "encoder_hidden_states": torch.empty(rows, tokens, 7680, device="meta"),
        "timestep": torch.empty(rows, device="meta"),
        "img_ids": torch.empty(rows, patches, 4, device="meta"),
        "txt_ids": torch.empty(rows, tokens, 4, device="meta"),
        "guidance": None,
    }


def kontext_inputs(rows: int, side: int, tokens: int) -> dict[str, Any]:
    """FLUX.1's, with a source picture beside each image, which the pipeline brings to a million pixels."""
    image, picture = (shapes.flux_inputs(rows, of_one, tokens) for of_one in (side, 1024))
    return {
        **image,
        "hidden_states": torch.cat([image["hidden_states"], picture["hidden_states"]], dim=1),
        "img_ids": torch.cat([image["img_ids"], picture["img_ids"]]),
    }


def wan_inputs(rows: int, side: int, tokens: int) -> dict[str, Any]:
    """A single frame of the height `side` and of 832 px width."""
    return {
        "hidden_states": torch.empty(rows, 16, 1, side // 8, 832 // 8, device="meta"),
        "encoder_hidden_states": torch.empty(rows, tokens, 4096, device="meta"),
        "timestep": torch.empty(rows, device="meta"),
    }


def sdxl_inputs(rows: int, side: int, tokens: int) -> dict[str, Any]:
    conditions = {
        "text_embeds": torch.empty(rows, 1280, device="meta"),
        "time_ids": torch.empty(rows, 6, device="meta"),
    }
    return {
        "sample": torch.empty(rows, 4, side // 8, side // 8, device="meta"),
        "timestep": torch.empty(rows, device="meta"),
        "encoder_hidden_states": torch.empty(rows, tokens, 2048, device="meta"),
        "added_cond_kwargs": conditions,
    }


def _qwen3_4b() -> nn.Module:
    sizes = dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, head_dim=128)
    return Qwen3Model(Qwen3Config(num_key_value_heads=8, vocab_size=151936, **sizes))


def _umt5_xxl() -> nn.Module:
    sizes = dict(d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, vocab_size=256384)
    return UMT5EncoderModel(UMT5Config(feed_forward_proj="gated-gelu", **sizes))


def _sdxl_vae() -> nn.Module:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )


def _wan(**config: int) -> Released:
    return Released(
        WanTransformer3DModel,
        dict(config),
        sizes=(480,),
        tokens=512,
        rows=1,
        calls=2,
        inputs=wan_inputs,
        others={"UMT5-XXL": _umt5_xxl, "VAE": AutoencoderKLWan},
    )


MODELS: dict[str, Released] = {
    **shapes.MODELS,
    "FLUX.2-klein 4B": Released(
        Flux2Transformer2DModel,
        dict(
            num_layers=5,
            num_single_layers=20,
            num_attention_heads=24,
            attention_head_dim=128,
            joint_attention_dim=7680,
            guidance_embeds=False,
        ),
        sizes=(1024,),
        tokens=512,
        rows=1,
        calls=1,
        inputs=klein_inputs,
        others={"Qwen3-4B": _qwen3_4b, "VAE": AutoencoderKLFlux2},
    ),
    "FLUX.1 Kontext": dataclasses.replace(shapes.MODELS["FLUX.1-dev"], sizes=(1024,), inputs=kontext_inputs),
    "SDXL": Released(
        UNet2DConditionModel,
        dict(
            sample_size=128,
            in_channels=4,
            out_channels=4,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        sizes=(1024,),
        tokens=77,
        rows=2,
        calls=1,
        inputs=sdxl_inputs,
        others={
            "CLIP-L": shapes.MODELS["FLUX.1-dev"].others["CLIP-L"],
            "CLIP-G": shapes.MODELS["SD3.5-M"].others["CLIP-G"],
            "VAE": _sdxl_vae,
        },
    ),
    "Wan 2.1 1.3B": _wan(num_attention_heads=12, num_layers=30, ffn_dim=8960),
    "Wan 2.1 14B": _wan(),
}


def _linear(base: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in base.named_modules() if isinstance(module, nn.Linear)}


def quantize(base: nn.Module, precision: str) -> None:
    """Replaces the weights of linear layers on `meta`, as the config's quantization would."""
    if precision == "8-bit":
        quantize_(base, Int8WeightOnlyConfig(), filter_fn=lambda module, name: isinstance(module, nn.Linear))
    elif precision == "4-bit":
        for name, layer in _linear(base).items():
            options = dict(bias=layer.bias is not None, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
            quantized = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, **options)
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, quantized.requires_grad_(False))


def quantized_network(released: Released, precision: str) -> tuple[PeftModel, Any]:
    """The network with the paper's LoRA on `meta`, and the network within."""
    model, base = shapes.network(released)
    if precision == "bfloat16":
        return model, base
    base = model.unload()
    quantize(base, precision)
    with torch.device("meta"):
        return get_peft_model(base, default_lora_config(base)), base


def base_bytes(base: nn.Module, precision: str) -> int:
    """Bytes of the network with its buffers: linear layers in this precision, the rest in bfloat16."""
    weights = sum(layer.weight.numel() for layer in _linear(base).values())
    rest = sum(tensor.numel() for tensor in (*base.parameters(), *base.buffers())) - weights
    kind = {"bfloat16": "bf16", "8-bit": "8 bit", "4-bit": "4 bit (nf4)"}[precision]
    return round(BASE_BYTES[kind] * weights) + BF16 * rest


def count(name: str, run: Mapping[str, Any]) -> dict[str, Any]:
    """
    Counts for a run of one of `MODELS`.

    Args:
        name (`str`): the model.
        run (`dict`): the run, as `memory_and_time.settings` returns it.
    """
    released, height = MODELS[name], run["height"]
    with torch.device("meta"):
        plain = released.network(**released.config)
    found: dict[str, Any] = {
        "base_bytes": base_bytes(plain, run["precision"]),
        "guided_rows": released.rows * released.calls,
    }
    model, base = quantized_network(released, run["precision"])
    found["lora"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows, calls = (released.rows, released.calls) if run["guidance_scale"] != 1 else (1, 1)
    unguided = dataclasses.replace(released, rows=rows, calls=calls)
    found["activations"] = shapes.activations(unguided, model, base, height, run["batch"], run["checkpointing"])
    found["flops"], found["others"] = row_flops(name, height), other_parameters(name)
    return found


@cache
def row_flops(name: str, height: int) -> dict[str, int]:
    """Operations of one row; quantization changes none."""
    released = MODELS[name]
    model, base = shapes.network(released)
    return shapes.flops(model, base, released.inputs(1, height, released.tokens))


@cache
def other_parameters(name: str) -> dict[str, int]:
    """Numbers of parameters of the encoders and the VAE."""
    found = {}
    for part, make in MODELS[name].others.items():
        with torch.device("meta"):
            found[part] = sum(p.numel() for p in make().parameters())
    return found
