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

"""Makes a tiny OPD trainer in one call, or its parts."""

import gc
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import StableDiffusion3Pipeline
from helpers.tiny_sd3 import ATTENTION, SIZE, make_lora, make_pipeline
from peft import LoraConfig
from transformers import TrainerCallback

from trl_diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer
from trl_diffusion_opd.acceleration.quantization import plain_tensors, scales
from trl_diffusion_opd.profiling.memory import Live


TASKS = ("count", "draw")
TRAINER_ARGUMENTS = (
    "reward_funcs",
    "train_dataset",
    "eval_dataset",
    "callbacks",
    "optimizers",
    "quantization_config",
    "peft_config",
)
# What every trainer is given in these tests.
TINY_SETTINGS: dict[str, Any] = dict(
    **SIZE,
    num_inference_steps=4,
    eval_num_inference_steps=3,
    guidance_scale=1.0,
    per_device_train_batch_size=2,
    per_device_eval_batch_size=2,
    max_steps=1,
    ema_decay=None,
    gradient_checkpointing=False,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
    eval_base_and_teachers=False,  # most tests are not about them, and they take time
)
# Further settings. An average that changes with every update:
AVERAGED = dict(ema_decay=0.9, ema_update_interval=1)
# An evaluation and a checkpoint after each:
EVALUATED_AND_SAVED = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
# What an uninterrupted run and a resumed one can differ in: noise, steps that are drawn, an average, a schedule.
STATEFUL = dict(
    sampler="flow_sde",
    num_trained_timesteps=2,
    ema_decay=0.9,
    ema_update_interval=2,
    learning_rate=1e-2,
    lr_scheduler_type="cosine",
)


def make_teachers(folder: Path) -> dict[str, str]:
    """Saves a LoRA a task and returns the folders by task."""
    pipeline = make_pipeline()
    for seed, task in enumerate(TASKS, start=1):
        make_lora(pipeline, folder / task, seed)  # of a copy
    return {task: str(folder / task) for task in TASKS}


def make_dataset(**rows: int) -> Dataset:
    """So many different prompts a task, by default 6 and 4, with a column for the rewards."""
    counts = rows or {"count": 6, "draw": 4}
    pairs = [(task, f"{task}{i}") for task, n in counts.items() for i in range(n)]
    return Dataset.from_list([{"prompt": p, "task": task, "target": int(p[-1])} for task, p in pairs])


def student_lora(**options: Any) -> LoraConfig:
    """A LoRA whose factors are both random: from zeros, half of the gradients would be zero."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "init_lora_weights": False, **options})


def make_config(output_dir: str | Path, **options: Any) -> DiffusionOPDConfig:
    return DiffusionOPDConfig(str(output_dir), **{**TINY_SETTINGS, **options})


def make_trainer(
    output_dir: str | Path, teachers: Any, pipeline: StableDiffusion3Pipeline | None = None, **options: Any
) -> DiffusionOPDTrainer:
    """A trainer of the tiny pipeline. `options` are arguments of the trainer or fields of its config."""
    arguments = {"train_dataset": make_dataset(), "peft_config": student_lora()}
    arguments |= {name: options.pop(name) for name in TRAINER_ARGUMENTS if name in options}
    return DiffusionOPDTrainer(
        pipeline or make_pipeline(), teachers, args=make_config(output_dir, **options), **arguments
    )


def snapshot(trainer: DiffusionOPDTrainer) -> dict[str, torch.Tensor]:
    """The student's trained weights."""
    return {name: p.detach().clone() for name, p in trainer.student.named_parameters().items()}


class Recorder(TrainerCallback):
    """Keeps the accumulated gradients of every update, and the weights after it."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.gradients.append({name: p.grad.clone() for name, p in trained.items()})

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})


class StopAt(TrainerCallback):
    """Stops after an update, with a checkpoint."""

    def __init__(self, update: int) -> None:
        self.update = update

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.update:
            control.should_training_stop = control.should_save = True


def first_pixel(prompts, images, completions, target, trainer_state, **columns) -> list[float]:
    """A reward that depends on the image and on the row."""
    return [float(image.getpixel((0, 0))[0]) + value for image, value in zip(images, target, strict=True)]


def relative_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of two sets of tensors over the norm of the second."""
    assert ours.keys() == theirs.keys()
    difference = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in ours)
    return (difference / sum(float(t.double().square().sum()) for t in theirs.values())) ** 0.5


def logged(log: list[dict[str, Any]], name: str) -> list[float]:
    """A metric of every update that has it: those of a round of training by reward are logged with its first update."""
    return [entry[name] for entry in log if "loss" in entry and name in entry]


def train_losses(trainer: DiffusionOPDTrainer) -> list[float]:
    """The logged loss of every update."""
    return logged(trainer.state.log_history, "loss")


def measured(trainer: Any, prompts: list[str]) -> int:
    """Bytes that a real forward and backward hold at once."""
    field, student = trainer.velocity_field, trainer.accelerator.unwrap_model(trainer.model)
    x = field.initial_latents(prompts, [torch.Generator().manual_seed(0) for _ in prompts])
    for parameter in trainer.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    field(x, 1.0, prompts, trainer.args.guidance_scale, student).square().mean().backward()
    gc.collect()
    live = Live()
    there = [*student.parameters(), *student.buffers(), *scales(student)]
    live.ignore([p for t in there for p in plain_tensors(t)] + [p.grad for p in trainer.student.parameters()] + [x])
    with live:
        field(x, 1.0, prompts, trainer.args.guidance_scale, student).square().mean().backward()
    return live.peak
