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

"""Draws images with the tiny models and scores them by task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from modules import MAX_TOKENS
from PIL import Image

from trl_diffusion_opd.tiny.prompts import TASKS, dataset
from trl_diffusion_opd.tiny.verifiers import rewards


def generate(
    pipeline: StableDiffusion3Pipeline,
    prompts: Sequence[str],
    seed: int = 0,
    steps: int = 10,
    guidance_scale: float = 1.0,
    batch_size: int = 64,
) -> list[Image.Image]:
    """Draws images by plain ODE sampling on the scheduler's own grid. The noise of image i depends on (seed, i)."""
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        generators = [torch.Generator().manual_seed(1_000_003 * seed + start + i) for i in range(len(batch))]
        images += pipeline(
            batch,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            height=32,
            width=32,
            generator=generators,
            max_sequence_length=MAX_TOKENS,
        ).images
    return images


def task_scores(
    pipeline: StableDiffusion3Pipeline,
    split: str = "test",
    num_images: int = 512,
    seed: int = 0,
    guidance_scale: float = 1.0,
    tasks: Sequence[str] = TASKS,
) -> dict[str, float]:
    """The mean verdict of each task over `num_images` images, which cycle through the split's prompts."""
    prompts, scores = dataset(split), {}
    for task in tasks:
        rows = prompts.filter(lambda row, task=task: row["task"] == task)
        chosen = rows.select([i % len(rows) for i in range(num_images)])
        images = generate(pipeline, chosen["prompt"], seed=seed, guidance_scale=guidance_scale)
        verdicts = [float(v) for v in rewards[task](images=images, spec=list(chosen["spec"])) if v is not None]
        scores[task] = sum(verdicts) / len(verdicts)
    return scores
