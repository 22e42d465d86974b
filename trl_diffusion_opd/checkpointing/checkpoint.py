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
Saves and resumes checkpoints: the files beyond Trainer's own, the mark of a complete checkpoint, the checks of a
resume.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..acceleration.processes import communication_failed
from ..acceleration.sharding import load_whole_optimizer_state, whole_optimizer_state
from ..guards.files import write_json
from ..guards.redaction import public_arguments
from ..hub.files import (
    ARGUMENTS_FILE,
    CHANGES_FILE,
    DEEPSPEED_FILES,
    EVALUATION_SETTINGS_FILE,
    GRID_FILE,
    PROMPTS_FILE,
    SEAL_FILE,
    ZERO3_FILES,
)
from ..models.lora_keys import some
from ..problems import Problems, Refusal
from .results import images_after, results
from .resume import Change, PromptsDigest, record, recorded
from .run_folder import name_of_run, set_aside
from .seal import damage, is_sealed, run_of, seal, update_of


logger = logging.getLogger(__name__)


@contextmanager
def written(
    output_dir: str, update: int, run: str, should_save: bool, accelerator: Accelerator, size: Callable[[], int]
) -> Iterator[Path]:
    """
    Context in which all processes write a checkpoint. On exit, when all have finished, it is marked as complete.

    Args:
        output_dir (`str`), update (`int`), run (`str`): the run's folder, the number of updates done, the run's name.
        should_save (`bool`): whether this process writes the files that all processes share.
        accelerator ([`~accelerate.Accelerator`])
        size: Returns the bytes of the checkpoint's tensors. Called only for the message of an error.

    Raises:
        [`OSError`]: if it cannot be written, for example on a full disk. Training then stops; older checkpoints are
            untouched.
    """
    folder = Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{update}"
    try:
        yield folder
        accelerator.wait_for_everyone()
        if should_save:
            seal(folder, run, update)
    # A full disk shows in several errors; torch.save's is a RuntimeError, "unexpected pos 64 vs 0".
    except (OSError, SafetensorError, RuntimeError) as error:
        if communication_failed(error):
            raise
        earlier = last_complete(output_dir)
        files = [] if earlier is None else [path for path in earlier.rglob("*") if path.is_file()]
        taken = size() if earlier is None else sum(path.stat().st_size for path in files)
        needed = (taken, shutil.disk_usage(folder.parent).free)
        of, free = (f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB" for size in needed)
        raise OSError(
            f"{folder.name} could not be saved in {output_dir} ({error}). A checkpoint of this run takes about "
            f"{of}; {free} are free there. Training stops. {resume_advice(output_dir)}"
        ) from error


def tensor_bytes(weights: Sequence[Tensor], is_lora: bool, optimizer: torch.optim.Optimizer) -> int:
    """Returns the size of a checkpoint's tensors in bytes."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    moments = sum(t.numel() * t.element_size() for t in states if isinstance(t, Tensor))
    # The averaged weights (of a LoRA in PEFT's and in diffusers' format), and the raw ones.
    return (3 if is_lora else 2) * sum(w.numel() * w.element_size() for w in weights) + moments


@contextmanager
def older_ones_kept(args: TrainingArguments) -> Iterator[None]:
    """
    Context in which Trainer deletes no older checkpoint. If the process is killed before the new one is complete, the
    older ones are still there.
    """
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        yield
    finally:
        args.save_total_limit = limit


def describe(
    folder: Path,
    args: TrainingArguments,
    levels: Tensor,
    prompts: PromptsDigest,
    evaluation: Mapping[str, object],
    changes: Sequence[object],
) -> None:
    """
    Writes the records into a checkpoint that a resume compares with its own settings.

    Args:
        folder (`Path`): the checkpoint, with Trainer's own files.
        args ([`~transformers.TrainingArguments`])
        levels (`Tensor`): the noise grid.
        prompts (`dict`): as [`~resume.prompts_of`] returns it.
        evaluation (`dict`): the settings of evaluations by name, ready for JSON.
        changes (`list[dict]`): settings that resumes have changed so far.
    """
    write_json(folder / GRID_FILE, {"levels": levels.tolist()}, sort_keys=True)
    write_json(folder / PROMPTS_FILE, prompts, sort_keys=True)
    write_json(folder / EVALUATION_SETTINGS_FILE, evaluation, sort_keys=True)
    if changes:
        write_json(folder / CHANGES_FILE, changes, sort_keys=True)
    # It is a path of this machine, and would be pushed. The state also has the number of the best update.
    state = json.loads((folder / TRAINER_STATE_NAME).read_text())
    write_json(folder / TRAINER_STATE_NAME, state | {"best_model_checkpoint": None}, sort_keys=True)
    # Written again, since `older_ones_kept` had removed save_total_limit when the student was saved.
    write_json(folder / ARGUMENTS_FILE, public_arguments(args), sort_keys=True)


def delete_older(args: TrainingArguments, state: TrainerState) -> None:
    """Deletes the oldest checkpoints beyond `save_total_limit`."""
    rotate_checkpoints(
        output_dir=str(args.output_dir),
        save_total_limit=args.save_total_limit,
        best_model_checkpoint=state.best_model_checkpoint,
    )


def last_complete(output_dir: str | Path | None) -> Path | None:
    """Returns the newest complete checkpoint in a folder, or `None`."""
    complete = [folder for folder in checkpoints(output_dir) if is_sealed(folder)]
    return complete[-1] if complete else None


def checkpoints(output_dir: str | Path | None) -> list[Path]:
    """Returns the checkpoints in a folder, the newest last."""
    numbers = {
        folder: folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        for folder in Path(output_dir or ".").glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    }
    return sorted((f for f in numbers if f.is_dir() and numbers[f].isdecimal()), key=lambda f: int(numbers[f]))


def resume_advice(output_dir: str | Path | None) -> str:
    """Says how to go on after training stopped with an error."""
    last = last_complete(output_dir)
    if last is None:
        return "There is no complete checkpoint. Start again; a smaller save_steps saves more often."
    return f"{last.name} is complete: start again with resume_from_checkpoint=True to go on from there."


@dataclass(frozen=True)
class Beginning:
    """
    Where training starts: a new run, or a checkpoint.

    Attributes:
        folder (`Path`, *optional*): the checkpoint, `None` for a new run.
        run (`str`): name of the run that it belongs to.
        update (`int`): number of updates done before.
        changes (`list[Change]`): settings that differ from the checkpoint's.
        record (`list[dict]`): settings that this and earlier resumes have changed, as checkpoints store them.
    """

    folder: Path | None
    run: str
    update: int
    changes: list[Change]
    record: list[dict[str, object]]


def begin(
    output_dir: str | None,
    resume_from_checkpoint: str | bool | None,
    accelerator: Accelerator,
    check: Callable[[Path], list[str]],
    compare: Callable[[Path], list[Change]],
    drawn_now: bool = False,
) -> Beginning:
    """
    Finds where training starts. What this run does not continue is moved aside: checkpoints of another run or later
    than the one it resumes from, with the results beside them, and images of later updates.

    Args:
        output_dir (`str`, *optional*), resume_from_checkpoint (`str` or `bool`, *optional*), accelerator
        check: Returns the problems of resuming from a complete checkpoint, a sentence each.
        compare: Returns the settings that differ from a checkpoint's.
        drawn_now (`bool`, *optional*, defaults to `False`): whether the images in the folder are this run's, which was
            evaluated before its first update.

    Raises:
        [`ValueError`]: on all processes, if the checkpoint does not exist or cannot be resumed from. One message lists
            everything.
    """
    folder = last_complete(output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
    if folder is None and resume_from_checkpoint is True:
        raise Refusal(
            f"resume_from_checkpoint=True, but {output_dir} holds no complete checkpoint. Leave it out to begin a new "
            "run."
        )
    resumed = Path(folder) if folder else None
    found: list[tuple[list[str], list[Change]]] = [([], [])]
    if resumed is not None and accelerator.is_main_process:
        found = [_looked_at(resumed, accelerator, check, compare)]
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    problems, changes = found[0]
    if resumed is not None:
        Problems(problems).raise_under(f"Can't resume from {resumed.name}")
    run = name_of_run(resumed, accelerator)
    update = 0 if resumed is None else update_of(resumed)
    if accelerator.is_main_process:
        _set_others_aside(Path(output_dir or "."), resumed, run, update, drawn_now)
    accelerator.wait_for_everyone()
    kept = [] if resumed is None else recorded(resumed) + record(changes, update)
    return Beginning(resumed, run, update, changes, kept)


def _set_others_aside(output_dir: Path, resumed: Path | None, run: str, update: int, drawn_now: bool) -> None:
    """Moves aside what the run does not go on from, and says so."""
    others = [one for one in checkpoints(output_dir) if run_of(one) != run or _number(one) > update]
    left: list[Path] = []
    if others or resumed is None or resumed.parent.resolve() != output_dir.resolve():
        left = results(output_dir, run)
    if not drawn_now:
        left += images_after(output_dir, None if resumed is None else update)
    aside = set_aside([*others, *left], output_dir)
    if aside is None:
        return
    if others:
        logger.warning(
            f"{output_dir} holds checkpoints that this run does not go on from "
            f"({', '.join(one.name for one in others)}). They were moved to {aside.name}"
            f"{', with the results beside them' if left else ''}. To go on from one of them, give it as "
            "resume_from_checkpoint."
        )
    else:
        logger.warning(
            f"{output_dir} holds results that this run does not go on from "
            f"({some([one.name for one in left])}). They were moved to {aside.name}."
        )


def _looked_at(
    folder: Path,
    accelerator: Accelerator,
    check: Callable[[Path], list[str]],
    compare: Callable[[Path], list[Change]],
) -> tuple[list[str], list[Change]]:
    """Returns the problems of resuming from a checkpoint, and the settings that differ from its own."""
    if not folder.is_dir():
        return [f"there is no folder {str(folder)!r}."], []
    is_named = folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")  # a half-written one may lack any file
    if not is_named and not (folder / TRAINER_STATE_NAME).is_file():
        return [f"{str(folder)!r} is not a checkpoint (it has no {TRAINER_STATE_NAME}). {_inside(folder)}"], []
    if not is_sealed(folder):
        return [f"it was not saved to its end. {_older(folder)}"], []
    if damaged := damage_problems(folder):
        return damaged, []
    changes = compare(folder)
    problems = check(folder)
    problems += [f"{one.name} was {one.then!r} and is {one.now!r}: {one.refusal}" for one in changes if one.refusal]
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        stage = accelerator.state.deepspeed_plugin.zero_stage
        problems += deepspeed_problems(folder, accelerator.num_processes, stage)
    else:
        problems += optimizer_problems(folder)
    return problems, changes


def damage_problems(folder: Path, names: list[str] | None = None) -> list[str]:
    """Lists damaged files of a complete checkpoint (all, or those in `names`), and the older one to resume from."""
    damaged = damage(folder, names)
    return [*damaged, _older(folder)] if damaged else []


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))


def _inside(folder: Path) -> str:
    """Says which complete checkpoint a folder holds, if it is an output folder."""
    last = last_complete(folder)
    return (
        "Name a folder checkpoint-… of a run's output folder."
        if last is None
        else f"The last one in it: resume_from_checkpoint={str(last)!r}."
    )


def _older(folder: Path) -> str:
    """Says which older complete checkpoint can be resumed from."""
    beside = checkpoints(folder.parent)
    older = [one for one in beside[: beside.index(folder)] if is_sealed(one)] if folder in beside else []
    if not older:
        return "There is no older complete checkpoint."
    return f"Go on from the older {older[-1].name}: resume_from_checkpoint={str(older[-1])!r}."


def restore_best(output_dir: str | Path | None, state: TrainerState, comparable_after: int = -1) -> None:
    """
    Sets the path of the best checkpoint in a resumed run's state, since saved states have no paths.

    If evaluations measure something else since an update, the best one before it is forgotten.

    Args:
        output_dir (`str`, *optional*), state ([`~transformers.TrainerState`])
        comparable_after (`int`, *optional*, defaults to -1): as [`~resume.comparable_after`] returns it.
    """
    if (state.best_global_step or 0) <= comparable_after:
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
    if state.best_model_checkpoint is None and state.best_global_step:
        best = Path(output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        state.best_model_checkpoint = str(best) if best.is_dir() else None


def set_incomplete_aside(output_dir: str | Path | None, accelerator: Accelerator) -> None:
    """Renames half-written checkpoints, which a killed process leaves, so that none is resumed from."""
    if accelerator.is_main_process and output_dir is not None:
        for folder in checkpoints(output_dir):
            if not is_sealed(folder):
                aside = folder.with_name(f"incomplete-{folder.name}")
                while aside.exists():  # an earlier process was killed at the same update
                    aside = aside.with_name(f"{aside.name}-again")
                logger.warning(
                    f"{folder.name} was not saved to its end (it has no file '{SEAL_FILE}') and is set aside as "
                    f"{aside.name}."
                )
                folder.rename(aside)
    accelerator.wait_for_everyone()


def grid_problems(folder: Path, levels: Tensor) -> list[str]:
    """Refuses a checkpoint that was trained on another noise grid than `levels`."""
    saved = torch.tensor(json.loads((folder / GRID_FILE).read_text())["levels"], dtype=torch.float64)
    if saved.shape == levels.shape and torch.allclose(saved, levels, rtol=0, atol=1e-6):
        return []
    if saved.shape != levels.shape:
        return [
            f"num_inference_steps was {len(saved) - 1}, is {len(levels) - 1}: it was trained on another noise grid. Use "
            "its num_inference_steps."
        ]
    rounded = [[round(t, 3) for t in grid.tolist()] for grid in (saved, levels)]
    return [
        f"it was trained on the noise grid {rounded[0]}, this run has {rounded[1]}. Use its num_inference_steps, "
        "resolution and scheduler."
    ]


def optimizer_problems(folder: Path) -> list[str]:
    """Refuses a checkpoint without its optimizer: Trainer would silently start with a new one."""
    if (folder / OPTIMIZER_NAME).exists():
        return []
    return [
        f"it has no optimizer ({OPTIMIZER_NAME}): it was saved with save_only_model=True, or under DeepSpeed, whose "
        "checkpoints are resumed under DeepSpeed alone. Name a saved LoRA as student_init to begin anew with its "
        "weights."
    ]


def deepspeed_problems(folder: Path, num_processes: int, stage: int) -> list[str]:
    """Refuses a checkpoint whose optimizer is not DeepSpeed's, or was split among processes in another way."""
    saved = len(list(folder.glob(DEEPSPEED_FILES)))
    if saved == 0:
        return [
            "it has no optimizer of DeepSpeed's: it was not saved under DeepSpeed, or with save_only_model=True. "
            "Resume it without DeepSpeed, or name a saved LoRA as student_init to begin anew with its weights."
        ]
    problems = []
    if saved != num_processes:
        problems.append(
            f"it was saved by {saved} processes under DeepSpeed, but this run has {num_processes}. DeepSpeed's "
            "checkpoints need the same number of processes."
        )
    was_zero3 = any(folder.glob(ZERO3_FILES))
    if was_zero3 != (stage == 3):
        problems.append(
            "it was saved under ZeRO-3, which this run does not have. Set zero_stage: 3 in DeepSpeed's settings."
            if was_zero3
            else "it was not saved under ZeRO-3, which this run has. Set zero_stage to what it was in DeepSpeed's settings."
        )
    return problems


def save_optimizer(optimizer: torch.optim.Optimizer, schedule: LRScheduler, folder: str | Path, keep: bool) -> None:
    """
    Writes optimizer and schedule of weights that are split among processes, in Trainer's format for whole weights. Any
    number of processes can resume from it. All processes must call it; those with `keep` write.
    """
    state = whole_optimizer_state(optimizer, keep=keep)
    if keep:
        torch.save(state, os.path.join(folder, OPTIMIZER_NAME))
        torch.save(schedule.state_dict(), os.path.join(folder, SCHEDULER_NAME))


def load_optimizer(optimizer: torch.optim.Optimizer, schedule: LRScheduler, folder: str | Path) -> None:
    """Loads optimizer and schedule for split weights, as [`save_optimizer`] or Trainer wrote them."""
    # Memory-mapped: each process reads only its part, and the processes of a machine share the pages.
    state = torch.load(os.path.join(folder, OPTIMIZER_NAME), map_location="cpu", weights_only=True, mmap=True)
    load_whole_optimizer_state(optimizer, state)
    schedule.load_state_dict(torch.load(os.path.join(folder, SCHEDULER_NAME), map_location="cpu", weights_only=True))
