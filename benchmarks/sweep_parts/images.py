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

"""Tiny flow-matching pipelines for images that the families of the tests do not have."""

from collections.abc import Callable
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from helpers import families_encoders as encoders
from helpers import families_text as text
from helpers.families import FAMILIES, PROMPTS, Family, flux2_without_encoder
from helpers.families_flow import dynamic, euler, qwen3_vl_with_processor, qwen_vae
from helpers.tiny_sd3 import make_vae, numbered, vae_config
from transformers import Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil


ATTENTION = ("to_q", "to_k", "to_v")
# Of transformers whose latents are packed, after Flux's.
PACKED: dict[str, Any] = dict(
    patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
)


def flux2_vae() -> diffusers.AutoencoderKLFlux2:
    return diffusers.AutoencoderKLFlux2(**vae_config((4, 4)))


def bria() -> DiffusionPipeline:
    transformer = diffusers.BriaTransformer2DModel(joint_attention_dim=16, axes_dims_rope=[4, 4, 8], **PACKED)
    return diffusers.BriaPipeline(transformer=transformer, vae=make_vae((4, 4)), scheduler=euler(), **text.t5())


def ovis() -> DiffusionPipeline:
    transformer = diffusers.OvisImageTransformer2DModel(
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8), **{**PACKED, "out_channels": 16}
    )
    return diffusers.OvisImagePipeline(
        transformer=transformer, vae=make_vae((4, 4)), scheduler=dynamic(), **text.qwen3(causal=False)
    )


def longcat() -> DiffusionPipeline:
    transformer = diffusers.LongCatImageTransformer2DModel(
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=[4, 4, 8], **{**PACKED, "in_channels": 64}
    )
    parts = text.qwen2_vl()
    parts["text_processor"] = parts.pop("processor")
    pipeline = diffusers.LongCatImagePipeline(
        transformer=transformer, vae=make_vae((4, 4), latent_channels=16), scheduler=dynamic(), **parts
    )
    pipeline.tokenizer_max_length = 32
    return pipeline


def prx() -> DiffusionPipeline:
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=4,
        patch_size=2,
        context_in_dim=16,
        hidden_size=16,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[4, 4],
    )
    return diffusers.PRXPipeline(
        transformer=transformer,
        vae=make_vae((4, 4)),
        scheduler=euler(shift=3.0),
        default_sample_size=None,
        **text.gemma2(),
    )


def kandinsky5_transformer(**options: Any) -> diffusers.Kandinsky5Transformer3DModel:
    return diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 6, 6),
        **options,
    )


def kandinsky5_encoders() -> dict[str, Any]:
    first = text.qwen2_vl()
    first["tokenizer"] = first.pop("processor")
    return numbered(first, text.clip(projection=False))


def kandinsky5_image() -> DiffusionPipeline:
    pipeline = diffusers.Kandinsky5T2IPipeline(
        transformer=kandinsky5_transformer(),
        vae=make_vae((4, 4, 4, 4)),
        scheduler=euler(shift=5.0),
        **kandinsky5_encoders(),
    )
    pipeline.resolutions = [(32, 32)]
    return pipeline


def bria_fibo() -> DiffusionPipeline:
    transformer = diffusers.BriaFiboTransformer2DModel(
        joint_attention_dim=32, text_encoder_dim=16, axes_dims_rope=[4, 4, 8], **{**PACKED, "in_channels": 4}
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1] * 4,
        latents_std=[1.2] * 4,
    )
    return diffusers.BriaFiboPipeline(transformer=transformer, vae=vae, scheduler=dynamic(), **encoders.smollm3())


def lumina_next() -> DiffusionPipeline:
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=16,
    )
    return diffusers.LuminaPipeline(
        transformer=transformer, vae=make_vae((4,) * 4), scheduler=euler(), **encoders.gemma()
    )


def nucleus() -> DiffusionPipeline:
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        dense_moe_strategy="leave_first_block_dense",
        num_experts=2,
        moe_intermediate_dim=16,
        capacity_factors=[2.0, 2.0],
    )
    pipeline = diffusers.NucleusMoEImagePipeline(
        transformer=transformer, vae=qwen_vae(), scheduler=dynamic(), **qwen3_vl_with_processor()
    )
    pipeline.default_return_index = -1
    for name, weight in transformer.named_parameters():
        if "experts" in name:  # left uninitialised
            weight.data.normal_(std=0.2)
    return pipeline


def bria_fibo2() -> DiffusionPipeline:
    transformer = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=32,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=2,
        gist_min_text_len=4,
        gist_max_text_len=32,
        axes_dims=(8, 4, 4),
        axes_lens=(64, 32, 32),
    )
    pipeline = diffusers.BriaFibo2Pipeline(
        transformer=transformer, vae=flux2_vae(), scheduler=dynamic(), **qwen3_vl_with_processor()
    )
    pipeline.text_encoder_out_layers = ((0, 1), (0, 1))
    return pipeline


def ernie() -> DiffusionPipeline:
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=32,
        in_channels=16,
        out_channels=16,
        text_in_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    return diffusers.ErnieImagePipeline(
        transformer=transformer, vae=flux2_vae(), scheduler=euler(shift=4.0), **text.qwen3(causal=False)
    )


def prx_pixel() -> DiffusionPipeline:
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=3,
        patch_size=2,
        context_in_dim=16,
        hidden_size=16,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[4, 4],
    )
    return diffusers.PRXPixelPipeline(
        transformer=transformer,
        scheduler=euler(shift=3.0),
        default_sample_size=None,
        prompt_max_tokens=16,
        **text.gemma2(),
    )


def z_image_omni() -> DiffusionPipeline:
    parts = FAMILIES["z_image"].build().components
    # A config remembers which of its values are defaults, and takes them again.
    config = {name: value for name, value in parts["transformer"].config.items() if not name.startswith("_")}
    siglip = Siglip2VisionModel(
        Siglip2VisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_patches=16
        )
    )
    return diffusers.ZImageOmniPipeline(
        **{
            **parts,
            "transformer": diffusers.ZImageTransformer2DModel(
                **{**config, "siglip_feat_dim": 16, "axes_lens": [256, 64, 64]}
            ),
        },
        siglip=siglip,
        siglip_processor=Siglip2ImageProcessorPil(),
    )


def omnigen() -> DiffusionPipeline:
    tokenizer = text.language_tokenizer(bos=True)
    transformer = diffusers.OmniGenTransformer2DModel(
        in_channels=4,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        num_layers=1,
        pad_token_id=0,
        vocab_size=len(tokenizer),
        time_step_dim=16,
        pos_embed_max_size=16,
        rope_scaling={"short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
    )
    return diffusers.OmniGenPipeline(
        transformer=transformer,
        vae=make_vae((4, 4, 4, 4)),
        scheduler=euler(invert_sigmas=True),
        tokenizer=tokenizer,
    )


def dreamlite(pipeline: type[DiffusionPipeline]) -> DiffusionPipeline:
    unet = diffusers.DreamLiteUNetModel(
        block_out_channels=(16, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        cross_attention_dim=16,
        ff_mult=1,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16,
    )
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    parts = encoders.qwen3_vl(generates=True)
    return pipeline(unet=unet, vae=vae, scheduler=dynamic(), processor=encoders.processor(parts["tokenizer"]), **parts)


def flux2_klein_kv() -> DiffusionPipeline:
    return diffusers.Flux2KleinKVPipeline(**FAMILIES["flux2_klein"].build().components)


_TRUE_CFG: dict[str, Any] = dict(guidance_name="true_cfg_scale", guidance_options={"negative_prompt": ""})


def _family(make: Callable[[], DiffusionPipeline], targets: tuple[str, ...] = ATTENTION, **options: Any) -> Family:
    return Family(make, targets, **options)


IMAGES: dict[str, Family] = {
    "BriaPipeline": _family(bria),
    "OvisImagePipeline": _family(ovis),
    "LongCatImagePipeline": _family(
        longcat, max_sequence_length=None, generation_kwargs={"enable_prompt_rewrite": False}
    ),
    "PRXPipeline": _family(
        prx,
        ("img_qkv_proj", "txt_kv_proj"),
        max_sequence_length=None,
        prompts=PROMPTS[1:],
        generation_kwargs={"use_resolution_binning": False},
    ),
    "Kandinsky5T2IPipeline": _family(
        kandinsky5_image, ("to_query", "to_key", "to_value"), size=32, max_sequence_length=16
    ),
    "BriaFiboPipeline": _family(bria_fibo, size=32, max_sequence_length=32),
    "LuminaPipeline": _family(lumina_next, size=32, max_sequence_length=32),
    "NucleusMoEImagePipeline": _family(nucleus, prompts=PROMPTS[1:], max_sequence_length=96),
    "BriaFibo2Pipeline": _family(bria_fibo2, max_sequence_length=None),
    "ErnieImagePipeline": _family(ernie, max_sequence_length=None),
    "PRXPixelPipeline": _family(
        prx_pixel,
        ("img_qkv_proj", "txt_kv_proj"),
        max_sequence_length=None,
        prompts=PROMPTS[1:],
        generation_kwargs={"use_resolution_binning": False},
    ),
    "ZImageOmniPipeline": _family(z_image_omni, guidance_offset=1.0),
    "OmniGenPipeline": _family(omnigen, ("to_q", "to_k", "to_v"), size=32, max_sequence_length=None),
    "DreamLitePipeline": _family(
        lambda: dreamlite(diffusers.DreamLitePipeline), guidance_scale=1.0, prompts=PROMPTS[1:]
    ),
    "DreamLiteMobilePipeline": _family(
        lambda: dreamlite(diffusers.DreamLiteMobilePipeline),
        guidance_scale=1.0,
        guidance_name=None,
        prompts=PROMPTS[1:],
    ),
    "Flux2Pipeline": _family(
        flux2_without_encoder, guidance_scale=1.0, guidance_name=None, generation_kwargs={"guidance_scale": 4.0}
    ),
    "Flux2KleinKVPipeline": _family(
        flux2_klein_kv,
        guidance_scale=1.0,
        guidance_name=None,
        generation_kwargs={"text_encoder_out_layers": (1, 2, 3)},
    ),
}
