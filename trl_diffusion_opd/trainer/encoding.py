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

"""How a trainer encodes the prompts of its updates: for the student's pipeline, and for those of teachers."""

from datasets import Dataset
from transformers import TrainerState

from ..data.readers import Readers, Texts
from ..data.tasks import TaskSampler
from ..models.teachers import TeacherBank
from ..pipelines.velocity import VelocityField
from ..rewards import Row
from .base_config import DiffusionConfig


class PromptEncoding:
    """[`DiffusionTrainer`]'s methods for encoding prompts. They use the attributes declared here."""

    args: DiffusionConfig
    state: TrainerState
    velocity_field: VelocityField
    bank: TeacherBank | None
    readers: Readers
    prompts: Dataset
    _sampler: TaskSampler

    @property
    def trained_scale(self) -> float:
        """The guidance scale of the student's forwards that are trained."""
        raise NotImplementedError

    @property
    def student_scales(self) -> set[float]:
        """The guidance scales at which the student, or a copy of it, reads in training."""
        return {self.trained_scale}

    def base_scales(self, task: str) -> set[float]:
        """The guidance scales at which the base reads a task's prompts themselves in training."""
        return set()

    def teacher_scales(self, task: str) -> set[float]:
        """The guidance scales at which a task's teachers read in training, in the student's pipeline."""
        roles = () if self.bank is None else self.bank.teachers.get(task, ())
        return {role.guidance_scale for role in roles if role.field is None}

    def guidance_scales(self, task: str) -> set[float]:
        """The guidance scales of all forwards of a task in training, in the student's pipeline."""
        return {*self.student_scales, *self.teacher_scales(task), *self.base_scales(task)}

    def texts(self, task: str, rows: list[Row]) -> Texts:
        """What each model reads of a micro-batch's rows."""
        return self.readers.texts(task, rows)

    def _fields(self) -> list[VelocityField]:
        """The velocities of the student's pipeline, and of those that teachers run through."""
        return [self.velocity_field, *([] if self.bank is None else self.bank.own_fields())]

    def _encode_ahead(self, task: str, rows: list[Row]) -> None:
        """Encodes what is read of the rows of a micro-batch, so that its update needs no text encoder."""
        texts = self.texts(task, rows)
        merged: dict[tuple[str, ...], set[float]] = {}  # texts that are the same are encoded once
        for read, scales in (
            (texts.student, self.student_scales),
            (texts.teacher, self.teacher_scales(task)),
            (texts.prompt, self.base_scales(task)),
        ):
            merged.setdefault(tuple(read), set()).update(scales)
        for of_batch, asked in merged.items():
            if asked:
                self.velocity_field.encode_prompts([*of_batch], asked)
        if self.bank is not None:
            self.bank.encode_prompts(self.bank.teachers[task], texts.teacher)

    def _encode_together(self, companies: list[list[str]]) -> None:
        for one in self._fields():
            one.encode_together(companies)

    def _companies(self) -> list[list[str]]:
        """
        Returns groups of the round's texts that are encoded together. They are the same for any number of processes
        and any size of micro-batches.
        """
        a_round = self.state.global_step // self._sampler.passes
        companies = self._sampler.companies(a_round % self._sampler.rounds)
        column = self.args.task_column
        return [group for rows in companies for group in self.readers.companies(self.prompts[rows.tolist()], column)]
