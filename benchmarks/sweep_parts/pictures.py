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

"""Tiny pipelines that edit pictures or refer to them."""

from dataclasses import replace
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from helpers import families_encoders as encoders
from helpers.edit_families import EDIT_FAMILIES, EditFamily, small_pictures
from helpers.families import Family
from helpers.families_flow import FLOW_FAMILIES, euler
from helpers.noise_families import NOISE_FAMILIES
from helpers.tiny_sd3 import make_vae

from .images import ATTENTION, IMAGES, kandinsky5_encoders, kandinsky5_transformer, longcat, z_image_omni
from .picture_videos import PICTURE_VIDEOS
from .small_pictures import noiseless, small_joy, small_longcat
from .specimens import NOT_BUILT
from .videos import wan_vae


def longcat_edit() -> DiffusionPipeline:
    pipeline = diffusers.LongCatImageEditPipeline(**longcat().components)
    pipeline.tokenizer_max_length = 32
    return pipeline


def z_image_omni_edit() -> DiffusionPipeline:
    pipeline = z_image_omni()
    pipeline.vae.bfloat16()  # the pipeline gives it pictures in bfloat16
    return pipeline


def kandinsky5_i2i() -> DiffusionPipeline:
    pipeline = diffusers.Kandinsky5I2IPipeline(
        transformer=kandinsky5_transformer(visual_cond=True),
        vae=make_vae((4, 4, 4, 4)),
        scheduler=euler(shift=5.0),
        **kandinsky5_encoders(),
    )
    pipeline.prompt_template = "<|im_start|>user\n{}<|vision_start|><|image_pad|><|vision_end|><|im_end|>"
    pipeline.prompt_template_encode_start_idx = 3
    pipeline.resolutions = [(32, 32)]
    return pipeline


def bria_fibo_edit() -> DiffusionPipeline:
    return diffusers.BriaFiboEditPipeline(**IMAGES["BriaFiboPipeline"].build().components)


def joy(plus: bool = False) -> DiffusionPipeline:
    kind = diffusers.JoyImageEditPlusTransformer3DModel if plus else diffusers.JoyImageEditTransformer3DModel
    transformer = kind(
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=16,
        mlp_width_ratio=2.0,
        num_layers=1,
        rope_dim_list=[4, 6, 6],
    )
    parts = encoders.qwen3_vl(generates=True)
    pipeline = diffusers.JoyImageEditPlusPipeline if plus else diffusers.JoyImageEditPipeline
    return pipeline(
        transformer=transformer,
        vae=wan_vae(),
        scheduler=euler(shift=4.0),
        processor=encoders.processor(parts["tokenizer"]),
        **parts,
    )


def instruct_pix2pix(kind: type[DiffusionPipeline], family: str, **options: Any) -> DiffusionPipeline:
    parts = NOISE_FAMILIES[family].build().components
    for name in ("image_encoder", "feature_extractor"):
        parts.pop(name, None)
    config = {name: value for name, value in parts["unet"].config.items() if not name.startswith("_")}
    unet = diffusers.UNet2DConditionModel(**{**config, "in_channels": 8})
    return kind(**{**parts, "unet": unet}, **options)


_ONE_SIZE = ((64, 64),)
_CROSS = NOISE_FAMILIES["sdxl"].lora_targets
PICTURES: dict[str, EditFamily] = {
    "FluxKontextPipeline": EDIT_FAMILIES["flux_kontext"],
    "Flux2Pipeline": EDIT_FAMILIES["flux2"],
    "Flux2KleinPipeline": EDIT_FAMILIES["flux2_klein"],
    "Flux2KleinKVPipeline": EditFamily(IMAGES["Flux2KleinKVPipeline"], numbers=(0, 1, 2)),
    "QwenImageEditPipeline": replace(EDIT_FAMILIES["qwen_image_edit"], context=small_pictures),
    "QwenImageEditPlusPipeline": replace(EDIT_FAMILIES["qwen_image_edit_plus"], context=small_pictures),
    "QwenImage21Pipeline": EditFamily(
        replace(FLOW_FAMILIES["qwen_image_21"], generation_kwargs={"output_resolution": 64}), numbers=(0, 1, 2)
    ),
    "BriaFibo2Pipeline": EditFamily(IMAGES["BriaFibo2Pipeline"], numbers=(0, 1)),
    "DreamLitePipeline": EditFamily(IMAGES["DreamLitePipeline"], numbers=(0, 1)),
    "DreamLiteMobilePipeline": EditFamily(IMAGES["DreamLiteMobilePipeline"], numbers=(0, 1)),
    "LongCatImageEditPipeline": EditFamily(
        Family(longcat_edit, ATTENTION, size=32, max_sequence_length=None, sized=False),
        numbers=(1,),
        sizes=_ONE_SIZE,
        context=small_longcat,
    ),
    "ZImageOmniPipeline": EditFamily(Family(z_image_omni_edit, ATTENTION, guidance_offset=1.0), numbers=(0, 1, 2)),
    "Kandinsky5I2IPipeline": EditFamily(
        Family(kandinsky5_i2i, ("to_query", "to_key", "to_value"), size=32, max_sequence_length=32),
        numbers=(1,),
        context=noiseless,
    ),
    "BriaFiboEditPipeline": EditFamily(
        Family(bria_fibo_edit, ATTENTION, size=32, max_sequence_length=32), numbers=(0, 1, 2)
    ),
    "JoyImageEditPipeline": EditFamily(
        Family(joy, ("img_attn_qkv", "txt_attn_qkv"), size=32, max_sequence_length=None),
        numbers=(1,),
        context=small_joy,
    ),
    "JoyImageEditPlusPipeline": EditFamily(
        Family(lambda: joy(plus=True), ("img_attn_qkv", "txt_attn_qkv"), size=32, max_sequence_length=None),
        numbers=(1, 2),
        context=small_joy,
    ),
    "StableDiffusionInstructPix2PixPipeline": EditFamily(
        Family(
            lambda: instruct_pix2pix(
                diffusers.StableDiffusionInstructPix2PixPipeline,
                "sd15",
                feature_extractor=None,
                requires_safety_checker=False,
            ),
            _CROSS,
            size=32,
            max_sequence_length=None,
            sized=False,
        ),
        numbers=(1,),
        sizes=((32, 32),),
    ),
    "StableDiffusionXLInstructPix2PixPipeline": EditFamily(
        Family(
            lambda: instruct_pix2pix(diffusers.StableDiffusionXLInstructPix2PixPipeline, "sdxl"),
            _CROSS,
            size=32,
            max_sequence_length=None,
        ),
        numbers=(1,),
    ),
}
PICTURES.update(PICTURE_VIDEOS)
PICTURES_NOT_BUILT: dict[str, str] = {
    "ConsisIDPipeline": "it follows a face, which other models have to find and to describe first",
    "Cosmos2_5_PredictBasePipeline": "it resizes pictures with torchvision",
    "Cosmos3OmniPipeline": NOT_BUILT["Cosmos3OmniPipeline"],
    "GlmImagePipeline": NOT_BUILT["GlmImagePipeline"],
    "HunyuanVideoFramepackPipeline": "it draws a video section by section, each with latents of its own",
    "Kandinsky6TI2VAPipeline": "it denoises video and sound together, with an audio autoencoder",
    "LTX2ImageToVideoPipeline": NOT_BUILT["LTX2Pipeline"],
    "LTXI2VLongMultiPromptPipeline": "it draws a long video in windows that overlap, each with latents of its own",
    "OmniGenPipeline": NOT_BUILT["OmniGenPipeline"],
    "QwenImageLayeredPipeline": "it draws several layers of one picture, each with transparency",
    "SanaWMPipeline": "it follows a path of the camera beside the picture",
}
