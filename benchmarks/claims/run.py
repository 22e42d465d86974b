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
Trains and measures the methods of the comparison on the tiny world, one JSON a method and seed.

    python benchmarks/claims/run.py --methods opd multi-task --seeds 0 1 2 --output outputs/claims

What is there already is not done again, and a run that was interrupted goes on. `base`, `teacher-<task>` and `merge-r<rank>`
need no training.
"""

import argparse
import dataclasses
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from cost import CostCallback, read_cost, read_curve
from diffusers import DiffusionPipeline
from methods import METHODS, RANKS, RESULTS, ROOT, TASKS
from peft import PeftModel
from transformers import set_seed

from trl_diffusion_opd import merge_teachers, tiny
from trl_diffusion_opd.scripts.stages import read_stages, run_stages


sys.path.insert(0, str(ROOT / "benchmarks" / "tiny"))

from measure import generate  # noqa: E402


NUM_IMAGES = 512
# The evaluation's noise is the same for all methods, whatever seed they were trained with.
NOISE_SEED = 2605


def counted(make_trainer: Callable[..., Any]) -> Callable[..., Any]:
    def make(output_dir: Path, student_init: str | None) -> Any:
        trainer = make_trainer(output_dir, student_init)
        CostCallback(trainer)
        return trainer

    return make


def train(method: str, seed: int, folder: Path) -> dict[str, Any]:
    """Trains what is not trained yet. Returns cost, curves and the LoRA's folder after each stage."""
    contents = METHODS[method](seed)
    for content in contents:
        # The average was this one, by default, when the results on the page were made.
        fixed = {"seed": seed, "use_cpu": True, "save_total_limit": 1, "ema_decay": 0.9}
        content["config"] = {**fixed, **content["config"]}
    path = folder / "stages.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"output_dir": str(folder), "stages": contents}, sort_keys=False))
    stages, _ = read_stages(path)
    run_stages([dataclasses.replace(stage, make_trainer=counted(stage.make_trainer)) for stage in stages], folder)
    folders = {content["name"]: folder / content["name"] for content in contents}
    costs = [read_cost(of_stage) for of_stage in folders.values()]
    for of_stage in folders.values():  # of no use now, and large
        for checkpoint in of_stage.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return {
        "settings": contents,
        "cost": {name: sum(cost[name] for cost in costs) for name in costs[0]},
        "curves": {name: read_curve(of_stage) for name, of_stage in folders.items()},
        "folders": folders,
    }


def untrained(method: str, folder: Path) -> Path | None:
    """The LoRA of a method without training, `None` for the base."""
    if method == "base":
        return None
    kind, _, which = method.partition("-")
    if kind == "teacher":
        return Path(tiny.TEACHERS[which])
    pipeline = DiffusionPipeline.from_pretrained(tiny.BASE)
    merge_teachers(pipeline, tiny.TEACHERS, folder, rank=int(which.removeprefix("r")))
    return folder


def measure(lora: Path | None, split: str = "test") -> dict[str, list[float]]:
    """The verdict on every image of held-out prompts, by task."""
    pipeline = DiffusionPipeline.from_pretrained(tiny.BASE)
    if lora is not None:
        PeftModel.from_pretrained(pipeline.transformer, lora)
    prompts, scores = tiny.dataset(split), {}
    for task in TASKS:
        rows = prompts.filter(lambda row, task=task: row["task"] == task)
        rows = rows.select([i % len(rows) for i in range(NUM_IMAGES)])
        images = generate(pipeline, rows["prompt"], seed=NOISE_SEED)
        scores[task] = [round(float(score), 4) for score in tiny.rewards[task](images=images, spec=list(rows["spec"]))]
    return scores


def run(method: str, seed: int, output: Path) -> dict[str, Any]:
    folder = output / f"{method}_{seed}"
    result: dict[str, Any] = {"method": method, "seed": seed, "num_images": NUM_IMAGES, "noise_seed": NOISE_SEED}
    if method in METHODS:
        set_seed(seed)
        trained = train(method, seed, folder)
        folders = trained.pop("folders")
        result |= trained | {"threads": torch.get_num_threads()}
    else:
        folders = {"lora": untrained(method, folder)}
    verdicts = {name: measure(lora) for name, lora in folders.items()}
    last = verdicts[list(verdicts)[-1]]
    result["test"] = {task: sum(scores) / len(scores) for task, scores in last.items()}
    result["test_after"] = {
        name: {task: sum(scores) / len(scores) for task, scores in of_stage.items()}
        for name, of_stage in verdicts.items()
    }
    result["verdicts"] = last
    return result


def main() -> None:
    others = ["base", *(f"teacher-{task}" for task in TASKS), *(f"merge-r{rank}" for rank in (*RANKS, 64))]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *others], required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True, help="Folder of the trainings.")
    args = parser.parse_args()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    output = args.output.resolve()
    os.chdir(ROOT)  # the paths of the examples' settings start there
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for method in args.methods:
            path = RESULTS / f"{method}_{seed}.json"
            if path.exists() or (method in others and seed != args.seeds[0]):
                continue
            result = run(method, seed, output)
            partial = path.with_suffix(".tmp")
            partial.write_text(json.dumps(result) + "\n")
            partial.replace(path)
            print(
                f"{path.name}: " + ", ".join(f"{task} {score:.3f}" for task, score in result["test"].items()),
                flush=True,
            )


if __name__ == "__main__":
    main()
