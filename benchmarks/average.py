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
What the moving average costs or gains: validation scores of the weights, of the average that follows the run, and of others.

    python benchmarks/average.py --lengths 10 30 60 300 --output docs/source/results/average

One run a method, at a constant rate, measured on its way: an average that follows the run does not depend on where the run
ends. All averages are taken of the same weights, and all images have the same noise.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from diffusers import DiffusionPipeline
from run_settings import QUIET, TINY
from trainers import TRAINERS
from transformers import TrainerCallback

from trl_diffusion_opd import tiny
from trl_diffusion_opd.models import average
from trl_diffusion_opd.tiny.verifiers import letters_graded


sys.path.insert(0, str(Path(__file__).parent / "tiny"))

from measure import generate  # noqa: E402


LENGTHS = (10, 30, 60, 300, 3000)
# Name: mean age as a share of the run, or decay and interval.
AVERAGES: dict[str, float | tuple[float, int]] = {"0.5%": 0.005, "1%": 0.01, "2%": 0.02, "0.9 / 8": (0.9, 8)}
SHARED = {
    **TINY,
    **QUIET,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "logging_strategy": "no",
    "ema_decay": None,
}


def trainer_of(method: str, updates: int, folder: str) -> Any:
    prompts = tiny.dataset("train")
    options: dict[str, Any] = SHARED | {"output_dir": folder, "max_steps": updates}
    kind = TRAINERS[method]
    # Small batches: more updates in the same time, and noisier weights, which is what an average is for.
    if method in ("opd", "sft"):
        steps = 5 if method == "opd" else 10
        options |= {"num_inference_steps": steps, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
        args = kind.config_class(**options)
        return kind(tiny.BASE, teachers=tiny.TEACHERS, args=args, train_dataset=prompts)
    letters = prompts.filter(lambda row: row["task"] == "letters")
    options |= {"num_inference_steps": 6, "num_generations": 8, "per_device_train_batch_size": 8}
    if method == "grpo":
        options |= {"learning_rate": 3e-4, "beta": 0.01, "sde_window_range": [0, 3]}
    else:
        options |= {"learning_rate": 1e-4, "num_trained_timesteps": 3}
    args = kind.config_class(**options)
    return kind(tiny.BASE, reward_funcs=letters_graded, args=args, train_dataset=letters)


class Averages(TrainerCallback):
    """Takes every average's step after each update, and measures all of them at certain ones."""

    def __init__(self, trainer: Any, tasks: list[str], lengths: list[int], num_images: int):
        self.trainer, self.tasks, self.lengths, self.num_images = trainer, tasks, lengths, num_images
        self.pipeline: Any = DiffusionPipeline.from_pretrained(tiny.BASE)
        self.pipeline.transformer = trainer.student.model
        self.parameters = trainer.student.parameters()
        self.shadows = {name: [p.detach().clone() for p in self.parameters] for name in AVERAGES}
        self.results: dict[int, dict[str, float]] = {}

    def step(self, name: str, update: int) -> None:
        setting = AVERAGES[name]
        decay, interval = setting if isinstance(setting, tuple) else (average.FOLLOWING, 1)
        if update % interval:
            return
        ema = average.moving_average([], decay)
        assert ema is not None
        if not isinstance(setting, tuple):
            ema.inv_gamma = 1 / setting
        kept = ema.get_decay(update)
        for shadow, parameter in zip(self.shadows[name], self.parameters, strict=True):
            shadow.lerp_(parameter.detach(), 1 - kept)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        raw = [p.detach().clone() for p in self.parameters]
        scores = {}
        for name, weights in {"raw": raw, **self.shadows}.items():
            for parameter, weight in zip(self.parameters, weights, strict=True):
                parameter.copy_(weight)
            scores[name] = self.score()
        for parameter, weight in zip(self.parameters, raw, strict=True):
            parameter.copy_(weight)
        return scores

    def score(self) -> float:
        """Mean over tasks of the scores on validation prompts: what RL is trained on, else the tiny world's verdicts."""
        prompts, means = tiny.dataset("validation"), []
        for task in self.tasks:
            rows = prompts.filter(lambda row, task=task: row["task"] == task)
            rows = rows.select([i % len(rows) for i in range(self.num_images)])
            images = generate(self.pipeline, rows["prompt"], seed=1)
            reward = self.trainer.reward_funcs[task][0] if self.trainer.reward_funcs[task] else tiny.rewards[task]
            verdicts = reward(images=images, spec=list(rows["spec"]))
            means.append(sum(map(float, verdicts)) / len(verdicts))
        return sum(means) / len(means)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for name in AVERAGES:
                self.step(name, state.global_step)
        if state.global_step in self.lengths:
            self.results[state.global_step] = self.measure()
            print(state.global_step, self.results[state.global_step], flush=True)


def run(method: str, lengths: list[int], num_images: int) -> dict[str, Any]:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(method, max(lengths), folder)
        callback = Averages(trainer, trainer.tasks, lengths, num_images)
        base = callback.score()
        print(method, "base", base, flush=True)
        trainer.add_callback(callback)
        trainer.train()
    return {
        "method": method,
        "tasks": trainer.tasks,
        "num_images": num_images,
        "base": base,
        "scores": {str(update): scores for update, scores in callback.results.items()},
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["opd", "grpo", "nft", "sft"])
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--num_images", type=int, default=256, help="a task, the same noise for all")
    parser.add_argument("--output", type=Path, default=Path("outputs/average"))
    arguments = parser.parse_args()
    disable_progress_bars()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for method in arguments.methods:
        result = run(method, arguments.lengths, arguments.num_images)
        (arguments.output / f"{method}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
