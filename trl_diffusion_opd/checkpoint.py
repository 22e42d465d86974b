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

"""What a checkpoint holds beyond Trainer's own files, when it counts as complete, and what a resume refuses."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from . import hub


if TYPE_CHECKING:
    from .trainer.base_trainer import DiffusionTrainer

logger = logging.getLogger(__name__)

COMPLETE_FILE = "complete"
GRID_FILE = "noise_grid.json"
# Of a full and of a sharded state, as accelerate names them.
FSDP_OPTIMIZER_NAMES = (OPTIMIZER_NAME_BIN, "optimizer_0")


def save(trainer: "DiffusionTrainer", save_checkpoint: Callable[[], None]) -> None:
    """
    Saves a checkpoint and marks it as complete when all processes have written their part of it.

    Older checkpoints are rotated away after that and not before: a process killed in between leaves one more, not none.
    """
    limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
    try:
        save_checkpoint()
    finally:
        trainer.args.save_total_limit = limit
    folder = Path(trainer.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
    trainer._save_state(folder)
    if trainer.args.should_save:
        write_json(folder / GRID_FILE, {"levels": trainer.velocity_field.levels.tolist()})
        # A path of this machine, which would be pushed. The number of the best update is in the state as well.
        state = json.loads((folder / TRAINER_STATE_NAME).read_text())
        write_json(folder / TRAINER_STATE_NAME, state | {"best_model_checkpoint": None})
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        hub.write_arguments(trainer.args, folder)  # once more: the limit was lifted while Trainer saved
        (folder / COMPLETE_FILE).touch()
        rotate_checkpoints(
            output_dir=trainer.args.output_dir,
            save_total_limit=limit,
            best_model_checkpoint=trainer.state.best_model_checkpoint,
            use_mtime=True,
        )
    if trainer.args.push_to_hub:
        hub.push_checkpoint(trainer, str(folder))


def load(trainer: "DiffusionTrainer", folder: str | Path) -> None:
    """
    Restores the student and its average.

    Raises:
        [`ValueError`]: if the checkpoint is not complete, or was made with another noise grid, other teachers or another
            student. One message lists everything.
    """
    folder = Path(folder)
    if not (folder / COMPLETE_FILE).exists():
        raise ValueError(f"{folder.name} was not saved to its end. Resume from an older checkpoint.")
    problems = trainer._check_resume(folder) + optimizer_problems(folder, trainer.is_fsdp_enabled)
    if problems:
        raise ValueError(f"Can't resume from {folder.name}:\n" + "\n".join(f"- {problem}" for problem in problems))
    trainer._load_state(folder)


def restore_best(output_dir: str | Path | None, state: TrainerState) -> None:
    """Puts back into a resumed run's state which checkpoint is the best: the saved state has no paths."""
    if state.best_model_checkpoint is None and state.best_global_step:
        best = Path(output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        state.best_model_checkpoint = str(best) if best.is_dir() else None


def set_incomplete_aside(output_dir: str | Path | None, accelerator: Accelerator) -> None:
    """Renames checkpoints that a killed process left half-written, so that none of them is resumed from."""
    if accelerator.is_main_process and output_dir is not None and Path(output_dir).is_dir():
        for folder in sorted(Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
            suffix = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
            if folder.is_dir() and suffix.isdigit() and not (folder / COMPLETE_FILE).exists():
                aside = folder.with_name(f"incomplete-{folder.name}")
                while aside.exists():  # killed at the same update before
                    aside = aside.with_name(f"{aside.name}-again")
                logger.warning(
                    f"{folder.name} was not saved to its end (no file '{COMPLETE_FILE}' in it) and is set aside as "
                    f"{aside.name}."
                )
                folder.rename(aside)
    accelerator.wait_for_everyone()


def grid_problems(folder: Path, levels: Tensor) -> list[str]:
    """Whether the checkpoint was trained on the noise grid `levels`."""
    saved = torch.tensor(json.loads((folder / GRID_FILE).read_text())["levels"], dtype=torch.float64)
    if saved.shape == levels.shape and torch.allclose(saved, levels, rtol=0, atol=1e-6):
        return []
    rounded = [[round(t, 3) for t in grid.tolist()] for grid in (saved, levels)]
    return [
        f"it was trained on the noise grid {rounded[0]}, this run has {rounded[1]}. Use its num_inference_steps, "
        "resolution and scheduler."
    ]


def optimizer_problems(folder: Path, is_fsdp: bool) -> list[str]:
    """Whether the checkpoint's optimizer can be read with FSDP, or without it."""
    # Parameters are named under FSDP and numbered otherwise.
    named = any((folder / name).exists() for name in FSDP_OPTIMIZER_NAMES)
    if named and not is_fsdp:
        return ["its optimizer was saved under FSDP. Launch with FSDP again."]
    if is_fsdp and (folder / OPTIMIZER_NAME).exists():
        return ["its optimizer was not saved under FSDP. Launch without FSDP."]
    return []


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
