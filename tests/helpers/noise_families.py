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
Tiny pipelines with random weights of models that predict noise, v or the sample, with the schedulers that their configs
may name. The numbers of each schedule come from the models' public configs.
"""

import functools
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import sentencepiece
from diffusers import DDIMScheduler, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig
from helpers import families_text as text
from helpers.families import Family
from helpers.tiny_sd3 import make_vae, numbered


SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpm": diffusers.DPMSolverMultistepScheduler,
}
STABLE_DIFFUSION = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    timestep_spacing="leading",
)
V_PREDICTION = dict(STABLE_DIFFUSION, prediction_type="v_prediction")
ZERO_SNR = dict(V_PREDICTION, rescale_betas_zero_snr=True, timestep_spacing="trailing")
PIXART = dict(STABLE_DIFFUSION, beta_start=0.0001, beta_end=0.02, beta_schedule="linear", steps_offset=0)
HUNYUAN = dict(V_PREDICTION, beta_end=0.02)
KOLORS = dict(STABLE_DIFFUSION, beta_end=0.014, num_train_timesteps=1100)


def noise_scheduler(config: dict[str, Any], kind: str = "ddim", **changes: Any) -> SchedulerMixin:
    """A scheduler of a family's schedule. Stable Diffusion's DDIM ends above 0, as its configs have it."""
    own = dict(clip_sample=False, set_alpha_to_one=not config["steps_offset"]) if kind == "ddim" else {}
    return SCHEDULERS[kind](**{**config, **own, **changes})


_UNET: dict[str, Any] = dict(
    block_out_channels=(8, 16),
    layers_per_block=1,
    sample_size=8,
    norm_num_groups=4,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)
_ADDED: dict[str, Any] = dict(
    attention_head_dim=(2, 4),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    transformer_layers_per_block=(1, 2),
)
_UNSAFE: dict[str, Any] = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def _sd15(schedule: dict[str, Any] = STABLE_DIFFUSION) -> DiffusionPipeline:
    return diffusers.StableDiffusionPipeline(
        unet=UNet2DConditionModel(**_UNET, attention_head_dim=4, cross_attention_dim=8),
        vae=make_vae((4, 4)),
        scheduler=noise_scheduler(schedule),
        **text.clip(projection=False),
        **_UNSAFE,
    )


def _sdxl(schedule: dict[str, Any] = STABLE_DIFFUSION) -> DiffusionPipeline:
    unet = UNet2DConditionModel(
        **_UNET, **_ADDED, cross_attention_dim=16, projection_class_embeddings_input_dim=6 * 4 + 8
    )
    return diffusers.StableDiffusionXLPipeline(
        unet=unet,
        vae=make_vae((4, 4)),
        scheduler=noise_scheduler(schedule),
        add_watermarker=False,
        **numbered(text.clip(projection=False), text.clip()),
    )


def _pixart_sigma() -> DiffusionPipeline:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        num_layers=2,
        norm_num_groups=1,
    )
    return diffusers.PixArtSigmaPipeline(
        transformer=transformer, vae=make_vae((4, 4)), scheduler=noise_scheduler(PIXART), **text.t5()
    )


def _hunyuan_dit() -> DiffusionPipeline:
    transformer = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        hidden_size=16,
        in_channels=4,
        patch_size=2,
        sample_size=4,
        num_layers=2,
        cross_attention_dim=8,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
    )
    # The pipeline takes a VAE of factor 8 for granted.
    return diffusers.HunyuanDiTPipeline(
        transformer=transformer,
        vae=make_vae((4,) * 4),
        scheduler=noise_scheduler(HUNYUAN),
        **numbered(text.clip(projection=False), text.t5()),
        **_UNSAFE,
    )


@functools.cache
def _chat_tokens() -> str:
    """The file of a SentencePiece model with a token a letter."""
    folder = tempfile.mkdtemp()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text.CHARACTERS] * 4),
        model_prefix=f"{folder}/tokenizer",
        model_type="char",
        vocab_size=len(text.CHARACTERS) + 4,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return str(Path(folder) / "tokenizer.model")


def _kolors() -> DiffusionPipeline:
    tokenizer = ChatGLMTokenizer(_chat_tokens())
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=tokenizer.tokenizer.n_words,
        hidden_size=16,
        ffn_hidden_size=16,
        kv_channels=8,
        num_attention_heads=2,
        multi_query_attention=True,
        multi_query_group_num=1,
        add_qkv_bias=True,
        original_rope=True,
    )
    encoder = ChatGLMModel(config, empty_init=False).eval()
    for name, parameter in encoder.named_parameters():
        if "layernorm" in name:  # left uninitialised
            parameter.data.fill_(1.0)
    unet = UNet2DConditionModel(
        **_UNET,
        **_ADDED,
        cross_attention_dim=16,
        encoder_hid_dim=16,
        encoder_hid_dim_type="text_proj",
        projection_class_embeddings_input_dim=6 * 4 + 16,
    )
    return diffusers.KolorsPipeline(
        unet=unet,
        vae=make_vae((4, 4)),
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=noise_scheduler(KOLORS),
        force_zeros_for_empty_prompt=False,
    )


_CROSS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "attn2.to_v", "attn2.to_out.0")

NOISE_FAMILIES: dict[str, Family] = {
    "sd15": Family(_sd15, _CROSS, max_sequence_length=None),
    "sd2_v": Family(lambda: _sd15(V_PREDICTION), _CROSS, max_sequence_length=None),
    "sdxl": Family(_sdxl, _CROSS, max_sequence_length=None),
    "sdxl_zero_snr": Family(lambda: _sdxl(ZERO_SNR), _CROSS, max_sequence_length=None),
    "pixart_sigma": Family(
        # Cleaning captions needs Beautiful Soup.
        _pixart_sigma,
        _CROSS,
        generation_kwargs={"use_resolution_binning": False, "clean_caption": False},
    ),
    "hunyuan_dit": Family(
        _hunyuan_dit, _CROSS, size=32, max_sequence_length=None, generation_kwargs={"use_resolution_binning": False}
    ),
    "kolors": Family(_kolors, _CROSS),
}
