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

"""Draws the picture for the tiny world's page: correct images, and those of base and teachers for the same prompts."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from measure import generate
from peft import PeftModel
from PIL import Image

from trl_diffusion_opd.tiny import BASE, TASKS, TEACHERS, dataset, render


def _prompts(per_task: int) -> list[dict[str, str]]:
    held_out = list(dataset("test"))
    return [row for task in TASKS for row in [r for r in held_out if r["task"] == task][:per_task]]


def draw_picture(path: Path, per_task: int = 4) -> None:
    """Draws one column for each held-out prompt (`per_task` of each task) and one row for each model. The first row
    has correct images."""
    rows = _prompts(per_task)
    prompts = [row["prompt"] for row in rows]
    pipeline = StableDiffusion3Pipeline.from_pretrained(BASE)
    lines: dict[str, list[Image.Image]] = {
        "ground truth": [render(row["spec"], seed) for seed, row in enumerate(rows)],
        "base": generate(pipeline, prompts),
    }
    for task in TASKS:
        model = PeftModel.from_pretrained(pipeline.transformer, TEACHERS[task])
        lines[f"{task} teacher"] = generate(pipeline, prompts)
        model.unload()
    figure, axes = plt.subplots(len(lines), len(rows), figsize=(1.05 * len(rows), 1.05 * len(lines) + 0.8))
    for line, (name, images) in enumerate(lines.items()):
        for column, image in enumerate(images):
            axis = axes[line, column]
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if line == 0:
                words = prompts[column].replace("a painting of", "a painting of\n").replace(" and ", "\nand ")
                for relation in (" left of ", " right of ", " above ", " below "):
                    words = words.replace(relation, f"\n{relation.strip()}\n")
                axis.set_title(words, fontsize=6)
            if column == 0:
                axis.set_ylabel(name, fontsize=7)
    figure.tight_layout(pad=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/source/images/tiny_world.png"))
    draw_picture(parser.parse_args().output)


if __name__ == "__main__":
    main()
