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

"""Tiny flow-matching pipelines for videos that the families of the tests do not have. Each makes one frame by itself."""

from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from helpers import families_encoders as encoders
from helpers import families_text as text
from helpers.families import PROMPTS, Family
from helpers.families_flow import euler
from helpers.tiny_sd3 import numbered

from .images import ATTENTION, kandinsky5_encoders, kandinsky5_transformer


# Of transformers after Wan's.
LIKE_WAN: dict[str, Any] = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=32,
    ffn_dim=32,
    num_layers=1,
    cross_attn_norm=True,
)


def wan_vae() -> diffusers.AutoencoderKLWan:
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1] * 4,
        latents_std=[1.2] * 4,
    )


def hunyuan_vae() -> diffusers.AutoencoderKLHunyuanVideo:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )


def anyflow() -> DiffusionPipeline:
    return diffusers.AnyFlowPipeline(
        transformer=diffusers.AnyFlowTransformer3DModel(rope_max_seq_len=32, **LIKE_WAN),
        vae=wan_vae(),
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(shift=5.0),
        **text.t5(multilingual=True),
    )


def anyflow_far() -> DiffusionPipeline:
    transformer = diffusers.AnyFlowFARTransformer3DModel(rope_max_seq_len=32, chunk_partition=(1,), **LIKE_WAN)
    return diffusers.AnyFlowFARPipeline(
        transformer=transformer,
        vae=wan_vae(),
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(shift=5.0),
        **text.t5(multilingual=True),
    )


def _skyreels(pipeline: type[DiffusionPipeline]) -> DiffusionPipeline:
    transformer = diffusers.SkyReelsV2Transformer3DModel(
        rope_max_seq_len=32, qk_norm="rms_norm_across_heads", inject_sample_info=False, **LIKE_WAN
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    return pipeline(transformer=transformer, vae=wan_vae(), scheduler=scheduler, **text.t5(multilingual=True))


def helios(pipeline: type[DiffusionPipeline], scheduler: Any) -> DiffusionPipeline:
    transformer = diffusers.HeliosTransformer3DModel(rope_dim=(4, 4, 4), qk_norm="rms_norm_across_heads", **LIKE_WAN)
    return pipeline(transformer=transformer, vae=wan_vae(), scheduler=scheduler, **text.t5(multilingual=True))


def hunyuan_video_transformer(**options: Any) -> diffusers.HunyuanVideoTransformer3DModel:
    return diffusers.HunyuanVideoTransformer3DModel(
        **{
            **dict(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=10,
                num_layers=1,
                num_single_layers=1,
                num_refiner_layers=1,
                text_embed_dim=16,
                pooled_projection_dim=8,
                rope_axes_dim=(2, 4, 4),
            ),
            **options,
        }
    )


def hunyuan_video() -> DiffusionPipeline:
    return diffusers.HunyuanVideoPipeline(
        transformer=hunyuan_video_transformer(),
        vae=hunyuan_vae(),
        scheduler=euler(shift=7.0),
        **numbered(encoders.llama(layers=3), text.clip(projection=False)),
    )


def hunyuan_video15() -> DiffusionPipeline:
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=16,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=2,
        temporal_compression_ratio=2,
    )
    pipeline = diffusers.HunyuanVideo15Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=euler(shift=5.0),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=6.0),
        **numbered(encoders.qwen2_5_text(), encoders.byt5()),
    )
    pipeline.tokenizer_max_length, pipeline.tokenizer_2_max_length = 32, 8
    pipeline.vision_num_semantic_tokens = 2
    return pipeline


def kandinsky5_video() -> DiffusionPipeline:
    pipeline = diffusers.Kandinsky5T2VPipeline(
        transformer=kandinsky5_transformer(),
        vae=hunyuan_vae(),
        scheduler=euler(shift=5.0),
        **kandinsky5_encoders(),
    )
    # The tiny tokenizer would need a thousand tokens for what is before the prompt.
    pipeline.prompt_template, pipeline.prompt_template_encode_start_idx = "<|im_start|>user\n{}<|im_end|>", 3
    return pipeline


def ltx() -> DiffusionPipeline:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        patch_size=1,
        encoder_causal=True,
    )
    return diffusers.LTXPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
        **text.t5(),
    )


def mochi() -> DiffusionPipeline:
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1,) * 5,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return diffusers.MochiPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **text.t5())


def sana_video() -> DiffusionPipeline:
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=4,
        rope_max_seq_len=32,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    return diffusers.SanaVideoPipeline(transformer=transformer, vae=wan_vae(), scheduler=scheduler, **text.gemma2())


def motif() -> DiffusionPipeline:
    transformer = diffusers.MotifVideoTransformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        text_embed_dim=16,
        rope_axes_dim=(2, 2, 4),
    )
    return diffusers.MotifVideoPipeline(
        transformer=transformer,
        vae=wan_vae(),
        scheduler=euler(shift=5.0),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=8.0),
        **text.gemma2(),
    )


def easy_animate() -> DiffusionPipeline:
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_layers=1,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=16,
    )
    vae = diffusers.AutoencoderKLMagvit(
        latent_channels=4,
        block_out_channels=[8, 8, 8, 8],
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    parts = text.qwen2_vl()
    del parts["processor"]
    return diffusers.EasyAnimatePipeline(transformer=transformer, vae=vae, scheduler=euler(), **parts)


class no_safety_checker:  # noqa: N801
    """In place of Cosmos' own, which loads models from the Hub."""

    def to(self, device: object) -> "no_safety_checker":
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def cosmos_transformer(**options: Any) -> diffusers.CosmosTransformer3DModel:
    return diffusers.CosmosTransformer3DModel(
        **{
            **dict(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=16,
                num_layers=1,
                mlp_ratio=2,
                text_embed_dim=16,
                adaln_lora_dim=4,
                max_size=(4, 32, 32),
                rope_scale=(2.0, 1.0, 1.0),
                extra_pos_embed_type=None,
                concat_padding_mask=False,  # it is resized by torchvision
            ),
            **options,
        }
    )


def cosmos2() -> DiffusionPipeline:
    scheduler = euler(use_karras_sigmas=True)
    scheduler.register_to_config(sigma_max=80.0, sigma_min=0.002, sigma_data=1.0, final_sigmas_type="sigma_min")
    return diffusers.Cosmos2TextToImagePipeline(
        transformer=cosmos_transformer(),
        vae=wan_vae(),
        scheduler=scheduler,
        safety_checker=no_safety_checker(),
        **text.t5(),
    )


# The numbers of frames with which pipelines are tried beside one: what their VAEs hold, few.
FRAMES = {
    "AllegroPipeline": 8,
    "AnimateDiffPipeline": 4,
    "CogVideoXPipeline": 9,
    "EasyAnimatePipeline": 5,
    "HunyuanVideo15Pipeline": 5,
    "HunyuanVideoPipeline": 5,
    "Kandinsky5T2VPipeline": 5,
    "LTXPipeline": 9,
    "LattePipeline": 4,
    "MochiPipeline": 7,
    "MotifVideoPipeline": 5,
    "SanaVideoPipeline": 5,
    "SkyReelsV2Pipeline": 5,
    "WanPipeline": 9,
}
_ONE = {"num_frames": 1}
_WAN = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "attn2.to_v")
VIDEOS: dict[str, Family] = {
    "AnyFlowPipeline": Family(anyflow, _WAN, size=32, generation_kwargs=_ONE),
    "AnyFlowFARPipeline": Family(anyflow_far, _WAN, size=32, generation_kwargs=_ONE),
    "SkyReelsV2Pipeline": Family(
        lambda: _skyreels(diffusers.SkyReelsV2Pipeline), _WAN, size=32, generation_kwargs=_ONE
    ),
    "SkyReelsV2DiffusionForcingPipeline": Family(
        lambda: _skyreels(diffusers.SkyReelsV2DiffusionForcingPipeline), _WAN, size=32, generation_kwargs=_ONE
    ),
    "HeliosPipeline": Family(
        lambda: helios(diffusers.HeliosPipeline, diffusers.HeliosScheduler(stages=1)),
        _WAN,
        size=32,
        generation_kwargs=_ONE,
    ),
    "HeliosPyramidPipeline": Family(
        lambda: helios(diffusers.HeliosPyramidPipeline, diffusers.HeliosDMDScheduler()),
        _WAN,
        size=32,
        generation_kwargs=_ONE,
    ),
    "HunyuanVideoPipeline": Family(
        hunyuan_video,
        ATTENTION,
        size=16,
        guidance_name="true_cfg_scale",
        guidance_options={"negative_prompt": ""},
        generation_kwargs={**_ONE, "prompt_template": {"template": "{}", "crop_start": 0}},
    ),
    "HunyuanVideo15Pipeline": Family(
        hunyuan_video15,
        ATTENTION,
        prompts=PROMPTS[1:],
        guidance_name=None,
        max_sequence_length=None,
        generation_kwargs=_ONE,
    ),
    "Kandinsky5T2VPipeline": Family(
        kandinsky5_video,
        ("to_query", "to_key", "to_value"),
        size=32,
        max_sequence_length=64,
        generation_kwargs=_ONE,
    ),
    "LTXPipeline": Family(ltx, ATTENTION, size=32, generation_kwargs=_ONE),
    "MochiPipeline": Family(mochi, ATTENTION, size=16, generation_kwargs=_ONE),
    "SanaVideoPipeline": Family(
        sana_video,
        _WAN,
        size=32,
        generation_kwargs={"use_resolution_binning": False, "complex_human_instruction": None, "frames": 1},
    ),
    "MotifVideoPipeline": Family(motif, ATTENTION, size=32, guidance_name=None, generation_kwargs=_ONE),
    "EasyAnimatePipeline": Family(
        easy_animate, ATTENTION, max_sequence_length=None, generation_kwargs={**_ONE, "negative_prompt": ""}
    ),
    "Cosmos2TextToImagePipeline": Family(cosmos2, ATTENTION, size=32),
}
