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

"""Saves tiny pipelines of another size than the student's, on the same latents."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from helpers.tiny_sd3 import make_pipeline, make_transformer


def large_pipeline(seed: int = 5) -> StableDiffusion3Pipeline:
    """
    The student's pipeline (`make_pipeline`) with another width, depth and shift, and another first text encoder. VAE
    and the other encoders have the student's weights.
    """
    pipeline = make_pipeline()
    wide = dict(num_layers=3, num_attention_heads=3, caption_projection_dim=24)
    pipeline.register_modules(
        transformer=make_transformer(seed, **wide), scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0)
    )
    with torch.no_grad():
        for parameter in pipeline.text_encoder.parameters():
            parameter.mul_(1.5)
    return pipeline


def save_large(folder: Path, seed: int = 5) -> str:
    large_pipeline(seed).save_pretrained(folder)
    return str(folder)
