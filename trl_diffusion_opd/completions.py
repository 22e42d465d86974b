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
"""Pictures of the student's progress: one grid an evaluation, in a file and in the trackers."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from diffusers.utils import make_image_grid
from PIL import Image
from transformers.integrations import TensorBoardCallback


if TYPE_CHECKING:
    from .trainer.base_trainer import DiffusionTrainer

FOLDER = "completions"
LOG_NAME = "completions"
# Smaller images are enlarged by a whole factor until they have this many pixels on the shorter side.
_VISIBLE_SIZE = 128


def log_grid(trainer: "DiffusionTrainer", grid: dict[str, list[Image.Image]]) -> None:
    """
    Shows images of the student: a row a task, a column a prompt.

    The picture is saved as `completions/step_{global_step}.png` in the output folder and sent to those of the trackers in
    `report_to` that show pictures (tensorboard, wandb, trackio), under the name `completions` at the current update. Call
    it on the main process.

    Args:
        trainer ([`DiffusionTrainer`])
        grid (`dict[str, list[PIL.Image.Image]]`): images of one size by task. Shorter rows are filled with white.
    """
    rows = {task: images for task, images in grid.items() if images}
    if not rows:
        return
    step = trainer.state.global_step
    picture = _picture(list(rows.values()))
    folder = Path(trainer.args.output_dir or ".") / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"step_{step:06d}.png")
    _send(trainer, picture, caption=f"rows: {', '.join(rows)}", step=step)


def _picture(rows: list[list[Image.Image]]) -> Image.Image:
    width, height = rows[0][0].size
    factor = math.ceil(_VISIBLE_SIZE / min(width, height))
    columns = max(len(images) for images in rows)
    blank = Image.new("RGB", (width, height), "white")
    cells = [image for images in rows for image in images + [blank] * (columns - len(images))]
    # Nearest: what is seen are the pixels that were generated, not a blur between them.
    cells = [cell.convert("RGB").resize((width * factor, height * factor), Image.Resampling.NEAREST) for cell in cells]
    return make_image_grid(cells, rows=len(rows), cols=columns)


def _send(trainer: "DiffusionTrainer", picture: Image.Image, caption: str, step: int) -> None:
    trackers = trainer.args.report_to or []
    for callback in trainer.callback_handler.callbacks:
        # The writer opens with training: an evaluation before it has only the file.
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_image(LOG_NAME, np.asarray(picture), step, dataformats="HWC")
    if "wandb" in trackers:
        import wandb

        if wandb.run is not None:
            # The callback of transformers has made this metric the x axis; wandb's own counter counts calls.
            wandb.log({LOG_NAME: wandb.Image(picture, caption=caption), "train/global_step": step})
    if "trackio" in trackers:
        import trackio

        if trackio.context_vars.current_run.get() is not None:
            image = trackio.Image(picture, caption=caption)
            trackio.log({LOG_NAME: image, "train/global_step": step}, step=step)
