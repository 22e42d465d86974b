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

"""Supervised fine-tuning on edits: rows with source pictures and the result, against the pipeline's own call."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import FluxKontextPipeline
from helpers.edit_families import EDIT_FAMILIES, picture
from helpers.sft_fixtures import sft_trainer
from peft import LoraConfig
from PIL import Image


pytestmark = pytest.mark.slow

SEED = 3
KONTEXT = EDIT_FAMILIES["flux_kontext"].family
# Source pictures of two rows: of one size, which are asked in one batch, others of that size, and of two sizes, which are
# asked one by one.
SOURCES = {
    "one size": [picture(1), picture(2)],
    "others": [Image.new("RGB", (64, 64), colour) for colour in ("black", "white")],
    "two sizes": [picture(1), picture(2, 32, 64)],
}


def edits(sources: list[Image.Image]) -> Dataset:
    prompts, results = ("make it blue", "a red cat"), (picture(7, 16, 16), picture(8, 16, 16))
    rows = zip(prompts, sources, results, strict=True)
    return Dataset.from_list([{"prompt": p, "source_images": [source], "image": image} for p, source, image in rows])


def update(folder: Path, dataset: Dataset) -> tuple[float, list[dict[str, Any]]]:
    """The loss of an update, and its rows in their order."""
    lora = LoraConfig(r=2, target_modules=list(KONTEXT.lora_targets))  # untrained: the student is the base
    options = dict(train_dataset=dataset, peft_config=lora, seed=SEED, guidance_scale=KONTEXT.guidance_scale)
    trainer = sft_trainer(folder, None, KONTEXT.build(), **options, **KONTEXT.kwargs)
    batches: list[list[dict[str, Any]]] = []
    step = trainer.training_step

    def training_step(model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        batches.append(inputs)
        return step(model, inputs, num_items_in_batch)

    trainer.training_step = training_step
    trainer.train()
    (loss,) = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    (rows,) = batches
    return loss, rows


def packed_latents(pipeline: FluxKontextPipeline, image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    z = pipeline.vae.encode(pixels).latent_dist.mode()
    z = (z - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
    _, channels, height, width = z.shape
    z = z.view(1, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return z.reshape(1, height * width // 4, 4 * channels)


def level_of(q: float, tokens: int) -> float:
    """A level of the logit-normal density, on the pipeline's own grid for an image of so many tokens."""
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    even = np.linspace(1, 1 / 1000, 1000)
    grid = np.append(math.exp(mu) / (math.exp(mu) + 1 / even - 1), 0)
    u = torch.sigmoid(torch.special.ndtri(torch.tensor(q, dtype=torch.float64)))
    return float(np.interp(1000 * (1 - float(u)), np.arange(1001), grid))


def own_velocity(pipeline: FluxKontextPipeline, row: dict[str, Any], x: torch.Tensor, t: float) -> torch.Tensor:
    """What the transformer answers at a state and level, in the pipeline's own call for the row."""
    answers: list[torch.Tensor] = []
    forward, tokens = pipeline.transformer.forward, x.shape[1]

    def at_level(hidden_states: torch.Tensor, timestep: torch.Tensor, **conditions: Any) -> tuple[torch.Tensor]:
        state = torch.cat([x.to(hidden_states.dtype), hidden_states[:, tokens:]], dim=1)
        answers.append(forward(hidden_states=state, timestep=torch.full_like(timestep, t), **conditions)[0])
        return (answers[-1],)

    pipeline.transformer.forward = at_level
    call = KONTEXT.call_kwargs(1.0, (row["prompt"],))
    pipeline(**call, image=row["source_images"][0], num_inference_steps=1, output_type="latent")
    pipeline.transformer.forward = forward
    (answer,) = answers
    assert answer.shape[1] > tokens  # the picture's tokens come behind the image's
    return answer[:, :tokens]


def own_loss(rows: list[dict[str, Any]]) -> float:
    pipeline, losses = KONTEXT.build(), []
    for position, row in enumerate(rows):
        entropy = np.random.SeedSequence([SEED, 0, 0, position])
        generator = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
        x0 = packed_latents(pipeline, row["image"])
        t = level_of(float(torch.rand(1, generator=generator, dtype=torch.float64)), x0.shape[1])
        eps = torch.randn(x0.shape, generator=generator)
        v = own_velocity(pipeline, row, (1 - t) * x0 + t * eps, t)
        losses.append(float((v - (eps - x0)).double().square().mean()))
    return sum(losses) / len(losses)


def test_loss_on_edits(tmp_path: Path) -> None:
    found: dict[str, float] = {}
    for name, sources in SOURCES.items():
        loss, rows = update(tmp_path / name, edits(sources))
        assert loss == pytest.approx(own_loss(rows), rel=1e-5), name
        found[name] = loss
    # The tiny network's loss is mostly that of the noise. This is ten times the tolerance above.
    assert abs(found["others"] / found["one size"] - 1) > 1e-4
