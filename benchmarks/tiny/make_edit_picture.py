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

"""Draws the picture for the page of the world that edits: given pictures, correct results, and those of base and teachers."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from edit_measure import generate_edits
from peft import PeftModel
from PIL import Image

from trl_diffusion_opd.tiny import EDIT, EDIT_TASKS, EDIT_TEACHERS, edit_dataset, render_edit


def _results(pipeline: FluxKontextPipeline, per_task: int) -> list[Image.Image]:
    images = []
    for task in EDIT_TASKS:
        rows = edit_dataset("test", (task,)).select(range(per_task))
        images += generate_edits(pipeline, rows["prompt"], rows["source_images"])
    return images


def draw_picture(path: Path, per_task: int = 4) -> None:
    """Draws one column for each held-out row (`per_task` of each task) and one line for each model. The first two lines
    have the given pictures and correct results."""
    rows = [row for task in EDIT_TASKS for row in edit_dataset("test", (task,)).select(range(per_task))]
    pipeline = FluxKontextPipeline.from_pretrained(EDIT)
    lines: dict[str, list[Image.Image | None]] = {
        "given": [row["source_images"][0] if row["source_images"] else None for row in rows],
        "ground truth": [render_edit(row["spec"], seed) for seed, row in enumerate(rows)],
        "base": list(_results(pipeline, per_task)),
    }
    for task in EDIT_TASKS:
        model = PeftModel.from_pretrained(pipeline.transformer, EDIT_TEACHERS[task])
        lines[f"{task} teacher"] = list(_results(pipeline, per_task))
        model.unload()
    figure, axes = plt.subplots(len(lines), len(rows), figsize=(1.05 * len(rows), 1.05 * len(lines) + 0.6))
    for line, (name, images) in enumerate(lines.items()):
        for column, image in enumerate(images):
            axis = axes[line, column]
            axis.set(xticks=[], yticks=[])
            if image is None:
                axis.set_frame_on(False)
            else:
                axis.imshow(image, interpolation="nearest")
            if line == 0:
                words = rows[column]["prompt"].replace(" and ", "\nand ").replace("make the ", "make the\n")
                axis.set_title(words.replace("remove the ", "remove the\n").replace("add a ", "add a\n"), fontsize=6)
            if column == 0:
                axis.set_ylabel(name, fontsize=7)
    figure.tight_layout(pad=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/source/images/tiny_edit.png"))
    draw_picture(parser.parse_args().output)


if __name__ == "__main__":
    main()
