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

"""
The loss on states that never change, which is measured and never trained (arXiv 2609.39692).

The loss of training is taken on the student's own states. They move with the student, so that loss can fall while the
student gets worse elsewhere. Here the states are a teacher's: those of its own trajectories, and those of the images
that it draws, noised again to each level.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .flow import noised, velocity_gap_sq
from .opd import StepPlan
from .rollout import gaussian, walk
from .samplers import SamplerTable, sampler_table


# velocity(x, level)
Velocity = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True, eq=False)
class FixedStates:
    """
    A teacher's states, with its velocities there.

    The velocities are kept on the CPU. The states are not kept: the same velocities lead to the same states.

    Attributes:
        plan ([`StepPlan`]): the steps at which models are compared. Its sampler gives the weights only.
        start, image, eps (`Tensor` of shape `(B, ...)`):
            Where the trajectories begin and the images that they end with, at level 0; the noise of noised images.
        on_trajectories (`list[Tensor]` of shape `(B, ...)`): the teacher's velocities at all steps of the walk.
        on_images (`list[Tensor]` of shape `(B, ...)`): those on noised images, at the plan's steps.
    """

    plan: StepPlan
    start: Tensor
    image: Tensor
    eps: Tensor
    on_trajectories: list[Tensor]
    on_images: list[Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, teacher: Velocity, start: Tensor, generators: list[torch.Generator], plan: StepPlan) -> "FixedStates":
        """
        Has a teacher draw images without added noise, and noises them again.

        Args:
            teacher (`Callable`): `teacher(x, t)` returns the velocity at states of shape `(B, ...)`.
            start (`Tensor` of shape `(B, ...)`): states at the first level, such as noise.
            generators (`list[torch.Generator]` of length `B`): for the noise of noised images.
            plan ([`StepPlan`]): levels, and the steps at which models are compared.
        """
        table, velocities = _ode(plan), list[Tensor]()

        def own(j: int, x: Tensor, _: Tensor | None) -> Tensor:
            v = teacher(x, float(table.levels[j]))
            velocities.append(v.cpu())
            return v

        end = walk(own, start, table)
        image = end - float(table.levels[-1]) * velocities[-1].to(end.device)  # some grids end above 0
        eps = gaussian(generators, start)
        levels = [float(table.levels[j]) for j in plan.steps]
        return cls(plan, start, image, eps, velocities, [teacher(noised(image, eps, t), t).cpu() for t in levels])

    @torch.no_grad()
    def kl(self, student: Velocity) -> Tensor:
        """
        The KL of a model from the teacher at these states, per latent dimension, as [`StepPlan.kl`] defines it.

        Args:
            student (`Callable`):
                `student(x, t)` returns the velocity at states of shape `(2 B, ...)`: first those of trajectories,
                then those of noised images.

        Returns:
            `Tensor` of shape `(2,)`, float64: on trajectories, and on noised images.
        """
        gaps: list[Tensor] = []

        def compared(j: int, x: Tensor, _: Tensor | None) -> Tensor:
            t = float(self.plan.table.levels[j])
            v = student(torch.cat([x, noised(self.image, self.eps, t)]), t)
            own = self.on_trajectories[j].to(x.device)
            gaps.append(velocity_gap_sq(v, torch.cat([own, self.on_images[j].to(x.device)])).view(2, -1).mean(1))
            return own

        walk(compared, self.start, _ode(self.plan).head(len(self.plan)))
        return torch.stack([self.plan.kl(of_kind) for of_kind in torch.stack(gaps, 1).cpu().double()])


def _ode(plan: StepPlan) -> SamplerTable:
    return sampler_table("ode", plan.table.levels)
