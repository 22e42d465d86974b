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

"""A tiny pipeline for every class that is tried."""

from helpers.families import FAMILIES, Family
from helpers.families_flow import FLOW_FAMILIES
from helpers.noise_families import NOISE_FAMILIES

from .images import IMAGES
from .noise import NOISE
from .videos import VIDEOS


OF_TESTS = {
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "Flux2KleinPipeline": "flux2_klein",
    "QwenImagePipeline": "qwen_image",
    "ZImagePipeline": "z_image",
    "SanaPipeline": "sana",
    "Lumina2Pipeline": "lumina2",
    "HiDreamImagePipeline": "hidream",
    "ChromaPipeline": "chroma",
    "WanPipeline": "wan",
    "CogView4Pipeline": "cogview4",
    "AuraFlowPipeline": "aura_flow",
    "HunyuanImagePipeline": "hunyuan_image",
    "Krea2Pipeline": "krea2",
    "QwenImage21Pipeline": "qwen_image_21",
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionXLPipeline": "sdxl",
    "PixArtSigmaPipeline": "pixart_sigma",
    "HunyuanDiTPipeline": "hunyuan_dit",
    "KolorsPipeline": "kolors",
}
_ALL = {**FAMILIES, **FLOW_FAMILIES, **NOISE_FAMILIES}
SPECIMENS: dict[str, Family] = {
    **{name: _ALL[family] for name, family in OF_TESTS.items()},
    **IMAGES,
    **VIDEOS,
    **NOISE,
}
_WITH_SOUND = "it denoises video and sound together, and needs a Gemma 4, a vocoder and an audio autoencoder"
NOT_BUILT: dict[str, str] = {
    "Cosmos3OmniPipeline": "its transformer is also the language model that reads the prompt, and can't be built small alone",
    "GlmImagePipeline": "it begins from image tokens that a language model writes, which would have to be built as well",
    "Ideogram4Pipeline": "it reads its text encoder at thirteen fixed layers, so that one can't be small",
    "LTX2DFRPipeline": _WITH_SOUND,
    "LTX2Pipeline": _WITH_SOUND,
    "OmniGenPipeline": "its processor needs torchvision",
}
