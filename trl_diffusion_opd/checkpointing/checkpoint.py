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
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..acceleration.processes import communication_failed
from ..acceleration.sharding import load_whole_optimizer_state, whole_optimizer_state
from ..guards.redaction import listed
from ..hub import push as hub
from ..models.student import STUDENT_ADAPTER
from ..reporting import console as tables
from .resume import (
    CHANGES_FILE,
    PROMPTS_FILE,
    Change,
    argument_changes,
    lora_changes,
    prompt_changes,
    record,
    recorded,
)
from .run_folder import name_of_run, set_aside
from .seal import SEAL_FILE, damage, is_sealed, run_of, seal, update_of


if TYPE_CHECKING:
    from ..trainer.base_trainer import DiffusionTrainer

logger = logging.getLogger(__name__)

GRID_FILE = "noise_grid.json"
DEEPSPEED_FILES = "global_step*/*_optim_states.pt"  # one a process
ZERO3_FILES = "global_step*/zero_pp_rank_*_model_states.pt"


def save(trainer: "DiffusionTrainer", save_checkpoint: Callable[[], None]) -> None:
    """
    Saves a checkpoint and marks it as complete when all processes have written their part of it.

    Older checkpoints are rotated away after that and not before: a process killed in between leaves one more, not none.

    Raises:
        [`OSError`]: if it cannot be written, for example on a full disk. Training then stops, and the older checkpoints are
            as they were.
    """
    folder = Path(trainer.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
    limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
    with _failure_explained(trainer, folder):
        try:
            save_checkpoint()
        finally:
            trainer.args.save_total_limit = limit
        trainer._save_state(folder)
        if trainer.args.should_save:
            write_json(folder / GRID_FILE, {"levels": trainer.velocity_field.levels.tolist()})
            write_json(folder / PROMPTS_FILE, trainer.prompts_digest())
            if trainer.changes:
                write_json(folder / CHANGES_FILE, trainer.changes)
            # A path of this machine, which would be pushed. The number of the best update is in the state as well.
            state = json.loads((folder / TRAINER_STATE_NAME).read_text())
            write_json(folder / TRAINER_STATE_NAME, state | {"best_model_checkpoint": None})
            hub.write_arguments(trainer.args, folder)  # once more: the limit was lifted while Trainer saved
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            seal(folder, trainer.run, trainer.state.global_step)
    if trainer.args.should_save:
        rotate_checkpoints(
            output_dir=trainer.args.output_dir,
            save_total_limit=limit,
            best_model_checkpoint=trainer.state.best_model_checkpoint,
        )
    if trainer.args.push_to_hub:
        hub.push_checkpoint(trainer, str(folder))


@contextmanager
def _failure_explained(trainer: "DiffusionTrainer", folder: Path) -> Iterator[None]:
    """A full disk has many voices: torch.save's is "unexpected pos 64 vs 0"."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if communication_failed(error):
            raise
        needed = (_size(trainer), shutil.disk_usage(folder.parent).free)
        of, free = (f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB" for size in needed)
        raise OSError(
            f"{folder.name} could not be saved in {trainer.args.output_dir} ({error}). A checkpoint of this run takes about "
            f"{of}; {free} are free there. Training stops. {resume_advice(trainer.args.output_dir)}"
        ) from error


def _size(trainer: "DiffusionTrainer") -> int:
    """Bytes of a checkpoint: those of an earlier one, else what its tensors take."""
    earlier = last_complete(trainer.args.output_dir)
    if earlier is not None:
        return sum(path.stat().st_size for path in earlier.rglob("*") if path.is_file())
    weights = sum(p.numel() * p.element_size() for p in trainer.student.parameters())
    states: list[Any] = [value for state in trainer.optimizer.state.values() for value in state.values()]
    moments = sum(t.numel() * t.element_size() for t in states if isinstance(t, Tensor))
    # The average in PEFT's format and in diffusers', or in diffusers' alone, and the weights as they are.
    return (3 if trainer.student.is_lora else 2) * weights + moments


def last_complete(output_dir: str | Path | None) -> Path | None:
    """The newest checkpoint of a run that was saved to its end."""
    complete = [folder for folder in checkpoints(output_dir) if is_sealed(folder)]
    return complete[-1] if complete else None


def checkpoints(output_dir: str | Path | None) -> list[Path]:
    """The checkpoints of a run, the newest last."""
    numbers = {
        folder: folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        for folder in Path(output_dir or ".").glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    }
    return sorted((f for f in numbers if f.is_dir() and numbers[f].isdecimal()), key=lambda f: int(numbers[f]))


def resume_advice(output_dir: str | Path | None) -> str:
    """What to do after a training that stopped."""
    last = last_complete(output_dir)
    if last is None:
        return "There is no complete checkpoint: start again, with a smaller save_steps if less is to be lost."
    return f"{last.name} is complete: start again with resume_from_checkpoint=True to go on from there."


def begin(trainer: "DiffusionTrainer", resume_from_checkpoint: str | bool | None) -> Path | None:
    """
    What a training begins from. Checkpoints that it has nothing to do with are set aside: another run's, and those of later
    updates than the one that it goes on from.

    Returns:
        `Path`: the checkpoint, `None` for a new run.

    Raises:
        [`ValueError`]: on all processes, if there is none, or if it can't be gone on from. One message lists everything.
    """
    output_dir, accelerator = trainer.args.output_dir, trainer.accelerator
    folder = last_complete(output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
    if folder is None and resume_from_checkpoint is True:
        raise ValueError(
            f"resume_from_checkpoint=True, and {output_dir} holds no complete checkpoint. Leave it out to begin a new run."
        )
    resumed = Path(folder) if folder else None
    found: list[Any] = [([], [])]
    if resumed is not None and accelerator.is_main_process:
        found = [_looked_at(trainer, resumed)]
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    problems, changes = found[0]
    if problems:
        assert resumed is not None
        raise ValueError(f"Can't resume from {resumed.name}:\n" + listed(problems))
    trainer.run = name_of_run(resumed, accelerator)
    update = 0 if resumed is None else update_of(resumed)
    others = []
    if accelerator.is_main_process:  # which moves them
        others = [one for one in checkpoints(output_dir) if run_of(one) != trainer.run or _number(one) > update]
    aside = set_aside(others, accelerator)
    if aside is not None:
        logger.warning(
            f"{output_dir} holds checkpoints that this run does not go on from ({', '.join(one.name for one in others)}). They "
            f"are set aside in {aside.name}. resume_from_checkpoint goes on from a checkpoint."
        )
    trainer.changes = [] if resumed is None else recorded(resumed) + record(changes, update)
    if resumed is not None and accelerator.is_main_process:
        tables.print_resume(resumed.name, update, changes)
    return resumed


def _looked_at(trainer: "DiffusionTrainer", folder: Path) -> tuple[list[str], list[Change]]:
    """What keeps a run from going on from a checkpoint, and what has changed since."""
    if not folder.is_dir():
        return [f"there is no folder {str(folder)!r}."], []
    if not is_sealed(folder):
        return [f"it was not saved to its end. {_older(folder)}"], []
    if damaged := damage_problems(folder):
        return damaged, []
    changes = argument_changes(folder, trainer.args)
    model = trainer.student.model
    if isinstance(model, PeftModel):
        changes += lora_changes(folder, model.peft_config[STUDENT_ADAPTER])
    changes += prompt_changes(folder, trainer.prompts_digest())
    problems = trainer._check_resume(folder)
    problems += [f"{one.name} was {one.then!r} and is {one.now!r}: {one.refusal}" for one in changes if one.refusal]
    if trainer.is_deepspeed_enabled:
        stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
        problems += deepspeed_problems(folder, trainer.accelerator.num_processes, stage)
    else:
        problems += optimizer_problems(folder)
    return problems, changes


def damage_problems(folder: Path, names: list[str] | None = None) -> list[str]:
    """Which files of a sealed checkpoint, or of those named, are damaged, and which older one can be gone on from."""
    damaged = damage(folder, names)
    return [*damaged, _older(folder)] if damaged else []


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))


def _older(folder: Path) -> str:
    """Which older checkpoint of the same run can be gone on from."""
    beside = checkpoints(folder.parent)
    older = [one for one in beside[: beside.index(folder)] if is_sealed(one)] if folder in beside else []
    if not older:
        return "There is no older complete checkpoint."
    return f"{older[-1].name} is the older one to go on from: resume_from_checkpoint={str(older[-1])!r}."


def restore_best(output_dir: str | Path | None, state: TrainerState) -> None:
    """Puts back into a resumed run's state which checkpoint is the best: the saved state has no paths."""
    if state.best_model_checkpoint is None and state.best_global_step:
        best = Path(output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        state.best_model_checkpoint = str(best) if best.is_dir() else None


def set_incomplete_aside(output_dir: str | Path | None, accelerator: Accelerator) -> None:
    """Renames checkpoints that a killed process left half-written, so that none of them is resumed from."""
    if accelerator.is_main_process and output_dir is not None:
        for folder in checkpoints(output_dir):
            if not is_sealed(folder):
                aside = folder.with_name(f"incomplete-{folder.name}")
                while aside.exists():  # killed at the same update before
                    aside = aside.with_name(f"{aside.name}-again")
                logger.warning(
                    f"{folder.name} was not saved to its end (no file '{SEAL_FILE}' in it) and is set aside as "
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


def optimizer_problems(folder: Path) -> list[str]:
    """Whether the checkpoint has its optimizer, without which Trainer would silently begin with a new one."""
    if (folder / OPTIMIZER_NAME).exists():
        return []
    return [
        f"it has no optimizer ({OPTIMIZER_NAME}): it was saved with save_only_model=True, or under DeepSpeed, whose "
        "checkpoints are resumed under DeepSpeed alone. Name a saved LoRA as student_init to begin anew with its weights."
    ]


def deepspeed_problems(folder: Path, num_processes: int, stage: int) -> list[str]:
    """Whether the checkpoint has an optimizer that DeepSpeed can load: its own, of as many processes and split alike."""
    saved = len(list(folder.glob(DEEPSPEED_FILES)))
    if saved == 0:
        return [
            "it has no optimizer of DeepSpeed's: it was not saved under DeepSpeed, or with save_only_model=True. Resume "
            "it without DeepSpeed, or name a saved LoRA as student_init to begin anew with its weights."
        ]
    problems = []
    if saved != num_processes:
        problems.append(
            f"it was saved by {saved} processes under DeepSpeed, and this run has {num_processes}. DeepSpeed's checkpoints "
            "are resumed on as many."
        )
    was_zero3 = any(folder.glob(ZERO3_FILES))
    if was_zero3 != (stage == 3):
        problems.append(
            "it was saved under ZeRO-3, which this run does not have. Set zero_stage: 3 in DeepSpeed's settings."
            if was_zero3
            else "it was not saved under ZeRO-3, which this run has. Set zero_stage to what it was in DeepSpeed's settings."
        )
    return problems


def save_optimizer(trainer: "DiffusionTrainer", folder: str | Path) -> None:
    """
    Writes optimizer and schedule of split weights as Trainer writes them where they are whole, so that any number of
    processes can go on from them. All processes call it.
    """
    state = whole_optimizer_state(trainer.optimizer, keep=trainer.args.should_save)
    if trainer.args.should_save:
        torch.save(state, os.path.join(folder, OPTIMIZER_NAME))
        torch.save(trainer.lr_scheduler.state_dict(), os.path.join(folder, SCHEDULER_NAME))


def load_optimizer(trainer: "DiffusionTrainer", folder: str | Path) -> None:
    """Restores for split weights what [`save_optimizer`] or Trainer wrote."""
    # Mapped, not read: each process takes its part, and those of a machine share the pages.
    state = torch.load(os.path.join(folder, OPTIMIZER_NAME), map_location="cpu", weights_only=True, mmap=True)
    load_whole_optimizer_state(trainer.optimizer, state)
    schedule = torch.load(os.path.join(folder, SCHEDULER_NAME), map_location="cpu", weights_only=True)
    trainer.lr_scheduler.load_state_dict(schedule)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
