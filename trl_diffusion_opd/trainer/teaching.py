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

"""Loads the frozen teachers of a trainer, and compares them with those of a checkpoint."""

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel

from ..checkpointing.checkpoint import damage_problems, last_complete
from ..checkpointing.seal import is_sealed
from ..data.tasks import SINGLE_TASK
from ..guards.files import read_json
from ..hub.files import MANIFEST_FILE
from ..models.backbone import STUDENT, Backbone
from ..models.merge import MergeReport, merge_adapters, merge_weights
from ..models.own_pipeline import OwnPipelines
from ..models.student import STUDENT_ADAPTER, Student
from ..models.student_copy import StudentCopy
from ..models.teacher_config import STUDENT_ITSELF, is_itself, normalize_teachers
from ..models.teacher_manifest import base_hash, identity
from ..models.teachers import Manifest, TeacherBank
from ..problems import Problems
from .base_config import MERGE, DiffusionConfig
from .checks import itself_problems, uses_fsdp
from .preparation import Parts


AVERAGE = "average"  # the role of the copy that follows the student's average


def load_teachers(parts: Parts, problems: Problems, default_scale: float | None, batched: bool) -> None:
    """
    Loads the trainer's teachers onto the student's backbone. Sets `bank` in `parts.method`, and with
    `student_init="merge"` also `merge_report`.

    Args:
        parts ([`Parts`]), problems ([`Problems`]): the trainer's parts, and where problems are added.
        default_scale (`float`, *optional*): guidance scale of teachers that name none. By default, the student's.
        batched (`bool`): whether the teachers of a task share a forward.
    """
    args, field = parts.args, parts.velocity_field
    if batched and args.torch_compile:
        problems.append(
            "batch_teachers=True with torch_compile=True: the blocks would be compiled again for every number of rows "
            "of every teacher. Leave out one of the two."
        )
    specs = parts.given_teachers
    if specs is None:
        problems.append("teachers=None: name a teacher for every task, such as a folder, owner/repo or 'base'.")
        return
    with problems.collect():
        # If the data has no usable tasks, the teachers are still checked.
        named = list(specs) if isinstance(specs, Mapping) else [SINGLE_TASK]
        configs = normalize_teachers(specs, parts.rounds.tasks or named)
        backbone = Backbone.of(parts.student)
        bank = TeacherBank(
            backbone,
            parts.pipeline,
            configs,
            args.guidance_scale if default_scale is None else default_scale,
            _recorded_manifest(args),
            batched,
            own_pipelines(parts),
            _itself(parts, backbone, [task for task, of in configs.items() if any(map(is_itself, of))], problems),
        )
        parts.method["bank"] = bank
        bank.check_guidance(field)
        for network in bank.backbone.networks():
            parts.use_attention_backend(network.to(args.device))
        for own in bank.own_pipelines():
            for network in own.backbone.networks():
                parts.use_attention_backend(network, field=own.fields[0])
            parts.start_lines.append(own.line)
        bank.check_batched(field)
        if args.student_init == MERGE:
            assert isinstance(parts.student, PeftModel)  # full weights with a student_init are refused before
            report: MergeReport = merge_adapters(parts.student, merge_weights(bank), STUDENT_ADAPTER)
            parts.method["merge_report"] = report


def _itself(parts: Parts, backbone: Backbone, tasks: list[str], problems: Problems) -> str:
    """
    The backbone's role that computes the teacher `"student"` of these tasks: a copy that follows the student's average,
    or without an average the student.
    """
    args = parts.args
    if not tasks:
        return STUDENT
    problems += itself_problems(parts.train_dataset, parts.eval_dataset, args.task_column, tasks)
    if not args.ema_decay:
        return STUDENT
    if not isinstance(parts.student, PeftModel) and (uses_fsdp(args) or args.deepspeed_plugin is not None):
        problems.append(
            f'teachers: task {tasks[0]!r} has the teacher "{STUDENT_ITSELF}" with an average of all weights, which '
            "FSDP and DeepSpeed split among processes, but the teacher's copy of it is whole. Train a LoRA, or set "
            "ema_decay=0, so that the student itself teaches."
        )
    parts.average_copy = StudentCopy(backbone, parts.student, AVERAGE)
    return AVERAGE


def own_pipelines(parts: Parts) -> OwnPipelines:
    """What loads the pipelines of teachers that do not run on the student's network."""
    args, kwargs = parts.args, parts.args.generation_kwargs
    assert kwargs is None or isinstance(kwargs, dict)  # the config has parsed or refused strings
    return OwnPipelines(
        parts.pipeline,
        parts.velocity_field,
        args.max_sequence_length,
        kwargs,
        parts.offload,
        args.offload_encoders,
        parts.prompt_store,
    )


def place(
    bank: TeacherBank, device: torch.device, student: Student, compiling: tuple[str | None, str | None] | None
) -> None:
    """
    Moves the teachers to the device, compiles them if asked, and checks that none of their parameters is trained.

    Args:
        bank ([`TeacherBank`]), device (`torch.device`): the teachers and their device.
        student ([`Student`]): the student. PEFT's own switches change `requires_grad`, so its parameters are compared
            with the teachers'.
        compiling (`tuple[str, str]`, *optional*): backend and mode, if blocks are compiled.
    """
    bank.backbone.to(device)
    if compiling is not None:
        for backbone in (bank.backbone, *(own.backbone for own in bank.own_pipelines())):
            backbone.compile(*compiling)
    shared = {id(p) for p in bank.parameters()} & {id(p) for p in student.parameters()}
    assert not shared, "a teacher's parameter is trainable"


def _recorded_manifest(args: DiffusionConfig) -> Manifest | None:
    named: str | bool | None = args.resume_from_checkpoint
    found = last_complete(args.output_dir) if named is True else named
    folder = Path(found) if found else None
    if folder is None or not (folder / MANIFEST_FILE).exists():
        return None
    # The other files of the checkpoint are checked when training begins.
    if is_sealed(folder) and (problems := damage_problems(folder, [MANIFEST_FILE])):
        raise ValueError("\n".join(f"{folder.name}: {problem}" for problem in problems))
    return read_json(folder / MANIFEST_FILE)


def manifest_problems(folder: Path, ours: Manifest) -> list[str]:
    """Refuses a checkpoint trained with other teachers than those in `ours`, which is empty without teachers."""
    recorded = read_json(folder / MANIFEST_FILE) or {}
    if recorded.keys() != ours.keys():
        return [f"it was trained with teachers for {list(recorded)}, this run has them for {list(ours)}."]
    problems = []
    for task, entries in recorded.items():
        theirs, mine = (
            [(identity(e["sha256"], e["source"]), base_hash(e["base"])) for e in one] for one in (entries, ours[task])
        )
        if theirs != mine:
            names = ", ".join(f"{entry['source']}@{entry['revision'] or entry['sha256']}" for entry in entries)
            problems.append(
                f"the teacher of task {task!r} has changed: the checkpoint was trained with {names}. Give that one "
                "(for a Hub teacher, its revision), or set resume_from_checkpoint in the arguments, which loads it."
            )
    return problems
