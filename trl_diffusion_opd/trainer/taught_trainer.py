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

"""What the trainers with frozen teachers share: loading them, asking them, and what a checkpoint says of them."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from ..algorithms.separability import conflict_warning
from ..checkpointing.checkpoint import damage_problems, last_complete
from ..checkpointing.seal import is_sealed
from ..data.tasks import SINGLE_TASK
from ..guards.files import write_json
from ..hub.files import MANIFEST_FILE
from ..models.backbone import Backbone
from ..models.merge import MergeReport, merge_adapters, merge_weights
from ..models.student import STUDENT_ADAPTER
from ..models.teachers import TeacherBank, normalize_teachers
from ..problems import Problems
from ..reporting import console as tables
from .base_config import MERGE, DiffusionConfig
from .base_trainer import DiffusionTrainer
from .conflicts import find_pairs


logger = logging.getLogger(__name__)


class TaughtTrainer(DiffusionTrainer):
    """
    Base of the trainers with teachers. A trainer sets `_teacher_specs` before `__init__`, calls [`_load_teachers`] in
    `_setup` and [`_place_teachers`] after `__init__`.

    Attributes:
        bank ([`TeacherBank`]): the loaded teachers.
        merge_report ([`MergeReport`], *optional*): with `student_init="merge"`, what the student started from.
    """

    bank: TeacherBank
    merge_report: MergeReport | None = None
    _has_compared = False

    # Before the first step

    def _load_teachers(self, model: nn.Module, problems: Problems, default_scale: float | None, batched: bool) -> None:
        args = self.args
        if batched and args.torch_compile:
            problems.append(
                "batch_teachers=True with torch_compile=True: compiled blocks would be compiled again for every number of "
                "rows of every teacher. Leave out one of the two."
            )
        with problems.collect():
            specs = self._teacher_specs
            # Where the data cannot tell the tasks, the teachers are still looked at.
            named = list(specs) if isinstance(specs, Mapping) else [SINGLE_TASK]
            teachers = normalize_teachers(specs, self.tasks or named)
            self.bank = TeacherBank(
                Backbone.of(model),
                self._pipeline,
                teachers,
                args.guidance_scale if default_scale is None else default_scale,
                self._recorded_manifest(args),
                batched,
            )
            for scale in {teacher.guidance_scale for roles in self.bank.teachers.values() for teacher in roles}:
                self.velocity_field.check_guidance(scale)
            for network in self.bank.backbone.networks():
                self._use_attention_backend(network.to(args.device), as_student=False)
            self.bank.check_batched(self.velocity_field)
            if args.student_init == MERGE:
                assert isinstance(model, PeftModel)  # full weights with a student_init are refused before
                self.merge_report = merge_adapters(model, merge_weights(self.bank), STUDENT_ADAPTER)

    def _place_teachers(self) -> None:
        self.bank.backbone.to(self.accelerator.device)
        if self.args.torch_compile:
            self.bank.backbone.compile(self.args.torch_compile_backend, self.args.torch_compile_mode)
        # PEFT's switches flip requires_grad: by identity, no teacher may be among what is trained.
        shared = {id(p) for p in self.bank.backbone.parameters()} & {id(p) for p in self.student.parameters()}
        assert not shared, "a teacher's parameter is trainable"

    def _print_teachers(self) -> None:
        lost = None if self.merge_report is None else self.merge_report.error
        tables.print_teachers(self.bank.summary(), {t: len(rows) for t, rows in self._task_rows.items()}, lost)

    def _compare_tasks(self) -> None:
        """Shows how well the tasks can be told apart, once, and warns of those that can't and whose teachers disagree."""
        if self._teacher_specs is None or self._has_compared:
            return
        self._has_compared = True
        self._in_eval_mode(self.model)
        pairs = find_pairs(self, self._make_sampler(), self.accelerator.unwrap_model(self.model))
        if self.is_world_process_zero():
            tables.print_pairs(pairs)
            if (warning := conflict_warning(pairs)) is not None:
                logger.warning(warning)

    @staticmethod
    def _recorded_manifest(args: DiffusionConfig) -> dict[str, Any] | None:
        named: str | bool | None = args.resume_from_checkpoint
        found = last_complete(args.output_dir) if named is True else named
        folder = Path(found) if found else None
        if folder is None or not (folder / MANIFEST_FILE).exists():
            return None
        # The rest of the checkpoint is looked at when training begins.
        if is_sealed(folder) and (problems := damage_problems(folder, [MANIFEST_FILE])):
            raise ValueError("\n".join(f"{folder.name}: {problem}" for problem in problems))
        return json.loads((folder / MANIFEST_FILE).read_text())

    # Training

    def _guidance_scales(self, task: str) -> set[float]:
        own = {} if self._teacher_specs is None else self.bank.teachers
        return super()._guidance_scales(task) | {teacher.guidance_scale for teacher in own.get(task, ())}

    def _target(self, task: str, x: Tensor, t: float, prompts: list[str]) -> Tensor:
        """Weighted mean velocity of the task's teachers, each at its own guidance."""
        with self._part("teacher"):
            return self.bank.mean_velocity(self.velocity_field, self.bank.teachers[task], x, t, prompts)

    def _frozen_parts(self) -> dict[str, list[Tensor]]:
        if self._teacher_specs is None:
            return {}
        name = "teachers" if self.student.is_lora else "teachers and frozen base"
        return {**super()._frozen_parts(), name: list(self.bank.backbone.parameters())}

    # Files

    def _save_method(self, folder: str) -> None:
        if self._teacher_specs is not None:
            write_json(Path(folder) / MANIFEST_FILE, self.bank.manifest(), sort_keys=True)

    def _check_resume(self, folder: Path) -> list[str]:
        problems = super()._check_resume(folder)
        path = folder / MANIFEST_FILE
        recorded = json.loads(path.read_text()) if path.exists() else {}
        ours = {} if self._teacher_specs is None else self.bank.manifest()
        if recorded.keys() != ours.keys():
            return [
                *problems,
                f"it was trained with teachers for {list(recorded)}, this run has them for {list(ours)}.",
            ]
        for task, entries in recorded.items():
            if [entry["sha256"] for entry in entries] != [entry["sha256"] for entry in ours[task]]:
                names = ", ".join(f"{entry['source']}@{entry['revision'] or entry['sha256']}" for entry in entries)
                problems.append(
                    f"the teacher of task {task!r} has changed: the checkpoint was trained with {names}. Give that one "
                    "(for a Hub teacher, its revision), or set resume_from_checkpoint in the arguments, which loads it."
                )
        return problems
