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

from .images import IMAGES
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
}
SPECIMENS: dict[str, Family] = {**{name: FAMILIES[family] for name, family in OF_TESTS.items()}, **IMAGES, **VIDEOS}
NOT_BUILT: dict[str, str] = {}
