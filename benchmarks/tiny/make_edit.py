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

"""Trains the base of the world that edits from scratch: `python benchmarks/tiny/make_edit.py --output_dir weights`.

The stage `base` trains a small FLUX.1 Kontext with the first world's VAE. The stage `check` measures it and the teachers
in `edit_teachers/<task>` of the output folder. The teachers are trained from the packaged base by reinforcement
learning, with `examples/stages/tiny_edit_two_stage.yaml`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import modules
import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models import AutoencoderKL
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from diffusers.training_utils import EMAModel
from edit_data import Rows, edit_rows
from edit_measure import edit_scores
from make import forget_paths
from make_training import EMPTY_CAPTIONS, Progress, encode, noise_levels, optimizer_of
from peft import PeftModel
from PIL import Image

from trl_diffusion_opd.tiny import BASE
from trl_diffusion_opd.tiny.edit_verifiers import edit_rewards
from trl_diffusion_opd.tiny.edits import EDIT_TASKS, edit_specs, render_edit


STAGES = ("base", "check")
# Steps, and rows of each task in a batch, of the two phases. Edits are learned in the first one. Drawing takes longer and
# gets most of the second one.
PHASES = ((5000, {"draw": 14, "local": 24, "global": 10}), (1500, {"draw": 30, "local": 12, "global": 6}))
ROWS = 1000  # that are made before training, for each row of a batch


def _packed(pipeline: FluxKontextPipeline, rows: Rows) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The latents of given pictures and results, (N, 16, 32), shifted and scaled."""
    config = pipeline.vae.config

    def pack(images: torch.Tensor) -> torch.Tensor:
        latents = (images - config["shift_factor"]) * config["scaling_factor"]
        return pipeline._pack_latents(latents, len(latents), 8, 8, 8)

    sources = None if rows.sources is None else pack(encode(pipeline.vae, rows.sources))
    return sources, pack(encode(pipeline.vae, rows.results))


def _flow_loss(
    pipeline: FluxKontextPipeline,
    prompts: list[str],
    sources: torch.Tensor | None,
    results: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """The sum over the rows of the mean error of the velocity."""
    embeds, pooled, text_ids = pipeline.encode_prompt(
        prompt=prompts, prompt_2=None, max_sequence_length=modules.EDIT_MAX_TOKENS
    )
    noise = torch.randn(results.shape, generator=generator)
    level = noise_levels(len(results), pipeline.scheduler.config.shift, generator)
    states = (1 - level[:, None, None]) * results + level[:, None, None] * noise
    ids = pipeline._prepare_latent_image_ids(len(results), 4, 4, states.device, states.dtype)
    if sources is not None:
        states = torch.cat([states, sources], dim=1)
        source_ids = ids.clone()
        source_ids[:, 0] = 1
        ids = torch.cat([ids, source_ids])
    velocity = pipeline.transformer(
        hidden_states=states,
        timestep=level,
        pooled_projections=pooled,
        encoder_hidden_states=embeds,
        txt_ids=text_ids,
        img_ids=ids,
        return_dict=False,
    )[0]
    return F.mse_loss(velocity[:, : results.shape[1]], noise - results, reduction="none").mean(dim=(1, 2)).sum()


def train(
    pipeline: FluxKontextPipeline, folder: Path, steps: int, batch: dict[str, int], rate: float = 1e-3, seed: int = 0
) -> None:
    """Trains transformer and text encoders together by flow matching, in place. At the end they have averaged weights."""
    rows = {task: edit_rows(task, ROWS * number, seed + 3) for task, number in batch.items()}
    latents = {task: _packed(pipeline, rows[task]) for task in batch}
    generator = torch.Generator().manual_seed(seed)
    parts = (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2)
    # The second encoder has one embedding table under two names.
    parameters = list({id(p): p for part in parts for p in part.parameters()}.values())
    optimizer, schedule = optimizer_of(parameters, rate, steps, weight_decay=1e-3)
    average = EMAModel(parameters, decay=0.998, use_ema_warmup=True, power=0.75)
    progress = Progress("base", steps)
    for step in range(steps):
        loss = torch.zeros(())
        for task, number in batch.items():
            sources, results = latents[task]
            index = torch.randint(len(results), (number,), generator=generator)
            empty = torch.rand(number, generator=generator) < EMPTY_CAPTIONS
            texts = ["" if no else rows[task].prompts[i] for i, no in zip(index.tolist(), empty.tolist(), strict=True)]
            given = None if sources is None else sources[index]
            loss = loss + _flow_loss(pipeline, texts, given, results[index], generator)
        loss = loss / sum(batch.values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.step(parameters)
        progress(step, loss.item())
        if (step + 1) % 500 == 0:
            average.store(parameters)
            average.copy_to(parameters)
            pipeline.save_pretrained(folder / "edit_base")
            print(f"base at {step + 1}: {edit_scores(pipeline, 'validation', num_images=96)}", flush=True)
            average.restore(parameters)
    average.copy_to(parameters)


def make_base(folder: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(BASE, subfolder="vae").eval()
    pipeline = modules.edit_pipeline(vae)
    for phase, (steps, batch) in enumerate(PHASES):
        train(pipeline, folder, steps, batch, seed=phase)
    # Half the bytes; diffusers loads them in float32 unless it is told otherwise.
    pipeline.transformer.half()
    vae.half()
    pipeline.save_pretrained(folder / "edit_base")
    forget_paths(folder / "edit_base")


@torch.no_grad()
def round_trip(vae: AutoencoderKL, task: str) -> float:
    """The mean verdict on correct results of the held-out rows after the VAE has encoded and decoded them."""
    rows = [json.dumps(spec) for spec in edit_specs(task, "test")]
    images = np.stack([np.asarray(render_edit(spec, seed)) for seed, spec in enumerate(rows)])
    decoded = vae.decode(encode(vae, images)).sample
    pixels = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    verdicts = edit_rewards[task](images=[Image.fromarray(image) for image in pixels], spec=list(rows))
    return float(np.mean([verdict for verdict in verdicts if verdict is not None]))


def check(folder: Path, num_images: int) -> dict[str, dict[str, float]]:
    """Measures the base and the folder's teachers on held-out rows. Prints the mean verdicts and returns them as
    {"base" or a teacher: {task: mean}}."""
    pipeline = FluxKontextPipeline.from_pretrained(folder / "edit_base")
    for task in EDIT_TASKS:
        print(f"{task}: ground truths through the VAE score {round_trip(pipeline.vae, task):.3f}")
    matrix = {"base": edit_scores(pipeline, num_images=num_images)}
    for task in EDIT_TASKS:
        teacher = folder / "edit_teachers" / task
        if not teacher.exists():
            print(f"{task}: no teacher in {teacher}.")
            continue
        model = PeftModel.from_pretrained(pipeline.transformer, teacher)
        matrix[task] = edit_scores(pipeline, num_images=num_images)
        model.unload()
    print("| | " + " | ".join(EDIT_TASKS) + " |\n" + "|---" * (len(EDIT_TASKS) + 1) + "|")
    for name, row in matrix.items():
        print(f"| {name} | " + " | ".join(f"{row[task]:.3f}" for task in EDIT_TASKS) + " |", flush=True)
    return matrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder in which edit_base/ is written")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--num_images", type=int, default=512, help="images drawn for each task in the stage check")
    arguments = parser.parse_args()
    for stage in [name for name in STAGES if name in arguments.stages]:
        start = time.perf_counter()
        if stage == "base":
            make_base(arguments.output_dir)
        else:
            check(arguments.output_dir, arguments.num_images)
        print(f"stage {stage}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
