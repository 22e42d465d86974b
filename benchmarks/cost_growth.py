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

"""
How the cost of an update grows: with the latents' size, the tasks, and the teachers of a task.

    OMP_NUM_THREADS=1 python benchmarks/cost_growth.py --output docs/source/results/cost_growth.json

The tiny model's architecture on CPU, two steps of which one is trained, one sample a task. For each size, an update's
seconds (the least of several, in turns), its floating-point operations as PyTorch counts them, and what it holds at its
peak by PyTorch's profiler. `benchmarks/startup.py` has the growth with the number of prompts.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from run_settings import ONE_UPDATE
from step_cost import allocated, one_pass, save_random_lora, seconds_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trl_diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer, tiny


PIXELS_A_LATENT = 4
GROWTH: dict[str, tuple[int, ...]] = {
    "latents": (32, 48, 64, 96, 128),
    "tasks": (1, 2, 4, 8),
    "teachers": (1, 2, 4, 8, 16),
}
START = {"latents": 32, "tasks": 1, "teachers": 1}


def make_trainer(folder: Path, latents: int, tasks: int, teachers: int) -> DiffusionOPDTrainer:
    """A trainer of `tasks` tasks, each taught by the mean of `teachers` LoRAs of random weights."""
    torch.manual_seed(0)
    pipeline = DiffusionPipeline.from_pretrained(tiny.BASE)
    config = {**pipeline.transformer.config, "pos_embed_max_size": max(GROWTH["latents"]) // 2}
    pipeline.transformer = SD3Transformer2DModel.from_config(config).eval()
    specs: dict[str, list[Any]] = {}
    for i in range(tasks):
        for j in range(teachers):
            specs.setdefault(f"task{i}", []).append(save_random_lora(pipeline, folder / f"{i}_{j}"))
    args = DiffusionOPDConfig(
        output_dir=str(folder / "out"),
        height=latents * PIXELS_A_LATENT,
        width=latents * PIXELS_A_LATENT,
        max_sequence_length=12,
        guidance_scale=1.0,
        num_inference_steps=2,
        per_device_train_batch_size=1,
        gradient_checkpointing=False,
        **ONE_UPDATE,
    )
    rows = [{"prompt": "two red circles", "task": task} for task in specs for _ in range(4)]
    trainer = DiffusionOPDTrainer(pipeline, specs, args=args, train_dataset=Dataset.from_list(rows))
    trainer.train()  # optimizer, schedule and wrapping as in training, and a warm-up
    return trainer


def batches_of(trainer: DiffusionOPDTrainer) -> list[list[dict[str, Any]]]:
    return [[{"prompt": "two red circles", "task": task}] for task in trainer.tasks]


def measure(what: str, repeats: int) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        trainers = {n: make_trainer(Path(folder) / str(n), **{**START, what: n}) for n in GROWTH[what]}
        seconds: dict[int, list[float]] = {n: [] for n in trainers}
        for _ in range(repeats):
            for n, trainer in trainers.items():
                batches = batches_of(trainer)
                seconds[n].append(seconds_of(trainer, lambda t=trainer, b=batches: one_pass(t, b)))
        rows = []
        for n, trainer in trainers.items():
            # The counter does not know the CPU's fused attention.
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                one_pass(trainer, batches_of(trainer))
            held = allocated(lambda t=trainer: one_pass(t, batches_of(t)), Path(folder))
            frozen = sum(p.nbytes for p in trainer.bank.backbone.parameters())
            rows.append(
                {
                    what: n,
                    "seconds": min(seconds[n]),
                    "gflop": counter.get_total_flops() / 1e9,
                    "held_mib": held / 2**20,
                    "teachers_mib": frozen / 2**20,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    args = parser.parse_args()
    results = {what: measure(what, args.repeats) for what in GROWTH}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    for what, rows in results.items():
        print(f"\n| {what} | ms | GFLOP | ms a GFLOP | holds MiB | teachers MiB |\n|---:|---:|---:|---:|---:|---:|")
        for row in rows:
            ms = 1000 * row["seconds"]
            print(
                f"| {row[what]} | {ms:.1f} | {row['gflop']:.2f} | {ms / row['gflop']:.1f} | {row['held_mib']:.1f} | "
                f"{row['teachers_mib']:.2f} |"
            )
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
