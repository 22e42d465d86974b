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

from ..data.tasks import TaskSampler
from ..models.teachers import TeacherBank
from ..pipelines.velocity import VelocityField


class PromptEncoding:
    """[`DiffusionTrainer`]'s methods for encoding prompts. They use the attributes declared here."""

    state: TrainerState
    velocity_field: VelocityField
    bank: TeacherBank | None
    prompts: Dataset
    _sampler: TaskSampler

    @property
    def trained_scale(self) -> float:
        """The guidance scale of the student's forwards that are trained."""
        raise NotImplementedError

    def _fields(self) -> list[VelocityField]:
        """The velocities of the student's pipeline, and of those that teachers run through."""
        return [self.velocity_field, *([] if self.bank is None else self.bank.own_fields())]

    def guidance_scales(self, task: str) -> set[float]:
        """The guidance scales that a task's prompts are used with in training, in the student's pipeline."""
        roles = () if self.bank is None else self.bank.teachers.get(task, ())
        return {self.trained_scale, *(role.guidance_scale for role in roles if role.field is None)}

    def _encode_ahead(self, task: str, prompts: list[str]) -> None:
        """Encodes the prompts of a micro-batch, so that its update needs no text encoder."""
        self.velocity_field.encode_prompts(prompts, self.guidance_scales(task))
        if self.bank is not None:
            self.bank.encode_prompts(self.bank.teachers[task], prompts)

    def _encode_together(self, companies: list[list[str]]) -> None:
        for one in self._fields():
            one.encode_together(companies)

    def _companies(self) -> list[list[str]]:
        """
        Returns groups of the round's prompts that are encoded together. They are the same for any number of processes
        and any size of micro-batches.
        """
        a_round = self.state.global_step // self._sampler.passes
        companies = self._sampler.companies(a_round % self._sampler.rounds)
        return [list(dict.fromkeys(self.prompts[rows.tolist()]["prompt"])) for rows in companies]
