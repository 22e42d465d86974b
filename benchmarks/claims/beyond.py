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
Trains and measures the runs of the claims beyond the paper's on the tiny world, one JSON a run and seed.

    python benchmarks/claims/beyond.py --search --output outputs/beyond
    python benchmarks/claims/beyond.py --claims methods steps --seeds 0 1 2 --output outputs/beyond

What is there already is not done again. `reference` measures base and teachers, which need no training.
"""

import argparse
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from beyond_runs import BEYOND, SEARCH_SEED, SHARED, WITH_TEACHERS, Run, claim_runs, search_runs
from beyond_worlds import (
    EDIT_KWARGS,
    OF_EDIT,
    OF_TINY,
    SHORT_TASKS,
    alike,
    alike_teachers,
    diversity,
    lora,
    short,
    verdicts,
)
from cost import COST_FILE, CostCallback, read_cost, read_curve, read_lines
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import PeftModel
from PIL import Image
from transformers import set_seed

from trl_diffusion_opd import (
    DiffusionDMDConfig,
    DiffusionDMDTrainer,
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    DiffusionOPDConfig,
    DiffusionOPDTrainer,
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    tiny,
)


TRAINERS: dict[str, tuple[type, type]] = {
    "opd": (DiffusionOPDTrainer, DiffusionOPDConfig),
    "dmd": (DiffusionDMDTrainer, DiffusionDMDConfig),
    "sft": (DiffusionSFTTrainer, DiffusionSFTConfig),
    "grpo": (DiffusionGRPOTrainer, DiffusionGRPOConfig),
}
NUM_IMAGES = 256
NUM_OF_A_PROMPT = 4  # images of one prompt, whose distances are measured
NUM_PROMPTS = 16  # of each task, for these distances
NUM_PROBED = 11  # updates, of which the first is not counted
NUM_EVALUATIONS = 4
NOISE_SEED = 2605


def world(run: Run, split: str, output: Path) -> tuple[Dataset, dict[str, str]]:
    """Prompts and teachers of a run."""
    if run.world == "alike":
        return alike(split), alike_teachers(output)
    if run.world == "edit":
        return tiny.edit_dataset(split), dict(tiny.EDIT_TEACHERS)
    if run.world == "tiny":
        return tiny.dataset(split), dict(tiny.TEACHERS)
    teachers = {task: "student" if run.own_teacher else str(tiny.TEACHERS[task]) for task in SHORT_TASKS}
    return short(split, run.world.endswith("teacher_prompt")), teachers


def trainer_of(run: Run, seed: int, folder: Path, output: Path, **changes: Any) -> Any:
    train, teachers = world(run, "train", output)
    validation, _ = world(run, "validation", output)
    make, config = TRAINERS[run.trainer]
    edits = run.world == "edit"
    calls = {**OF_EDIT, "generation_kwargs": EDIT_KWARGS} if edits else OF_TINY
    rewards: dict[str, Any] = {task: scorer(task) for task in teachers}
    taught: dict[str, Any] = {"teachers": teachers}
    rank = 64
    if run.trainer == "grpo":
        # As the teachers are: the graded score and the verdict count alike.
        rewards = {task: [tiny.edit_graded_rewards[task], rewards[task]] for task in teachers}
        taught, rank = {}, 16
        calls = {**calls, "reward_weights": [1.0, 1.0] * len(teachers)}
    else:
        calls = {**calls, **WITH_TEACHERS}
    args = config(str(folder), **{**SHARED, **calls, **run.config, "seed": seed, **changes})
    return make(
        tiny.EDIT if edits else tiny.BASE,
        **taught,
        reward_funcs=rewards,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        peft_config=lora(rank),
    )


def scorer(task: str) -> Callable[..., list[float]]:
    """The verdicts of one task, as a reward function."""

    def score(images: list[Image.Image], **columns: Any) -> list[float]:
        return verdicts(task, images, columns)

    score.__name__ = task
    return score


def updates_of(name: str, run: Run, seed: int, output: Path) -> int:
    """
    How many updates the budget allows: a few are trained, and their forwards counted. No seed changes it, so that of
    another seed is taken where there is one.
    """
    for path in BEYOND.glob(f"{name}_*.json"):
        return json.loads(path.read_text())["updates"]
    with tempfile.TemporaryDirectory() as place:
        trainer = trainer_of(run, seed, Path(place), output, max_steps=NUM_PROBED)
        CostCallback(trainer)
        trainer.train()
        lines = read_lines(Path(place) / COST_FILE)
        # Without what is done once, before the first update.
        return round(run.forwards * (len(lines) - 1) / (lines[-1]["forwards"] - lines[0]["forwards"]))


def train(name: str, run: Run, seed: int, output: Path) -> tuple[Any, dict[str, Any]]:
    updates, folder = updates_of(name, run, seed, output), output / f"{name}_{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run has left
    set_seed(seed)
    evaluated: dict[str, Any] = {}
    if run.curve:
        evaluated = {"eval_strategy": "steps", "eval_steps": max(1, updates // NUM_EVALUATIONS), "eval_on_start": True}
    trainer = trainer_of(run, seed, folder, output, max_steps=updates, **evaluated)
    CostCallback(trainer)
    trainer.train()
    return trainer, {"updates": updates, "cost": read_cost(folder), "curve": read_curve(folder) if run.curve else []}


def drawn(
    draw: Callable[..., Any], rows: Dataset, prompts: Sequence[str], first: int, steps: int, guidance: float
) -> list[Image.Image]:
    """An image of each prompt, of its row's picture where rows have one."""
    images: list[Image.Image] = []
    sources = list(rows["source_images"]) if "source_images" in rows.column_names else None
    calls = OF_TINY if sources is None else {**OF_EDIT, **EDIT_KWARGS}
    for start in range(0, len(prompts), 64):
        batch = list(prompts[start : start + 64])
        numbers = range(first + start, first + start + len(batch))
        generators = [torch.Generator().manual_seed(1_000_003 * NOISE_SEED + number) for number in numbers]
        given = {}
        if sources is not None:
            given = {"image": [picture for row in sources[start : start + 64] for picture in row] or None}
        images += draw(
            prompt=batch, num_inference_steps=steps, guidance_scale=guidance, generator=generators, **given, **calls
        ).images
    return images


def measure(
    draw: Callable[..., Any], test: Dataset, templates: dict[str, str], steps: int, guidance: float = 1.0
) -> dict[str, Any]:
    """Scores on held-out prompts, and how much images of one prompt differ. The noise is the same for all models."""
    measured: dict[str, Any] = {"steps": steps, "guidance": guidance, "scores": {}, "diversity": {}, "verdicts": {}}
    for task in dict.fromkeys(test["task"]):
        rows = test.filter(lambda row, task=task: row["task"] == task)
        read = [templates.get(task, "{prompt}").format(prompt=prompt) for prompt in rows["prompt"]]
        which = [i % len(rows) for i in range(NUM_IMAGES)]
        images = drawn(draw, rows.select(which), [read[i] for i in which], 0, steps, guidance)
        scores = verdicts(task, images, {"spec": rows.select(which)["spec"]})
        measured["scores"][task] = sum(scores) / len(scores)
        measured["verdicts"][task] = [round(score, 4) for score in scores]
        repeated = [i for i in range(min(NUM_PROMPTS, len(rows))) for _ in range(NUM_OF_A_PROMPT)]
        images = drawn(draw, rows.select(repeated), [read[i] for i in repeated], 10_000, steps, guidance)
        groups = [images[i : i + NUM_OF_A_PROMPT] for i in range(0, len(images), NUM_OF_A_PROMPT)]
        measured["diversity"][task] = sum(map(diversity, groups)) / len(groups)
    return measured


def student(name: str, run: Run, seed: int, output: Path) -> dict[str, Any]:
    trainer, result = train(name, run, seed, output)
    test, _ = world(run, "test", output)
    templates = run.config.get("prompt_templates", {})
    result["measured"] = [measure(trainer.pipeline, test, templates, **how) for how in run.sampled]
    return {"run": name, "seed": seed, "trainer": run.trainer, "config": run.config, "world": run.world, **result}


def reference(output: Path) -> dict[str, Any]:
    """Base and teachers of every world, at the steps and scales that students are drawn with. A teacher draws its own task."""

    def model(lora_folder: str | None) -> DiffusionPipeline:
        pipeline = DiffusionPipeline.from_pretrained(tiny.BASE)
        pipeline.set_progress_bar_config(disable=True)
        if lora_folder is not None:
            PeftModel.from_pretrained(pipeline.transformer, lora_folder)
        return pipeline

    hows = [{"steps": steps} for steps in (10, 4, 2)]
    hows += [{"steps": 10, "guidance": scale} for scale in (2.0, 3.0, 5.0, 7.0)]
    found: dict[str, Any] = {"run": "reference", "seed": 0, "measured": {}}
    of_world = {"tiny": (tiny.dataset("test"), tiny.TEACHERS), "alike": (alike("test"), alike_teachers(output))}
    for name, (test, teachers) in of_world.items():
        at = hows if name == "tiny" else hows[:1]
        found["measured"][name] = {"base": [measure(model(None), test, {}, **how) for how in at[:3]]}
        for task, place in teachers.items():
            own = test.filter(lambda row, task=task: row["task"] == task)
            found["measured"][name][task] = [measure(model(str(place)), own, {}, **how) for how in at]
    found["measured"]["short"] = {"base": [measure(model(None), short("test", False), {}, steps=10)]}
    return found


def edit_reference() -> dict[str, Any]:
    """Base and teachers of the world that edits, each on all of its tasks."""
    measured: dict[str, Any] = {}
    for name, folder in (("base", None), *tiny.EDIT_TEACHERS.items()):
        pipeline = DiffusionPipeline.from_pretrained(tiny.EDIT)
        pipeline.set_progress_bar_config(disable=True)
        if folder is not None:
            PeftModel.from_pretrained(pipeline.transformer, folder)
        measured[name] = [measure(pipeline, tiny.edit_dataset("test"), {}, steps=10)]
    return {"run": "edit-reference", "seed": 0, "measured": {"edit": measured}}


def keep(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(result) + "\n")
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", action="store_true", help="Search the settings of the compared methods.")
    parser.add_argument("--claims", nargs="+", default=[], choices=["reference", *claim_runs()])
    parser.add_argument("--runs", nargs="+", help="Only these runs of them.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True, help="Folder of the trainings.")
    args = parser.parse_args()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    output = args.output.resolve()
    todo = [("search/" + name, run, SEARCH_SEED) for name, run in search_runs().items()] if args.search else []
    chosen = claim_runs()
    todo += [
        (name, run, seed)
        for seed in args.seeds
        for claim in args.claims
        if claim != "reference"
        for name, run in chosen[claim].items()
    ]
    for name, run, seed in todo:
        path = BEYOND / f"{name}_{seed}.json"
        if path.exists() or (args.runs and name not in args.runs):
            continue
        result = student(name.removeprefix("search/"), run, seed, output)
        keep(path, result)
        scores = result["measured"][0]["scores"]
        print(f"{path.name}: " + ", ".join(f"{task} {score:.3f}" for task, score in scores.items()), flush=True)
    if "reference" in args.claims and not (BEYOND / "reference_0.json").exists():
        keep(BEYOND / "reference_0.json", reference(output))
    if "edits" in args.claims and not (BEYOND / "edit-reference_0.json").exists():
        keep(BEYOND / "edit-reference_0.json", edit_reference())


if __name__ == "__main__":
    main()
