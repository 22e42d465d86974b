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

"""Checks before the first step whether pipelines and teachers have what an extrapolated or branch-aware target needs."""

from ..models.targets import anchor_scales
from ..models.teachers import TeacherBank
from ..pipelines.velocity import VelocityField
from ..problems import Problems
from .diffusion_opd_config import DiffusionOPDConfig


# More than this is warned of.
MOST_EXTRAPOLATED = 1.5


def target_problems(args: DiffusionOPDConfig, bank: TeacherBank, field: VelocityField) -> list[str]:
    """
    Reasons why the student can't learn the target that `args` describe, a sentence each.

    Args:
        args ([`DiffusionOPDConfig`]): with its `guidance_scale` set.
        bank ([`TeacherBank`]), field ([`VelocityField`]): the teachers, and the student's pipeline.
    """
    problems = Problems()
    scales = {scale for roles in bank.teachers.values() for scale in anchor_scales(roles, args.teacher_extrapolation)}
    for scale in sorted(scales):  # of teachers with pipelines of their own, the base has another one
        with problems.collect():
            field.check_guidance(scale)
    if args.guidance_branch_weight > 0:
        problems += _branch_problems(args.guidance_branch_weight, args.guidance_scale, bank, field)
    return problems


def _branch_problems(weight: float, scale: float, bank: TeacherBank, field: VelocityField) -> list[str]:
    name = f"guidance_branch_weight={weight}"
    if scale == 1:
        return [
            f"{name} with guidance_scale=1.0: without guidance the student computes no branch without the prompt. Set "
            "guidance_scale above 1, or guidance_branch_weight=0."
        ]
    others = {
        f"{role.label} of task {task!r} has {role.guidance_scale}"
        for task, roles in bank.teachers.items()
        for role in roles
        if role.guidance_scale != scale
    }
    if others:
        return [
            f"{name}: student and teachers must have one guidance scale. The student's is {scale}, but "
            f"{', '.join(sorted(others))}. The branches themselves are matched, so a teacher's own scale would be "
            "lost. Give all one scale, or set guidance_branch_weight=0."
        ]
    problems = Problems()
    with problems.collect():
        field.check_branches(scale)
    for role in (role for roles in bank.teachers.values() for role in roles):
        if role.field is not None:
            with problems.collect(), bank.use(role):
                role.field.check_branches(scale)
    return list(dict.fromkeys(problems))


def extrapolation_warning(extrapolation: float) -> str | None:
    """Warns of a target far beyond the teachers; `None` where it is not."""
    if extrapolation <= MOST_EXTRAPOLATED:
        return None
    return (
        f"teacher_extrapolation={extrapolation} is far beyond the teachers, where nobody has trained: images may lose "
        f"quality. 1.25 is usual; above {MOST_EXTRAPOLATED}, look at the images of evaluations."
    )
