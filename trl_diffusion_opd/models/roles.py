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

"""What the roles of a model say of it: how it is told from others, and what of it never changes."""

from collections.abc import Sequence
from dataclasses import replace

from .teachers import THE_BASE, Role


def frozen_roles(roles: Sequence[Role]) -> list[Role]:
    """The roles as pictures and scores show them: with the base in place of the student itself, which began as it."""
    return [replace(role, teacher=THE_BASE) if role.teacher.kind == "student" else role for role in roles]


def model_identity(roles: Sequence[Role]) -> list[list[str | float | None]]:
    """Identifies a model among others on the same base, by files, guidance and weight of each of its networks."""
    return [
        [
            role.teacher.kind,
            role.teacher.sha256,
            role.config.lora_scale,
            role.guidance_scale,
            role.weight,
            *([] if role.teacher.own is None else [role.teacher.own.sha256, repr(role.config.generation_kwargs)]),
        ]
        for role in roles
    ]
