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

"""Tiny pipelines of models that predict noise or v, besides those of the tests, and those that denoise in stages."""

from typing import Any

import diffusers
from diffusers import DDIMScheduler, DiffusionPipeline
from helpers import families_text as text
from helpers.families import FAMILIES, PROMPTS, Family
from helpers.noise_families import NOISE_FAMILIES, PIXART, STABLE_DIFFUSION, noise_scheduler
from helpers.tiny_sd3 import make_vae

from .videos import cosmos_transformer, no_safety_checker, wan_vae


_CROSS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "attn2.to_v")
_PLAIN = {"clean_caption": False}  # cleaning needs Beautiful Soup


def _pixart_transformer() -> diffusers.PixArtTransformer2DModel:
    return NOISE_FAMILIES["pixart_sigma"].build().transformer


def pixart_alpha() -> DiffusionPipeline:
    return diffusers.PixArtAlphaPipeline(
        transformer=_pixart_transformer(), vae=make_vae((4, 4)), scheduler=noise_scheduler(PIXART), **text.t5()
    )


def allegro() -> DiffusionPipeline:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=4,
        sample_height=4,
        sample_frames=4,
        caption_channels=16,
    )
    vae = diffusers.AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4, sample_size=32
    )
    vae.enable_tiling()  # it decodes in no other way
    vae.kernel, vae.stride = (4, 32, 32), (4, 16, 16)
    return diffusers.AllegroPipeline(transformer=transformer, vae=vae, scheduler=noise_scheduler(PIXART), **text.t5())


def latte() -> DiffusionPipeline:
    transformer = diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        attention_bias=True,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=1,
    )
    return diffusers.LattePipeline(
        transformer=transformer, vae=make_vae((4, 4)), scheduler=noise_scheduler(PIXART), **text.t5()
    )


def cogvideox() -> DiffusionPipeline:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        max_text_seq_length=16,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear",
        beta_end=0.012,
        prediction_type="v_prediction",
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    return diffusers.CogVideoXPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **text.t5())


def cogview3() -> DiffusionPipeline:
    transformer = diffusers.CogView3PlusTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear",
        beta_end=0.012,
        prediction_type="v_prediction",
        snr_shift_scale=4.0,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    return diffusers.CogView3PlusPipeline(
        transformer=transformer, vae=make_vae((4, 4)), scheduler=scheduler, **text.t5()
    )


def _motion_adapter() -> diffusers.MotionAdapter:
    return diffusers.MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=4,
        motion_max_seq_length=4,
    )


def animate_diff() -> DiffusionPipeline:
    parts = NOISE_FAMILIES["sd15"].build().components
    for name in ("safety_checker", "requires_safety_checker"):
        parts.pop(name, None)
    return diffusers.AnimateDiffPipeline(**parts, motion_adapter=_motion_adapter())


def animate_diff_xl() -> DiffusionPipeline:
    parts = NOISE_FAMILIES["sdxl"].build().components
    return diffusers.AnimateDiffSDXLPipeline(**parts, motion_adapter=_motion_adapter())


def latent_consistency() -> DiffusionPipeline:
    parts = NOISE_FAMILIES["sd15"].build().components
    parts["scheduler"] = diffusers.LCMScheduler(beta_schedule="scaled_linear", beta_end=0.012)
    unet = diffusers.UNet2DConditionModel.from_config({**parts["unet"].config, "time_cond_proj_dim": 32})
    return diffusers.LatentConsistencyModelPipeline(**{**parts, "unet": unet}, requires_safety_checker=False)


def deepfloyd() -> DiffusionPipeline:
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=32,
        encoder_hid_dim=16,
        act_fn="gelu",
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        class_embed_type=None,
        resnet_time_scale_shift="scale_shift",
        time_embedding_act_fn="gelu",
        cross_attention_norm="group_norm",
    )
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True
    )
    return diffusers.IFPipeline(
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
        **text.t5(),
    )


def _movq() -> diffusers.VQModel:
    return diffusers.VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
        norm_type="spatial",
    )


def kandinsky3() -> DiffusionPipeline:
    unet = diffusers.Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        block_out_channels=(32, 64),
        cross_attention_dim=4,
        encoder_hid_dim=16,
    )
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False, beta_schedule="scaled_linear")
    return diffusers.Kandinsky3Pipeline(unet=unet, movq=_movq(), scheduler=scheduler, **text.t5())


def latent_diffusion() -> DiffusionPipeline:
    parts = NOISE_FAMILIES["sd15"].build().components
    return diffusers.LDMTextToImagePipeline(
        vqvae=parts["vae"],
        bert=parts["text_encoder"],
        tokenizer=parts["tokenizer"],
        unet=parts["unet"],
        scheduler=DDIMScheduler(**STABLE_DIFFUSION),
    )


def sana_sprint() -> DiffusionPipeline:

    parts = FAMILIES["sana"].build().components
    transformer = diffusers.SanaTransformer2DModel.from_config(
        {**parts["transformer"].config, "guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
    )
    return diffusers.SanaSprintPipeline(**{**parts, "transformer": transformer, "scheduler": diffusers.SCMScheduler()})


def cosmos1() -> DiffusionPipeline:
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        latents_mean=None,
        latents_std=None,
    )
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", final_sigmas_type="sigma_min"
    )
    return diffusers.CosmosTextToWorldPipeline(
        transformer=cosmos_transformer(extra_pos_embed_type="learnable"),
        vae=vae,
        scheduler=scheduler,
        safety_checker=no_safety_checker(),
        **text.t5(),
    )


def cosmos25() -> DiffusionPipeline:
    parts = text.qwen2_vl()
    del parts["processor"]
    scheduler = diffusers.UniPCMultistepScheduler(
        use_karras_sigmas=True,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        sigma_min=0.01,
        sigma_max=200.0,
    )
    return diffusers.Cosmos2_5_PredictBasePipeline(
        transformer=cosmos_transformer(
            in_channels=5,
            use_crossattn_projection=True,
            crossattn_proj_in_channels=32,
            encoder_hidden_states_channels=16,
        ),
        vae=wan_vae(),
        scheduler=scheduler,
        safety_checker=no_safety_checker(),
        **parts,
    )


def _prior(**options: Any) -> diffusers.PriorTransformer:
    return diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=8, num_layers=1, num_embeddings=77, **options
    )


def _image_encoder() -> dict[str, Any]:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    config = CLIPVisionConfig(
        hidden_size=8,
        projection_dim=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return {"image_encoder": CLIPVisionModelWithProjection(config), "image_processor": CLIPImageProcessorPil()}


def kandinsky_prior(pipeline: type[DiffusionPipeline]) -> DiffusionPipeline:
    return pipeline(
        prior=_prior(),
        scheduler=diffusers.UnCLIPScheduler(prediction_type="sample"),
        **text.clip(),
        **_image_encoder(),
    )


def _kandinsky_unet() -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=8,
        encoder_hid_dim=8,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
        resnet_time_scale_shift="scale_shift",
    )


def kandinsky22() -> DiffusionPipeline:
    prior = kandinsky_prior(diffusers.KandinskyV22PriorPipeline).components
    return diffusers.KandinskyV22CombinedPipeline(
        unet=_kandinsky_unet(),
        scheduler=diffusers.DDPMScheduler(),
        movq=_movq(),
        **{f"prior_{name}": part for name, part in prior.items()},
    )


def kandinsky21() -> DiffusionPipeline:
    from diffusers.pipelines.kandinsky import MultilingualCLIP
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig

    tokenizer = text.language_tokenizer(bos=True)
    config = MCLIPConfig(
        numDims=8,
        transformerDimensions=8,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
    )
    prior = kandinsky_prior(diffusers.KandinskyPriorPipeline).components
    return diffusers.KandinskyCombinedPipeline(
        text_encoder=MultilingualCLIP(config),
        tokenizer=tokenizer,
        unet=_kandinsky_unet(),
        scheduler=diffusers.DDPMScheduler(),
        movq=_movq(),
        **{f"prior_{name}": part for name, part in prior.items()},
    )


def stable_unclip() -> DiffusionPipeline:
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    parts = NOISE_FAMILIES["sd2_v"].build().components
    first, second = text.clip(), text.clip(projection=False)
    unet = diffusers.UNet2DConditionModel.from_config(
        {**parts["unet"].config, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 16}
    )
    return diffusers.StableUnCLIPPipeline(
        prior_tokenizer=first["tokenizer"],
        prior_text_encoder=first["text_encoder"],
        prior=_prior(),
        prior_scheduler=diffusers.UnCLIPScheduler(prediction_type="sample"),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=8),
        image_noising_scheduler=diffusers.DDPMScheduler(),
        unet=unet,
        scheduler=parts["scheduler"],
        vae=parts["vae"],
        **second,
    )


_UNLIMITED: dict[str, Any] = dict(max_sequence_length=None)
NOISE: dict[str, Family] = {
    "PixArtAlphaPipeline": Family(pixart_alpha, _CROSS, generation_kwargs={"use_resolution_binning": False, **_PLAIN}),
    "AllegroPipeline": Family(
        allegro, _CROSS, size=32, prompts=PROMPTS[1:], generation_kwargs={"num_frames": 1, **_PLAIN}
    ),
    "LattePipeline": Family(latte, _CROSS, **_UNLIMITED, generation_kwargs={"video_length": 1, **_PLAIN}),
    "CogVideoXPipeline": Family(cogvideox, ("to_q", "to_k", "to_v"), generation_kwargs={"num_frames": 1}),
    "CogView3PlusPipeline": Family(cogview3, ("to_q", "to_k", "to_v")),
    "AnimateDiffPipeline": Family(animate_diff, _CROSS, **_UNLIMITED, generation_kwargs={"num_frames": 1}),
    "AnimateDiffSDXLPipeline": Family(animate_diff_xl, _CROSS, **_UNLIMITED, generation_kwargs={"num_frames": 1}),
    "LatentConsistencyModelPipeline": Family(latent_consistency, _CROSS, **_UNLIMITED),
    "IFPipeline": Family(deepfloyd, ("to_q", "to_k", "to_v"), **_UNLIMITED, generation_kwargs=_PLAIN),
    "Kandinsky3Pipeline": Family(kandinsky3, ("to_q", "to_k", "to_v"), **_UNLIMITED),
    "LDMTextToImagePipeline": Family(latent_diffusion, _CROSS, **_UNLIMITED),
    "SanaSprintPipeline": Family(
        sana_sprint,
        _CROSS,
        size=32,
        guidance_scale=1.0,
        guidance_name=None,
        generation_kwargs={"use_resolution_binning": False, "complex_human_instruction": None},
    ),
    "CosmosTextToWorldPipeline": Family(
        cosmos1, ("to_q", "to_k", "to_v"), size=32, generation_kwargs={"num_frames": 1}
    ),
    "Cosmos2_5_PredictBasePipeline": Family(
        cosmos25, ("to_q", "to_k", "to_v"), size=32, generation_kwargs={"num_frames": 1}
    ),
    "KandinskyPriorPipeline": Family(
        lambda: kandinsky_prior(diffusers.KandinskyPriorPipeline), ("to_q", "to_k", "to_v"), **_UNLIMITED
    ),
    "KandinskyV22PriorPipeline": Family(
        lambda: kandinsky_prior(diffusers.KandinskyV22PriorPipeline), ("to_q", "to_k", "to_v"), **_UNLIMITED
    ),
    "KandinskyCombinedPipeline": Family(kandinsky21, ("to_q", "to_k", "to_v"), **_UNLIMITED),
    "KandinskyV22CombinedPipeline": Family(kandinsky22, ("to_q", "to_k", "to_v"), **_UNLIMITED),
    "StableUnCLIPPipeline": Family(stable_unclip, _CROSS, **_UNLIMITED),
}
