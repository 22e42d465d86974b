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

"""Scores base and teachers once on an evaluation's prompts and noise, so that the student's rewards can be judged."""

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerState

from ..checkpointing.resume import prompts_of
from ..data.readers import has_teacher_prompts
from ..data.tasks import task_rows
from ..guards.files import read_json, write_json
from ..hub.files import REFERENCES_FILE
from ..models.backbone import BASE, base_backbone
from ..models.roles import frozen_roles, model_identity
from ..models.teachers import Role, TeacherBank
from ..pipelines.drawing import Velocity
from ..reporting import console as tables
from ..rewards import reward_fingerprint, reward_name
from ..rewards.common_scale import Reference, is_gain
from .image_evaluator import ImageEvaluator, applicable_mean


References = Mapping[str, Mapping[str, Reference]]  # by task and reward


class BaseAndTeachers:
    """
    Scores the base and each task's teachers, on the prompts and noise of an evaluation.

    It happens once for each set of prompts. The scores of a run are kept in its output folder, so that a resume does
    not measure again.

    Args:
        evaluator ([`ImageEvaluator`]): draws and scores the images, as it does the student's.
        bank ([`TeacherBank`], *optional*): the teachers.
    """

    def __init__(self, evaluator: ImageEvaluator, bank: TeacherBank | None):
        self.evaluator = evaluator
        self.bank = bank
        # A student that is trained in full, without teachers, has no copy of the base.
        self._backbone = base_backbone(evaluator.student, None if bank is None else bank.backbone)
        self._known: dict[str, References] = {}

    def of(self, dataset: Dataset, state: TrainerState, run: str | None) -> References:
        """
        Returns the scores on a set of prompts, and measures them if they are not known. All processes must call it.

        Args:
            dataset ([`~datasets.Dataset`]): the prompts.
            state ([`~transformers.TrainerState`]): passed to the rewards.
            run (`str`, *optional*): the name of the run in progress, if there is one.
        """
        evaluator = self.evaluator
        if not evaluator.args.eval_base_and_teachers or self._backbone is None:
            return {}
        if not any(evaluator.reward_funcs.values()):
            return {}
        key = self._key(dataset)
        if key not in self._known:
            kept = gather_object([self._read(run)])[0]  # the main process's: others may see another disk
            self._known |= {name: _from_json(entry) for name, entry in kept.items()}
        if key not in self._known:
            self._known[key] = self._measure(dataset, state)
        if run is not None and evaluator.accelerator.is_main_process:
            sets = {name: _to_json(entry) for name, entry in self._known.items()}
            content = {"run": run, "sets": sets}
            if read_json(self._file) != content:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._file, content, sort_keys=True)
        return self._known[key]

    @property
    def _file(self) -> Path:
        return Path(self.evaluator.args.output_dir or ".") / REFERENCES_FILE

    def _read(self, run: str | None) -> dict[str, dict]:
        content = read_json(self._file) if run is not None and self.evaluator.accelerator.is_main_process else None
        return content["sets"] if content is not None and content["run"] == run else {}

    def _key(self, dataset: Dataset) -> str:
        """Identifies everything that the scores depend on, within a run."""
        args, functions = self.evaluator.args, self.evaluator.reward_funcs
        rows = task_rows(dataset, args.task_column)
        teachers = {} if self.bank is None else {task: model_identity(self._roles(task)) for task in rows}
        facts = [
            prompts_of(dataset, rows),
            {task: [reward_fingerprint(function) for function in functions[task]] for task in rows},
            teachers,
            [args.num_eval_images, args.seed, args.eval_num_inference_steps, args.evaluation_guidance],
            [args.height, args.width, args.max_sequence_length, str(args.generation_kwargs)],
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def _measure(self, dataset: Dataset, state: TrainerState) -> References:
        evaluator, args = self.evaluator, self.evaluator.args
        rewarded = {
            task: np.resize(rows, args.num_eval_images or len(rows)).tolist()
            for task, rows in task_rows(dataset, args.task_column).items()
            if evaluator.reward_funcs[task]
        }
        taught = {task for task in rewarded if not self._is_base(dataset, task)}
        count = sum(len(rows) * (1 + (task in taught)) for task, rows in rewarded.items())
        if evaluator.accelerator.is_main_process:
            who = "Base and teachers are" if taught else "The base is"
            tables.print_unwrapped(
                f"{who} scored once on the evaluation's prompts: {count:,} images (off: eval_base_and_teachers=False)."
            )
        found = {}
        with evaluator.recording(count, "base and teachers" if taught else "base") as record:
            for task, rows in rewarded.items():
                base = evaluator.score_task(dataset, task, rows, state, record, self._base_velocity(), "prompt")
                teacher = (
                    evaluator.score_task(dataset, task, rows, state, record, self._teacher_velocity(task), "teacher")
                    if task in taught
                    else None
                )
                names = [reward_name(function) for function in evaluator.reward_funcs[task]]
                found[task] = {
                    name: _reference(base[name], None if teacher is None else teacher[name]) for name in names
                }
        return found

    def _roles(self, task: str) -> list[Role]:
        return [] if self.bank is None else frozen_roles(self.bank.teachers[task])

    def _is_base(self, dataset: Dataset, task: str) -> bool:
        """Whether a task has no teacher but the base, as the evaluation draws it."""
        scale, roles = self.evaluator.args.evaluation_guidance, self._roles(task)
        if not all(role.teacher.kind == "base" and role.guidance_scale == scale for role in roles):
            return False
        return not roles or not has_teacher_prompts(dataset, task_rows(dataset, self.evaluator.args.task_column)[task])

    def _use_base(self) -> AbstractContextManager[nn.Module]:
        assert self._backbone is not None
        return self._backbone.use(BASE)

    def _base_velocity(self) -> Velocity:
        field, scale = self.evaluator.field, self.evaluator.args.evaluation_guidance

        def velocity(x: Tensor, t: float, prompts: list[str]) -> Tensor:
            with self._use_base() as network:
                return field(x, t, prompts, scale, network)

        return velocity

    def _teacher_velocity(self, task: str) -> Velocity:
        assert self.bank is not None
        bank, field, roles = self.bank, self.evaluator.field, self._roles(task)
        return lambda x, t, prompts: bank.mean_velocity(field, roles, x, t, prompts)


def _reference(base: list[float | None], teacher: list[float | None] | None) -> Reference:
    if teacher is None:
        return Reference(_mean(base))
    return Reference(_mean(base), _mean(teacher), is_gain(base, teacher))


def _mean(scores: list[float | None]) -> float | None:
    mean = applicable_mean(scores)
    return None if math.isnan(mean) else mean


def _to_json(references: References) -> dict[str, dict]:
    return {task: {name: asdict(one) for name, one in of_task.items()} for task, of_task in references.items()}


def _from_json(entry: Mapping[str, Mapping[str, dict]]) -> References:
    return {task: {name: Reference(**one) for name, one in of_task.items()} for task, of_task in entry.items()}
