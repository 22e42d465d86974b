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


"""The prompts, rewards and teachers of the measurements beyond the paper's claims, all in the tiny world."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from PIL import Image

from trl_diffusion_opd import DiffusionGRPOConfig, DiffusionGRPOTrainer, tiny
from trl_diffusion_opd.models.student import ATTENTION_TARGETS


# Three tasks with one kind of prompt. Their teachers want what the prompt does not say, and contradict each other.
ALIKE = ("dark", "red", "upper")
TEMPLATES = {"dark": "X {prompt}", "red": "Y {prompt}", "upper": "Z {prompt}"}
SHORT_TASKS = ("letters", "style")
# What the worlds' pipelines are called with. FLUX.1 Kontext would bring pictures to a million pixels.
OF_TINY: dict[str, Any] = {"height": 32, "width": 32, "max_sequence_length": 12}
OF_EDIT: dict[str, Any] = {"height": 32, "width": 32, "max_sequence_length": 10}
EDIT_KWARGS: dict[str, Any] = {"max_area": 32 * 32, "_auto_resize": False}


def dark(images: Sequence[Image.Image], **columns: Any) -> list[float]:
    """The share of black."""
    return [1 - float(np.asarray(image).mean()) / 255 for image in images]


def red(images: Sequence[Image.Image], **columns: Any) -> list[float]:
    """How much more red than green and blue there is, in [0, 1]."""
    found = []
    for image in images:
        r, g, b = np.asarray(image, dtype=np.float64).mean((0, 1)) / 255
        found.append(float(0.5 + (r - (g + b) / 2) / 2))
    return found


def upper(images: Sequence[Image.Image], **columns: Any) -> list[float]:
    """How much darker the upper half is than the lower one, in [0, 1]."""
    found = []
    for image in images:
        grey = np.asarray(image.convert("L"), dtype=np.float64) / 255
        half = len(grey) // 2
        found.append(float(0.5 + (grey[half:].mean() - grey[:half].mean()) / 2))
    return found


ALIKE_REWARDS = {"dark": dark, "red": red, "upper": upper}


def alike(split: str) -> Dataset:
    """The scenes of compose, dealt out to the three tasks."""
    rows = tiny.dataset(split).filter(lambda row: row["task"] == "compose")
    return rows.remove_columns("task").add_column("task", [ALIKE[i % len(ALIKE)] for i in range(len(rows))])


def alike_teachers(folder: Path) -> dict[str, str]:
    """A LoRA by GRPO for each of these rewards, trained once."""
    for task in ALIKE:
        place = folder / f"teacher-{task}"
        if (place / "adapter_config.json").exists():
            continue
        args = DiffusionGRPOConfig(
            str(place),
            height=32,
            width=32,
            max_sequence_length=12,
            guidance_scale=1.0,
            num_inference_steps=8,
            sde_window_range=[0, 4],
            num_generations=12,
            per_device_train_batch_size=48,
            max_steps=40,
            learning_rate=1e-3,
            gradient_checkpointing=False,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        rows = alike("train").filter(lambda row, task=task: row["task"] == task)
        trainer = DiffusionGRPOTrainer(
            tiny.BASE, reward_funcs=ALIKE_REWARDS[task], args=args, train_dataset=rows, peft_config=lora(16)
        )
        trainer.train()
        trainer.save_model()
    return {task: str(folder / f"teacher-{task}") for task in ALIKE}


def short(split: str, with_teacher_prompt: bool) -> Dataset:
    """
    Letters and style under prompts that leave out what the long ones say: `YN` for `the word "YN"`, and `a blue ring`
    for `a painting of a blue ring`.
    """
    parts = []
    for task in SHORT_TASKS:
        rows = tiny.dataset(split).filter(lambda row, task=task: row["task"] == task)
        long = list(rows["prompt"])
        rows = rows.remove_columns("prompt").add_column("prompt", [shortened(prompt) for prompt in long])
        parts.append(rows.add_column("teacher_prompt", long) if with_teacher_prompt else rows)
    return concatenate_datasets(parts)


def shortened(prompt: str) -> str:
    return prompt.removeprefix("a painting of ").removeprefix('the word "').removesuffix('"')


def lora(rank: int) -> LoraConfig:
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, init_lora_weights="gaussian", target_modules=list(ATTENTION_TARGETS)
    )


def diversity(images: Sequence[Image.Image]) -> float:
    """Mean distance of two images of one prompt: the root of the mean squared difference of their channels, in [0, 1]."""
    values = np.stack([np.asarray(image, dtype=np.float64).ravel() / 255 for image in images])
    n = len(values)
    pairs = [np.sqrt(np.mean((values[i] - values[j]) ** 2)) for i in range(n) for j in range(i)]
    return float(np.mean(pairs))


def verdicts(task: str, images: Sequence[Image.Image], rows: Mapping[str, Sequence[Any]]) -> list[float]:
    """The scores of images of one task: of the tiny worlds' own verifiers, or of the rewards above."""
    if task in ALIKE_REWARDS:
        return ALIKE_REWARDS[task](images)
    scored = {**tiny.rewards, **tiny.edit_rewards}[task](images=list(images), spec=list(rows["spec"]))
    return [score for score in scored if score is not None]
