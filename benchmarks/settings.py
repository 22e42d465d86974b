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
What prompts, updates, batch, learning rate, rank and task weights change, on the tiny world.

    OMP_NUM_THREADS=1 python benchmarks/settings.py --output docs/source/results/settings.json
    python benchmarks/settings.py --table --output docs/source/results/settings.json

Each student is the demo's (`examples/configs/tiny.yaml`) with fewer updates and one or two other settings. Its velocity gap
is measured on its own walk of ten ODE steps, on held-out prompts and on those that it was trained on. Its retention is
measured on held-out prompts, with the same noise for all. What is in the file already is not done again.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from torch import Tensor

from trl_diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer, tiny
from trl_diffusion_opd.algorithms.flow import velocity_gap_sq
from trl_diffusion_opd.algorithms.opd import StepPlan
from trl_diffusion_opd.algorithms.rollout import sample_generators, walk
from trl_diffusion_opd.algorithms.samplers import sampler_table
from trl_diffusion_opd.data.tasks import task_rows
from trl_diffusion_opd.evaluation import SCORES_FILE, evaluate_retention
from trl_diffusion_opd.models.student import ATTENTION_TARGETS


ROOT = Path(__file__).resolve().parents[1]
EVALUATION_SEED = 2605
NUM_STEPS = 10
NUM_GAP_PROMPTS = 64
# What differs from examples/configs/tiny.yaml in all of them.
SHARED: dict[str, Any] = {
    "max_steps": 200,
    "eval_strategy": "no",
    "eval_on_start": False,
    "log_completions": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}
# 800 samples of each task.
SHORT = {"max_steps": 100, "per_device_train_batch_size": 8}
# Fields of the config, and two more: `lora_r`, and `prompts`, the number of prompts of each task.
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "updates": {"50": {"max_steps": 50}, "100": {"max_steps": 100}},
    "seed": {"0": {}, "1": {"seed": 1}},
    "prompts": {"all": SHORT, "50": {**SHORT, "prompts": 50}},
    "rank and rate": {
        f"{rank}, {rate:g}": {**SHORT, "lora_r": rank, "learning_rate": rate}
        for rank, rate in ((32, 2e-3), (32, 3e-4))
    },
    "weights": {"compose 4": {**SHORT, "task_weights": {"compose": 4.0}}},
}

# Groups whose students draw no images: their gaps are compared.
GAP_ONLY = ("rank and rate", "weights")


def settings(change: dict[str, Any], folder: Path) -> DiffusionOPDConfig:
    file = yaml.safe_load((ROOT / "examples" / "configs" / "tiny.yaml").read_text())
    known = DiffusionOPDConfig.__dataclass_fields__
    fields = {**file, **SHARED, **change, "output_dir": str(folder)}
    return DiffusionOPDConfig(**{name: value for name, value in fields.items() if name in known})


def some_prompts(number: int | None) -> Dataset:
    """The training prompts, or `number` of each task: fewer where a task has fewer."""
    dataset = tiny.dataset("train")
    if number is None:
        return dataset
    tasks = task_rows(dataset, "task").values()
    return concatenate_datasets(
        [dataset.select(rows).shuffle(seed=0).select(range(min(number, len(rows)))) for rows in tasks]
    )


def velocity_gaps(trainer: DiffusionOPDTrainer, dataset: Dataset) -> dict[str, float]:
    """The velocity gap of each task, on the averaged student's own walk over the first prompts of the dataset."""
    trainer.velocity_field.set_grid(NUM_STEPS)
    prompts = {
        task: [dataset[int(row)]["prompt"] for row in np.resize(rows, NUM_GAP_PROMPTS)]
        for task, rows in task_rows(dataset, "task").items()
    }
    with trainer.averaged_student(), torch.no_grad():
        return {task: velocity_gap(trainer, task, of_task) for task, of_task in prompts.items()}


def velocity_gap(trainer: DiffusionOPDTrainer, task: str, prompts: list[str]) -> float:
    """The norm of the gap by the norm of the teacher's velocity, over all steps but the last, which all count alike."""
    field, roles = trainer.velocity_field, trainer.bank.teachers[task]
    plan = StepPlan.of(sampler_table("ode", field.levels, None), "velocity", skip_last_steps=1)
    squares: list[tuple[float, float]] = []

    def velocity(j: int, x: Tensor, z: Tensor | None) -> Tensor:
        t = float(plan.table.levels[j])
        target = trainer.bank.mean_velocity(field, roles, x, t, prompts)
        student = field(x, t, prompts, trainer.args.guidance_scale, trainer.student.model)
        squares.append((float(velocity_gap_sq(student, target).mean()), float(target.square().mean())))
        return student

    generators = sample_generators([EVALUATION_SEED, trainer.tasks.index(task)], list(range(len(prompts))))
    walk(velocity, field.initial_latents(prompts, generators), plan.walked, generators)
    gap, norm = map(sum, zip(*squares, strict=True))
    return math.sqrt(gap / norm)


def lora_config(rank: int) -> LoraConfig:
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, init_lora_weights="gaussian", target_modules=list(ATTENTION_TARGETS)
    )


def scores(folder: Path, args: DiffusionOPDConfig, num_images: int, shared: Path) -> dict[str, dict[str, float]]:
    """Mean verdicts of base, teacher and student on held-out prompts. Base and teachers are drawn once for all students."""
    evaluate_retention(
        tiny.BASE,
        tiny.TEACHERS,
        {folder.name: str(folder)},
        tiny.rewards,
        tiny.dataset("test"),
        num_images=num_images,
        output_dir=shared,
        **{**args.retention_options(), "num_inference_steps": NUM_STEPS, "seed": EVALUATION_SEED},
    )
    of_models = json.loads((shared / SCORES_FILE).read_text())
    keys = {"base": "base", "student": folder.name}
    return {
        task: {
            model: statistics.mean(of_models[key][task][task])
            for model, key in {**keys, "teacher": f"teacher/{task}"}.items()
        }
        for task in tiny.TASKS
    }


def run(change: dict[str, Any], folder: Path, num_images: int | None, shared: Path) -> dict[str, Any]:
    """Trains and measures one student. It draws no images if `num_images` is `None`."""
    args = settings(change, folder)
    lora = lora_config(change.get("lora_r", 64))
    train, test = some_prompts(change.get("prompts")), tiny.dataset("test")
    start = time.perf_counter()
    trainer = DiffusionOPDTrainer(tiny.BASE, tiny.TEACHERS, args=args, train_dataset=train, peft_config=lora)
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.save_model()
    last = trainer.state.log_history[-2]  # the last entry is the run's summary
    return {
        "gap": velocity_gaps(trainer, test),
        "gap_on_training_prompts": velocity_gaps(trainer, train) if "prompts" in change else None,
        "logged_gap": {task: last[f"velocity_gap/{task}"] for task in tiny.TASKS},
        "scores": None if num_images is None else scores(folder, args, num_images, shared),
        "seconds": seconds,
    }


def retention(result: dict[str, Any]) -> dict[str, float]:
    """By task: the part of the teacher's gain over the base that the student has. Empty if no images were drawn."""
    return {
        task: (row["student"] - row["base"]) / (row["teacher"] - row["base"])
        for task, row in (result["scores"] or {}).items()
    }


def table(results: list[dict[str, Any]]) -> str:
    """A row a student: gaps on held-out prompts, retention by task and in the mean."""
    lines = [
        "| setting | value | " + " | ".join(f"gap {task}" for task in tiny.TASKS) + " | "
        + " | ".join(tiny.TASKS) + " | mean |",
        "|---|---|" + "---:|" * (2 * len(tiny.TASKS) + 1),
    ]  # fmt: skip
    for result in results:
        kept = retention(result)
        cells = [f"{result['gap'][task]:.3f}" for task in tiny.TASKS]
        cells += [f"{value:.3f}" for value in (*kept.values(), statistics.mean(kept.values()))] if kept else ["-"] * 4
        lines.append(f"| {result['group']} | {result['value']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", default=list(CHANGES), choices=list(CHANGES))
    parser.add_argument("--num_images", type=int, default=128, help="Images a task.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="Folder that keeps the images, for another call.")
    parser.add_argument("--table", action="store_true", help="print what is in the file, and train nothing")
    args = parser.parse_args()
    results = json.loads(args.output.read_text()) if args.output.exists() else []
    done = {(result["group"], result["value"]) for result in results}
    with tempfile.TemporaryDirectory() as temporary:
        work = temporary if args.work is None else args.work
        asked = [] if args.table else [(group, value) for group in args.groups for value in CHANGES[group]]
        for group, value in asked:
            if (group, value) in done:
                continue
            change = CHANGES[group][value]
            folder = Path(work) / f"student_{len(results)}"
            number = None if group in GAP_ONLY else args.num_images
            result = {"group": group, "value": value, "changes": change, "num_images": number}
            results.append({**result, **run(change, folder, number, Path(work) / "shared")})
            args.output.write_text(json.dumps(results, indent=1) + "\n")
            print(table(results[-1:]).splitlines()[-1], f"{results[-1]['seconds']:.0f} s", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
