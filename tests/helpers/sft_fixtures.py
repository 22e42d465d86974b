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

"""Makes a tiny trainer of supervised fine-tuning in one call, and images for it."""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Value
from diffusers import DiffusionPipeline
from helpers.opd_fixtures import TINY_SETTINGS, TRAINER_ARGUMENTS, make_dataset, student_lora
from helpers.tiny_sd3 import make_pipeline
from PIL import Image as Pillow

from trl_diffusion_opd import DiffusionSFTConfig, DiffusionSFTTrainer


def picture(seed: int, width: int = 16, height: int = 16) -> Pillow.Image:
    return Pillow.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def image_dataset() -> Dataset:
    """The prompts of `make_dataset`, each with an image."""
    rows = make_dataset().to_dict()
    features = Features(
        {"prompt": Value("string"), "task": Value("string"), "target": Value("int64"), "image": Image()}
    )
    images = [picture(i) for i in range(len(rows["prompt"]))]
    return Dataset.from_dict({**rows, "image": images}, features=features)


def sft_config(output_dir: str | Path, **options: Any) -> DiffusionSFTConfig:
    return DiffusionSFTConfig(str(output_dir), **{**TINY_SETTINGS, **options})


def sft_trainer(
    output_dir: str | Path, teachers: Any = None, pipeline: DiffusionPipeline | None = None, **options: Any
) -> DiffusionSFTTrainer:
    """On images, or with `teachers` on theirs. `options` are arguments of the trainer or fields of its config."""
    arguments = {"peft_config": student_lora(), "train_dataset": make_dataset() if teachers else image_dataset()}
    arguments |= {name: options.pop(name) for name in TRAINER_ARGUMENTS if name in options}
    return DiffusionSFTTrainer(
        pipeline or make_pipeline(), teachers, args=sft_config(output_dir, **options), **arguments
    )
