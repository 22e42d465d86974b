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

"""Wan 2.2, tiny: two experts with weights of their own, and the model of its series that has one transformer."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from helpers.families import FAMILIES, Family
from helpers.family_fixtures import family_trainer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback

from trl_diffusion_opd import DiffusionOPDTrainer
from trl_diffusion_opd.acceleration.sharding import whole
from trl_diffusion_opd.pipelines.denoiser import denoiser
from trl_diffusion_opd.pipelines.experts import EXPERTS


BOUNDARY = 0.875  # as in Wan 2.2: of 4 steps with shift 3, two are above it


def wan_2_2(**config: Any) -> DiffusionPipeline:
    """Wan 2.2 with both experts. `config` replaces parts and options."""
    parts = FAMILIES["wan"].build().components
    torch.manual_seed(7)
    second = type(parts["transformer"]).from_config(parts["transformer"].config)
    for parameter in second.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.2)
    second.eval().requires_grad_(False)
    pipeline = diffusers.WanPipeline(**{**parts, "transformer_2": second, "boundary_ratio": BOUNDARY, **config})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ti2v() -> DiffusionPipeline:
    """Wan 2.2 5B: one transformer, no boundary, and a timestep for each token."""
    parts = FAMILIES["wan"].build().components
    return diffusers.WanPipeline(**{**parts, "transformer_2": None, "expand_timesteps": True})


WAN_2_2 = Family(
    wan_2_2, FAMILIES["wan"].lora_targets, size=32, guidance_scale=5.0, generation_kwargs={"num_frames": 1}
)
TI2V = Family(ti2v, WAN_2_2.lora_targets, size=32, guidance_scale=5.0, generation_kwargs={"num_frames": 1})


def random_lora(seed: int, pipeline: DiffusionPipeline | None = None) -> PeftModel:
    """Both experts with a LoRA that moves them, in one module."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=list(WAN_2_2.lora_targets), init_lora_weights=False)
    return get_peft_model(denoiser(pipeline or WAN_2_2.build()), config).eval()


def save_pair(
    folder: Path, seed: int, name: str = "x_{}_noise.safetensors", pipeline: DiffusionPipeline | None = None
) -> PeftModel:
    """A LoRA of each expert, in diffusers' layout, in two files of one folder."""
    model = random_lora(seed, pipeline)
    for expert, noise in zip(EXPERTS, ("high", "low"), strict=True):
        prefix = f"{expert}."
        layers = {
            key.removeprefix(prefix).replace(".default", ""): p.detach().clone()
            for key, p in model.get_base_model().named_parameters()
            if "lora_" in key and key.startswith(prefix)
        }
        diffusers.WanPipeline.save_lora_weights(folder, transformer_lora_layers=layers, weight_name=name.format(noise))
    return model


class WhichMoved(TrainerCallback):
    """Notes for each update which experts' weights it has changed."""

    def __init__(self) -> None:
        self.trainer: DiffusionOPDTrainer | None = None
        self.moved: list[list[str]] = []
        self.before: dict[str, torch.Tensor] = {}

    def weights(self) -> dict[str, torch.Tensor]:
        assert self.trainer is not None
        return {name: p.detach().clone() for name, p in whole(self.trainer.student.named_parameters()).items()}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = self.weights()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        changed = [name for name, p in self.weights().items() if not torch.equal(p, self.before[name])]
        self.moved.append([expert for expert in EXPERTS if any(f".model.{expert}." in name for name in changed)])


def trained_on_few_levels(folder: Path, teachers: Any, **options: Any) -> tuple[DiffusionOPDTrainer, list[list[str]]]:
    """A finished trainer whose updates train one step of the walk each, and which experts each update has changed."""
    watch = WhichMoved()
    settings = dict(
        train_dataset=Dataset.from_list([{"prompt": prompt, "task": "one"} for prompt in "abcd"]),
        num_inference_steps=4,
        num_trained_timesteps=1,
        loss_weighting="velocity",
        sampler="flow_sde",
        max_steps=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        guidance_scale=1.0,
        callbacks=[watch],
    )
    trainer = watch.trainer = family_trainer(WAN_2_2, folder, teachers, **{**settings, **options})
    trainer.train()
    return trainer, watch.moved
