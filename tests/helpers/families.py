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

"""
Tiny pipelines with random weights, one for each family of flow-matching models, with tokenizers and text encoders.

The facts about each family come from diffusers' documentation, not from the package, since the package is tested
against them.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from helpers import families_text as text
from helpers.tiny_sd3 import TRANSFORMER, make_vae, numbered, vae_config
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import nn


def denoiser(pipeline: DiffusionPipeline) -> Any:
    """The network that denoises."""
    return pipeline.components.get("unet", pipeline.components.get("transformer"))


PROMPTS = ("a red cat", "two dogs left of a blue square")


@dataclass(frozen=True)
class Family:
    """
    One family.

    Args:
        make (`Callable`): builds the pipeline.
        lora_targets (`tuple[str]`): linear layers for a LoRA.
        size (`int`): height and width in pixels.
        guidance_scale (`float`): a usual scale.
        guidance_name (`str`, *optional*): what the pipeline's call names classifier-free guidance; `None` if nothing.
        guidance_offset (`float`): what the pipeline's scale is less than the usual one, of which 1 is no guidance.
        guidance_options (`dict`): what a user must pass besides, for guidance to be on.
        generation_kwargs (`dict`): further arguments of the pipeline's `__call__`.
        max_sequence_length (`int`, *optional*): of the text.
        prompts (`tuple[str]`): of different length.
        sized (`bool`): whether the pipeline's call takes height and width. If not, its pictures' size decides.
        trainable (`bool`): whether gradients reach every weight.
    """

    make: Callable[[], DiffusionPipeline]
    lora_targets: tuple[str, ...]
    size: int = 16
    guidance_scale: float = 4.0
    guidance_name: str | None = "guidance_scale"
    guidance_offset: float = 0.0
    guidance_options: dict[str, Any] = field(default_factory=dict)
    generation_kwargs: dict[str, Any] = field(default_factory=dict)
    max_sequence_length: int | None = 16
    prompts: tuple[str, ...] = PROMPTS
    sized: bool = True
    trainable: bool = True
    has_encoders: bool = True

    def build(self) -> DiffusionPipeline:
        """The pipeline, in float32 and eval mode, the same at every call."""
        torch.manual_seed(0)
        pipeline = self.make()
        for network in (denoiser(pipeline), pipeline.components.get("vae")):
            if network is not None:
                _fill_zeros(network)
                network.eval().requires_grad_(False)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def guided(self, scale: float) -> DiffusionPipeline:
        """The pipeline; if it has a guider, that has this scale."""
        pipeline = self.build()
        if "guider" in pipeline.components:
            pipeline.guider = diffusers.ClassifierFreeGuidance(guidance_scale=scale)
        return pipeline

    @property
    def kwargs(self) -> dict[str, Any]:
        """Arguments of `VelocityField`."""
        return dict(
            height=self.size,
            width=self.size,
            max_sequence_length=self.max_sequence_length,
            generation_kwargs=dict(self.generation_kwargs),
        )

    def call_kwargs(self, guidance_scale: float, prompts: tuple[str, ...] | None = None) -> dict[str, Any]:
        """Arguments of the pipeline's own `__call__`, as its documentation has them."""
        prompts = self.prompts if prompts is None else prompts
        options = {**self.guidance_options, **self.generation_kwargs}
        if self.guidance_name is not None:
            options[self.guidance_name] = guidance_scale - self.guidance_offset
        if isinstance(options.get("negative_prompt"), str):
            options["negative_prompt"] = [options["negative_prompt"]] * len(prompts)
        if self.max_sequence_length is not None:
            options["max_sequence_length"] = self.max_sequence_length
        if self.sized:
            options.update(height=self.size, width=self.size)
        return dict(prompt=list(prompts), **options)


def _fill_zeros(module: nn.Module) -> None:
    # Gates and output layers that start at zero would leave parts of a network untested; unset tokens hold anything.
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if name.endswith("pad_token") or not parameter.any():
            parameter.data.normal_(std=0.2, generator=generator)


def _dynamic_euler(**options: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **options)


def _sd3() -> DiffusionPipeline:
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(**TRANSFORMER),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae((4, 4)),
        **numbered(text.clip(), text.clip(), text.t5()),
    )


# Of transformers after SD3's, and of those after Flux's, whose latents are packed.
_LIKE_SD3: dict[str, Any] = dict(in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2)
_LIKE_FLUX: dict[str, Any] = dict(
    patch_size=1,
    in_channels=16,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
)


def _flux_transformer() -> diffusers.FluxTransformer2DModel:
    return diffusers.FluxTransformer2DModel(
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
        **_LIKE_FLUX,
    )


def flux(pipeline_class: type[DiffusionPipeline] = diffusers.FluxPipeline) -> DiffusionPipeline:
    return pipeline_class(
        transformer=_flux_transformer(),
        scheduler=_dynamic_euler(),
        vae=make_vae((4, 4)),
        **numbered(text.clip(projection=False), text.t5()),
    )


def flux2_klein(is_distilled: bool = False) -> DiffusionPipeline:
    transformer = diffusers.Flux2Transformer2DModel(
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=False,
        **_LIKE_FLUX,
    )
    return diffusers.Flux2KleinPipeline(
        transformer=transformer,
        vae=diffusers.AutoencoderKLFlux2(**vae_config((4, 4))),
        scheduler=_dynamic_euler(),
        is_distilled=is_distilled,
        **text.qwen3(causal=True),
    )


class _Flux2FromSeeds(diffusers.Flux2Pipeline):
    """FLUX.2 whose text encoder, Mistral 3 with vision, is replaced by noise seeded with the prompt."""

    def encode_prompt(self, prompt: list[str], *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seeds = [torch.Generator().manual_seed(zlib.crc32(one.encode())) for one in prompt]
        embeds = torch.stack([torch.randn(6, 48, generator=seed) for seed in seeds])
        return embeds, self._prepare_text_ids(embeds)


def flux2_without_encoder() -> DiffusionPipeline:
    """FLUX.2, whose only guidance is an embedding."""
    parts = flux2_klein().components
    config = {**parts["transformer"].config, "guidance_embeds": True}
    return _Flux2FromSeeds(
        scheduler=parts["scheduler"],
        vae=parts["vae"],
        transformer=diffusers.Flux2Transformer2DModel.from_config(config),
        text_encoder=None,
        tokenizer=None,
    )


def _video_vae(kind: type[Any], width: int, widths: list[int], shortens: list[bool]) -> Any:
    """Of an image it makes a video of one frame; `shortens` says which of its blocks halve a longer one."""
    return kind(
        base_dim=width,
        z_dim=4,
        dim_mult=widths,
        num_res_blocks=1,
        temperal_downsample=shortens,
        latents_mean=[0.1] * 4,
        latents_std=[1.2] * 4,
    )


def _qwen_parts(vae_widths: list[int]) -> dict[str, Any]:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        attention_head_dim=16,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
        **{**_LIKE_SD3, "in_channels": 16},  # packed
    )
    vae = _video_vae(diffusers.AutoencoderKLQwenImage, 1, vae_widths, [False] * (len(vae_widths) - 1))
    return dict(transformer=transformer, vae=vae, scheduler=_dynamic_euler(shift_terminal=0.02))


def _qwen_image() -> DiffusionPipeline:
    encoders = text.qwen2_vl()
    del encoders["processor"]
    return diffusers.QwenImagePipeline(**_qwen_parts([4, 4]), **encoders)


def qwen_image_edit(plus: bool = False) -> DiffusionPipeline:
    # The pipeline brings the image to edit to a million pixels: a VAE of factor 32 keeps it at 256 tokens.
    kind = diffusers.QwenImageEditPlusPipeline if plus else diffusers.QwenImageEditPipeline
    return kind(**_qwen_parts([2, 2, 2, 4, 4, 4]), **text.qwen2_vl())


def _z_image() -> DiffusionPipeline:
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return diffusers.ZImagePipeline(
        transformer=transformer,
        vae=make_vae((4, 4)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **text.qwen3(causal=False),
    )


def _sana() -> DiffusionPipeline:
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=32,
        **_LIKE_SD3,
    )
    blocks: dict[str, Any] = dict(latent_channels=4, attention_head_dim=2, scaling_factor=0.4)
    for side in ("encoder", "decoder"):
        blocks[f"{side}_block_types"] = ("ResBlock", "EfficientViTBlock")
        blocks[f"{side}_block_out_channels"] = (8, 8)
        blocks[f"{side}_qkv_multiscales"] = ((), (5,))
    vae = diffusers.AutoencoderDC(
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        **blocks,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.SanaPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **text.gemma2())


def _lumina2() -> DiffusionPipeline:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        norm_eps=1e-5,
        scaling_factor=1.0,
        axes_dim_rope=[4, 2, 2],
        cap_feat_dim=16,
    )
    # The pipeline takes a VAE of factor 8 for granted.
    return diffusers.Lumina2Pipeline(
        transformer=transformer, vae=make_vae((4,) * 4), scheduler=_dynamic_euler(), **text.gemma2()
    )


def _hidream() -> DiffusionPipeline:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[16, 16],
        text_emb_dim=16,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
    )
    pipeline = diffusers.HiDreamImagePipeline(
        transformer=transformer,
        vae=make_vae((4, 4)),
        scheduler=_dynamic_euler(),
        **numbered(text.clip(), text.clip(), text.t5(), text.llama()),
    )
    pipeline.default_sample_size = 8  # the pipeline scales every size to this area, 1024 x 1024 as it is
    return pipeline


def _chroma() -> DiffusionPipeline:
    transformer = diffusers.ChromaTransformer2DModel(
        joint_attention_dim=16,
        axes_dims_rope=[4, 4, 8],
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
        **_LIKE_FLUX,
    )
    return diffusers.ChromaPipeline(
        transformer=transformer, vae=make_vae((4, 4)), scheduler=_dynamic_euler(), **text.t5()
    )


def _wan() -> DiffusionPipeline:
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        attention_head_dim=12,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
        **_LIKE_SD3,
    )
    vae = _video_vae(diffusers.AutoencoderKLWan, 4, [1, 1, 1, 1], [False, True, True])
    return diffusers.WanPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **text.t5(multilingual=True),
    )


def _cogview4() -> DiffusionPipeline:
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        attention_head_dim=8,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        **_LIKE_SD3,
    )
    scheduler = _dynamic_euler(base_shift=0.25, max_shift=0.75, base_image_seq_len=256, time_shift_type="linear")
    return diffusers.CogView4Pipeline(transformer=transformer, vae=make_vae((4, 4)), scheduler=scheduler, **text.glm())


_PICTURE = Image.fromarray((np.random.default_rng(0).random((16, 16, 3)) * 255).astype("uint8"))
TRUE_CFG: dict[str, Any] = dict(guidance_name="true_cfg_scale", guidance_options={"negative_prompt": ""})
JOINT = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
_SELF_AND_CROSS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "attn2.to_v")

FAMILIES: dict[str, Family] = {
    "sd3": Family(_sd3, (*JOINT, "attn.add_q_proj"), guidance_scale=4.5),
    # Flux knows two guidances: classifier-free, and an embedding that distillation left it with.
    "flux": Family(flux, JOINT, generation_kwargs={"guidance_scale": 3.5}, **TRUE_CFG),
    "flux2_klein": Family(flux2_klein, JOINT, generation_kwargs={"text_encoder_out_layers": (1, 2, 3)}),
    "qwen_image": Family(_qwen_image, JOINT, **TRUE_CFG),
    # Its velocity is v + s (v - v_empty).
    "z_image": Family(_z_image, ("attention.to_q", "attention.to_k", "attention.to_v"), guidance_offset=1.0),
    "sana": Family(
        _sana,
        _SELF_AND_CROSS,
        guidance_scale=4.5,
        # The default text before the prompt is several hundred tokens long.
        generation_kwargs={"use_resolution_binning": False, "complex_human_instruction": None},
        size=32,
    ),
    "lumina2": Family(_lumina2, JOINT, size=32, max_sequence_length=48),
    "hidream": Family(_hidream, ("attn1.to_q", "attn1.to_k", "attn1.to_v"), guidance_scale=5.0, trainable=False),
    "chroma": Family(_chroma, JOINT),
    "wan": Family(_wan, _SELF_AND_CROSS, size=32, guidance_scale=5.0, generation_kwargs={"num_frames": 1}),
    "cogview4": Family(_cogview4, ("attn1.to_q", "attn1.to_k", "attn1.to_v"), guidance_scale=5.0),
    "flux_kontext": Family(
        lambda: flux(diffusers.FluxKontextPipeline),
        JOINT,
        generation_kwargs={"image": _PICTURE, "guidance_scale": 3.5, "max_area": 16 * 16, "_auto_resize": False},
        **TRUE_CFG,
    ),
    # One prompt: its processor wants an image a prompt.
    "qwen_image_edit": Family(
        qwen_image_edit, JOINT, size=128, generation_kwargs={"image": _PICTURE}, prompts=PROMPTS[1:], **TRUE_CFG
    ),
}


# Qwen-Image-Edit differs from Qwen-Image and Kontext in nothing that the trainer sees, and takes as long as all
# others.
TRAINED = [name for name, family in FAMILIES.items() if family.trainable and name != "qwen_image_edit"]


def save_teacher(family: Family, folder: Path, seed: int) -> PeftModel:
    """A LoRA that moves the base a little, as a PEFT folder."""
    transformer = denoiser(family.build())
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=list(family.lora_targets), init_lora_weights=False)
    model = get_peft_model(transformer, config).eval()
    model.save_pretrained(folder)
    return model
