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

"""What a student is taught at a state: its teachers' velocity, or one beyond it, away from the base."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from ..algorithms.opd import extrapolated_target
from ..pipelines.velocity import VelocityField
from .teachers import Role, TeacherBank


def anchor_scales(roles: Sequence[Role], extrapolation: float) -> set[float]:
    """
    The guidance scales at which the base is computed for a target, one forward each. None without extrapolation, or
    if the base is the only teacher: away from itself it goes nowhere.

    Args:
        roles (`list[Role]`): the task's teachers.
        extrapolation (`float`): as in [`extrapolated_target`].
    """
    if extrapolation == 1 or all(role.teacher.kind == "base" for role in roles):
        return set()
    return {role.guidance_scale for role in roles}


class State:
    """
    A state of a trajectory, at which teachers and base are asked for their velocities. Call its methods under
    `torch.no_grad()`.

    Args:
        bank ([`TeacherBank`]), field ([`VelocityField`]): the teachers, and the student's pipeline.
        x (`torch.Tensor` of shape `(B, ...)`), t (`float`): the state and its level.
        branches (`bool`, *optional*):
            Whether all velocities are those of [`VelocityField.branches`], of shape `(3, B, ...)`.
        part (`Callable`, *optional*): returns a context that times its block, by the name of a part of an update.
    """

    def __init__(
        self,
        bank: TeacherBank,
        field: VelocityField,
        x: Tensor,
        t: float,
        branches: bool = False,
        part: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
    ):
        self.x, self.t = x, t
        self._bank, self._field, self._branches, self._part = bank, field, branches, part
        self._of_base: dict[tuple[float, tuple[str, ...]], Tensor] = {}

    def base(self, prompts: list[str], guidance_scale: float) -> Tensor:
        """The base's velocity. Computed once for each scale and prompts."""
        key = guidance_scale, tuple(prompts)
        if key not in self._of_base:
            velocity = self._field.branches if self._branches else self._field
            with self._part("reference"), self._bank.use(None) as network:
                self._of_base[key] = velocity(self.x, self.t, prompts, guidance_scale, network)
        return self._of_base[key]

    def target(self, roles: Sequence[Role], prompts: list[str], extrapolation: float = 1.0) -> Tensor:
        """
        The weighted mean velocity of teachers, extrapolated away from that of the base.

        The base is computed through the student's pipeline, for each teacher at the teacher's guidance scale, and its
        velocities have the teachers' weights. So the base as one of several teachers is not extrapolated.

        Args:
            roles (`list[Role]`): the teachers.
            prompts (`list[str]`): what the teachers read.
            extrapolation (`float`, *optional*, defaults to 1): as in [`extrapolated_target`].
        """
        with self._part("teacher"):
            teacher = self._bank.mean_velocity(self._field, roles, self.x, self.t, prompts, self._branches)
            if not anchor_scales(roles, extrapolation):
                return teacher
            weighted = [role.weight * self.base(prompts, role.guidance_scale) for role in roles]
            return extrapolated_target(teacher, sum(weighted[1:], weighted[0]), extrapolation)
