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
Provokes what can go wrong in a training, on the tiny world, and records what is logged, scored and drawn then.

    OMP_NUM_THREADS=1 python benchmarks/symptoms.py --output docs/source/results/symptoms.json
    python benchmarks/symptoms.py --picture docs/source/images/symptoms.png --output docs/source/results/symptoms.json

Every student is that of `benchmarks/settings.py` with 50 updates (20 where they end in noise) and one mistake. What is in the file already is not done
again. The picture shows the same prompts and noise for all of them; it is drawn from what `--images` has kept.
"""

import argparse
import json
import logging
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from PIL import Image
from settings import NUM_STEPS, lora_config, settings, velocity_gaps

from trl_diffusion_opd import DiffusionGRPOConfig, DiffusionGRPOTrainer, DiffusionOPDTrainer, tiny
from trl_diffusion_opd.models.teachers import add_adapter, parse_teacher, read_lora


# Of each task.
NUM_IMAGES = {"reference": 128, "healthy": 128, "rate / 100": 128}
FEWER_IMAGES = 64
DRAWN = (1.0, NUM_STEPS)  # guidance scale and steps, where a symptom does not say otherwise
# Two prompts of each task in the picture.
NUM_SHOWN = 2
# Changes of the config, and the guidance scales and numbers of steps that the student is drawn with.
STUDENTS: dict[str, dict[str, Any]] = {
    "healthy": {"draw": [DRAWN, (2.5, NUM_STEPS), (4.5, NUM_STEPS), (1.0, 5), (1.0, 40)]},
    "rate / 100": {"changes": {"learning_rate": 2e-5}},
    "rate x 100": {"changes": {"learning_rate": 0.2, "max_steps": 20}},
    "alike prompts": {"alike": True},
    "guidance folded in": {
        "changes": {"teacher_guidance_scale": 2.5},
        "draw": [DRAWN, (2.5, NUM_STEPS), (4.5, NUM_STEPS)],
    },
}
# Strengths of the healthy student's LoRA.
STRENGTHS = (0.5, 1.0, 2.0, 3.0)
# beta of a teacher by a reward that can be had without the prompt.
HACKED = {"reward hacking": 0.0}


def darkness(prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float]:
    """The share of black in an image: it says nothing about the prompt."""
    return [1 - float(np.asarray(image).mean()) / 255 for image in images]


def alike_prompts(split: str) -> Dataset:
    """Scenes of compose, every other one with the teacher of style."""
    rows = tiny.dataset(split).filter(lambda row: row["task"] == "compose")
    tasks = [("compose", "style")[i % 2] for i in range(len(rows))]
    return rows.remove_columns("task").add_column("task", tasks)


def rows_of(task: str, dataset: Dataset, number: int) -> Dataset:
    rows = dataset.filter(lambda row: row["task"] == task)
    return rows.select([i % len(rows) for i in range(number)])


def colours(images: list[Image.Image]) -> dict[str, float]:
    """Mean saturation, and the share of channel values at 0 or 255."""
    values = np.stack([np.asarray(image) for image in images])
    saturation = np.stack([np.asarray(image.convert("HSV"))[..., 1] for image in images])
    return {
        "saturation": float(saturation.mean()) / 255,
        "clipped": float(((values == 0) | (values == 255)).mean()),
    }


def drawn(
    pipeline: Callable[..., Any], guidance: float, steps: int, keep: Path | None, num_images: int
) -> dict[str, Any]:
    """What a model scores on held-out prompts, and the colours of its images. The noise is the same for all models."""
    found: dict[str, Any] = {
        "guidance_scale": guidance,
        "steps": steps,
        "num_images": num_images,
        "scores": {},
        "colours": {},
    }
    for task in tiny.TASKS:
        rows = rows_of(task, tiny.dataset("test"), num_images)
        images = []
        for start in range(0, num_images, 64):
            generators = [torch.Generator().manual_seed(start + i) for i in range(64)]
            batch = list(rows["prompt"][start : start + 64])
            images += pipeline(
                batch,
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=32,
                width=32,
                max_sequence_length=12,
                generator=generators,
            ).images
        found["scores"][task] = statistics.mean(tiny.rewards[task](images=images, spec=list(rows["spec"])))
        found["colours"][task] = colours(images)
        if task == "compose":
            as_style = [json.dumps({**json.loads(spec), "task": "style"}) for spec in rows["spec"]]
            found["dusk_of_compose"] = statistics.mean(tiny.rewards["style"](images=images, spec=as_style))
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(images[:NUM_SHOWN]):
                image.save(keep / f"{task}_{i}.png")
    return found


class Warned(logging.Handler):
    """Keeps what the package warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def history(trainer: Any, names: list[str]) -> list[dict[str, float]]:
    return [
        {"step": entry["step"], **{name: entry[name] for name in names if name in entry}}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def student(name: str, folder: Path, images: Path | None) -> dict[str, Any]:
    """Trains one student and records what is seen of it."""
    symptom = STUDENTS[name]
    args = settings({"max_steps": 50, **symptom.get("changes", {})}, folder)
    train, test = (alike_prompts(one) if symptom.get("alike") else tiny.dataset(one) for one in ("train", "test"))
    teachers = {task: tiny.TEACHERS[task] for task in tiny.TASKS if task in set(train["task"])}
    trainer = DiffusionOPDTrainer(tiny.BASE, teachers, args=args, train_dataset=train, peft_config=lora_config(64))
    result: dict[str, Any] = {"before": velocity_gaps(trainer, test), "error": None}
    trainer.velocity_field.set_grid(args.num_inference_steps)
    try:
        trainer.train()
    except FloatingPointError as error:
        result["error"] = str(error)
    gaps = [f"{kind}/{task}" for kind in ("velocity_gap", "kl") for task in teachers]
    result["history"] = history(trainer, [*gaps, "grad_norm", "loss"])
    result["gap"] = velocity_gaps(trainer, test)
    keep, number = None if images is None else images / name, NUM_IMAGES.get(name, FEWER_IMAGES)
    result["drawn"] = [
        drawn(trainer.pipeline, *one, None if keep is None else keep / f"{one[0]:g}_{one[1]}", number)
        for one in symptom.get("draw", [DRAWN])
    ]
    if name == "healthy":
        trainer.save_model()
        result["strengths"] = strengths(folder, keep)
    return result


def strengths(folder: Path, keep: Path | None) -> list[dict[str, Any]]:
    """The student's LoRA at several strengths."""
    pipeline: Any = DiffusionPipeline.from_pretrained(tiny.BASE)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(folder), adapter_name="student")
    found = []
    for strength in STRENGTHS:
        pipeline.set_adapters(["student"], [strength])
        place = None if keep is None else keep / f"strength_{strength:g}"
        found.append({"strength": strength, **drawn(pipeline, *DRAWN, place, NUM_IMAGES["healthy"])})
    return found


def hacked(name: str, folder: Path, images: Path | None) -> dict[str, Any]:
    """A teacher by GRPO for dark images of scenes; whether they show what was asked for is only measured."""
    args = DiffusionGRPOConfig(
        str(folder),
        height=32,
        width=32,
        max_sequence_length=12,
        guidance_scale=1.0,
        num_inference_steps=8,
        sde_window_range=[0, 4],
        num_generations=12,
        per_device_train_batch_size=24,
        max_steps=25,
        learning_rate=1e-3,
        beta=HACKED[name],
        reward_weights=[1.0, 0.0],
        gradient_checkpointing=False,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    train = rows_of("compose", tiny.dataset("train"), 602)
    rewards = {"compose": [darkness, tiny.graded_rewards["compose"]]}
    trainer = DiffusionGRPOTrainer(tiny.BASE, reward_funcs=rewards, args=args, train_dataset=train)
    trainer.train()
    names = [name for name in trainer.state.log_history[-2] if name.startswith(("reward", "kl", "frac"))]
    place = None if images is None else images / name / "1_10"
    return {"history": history(trainer, names), "drawn": [drawn(trainer.pipeline, *DRAWN, place, FEWER_IMAGES)]}


def reference(images: Path | None) -> dict[str, Any]:
    """Base and teachers, without guidance and at the scales that teachers are asked at."""
    result = {}
    for name in ("base", *tiny.TASKS):
        pipeline: Any = DiffusionPipeline.from_pretrained(tiny.BASE)
        pipeline.set_progress_bar_config(disable=True)
        if name != "base":
            config, weights, _ = read_lora(pipeline, parse_teacher(tiny.TEACHERS[name]))
            pipeline.transformer = add_adapter(pipeline.transformer, "default", config, weights, trainable=False)
        scales = (1.0, 2.5, 4.5, 7.5) if name == "base" else (1.0, 2.5, 7.5)
        keep = None if images is None else images / f"reference {name}"
        result[name] = [
            drawn(
                pipeline,
                scale,
                NUM_STEPS,
                None if keep is None else keep / f"{scale:g}_{NUM_STEPS}",
                NUM_IMAGES["reference"],
            )
            for scale in scales
        ]
    return {"models": result}


def main() -> None:
    names = ["reference", *STUDENTS, *HACKED]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--symptoms", nargs="+", default=names, choices=names)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--images", type=Path, help="Folder for images of the first prompts of each task.")
    args = parser.parse_args()
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    warned = Warned()
    logging.getLogger("trl_diffusion_opd").addHandler(warned)
    for name in args.symptoms:
        if name in results:
            continue
        warned.messages.clear()
        with tempfile.TemporaryDirectory() as work:
            if name == "reference":
                result = reference(args.images)
            else:
                result = (hacked if name in HACKED else student)(name, Path(work) / "run", args.images)
        results[name] = {**result, "warnings": [*warned.messages]}
        args.output.write_text(json.dumps(results, indent=1) + "\n")
        print(
            name,
            {task: round(s, 3) for task, s in result["drawn"][0]["scores"].items()} if "drawn" in result else "",
            flush=True,
        )


if __name__ == "__main__":
    main()
