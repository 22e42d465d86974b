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

from dataclasses import dataclass, field

from ..data.readers import template_problems
from ..guards.files import JSON
from .base_config import DiffusionConfig


@dataclass
class TaughtConfig(DiffusionConfig):
    r"""
    Parameters shared by the trainers of this package that take teachers. Not used directly.

    Parameters:
        > Parameters that control the teachers

        teacher_guidance_scale (`float`, *optional*):
            Guidance scale of the teachers that name none of their own. `None` is `guidance_scale`. With
            `guidance_scale=1.0` and a larger scale here, the student learns its teachers' guided velocity and needs no
            guidance itself, which halves its work.
        batch_teachers (`bool`, *optional*, defaults to `False`):
            Whether to compute a task's teachers in one forward, on one copy of the micro-batch for each, instead of
            one after another. This holds for LoRAs and `"base"` with the same guidance scale. The result is the same,
            but the forward needs as many times the memory. Refused with `torch_compile`.
        prompt_templates (`str` or `dict`, *optional*):
            For each task the text that the student reads, with `{prompt}` in the prompt's place, such as `{"night":
            "{prompt}, night"}`. With a word of its own, the student can tell a task from another one that has the same
            kind of prompts. The student reads it in training, in evaluations and in the card's example. Teachers, the
            base and the rewards read the prompt. In a task without a template the student reads the prompt too.
    """

    _VALID_DICT_FIELDS = DiffusionConfig._VALID_DICT_FIELDS + ["prompt_templates"]

    # Parameters that control the teachers
    teacher_guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance scale of teachers that name none. If not set, `guidance_scale`."}
    )
    batch_teachers: bool = field(
        default=False,
        metadata={"help": "Compute a task's LoRA teachers in one forward, with a copy of the batch for each."},
    )
    prompt_templates: dict[str, JSON] | str | None = field(
        default=None,
        metadata={"help": 'What the student reads in a task, e.g. \'{"night": "{prompt}, night"}\'.'},
    )

    @property
    def templates(self) -> dict[str, str]:
        given = self.prompt_templates or {}
        assert isinstance(given, dict)  # the config has parsed or refused strings
        return {task: str(template) for task, template in given.items()}

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.teacher_guidance_scale is not None and self.teacher_guidance_scale < 1:
            problems.append(f"teacher_guidance_scale={self.teacher_guidance_scale}: it must be at least 1.0.")
        if isinstance(self.prompt_templates, dict):
            problems += template_problems(self.prompt_templates)
        elif isinstance(self.prompt_templates, str):
            problems.append(
                f"prompt_templates={self.prompt_templates!r} is not a JSON object such as "
                '\'{"night": "{prompt}, night"}\'.'
            )
        return problems
