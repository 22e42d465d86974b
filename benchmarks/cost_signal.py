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
What an update costs with each of the options that make it cheaper, and what the student then keeps of its teachers, on the
tiny world.

    OMP_NUM_THREADS=1 python benchmarks/cost_signal.py --seeds 0 1 --output docs/source/results/cost_signal

Every student has the same number of updates of the same prompts, from the shipped teachers, on ten ODE steps as published.
Costs are counted, not timed: rows that go through the network forward and backward in an update, where a backward counts
as a forward (a LoRA on a frozen base). The reference is the published form: three passes (rollout, teacher, student), nine
trained steps. `<output>/<option>_<seed>.json` is what one student scored; what is there already is not done again.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig

from trl_diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer, tiny
from trl_diffusion_opd.evaluation import SCORES_FILE, evaluate_retention
from trl_diffusion_opd.models.student import ATTENTION_TARGETS
from trl_diffusion_opd.trainer.dry_run_shared import counted


ROOT = Path(__file__).resolve().parents[1]
EVALUATION_SEED = 2605
# What differs from examples/configs/tiny.yaml in all of them.
SHARED: dict[str, Any] = {
    "num_inference_steps": 10,
    "num_trained_timesteps": None,
    "max_steps": 150,
    "per_device_train_batch_size": 8,
    "eval_strategy": "no",
    "eval_on_start": False,
    "log_completions": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}
# Guided teachers draw better pictures here (compose .67 for .59), at twice the forwards.
SCALE = 2.5
_FOLDED = {"guidance_scale": 1.0, "teacher_guidance_scale": SCALE}
OPTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "num_trained_timesteps=5": {"num_trained_timesteps": 5},
    "num_trained_timesteps=4": {"num_trained_timesteps": 4},
    "num_trained_timesteps=3": {"num_trained_timesteps": 3},
    "num_trained_timesteps=1": {"num_trained_timesteps": 1},
    "skip_last_steps=3": {"skip_last_steps": 3},
    "skip_last_steps=5": {"skip_last_steps": 5},
    "skip_last_steps=3, num_trained_timesteps=4": {"skip_last_steps": 3, "num_trained_timesteps": 4},
    "num_inference_steps=5": {"num_inference_steps": 5},
    "guided": {"guidance_scale": SCALE},
    "guided, num_trained_timesteps=4": {"guidance_scale": SCALE, "num_trained_timesteps": 4},
    "unguided student": _FOLDED,
    "unguided student, num_trained_timesteps=4": {**_FOLDED, "num_trained_timesteps": 4},
}


def settings(option: str, seed: int, folder: Path) -> DiffusionOPDConfig:
    file = yaml.safe_load((ROOT / "examples" / "configs" / "tiny.yaml").read_text())
    known = {name: value for name, value in file.items() if name in DiffusionOPDConfig.__dataclass_fields__}
    known |= {**SHARED, **OPTIONS[option], "seed": seed, "output_dir": str(folder)}
    return DiffusionOPDConfig(**known)


def train(option: str, seed: int, folder: Path) -> dict[str, Any]:
    """Trains one student; returns what an update of it costs."""
    args = settings(option, seed, folder)
    lora = LoraConfig(r=64, lora_alpha=128, init_lora_weights="gaussian", target_modules=list(ATTENTION_TARGETS))
    trainer = DiffusionOPDTrainer(
        tiny.BASE, tiny.TEACHERS, args=args, train_dataset=tiny.dataset("train"), peft_config=lora
    )
    with counted([trainer.student.model]) as rows:
        trainer.train()
    trainer.save_model()
    steps = len(trainer.plan)
    # The noise floor is measured at some updates; it is a part of the counts, as of the run.
    samples = args.max_steps * args.per_device_train_batch_size * len(trainer.tasks)
    counts = {"forward_rows": rows.forwards / samples, "backward_rows": rows.backwards / samples}
    return {**counts, "trainable_steps": steps}


def evaluate(option: str, seed: int, folder: Path, num_images: int, shared: Path) -> dict[str, Any]:
    """Mean scores of the student, of its teachers and of the base, each at its own guidance; the base unguided."""
    options = settings(option, EVALUATION_SEED, folder).retention_options()
    report: dict[str, Any] = {}
    # Base and teachers are drawn once for all students of one guidance.
    place = shared / f"{options['guidance_scale']}_{options['teacher_guidance_scale']}"
    name = f"{option}_{seed}"
    evaluate_retention(
        tiny.BASE,
        tiny.TEACHERS,
        {name: str(folder)},
        tiny.rewards,
        tiny.dataset("test"),
        num_images=num_images,
        output_dir=place,
        **options,
    )
    scores = json.loads((place / SCORES_FILE).read_text())
    for task in tiny.TASKS:
        report[task] = {
            model: statistics.mean(scores[key][task][task])
            for model, key in (("base", "base"), ("teacher", f"teacher/{task}"), ("student", name))
        }
    return report


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The results of each option, one a seed."""
    results: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text())
        results.setdefault(result["option"], []).append(result)
    return {option: results[option] for option in OPTIONS if option in results}


def cost(result: dict[str, Any]) -> float:
    """Of one sample in an update, in forwards of one row; a backward counts as one."""
    return result["cost"]["forward_rows"] + result["cost"]["backward_rows"]


def published_cost(option: str) -> int:
    """The same in three passes with all of nine steps trained, guided or not as the option's teachers are."""
    rows = (
        1
        if OPTIONS[option].get("guidance_scale", 1.0) == OPTIONS[option].get("teacher_guidance_scale", 1.0) == 1
        else 2
    )
    return 9 * 4 * rows


def retention(result: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    """By task, over the base without guidance."""
    return {
        task: (row["student"] - base[task]["base"]) / (row["teacher"] - base[task]["base"])
        for task, row in result["scores"].items()
    }


def print_table(folder: Path) -> None:
    results = read(folder)
    base = results["all"][0]["scores"]
    header = "| option | forwards and backwards a sample | times cheaper than published | "
    print(header + " | ".join(tiny.TASKS) + " | mean | seeds |")
    print("|---|---:|---:|" + "---:|" * (len(tiny.TASKS) + 2))
    for option, of_seeds in results.items():
        costs = statistics.mean(map(cost, of_seeds))
        kept = [retention(result, base) for result in of_seeds]
        by_task = [statistics.mean(of_seed[task] for of_seed in kept) for task in tiny.TASKS]
        cells = [f"{published_cost(option) / costs:.2f}", *(f"{value:.3f}" for value in by_task)]
        seeds = ", ".join(f"{statistics.mean(of_seed.values()):.3f}" for of_seed in kept)
        print(f"| {option} | {costs:.1f} | {' | '.join(cells)} | {statistics.mean(by_task):.3f} | {seeds} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--options", nargs="+", default=list(OPTIONS), choices=list(OPTIONS))
    parser.add_argument("--num_images", type=int, default=512)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="print what is in the folder, and train nothing")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.table:
        print_table(args.output)
        return
    with tempfile.TemporaryDirectory() as work:
        for seed in args.seeds:
            for option in args.options:
                file = args.output / f"{option.replace(', ', '-').replace(' ', '-')}_{seed}.json"
                if file.exists():
                    continue
                folder = Path(work) / file.stem
                cost = train(option, seed, folder)
                scores = evaluate(option, seed, folder, args.num_images, Path(work) / "shared")
                result = {
                    "option": option,
                    "seed": seed,
                    "num_images": args.num_images,
                    "cost": cost,
                    "scores": scores,
                }
                file.write_text(json.dumps(result, indent=2) + "\n")
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
