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

"""Tiny pipelines of further flow-matching families, made as those of `families.py`."""

from typing import Any

import diffusers
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from helpers import families_encoders as encoders
from helpers import families_text as text
from helpers.families import Family
from helpers.tiny_sd3 import make_vae, numbered


def euler(**options: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**options)


def dynamic() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def aura_flow() -> DiffusionPipeline:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    return diffusers.AuraFlowPipeline(
        transformer=transformer, vae=make_vae((4, 4)), scheduler=euler(shift=1.73), **text.t5(multilingual=True)
    )


def krea2() -> DiffusionPipeline:
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(8, 4, 4),
    )
    return diffusers.Krea2Pipeline(
        transformer=transformer,
        vae=qwen_vae(),
        scheduler=dynamic(),
        text_encoder_select_layers=(1, 2),
        **encoders.qwen3_vl(),
    )


def qwen_vae() -> diffusers.AutoencoderKLQwenImage:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=1,
        z_dim=4,
        dim_mult=[4, 4],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1] * 4,
        latents_std=[1.2] * 4,
    )


def hunyuan_image() -> DiffusionPipeline:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=16,
        rope_axes_dim=(4, 4),
    )
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
        scaling_factor=0.75,
    )
    first = text.qwen2_vl()
    del first["processor"]
    pipeline = diffusers.HunyuanImagePipeline(
        transformer=transformer,
        vae=vae,
        scheduler=euler(shift=4.0),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.5),
        **numbered(first, encoders.byt5()),
    )
    pipeline.tokenizer_max_length = 24
    return pipeline


def qwen3_vl_with_processor(layers: int = 2) -> dict[str, Any]:
    """`text_encoder` and `processor`."""
    parts = encoders.qwen3_vl(layers, generates=True)
    return {"text_encoder": parts["text_encoder"], "processor": encoders.processor(parts["tokenizer"])}


def qwen_image_21() -> DiffusionPipeline:
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    # The pipeline takes a VAE of factor 16 for granted.
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=2,
        decoder_base_dim=2,
        z_dim=4,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False] * 4,
        latents_mean=[0.1] * 4,
        latents_std=[1.2] * 4,
    )
    return diffusers.QwenImage21Pipeline(
        transformer=transformer, vae=vae, scheduler=dynamic(), **qwen3_vl_with_processor()
    )


_ATTENTION = ("to_q", "to_k", "to_v")
FLOW_FAMILIES: dict[str, Family] = {
    "aura_flow": Family(aura_flow, (*_ATTENTION, "linear_1", "linear_2", "out_projection")),
    # Its guidance is that of a component.
    "hunyuan_image": Family(hunyuan_image, _ATTENTION, guidance_name=None, max_sequence_length=None),
    # Its velocity is v + s (v - v_empty).
    "krea2": Family(krea2, _ATTENTION, guidance_offset=1.0, max_sequence_length=48),
    "qwen_image_21": Family(
        qwen_image_21,
        (*_ATTENTION, "to_out.0"),
        size=64,
        max_sequence_length=None,
        guidance_name="true_cfg_scale",
        guidance_options={"negative_prompt": ""},
    ),
}
