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

"""Draws and edits with the models of the world that edits, and scores the results by task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from modules import EDIT_MAX_TOKENS
from PIL import Image

from trl_diffusion_opd.tiny.edit_verifiers import edit_rewards
from trl_diffusion_opd.tiny.edits import EDIT_TASKS, edit_dataset


def generate_edits(
    pipeline: FluxKontextPipeline,
    prompts: Sequence[str],
    sources: Sequence[Sequence[Image.Image]],
    seed: int = 0,
    steps: int = 10,
    batch_size: int = 64,
) -> list[Image.Image]:
    """Draws or edits by plain ODE sampling on the scheduler's own grid. All rows have one picture, or none has any. The
    noise of image i depends on (seed, i)."""
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        given = [row[0] for row in sources[start : start + batch_size] if row]
        generators = [torch.Generator().manual_seed(1_000_003 * seed + start + i) for i in range(len(batch))]
        images += pipeline(
            image=given or None,
            prompt=batch,
            num_inference_steps=steps,
            guidance_scale=1.0,
            height=32,
            width=32,
            max_area=32 * 32,
            _auto_resize=False,
            generator=generators,
            max_sequence_length=EDIT_MAX_TOKENS,
        ).images
    return images


def edit_scores(
    pipeline: FluxKontextPipeline,
    split: str = "test",
    num_images: int = 512,
    seed: int = 0,
    tasks: Sequence[str] = EDIT_TASKS,
) -> dict[str, float]:
    """The mean verdict of each task over `num_images` images, which cycle through the split's rows."""
    scores = {}
    for task in tasks:
        rows = edit_dataset(split, (task,))
        chosen = rows.select([i % len(rows) for i in range(num_images)])
        images = generate_edits(pipeline, chosen["prompt"], chosen["source_images"], seed=seed)
        verdicts = [float(v) for v in edit_rewards[task](images=images, spec=list(chosen["spec"])) if v is not None]
        scores[task] = sum(verdicts) / len(verdicts)
    return scores
