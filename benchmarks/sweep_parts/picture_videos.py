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

"""Tiny pipelines that begin a video with a picture. They draw two latent frames, of which the picture is the first."""

from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from helpers import families_text as text
from helpers.edit_families import EditFamily
from helpers.families import PROMPTS, Family
from helpers.families_flow import euler
from helpers.tiny_sd3 import numbered
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from .images import ATTENTION, kandinsky5_transformer
from .noise import cogvideox, cosmos1
from .small_pictures import noiseless
from .videos import (
    LIKE_WAN,
    VIDEOS,
    cosmos2,
    cosmos_transformer,
    hunyuan_vae,
    hunyuan_video,
    hunyuan_video15,
    hunyuan_video_transformer,
    kandinsky5_video,
    ltx,
    motif,
    sana_video,
    wan_vae,
)


_VISION: dict[str, Any] = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
)


def _clip_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def _siglip() -> SiglipVisionModel:
    return SiglipVisionModel(SiglipVisionConfig(**_VISION)).eval()


def _siglip_processor() -> SiglipImageProcessorPil:
    return SiglipImageProcessorPil(size={"height": 32, "width": 32})


def like_wan(
    pipeline: type[DiffusionPipeline], network: type[Any], scheduler: Any = None, **options: Any
) -> DiffusionPipeline:
    """After Wan 2.1's: a CLIP reads the picture, and its latents and a mask are beside those of the noise."""
    config = {
        **LIKE_WAN,
        "in_channels": 12,
        "image_dim": 16,
        "added_kv_proj_dim": 24,
        "rope_max_seq_len": 32,
        **options,
    }
    return pipeline(
        transformer=network(qk_norm="rms_norm_across_heads", **config),
        vae=wan_vae(),
        scheduler=scheduler or euler(shift=3.0),
        image_encoder=CLIPVisionModelWithProjection(CLIPVisionConfig(**_VISION, projection_dim=8)).eval(),
        image_processor=_clip_processor(),
        **text.t5(multilingual=True),
    )


def wan_2_2_i2v(in_channels: int = 12, experts: int = 1, **options: Any) -> DiffusionPipeline:
    """Wan 2.2's: no CLIP. That of 14 billion parameters has two experts, that of 5 has the picture in place of a frame."""
    networks = [
        diffusers.WanTransformer3DModel(
            qk_norm="rms_norm_across_heads", rope_max_seq_len=32, **{**LIKE_WAN, "in_channels": in_channels}
        )
        for _ in range(experts)
    ]
    return diffusers.WanImageToVideoPipeline(
        transformer=networks[0],
        transformer_2=networks[1] if experts == 2 else None,
        vae=wan_vae(),
        scheduler=euler(shift=3.0),
        image_encoder=None,
        image_processor=None,
        **text.t5(multilingual=True),
        **options,
    )


def _unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)


def cogvideox_i2v() -> DiffusionPipeline:
    parts = cogvideox().components
    config = {name: value for name, value in parts["transformer"].config.items() if not name.startswith("_")}
    transformer = diffusers.CogVideoXTransformer3DModel(**{**config, "in_channels": 8})
    return diffusers.CogVideoXImageToVideoPipeline(**{**parts, "transformer": transformer})


def kandinsky5_i2v() -> DiffusionPipeline:
    parts = kandinsky5_video()
    pipeline = diffusers.Kandinsky5I2VPipeline(
        **{**parts.components, "transformer": kandinsky5_transformer(visual_cond=True)}
    )
    pipeline.prompt_template, pipeline.prompt_template_encode_start_idx = "<|im_start|>user\n{}<|im_end|>", 3
    return pipeline


_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_HUNYUAN_TEMPLATE = {
    "template": (
        "<|start_header_id|>system<|end_header_id|><|image_pad|>Describe<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
    ),
    "crop_start": 10,
    "image_emb_start": 4,
    "image_emb_end": 8,
    "image_emb_len": 4,
}


def hunyuan_video_i2v() -> DiffusionPipeline:
    tokenizer = text.language_tokenizer(bos=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [*text.SPECIAL[4:], *_HEADERS]})
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION),
        text_config=LlamaConfig(**text.language_config(tokenizer, num_hidden_layers=3)),
        image_token_index=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    return diffusers.HunyuanVideoImageToVideoPipeline(
        transformer=hunyuan_video_transformer(image_condition_type="token_replace"),
        vae=hunyuan_vae(),
        scheduler=euler(shift=7.0),
        image_processor=_clip_processor(),
        **numbered(
            {"text_encoder": LlavaForConditionalGeneration(config).eval(), "tokenizer": tokenizer},
            text.clip(projection=False),
        ),
    )


def hunyuan_skyreels() -> DiffusionPipeline:
    parts = hunyuan_video().components
    return diffusers.HunyuanSkyreelsImageToVideoPipeline(
        **{**parts, "transformer": hunyuan_video_transformer(in_channels=8)}
    )


def hunyuan_video15_i2v() -> DiffusionPipeline:
    own = hunyuan_video15()
    config = {name: value for name, value in own.transformer.config.items() if not name.startswith("_")}
    transformer = diffusers.HunyuanVideo15Transformer3DModel(**{**config, "image_embed_dim": 16, "task_type": "i2v"})
    pipeline = diffusers.HunyuanVideo15ImageToVideoPipeline(
        **{**own.components, "transformer": transformer},
        image_encoder=_siglip(),
        feature_extractor=_siglip_processor(),
    )
    pipeline.tokenizer_max_length, pipeline.tokenizer_2_max_length = 32, 8
    pipeline.vision_num_semantic_tokens = 4
    return pipeline


def motif_i2v() -> DiffusionPipeline:
    parts = motif().components
    config = {name: value for name, value in parts["transformer"].config.items() if not name.startswith("_")}
    parts["text_encoder"].vision_tower = _siglip()
    transformer = diffusers.MotifVideoTransformer3DModel(**{**config, "image_embed_dim": 16})
    return diffusers.MotifVideoImage2VideoPipeline(
        **{**parts, "transformer": transformer, "feature_extractor": _siglip_processor()}
    )


def cosmos2_video() -> DiffusionPipeline:
    own = cosmos2()
    config = {name: value for name, value in own.transformer.config.items() if not name.startswith("_")}
    transformer = diffusers.CosmosTransformer3DModel(**{**config, "in_channels": 5})
    return diffusers.Cosmos2VideoToWorldPipeline(
        **{**own.components, "transformer": transformer, "safety_checker": own.safety_checker}
    )


def cosmos_video() -> DiffusionPipeline:
    own = cosmos1()
    transformer = cosmos_transformer(extra_pos_embed_type="learnable", in_channels=5)
    return diffusers.CosmosVideoToWorldPipeline(
        **{**own.components, "transformer": transformer, "safety_checker": own.safety_checker}
    )


def _video(family: Family, numbers: tuple[int, ...] = (1,), **options: Any) -> EditFamily:
    return EditFamily(family, numbers, is_video=True, context=noiseless, **options)


_WAN = VIDEOS["SkyReelsV2Pipeline"].lora_targets
_FIVE, _NINE = {"num_frames": 5}, {"num_frames": 9}
_TRUE_CFG: dict[str, Any] = dict(guidance_name="true_cfg_scale", guidance_options={"negative_prompt": ""})
WAN_2_2 = {
    "wan_2_2_i2v": _video(
        Family(
            lambda: wan_2_2_i2v(experts=2, boundary_ratio=0.8),
            _WAN,
            size=32,
            generation_kwargs=_FIVE,
        )
    ),
    "wan_2_2_5b_i2v": _video(
        Family(lambda: wan_2_2_i2v(in_channels=4, expand_timesteps=True), _WAN, size=32, generation_kwargs=_FIVE)
    ),
}
PICTURE_VIDEOS: dict[str, EditFamily] = {
    "WanImageToVideoPipeline": _video(
        Family(
            lambda: like_wan(diffusers.WanImageToVideoPipeline, diffusers.WanTransformer3DModel),
            _WAN,
            size=32,
            generation_kwargs=_FIVE,
        )
    ),
    "SkyReelsV2ImageToVideoPipeline": _video(
        Family(
            lambda: like_wan(
                diffusers.SkyReelsV2ImageToVideoPipeline,
                diffusers.SkyReelsV2Transformer3DModel,
                _unipc(),
                inject_sample_info=False,
            ),
            _WAN,
            size=32,
            generation_kwargs=_FIVE,
        )
    ),
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": _video(
        Family(
            lambda: diffusers.SkyReelsV2DiffusionForcingImageToVideoPipeline(
                **VIDEOS["SkyReelsV2Pipeline"].build().components
            ),
            _WAN,
            size=32,
            generation_kwargs=_FIVE,
        )
    ),
    "ChronoEditPipeline": _video(
        Family(
            lambda: like_wan(diffusers.ChronoEditPipeline, diffusers.ChronoEditTransformer3DModel),
            _WAN,
            size=32,
            generation_kwargs=_FIVE,
        )
    ),
    "LTXImageToVideoPipeline": _video(
        Family(
            lambda: diffusers.LTXImageToVideoPipeline(**ltx().components), ATTENTION, size=32, generation_kwargs=_NINE
        )
    ),
    "CogVideoXImageToVideoPipeline": _video(Family(cogvideox_i2v, ATTENTION, generation_kwargs=_NINE)),
    "Kandinsky5I2VPipeline": _video(
        Family(
            kandinsky5_i2v,
            ("to_query", "to_key", "to_value"),
            size=32,
            max_sequence_length=64,
            generation_kwargs={"num_frames": 25},  # it evens out the first four latent frames after the next,
        )
    ),
    "HunyuanVideoImageToVideoPipeline": _video(
        Family(
            hunyuan_video_i2v,
            ATTENTION,
            size=16,
            generation_kwargs={**_FIVE, "prompt_template": _HUNYUAN_TEMPLATE},
            **_TRUE_CFG,
        )
    ),
    "HunyuanSkyreelsImageToVideoPipeline": _video(
        Family(
            hunyuan_skyreels,
            ATTENTION,
            size=16,
            generation_kwargs={**_FIVE, "prompt_template": {"template": "{}", "crop_start": 0}},
            **_TRUE_CFG,
        )
    ),
    "HunyuanVideo15ImageToVideoPipeline": _video(
        Family(
            hunyuan_video15_i2v,
            ATTENTION,
            prompts=PROMPTS[1:],
            guidance_name=None,
            max_sequence_length=None,
            sized=False,
            generation_kwargs=_FIVE,
        ),
        sizes=((64, 64),),
    ),
    "SanaImageToVideoPipeline": _video(
        Family(
            lambda: diffusers.SanaImageToVideoPipeline(**sana_video().components),
            _WAN,
            size=32,
            generation_kwargs={"use_resolution_binning": False, "complex_human_instruction": None, "frames": 5},
        )
    ),
    "MotifVideoImage2VideoPipeline": _video(
        Family(motif_i2v, ATTENTION, size=32, guidance_name=None, generation_kwargs=_FIVE)
    ),
    "HeliosPipeline": _video(VIDEOS["HeliosPipeline"], numbers=(0, 1)),
    "CosmosVideoToWorldPipeline": _video(Family(cosmos_video, ATTENTION, size=32, generation_kwargs=_NINE)),
    "Cosmos2VideoToWorldPipeline": _video(Family(cosmos2_video, ATTENTION, size=32, generation_kwargs=_FIVE)),
}
