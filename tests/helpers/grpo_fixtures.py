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

"""Makes a tiny GRPO trainer in one call."""

from pathlib import Path
from typing import Any

import numpy as np
from diffusers import StableDiffusion3Pipeline
from helpers.opd_fixtures import TINY_SETTINGS, TRAINER_ARGUMENTS, make_dataset, student_lora
from helpers.tiny_sd3 import make_pipeline

from trl_diffusion_opd import DiffusionGRPOConfig, DiffusionGRPOTrainer


def brightness(images, **columns) -> list[float]:
    """Mean of the pixels, in [0, 255]."""
    return [float(np.asarray(image).mean()) for image in images]


def make_config(output_dir: str | Path, **options: Any) -> DiffusionGRPOConfig:
    settings = {**TINY_SETTINGS, "per_device_train_batch_size": 4, "num_generations": 4}
    return DiffusionGRPOConfig(str(output_dir), **{**settings, **options})


def make_trainer(
    output_dir: str | Path,
    reward_funcs: Any = brightness,
    pipeline: StableDiffusion3Pipeline | None = None,
    **options: Any,
) -> DiffusionGRPOTrainer:
    """A trainer of the tiny pipeline. `options` are arguments of the trainer or fields of its config."""
    arguments = {"train_dataset": make_dataset(), "peft_config": student_lora()}
    arguments |= {name: options.pop(name) for name in TRAINER_ARGUMENTS if name in options}
    return DiffusionGRPOTrainer(
        pipeline or make_pipeline(), reward_funcs, args=make_config(output_dir, **options), **arguments
    )
