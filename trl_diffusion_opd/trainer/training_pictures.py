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

"""Draws the student's images during training, beside those of the base and the teachers."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from ..data.readers import Reader
from ..data.tasks import task_rows
from ..models.backbone import BASE, Backbone, base_backbone
from ..models.roles import frozen_roles
from ..models.student import Student
from ..models.teachers import Role, TeacherBank
from ..pipelines.drawing import Velocity
from ..pipelines.velocity import VelocityField
from ..reporting.completions import Beside, Completion, log_completions
from ..reporting.sources import SOURCE, source_of
from ..reporting.trackers import tensorboard_writers
from .image_evaluator import ImageEvaluator


@dataclass(frozen=True)
class FrozenModel:
    """
    A frozen model whose images are shown beside the student's.

    Attributes:
        name (`str`): `"base"`, `"teacher"`, or `"teacher 1"`, ... where a task has several.
        guidance_scale (`float`): the classifier-free guidance scale that it draws with.
        velocity (`Callable`): returns its velocity, from that of the student's pipeline with the noise grid to use.
        reader (`str`): what it reads of a row: see [`Readers`].
    """

    name: str
    guidance_scale: float
    velocity: Callable[[VelocityField], Velocity]
    reader: Reader

    @property
    def caption(self) -> str:
        return captioned(self.name, self.guidance_scale)


def captioned(name: str, guidance_scale: float) -> str:
    """The name of a model as pictures show it."""
    return f"{name}, CFG {guidance_scale:g}"


def base_model(
    student: Student, backbone: Backbone | None, guidance_scale: float, state: TrainerState
) -> list[FrozenModel]:
    """
    Returns the base, in a list.

    If all weights are trained and nobody keeps a copy of the base, the student is the base before its first update.
    Afterwards there is none, and the list is empty.

    Args:
        student ([`Student`]), backbone ([`Backbone`], *optional*): the student, and the frozen networks if there are.
        guidance_scale (`float`), state ([`~transformers.TrainerState`])
    """
    known = base_backbone(student, backbone)
    if known is not None:
        return [_on_student_pipeline("base", guidance_scale, lambda: known.use(BASE))]
    if state.global_step == 0:
        return [_on_student_pipeline("base", guidance_scale, lambda: nullcontext(student.model))]
    return []


def _on_student_pipeline(name: str, scale: float, use: Callable[[], AbstractContextManager[nn.Module]]) -> FrozenModel:
    def of_field(field: VelocityField) -> Velocity:
        def velocity(x: Tensor, t: float, prompts: list[str]) -> Tensor:
            with use() as network:
                return field(x, t, prompts, scale, network)

        return velocity

    return FrozenModel(name, scale, of_field, "prompt")


def teacher_models(bank: TeacherBank, task: str) -> list[FrozenModel]:
    """Returns a task's teachers, each with its own guidance scale. For the student itself it is the base, as it began."""
    roles = frozen_roles(bank.teachers[task])
    return [
        FrozenModel(
            "teacher" if len(roles) == 1 else f"teacher {i}", role.guidance_scale, _velocity_of(bank, role), "teacher"
        )
        for i, role in enumerate(roles, start=1)
    ]


def _velocity_of(bank: TeacherBank, role: Role) -> Callable[[VelocityField], Velocity]:
    return lambda field: partial(bank.velocity, field, role)


class TrainingPictures:
    """
    Draws and logs the student's images for fixed prompts and noise, to compare the pictures of a run. The frozen models'
    images are drawn once and kept.

    Args:
        evaluator ([`ImageEvaluator`]): draws and scores images.
        frozen_models (`Callable`): returns the frozen models that are shown with a task.

    Attributes:
        logged_at (`int`): the update of the last picture.
    """

    def __init__(self, evaluator: ImageEvaluator, frozen_models: Callable[[str], list[FrozenModel]]):
        self.evaluator = evaluator
        self.frozen_models = frozen_models
        self.logged_at = -1
        # For each task, and each of its prompts, the frozen models' images by caption.
        self._kept: dict[str, list[dict[str, Beside]]] | None = None

    def log(self, dataset: Dataset, state: TrainerState, callbacks: Sequence[TrainerCallback]) -> None:
        """
        Draws images for the first prompts of each task with the averaged weights, and logs them with
        [`log_completions`]. At most once an update. All processes must call it.

        Args:
            dataset ([`~datasets.Dataset`]), state ([`~transformers.TrainerState`])
            callbacks (`list`): the trainer's callbacks, with the trackers' among them.
        """
        if self.logged_at == state.global_step:
            return
        self.logged_at = state.global_step
        args = self.evaluator.args
        if self._kept is None:
            self._kept = self._draw_frozen(dataset, state)
        shown: list[Completion] = []
        for completion in self.evaluator.completions(dataset, state):
            number = sum(one.task == completion.task for one in shown)
            beside = self._kept[completion.task][number]
            shown.append(replace(completion, label=captioned("student", args.evaluation_guidance), beside=beside))
        if self.evaluator.accelerator.is_main_process:
            trackers, writers = args.report_to or [], tensorboard_writers(callbacks)
            log_completions(shown, args.output_dir or ".", state.global_step, trackers, writers)

    def _draw_frozen(self, dataset: Dataset, state: TrainerState) -> dict[str, list[dict[str, Beside]]]:
        args = self.evaluator.args
        kept: dict[str, list[dict[str, Beside]]] = {}
        for task, rows in task_rows(dataset, args.task_column).items():
            sources = [source_of(dataset[int(row)]) for row in rows[: args.num_completions_to_print]]
            of_task = kept[task] = [{} if source is None else {SOURCE: Beside(source, {})} for source in sources]
            for frozen in self.frozen_models(task):
                velocity = frozen.velocity(self.evaluator.field)
                drawn = self.evaluator.completions(dataset, state, [task], velocity, frozen.reader)
                for of_prompt, one in zip(of_task, drawn, strict=True):
                    of_prompt[frozen.caption] = Beside(one.image, one.rewards)
        return kept
