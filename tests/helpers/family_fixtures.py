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

"""Makes a trainer for a family's tiny pipeline in one call."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from diffusers import DiffusionPipeline
from helpers.families import Family
from helpers.opd_fixtures import make_trainer
from peft import LoraConfig

from trl_diffusion_opd import DiffusionOPDTrainer


def prompts_of(family: Family, number: int | None = None) -> Dataset:
    """The family's prompts, all or so many, as rows of one task."""
    return Dataset.from_list([{"prompt": prompt, "task": "one"} for prompt in family.prompts[:number]])


def family_trainer(
    family: Family, output_dir: str | Path, teachers: Any, pipeline: DiffusionPipeline | None = None, **options: Any
) -> DiffusionOPDTrainer:
    """
    With the family's own guidance and an untrained LoRA: the student's first walk is the base's. `options` are arguments
    of the trainer or fields of its config.
    """
    settings = {
        **family.kwargs,
        "guidance_scale": family.guidance_scale,
        "train_dataset": prompts_of(family),
        "peft_config": LoraConfig(r=2, target_modules=list(family.lora_targets)),
    }
    return make_trainer(output_dir, teachers, pipeline or family.build(), **{**settings, **options})
