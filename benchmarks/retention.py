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
Retention of the distilled student on the tiny world, over several seeds.

    python benchmarks/retention.py --seeds 0 1 2 --num_images 512 --output outputs/retention

For each seed a student is trained by `examples/opd_sd3.py`. Then base, teachers and all students draw images for the
held-out prompts with the same noise. `<output>/seed_<s>.json` is the report of one seed with the score of every image,
`<output>/summary.json` the mean over seeds, with intervals from a bootstrap over images (paired between models and seeds)
and seeds. What is there already is not done again.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from trl_diffusion_opd import tiny
from trl_diffusion_opd.evaluation import SCORES_FILE, evaluate_retention
from trl_diffusion_opd.evaluation.retention import (
    NUM_RESAMPLES,
    Scores,
    interval,
    resample_counts,
    resampled_means,
    retention_of,
    retention_report,
)
from trl_diffusion_opd.trainer.diffusion_opd_config import DiffusionOPDConfig


ROOT = Path(__file__).resolve().parents[1]
# The evaluation's noise is the same for all students, whatever seed they were trained with.
EVALUATION_SEED = 2605


def train(config: Path, seed: int, folder: Path) -> None:
    """Trains the student of one seed in a process of its own, unless it is there."""
    if (folder / "adapter_model.safetensors").exists():
        return
    script = str(ROOT / "examples" / "opd_sd3.py")
    command = [sys.executable, script, "--config", str(config), "--seed", str(seed), "--output_dir", str(folder)]
    command += ["--num_test_images", "8"]  # the script's own report, which is not used here
    subprocess.run(command, check=True, cwd=ROOT)  # the config's paths start there


def evaluate(config: Path, students: Mapping[str, str], num_images: int, batch_size: int, output: Path) -> Scores:
    """Scores of base, teachers and students on the held-out prompts, with the settings that the students trained for."""
    names = {field.name for field in dataclasses.fields(DiffusionOPDConfig)}
    settings = {key: value for key, value in yaml.safe_load(config.read_text()).items() if key in names}
    args = DiffusionOPDConfig(**{**settings, "output_dir": str(output), "report_to": "none"})
    evaluate_retention(
        tiny.BASE,
        tiny.TEACHERS,
        students,
        tiny.rewards,
        tiny.dataset("test"),
        num_images=num_images,
        output_dir=output,
        **{**args.retention_options(), "batch_size": batch_size, "seed": EVALUATION_SEED},
    )
    return json.loads((output / SCORES_FILE).read_text())


def summarize(reports: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """
    Means over seeds.

    A resample draws images of each task, the same for all models and seeds, and as many seeds as there are, the same for
    all tasks; its value is the mean of the drawn seeds' retention.
    """
    seeds = list(reports)
    first = reports[seeds[0]]
    generator = np.random.default_rng(np.random.SeedSequence([EVALUATION_SEED, len(seeds)]))
    drawn = generator.integers(len(seeds), size=(NUM_RESAMPLES, len(seeds)))
    tasks: dict[str, Any] = {}
    sampled = []
    for index, (task, entry) in enumerate(first["tasks"].items()):
        counts = resample_counts(first["num_images"], [EVALUATION_SEED, index])
        means = [  # [model, resample, seed]
            resampled_means(_values(reports.values(), model, task, entry["reward"]), counts)
            for model in ("base", f"teacher/{task}", "student")
        ]
        of_seeds = {seed: reports[seed]["tasks"][task]["retention"] for seed in seeds}
        tasks[task] = {
            "reward": entry["reward"],
            **{
                key: _mean([reports[seed]["tasks"][task][key] for seed in seeds])
                for key in ("base", "teacher", "student")
            },
            "retention": _mean(list(of_seeds.values())),
            "ci95": None,
            "seeds": of_seeds,
        }
        if tasks[task]["retention"] is not None:
            ratios = np.take_along_axis(retention_of(*means), drawn, axis=1).mean(axis=1)
            tasks[task]["ci95"] = interval(ratios)
            sampled.append(ratios)
    return {
        "tasks": tasks,
        "mean_retention": _mean([entry["retention"] for entry in tasks.values()]),
        "mean_ci95": interval(np.mean(sampled, axis=0)) if sampled else None,
        "num_images": first["num_images"],
        "seeds": seeds,
    }


def _values(reports: Any, model: str, task: str, reward: str) -> np.ndarray:
    return np.array([report["image_scores"][model][task][reward] for report in reports], dtype=float)


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values or not values else float(np.mean(values))  # type: ignore[arg-type]


def summary_table(summary: Mapping[str, Any]) -> str:
    lines = [
        "| task | base | teacher | student | "
        + " | ".join(f"seed {seed}" for seed in summary["seeds"])
        + " | retention | 95% interval |",
        "| --- |" + " ---: |" * (5 + len(summary["seeds"])),
    ]
    for task, entry in summary["tasks"].items():
        cells = [entry["base"], entry["teacher"], entry["student"], *entry["seeds"].values(), entry["retention"]]
        lines.append(f"| {task} | " + " | ".join(map(_cell, cells)) + f" | {_range(entry['ci95'])} |")
    blank = " |" * (3 + len(summary["seeds"]))
    lines.append(f"| **mean** |{blank} **{_cell(summary['mean_retention'])}** | {_range(summary['mean_ci95'])} |")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _range(bounds: Sequence[float] | None) -> str:
    return "–" if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_images", type=int, default=512, help="Images a task.")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--config", type=Path, default=ROOT / "examples" / "configs" / "tiny.yaml")
    parser.add_argument("--output", type=Path, required=True, help="Folder of the students and the reports.")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    files = {seed: args.output / f"seed_{seed}.json" for seed in args.seeds}
    missing = [seed for seed in args.seeds if not files[seed].exists()]
    for seed in missing:
        train(args.config.resolve(), seed, args.output.resolve() / f"student_{seed}")
    if missing:  # all at once: base and teachers are drawn for all of them
        students = {f"student_{seed}": str(args.output / f"student_{seed}") for seed in missing}
        scores = evaluate(args.config, students, args.num_images, args.batch_size, args.output / "evaluation")
        teachers = {task: f"teacher/{task}" for task in scores["base"]}
        for seed in missing:
            of_seed = {model: scores[model] for model in ("base", *teachers.values())}
            of_seed["student"] = scores[f"student_{seed}"]
            report = retention_report(of_seed, teachers, ["student"], EVALUATION_SEED)
            files[seed].write_text(json.dumps({**report, "training_seed": seed, "image_scores": of_seed}) + "\n")
    reports = {seed: json.loads(files[seed].read_text()) for seed in args.seeds}
    sizes = {seed: report["num_images"] for seed, report in reports.items()}
    if len(set(sizes.values())) > 1:
        sys.exit(f"The seeds were evaluated on different numbers of images ({sizes}). Remove the JSON files of some.")
    summary = summarize(reports)
    (args.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(summary_table(summary))


if __name__ == "__main__":
    main()
