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

"""A reference for the OPD update, computed as in published code: a rollout, then the teachers, then one loss and
backward.

It calls the transformer's own forward and uses nothing of the package but the samplers' coefficients.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from helpers.noise_grids import sd3_levels
from helpers.tiny_sd3 import make_pipeline, make_transformer
from peft import PeftModel
from torch import Tensor, nn

from trl_diffusion_opd import DiffusionOPDTrainer, sampler_table


@dataclass
class MicroBatch:
    """
    What the student reads in a micro-batch of one task, and the positions among the task's prompts of this update.
    Teachers and base read the same, unless they are given something else.
    """

    task: str
    prompts: list[str]
    positions: list[int]
    of_teachers: list[str] | None = None
    of_base: list[str] | None = None


@dataclass
class Role:
    """A teacher: its share in the target and its guidance."""

    model: nn.Module
    weight: float = 1.0
    guidance_scale: float = 1.0


@dataclass
class ThreePass:
    """
    Args:
        pipeline: encodes the prompts.
        coefficients: `a, c, b, s` of the trained steps, as floats.
        levels: noise levels of the trained steps.
        weights: `w_j` of the trained steps.
        teachers: by task.
    """

    pipeline: StableDiffusion3Pipeline
    coefficients: list[tuple[float, float, float, float]]
    levels: list[float]
    weights: list[float]
    teachers: dict[str, list[Role]]
    seed: int
    guidance_scale: float = 1.0
    task_weights: dict[str, float] = field(default_factory=dict)
    beta: float = 0.0
    base: nn.Module | None = None
    policy_gradient: bool = False
    encoded: dict[tuple[str, ...], tuple[Tensor, ...]] = field(default_factory=dict)

    def velocity(self, model: nn.Module, x: Tensor, t: float, prompts: list[str], scale: float) -> Tensor:
        embeds, negative, pooled, negative_pooled = self._encode(tuple(prompts))

        def call(embeds: Tensor, pooled: Tensor) -> Tensor:
            timestep = torch.full((len(x),), t * 1000, dtype=torch.float32)
            return model(
                hidden_states=x,
                timestep=timestep,
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                return_dict=False,
            )[0]

        v = call(embeds, pooled)
        if scale == 1.0:
            return v
        empty = call(negative, negative_pooled)
        return empty + scale * (v - empty)

    @torch.no_grad()
    def _encode(self, prompts: tuple[str, ...]) -> tuple[Tensor, ...]:
        if prompts not in self.encoded:
            self.encoded[prompts] = self.pipeline.encode_prompt(
                prompt=list(prompts), prompt_2=None, prompt_3=None, max_sequence_length=16
            )
        return self.encoded[prompts]

    @torch.no_grad()
    def roll_out(self, student: nn.Module, batch: MicroBatch, task_index: int) -> tuple[list[Tensor], list[Tensor]]:
        """States of the trained steps, and the state that each step arrives at."""
        generators = []
        for position in batch.positions:
            entropy = np.random.SeedSequence([self.seed, 0, task_index, position])
            generators.append(torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0])))

        def draw() -> Tensor:
            return torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in generators])

        x, previous, states, nexts = draw(), None, [], []
        for t, (a, c, b, s) in zip(self.levels, self.coefficients, strict=True):
            states.append(x)
            v = self.velocity(student, x, t, batch.prompts, self.guidance_scale)
            x0 = x - t * v
            x = a * x + c * v + (b * previous if b else 0) + (s * draw() if s else 0)
            previous = x0
            nexts.append(x)
        return states, nexts

    def gradients(self, student: nn.Module, batches: list[MicroBatch]) -> dict[str, Tensor]:
        tasks = sorted({batch.task for batch in batches})
        trajectories = [self.roll_out(student, batch, tasks.index(batch.task)) for batch in batches]
        targets, anchors = [], []
        with torch.no_grad():
            for batch, (states, _) in zip(batches, trajectories, strict=True):
                steps = list(zip(states, self.levels, strict=True))
                targets.append([self._mean_teacher(x, t, batch) for x, t in steps])
                anchors.append([self._base(x, t, batch) for x, t in steps])
        total = sum(self.task_weights.get(task, 1.0) for task in tasks)
        loss: Tensor | float = 0.0
        for batch, trajectory, target, anchor in zip(batches, trajectories, targets, anchors, strict=True):
            same = sum(other.task == batch.task for other in batches)
            share = self.task_weights.get(batch.task, 1.0) / total / same / len(self.levels)
            for j, (x, x_next) in enumerate(zip(*trajectory, strict=True)):
                v = self.velocity(student, x, self.levels[j], batch.prompts, self.guidance_scale)
                step_loss = self._surrogate if self.policy_gradient else self._gap
                loss = loss + share * step_loss(j, v, target[j], x, x_next)
                if self.beta:
                    loss = loss + share * self.beta * self._gap(j, v, anchor[j], x, x_next)
        trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        assert isinstance(loss, Tensor)
        return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))

    def _mean_teacher(self, x: Tensor, t: float, batch: MicroBatch) -> Tensor:
        roles = self.teachers[batch.task]
        total = sum(role.weight for role in roles)
        velocities = [role.weight * self._of(role, x, t, batch) for role in roles]
        return torch.stack(velocities).sum(0) / total

    def _of(self, role: Role, x: Tensor, t: float, batch: MicroBatch) -> Tensor:
        return self.velocity(role.model, x, t, batch.of_teachers or batch.prompts, role.guidance_scale)

    def _base(self, x: Tensor, t: float, batch: MicroBatch) -> Tensor | None:
        if self.base is None:
            return None
        return self.velocity(self.base, x, t, batch.of_base or batch.prompts, self.guidance_scale)

    def _gap(self, j: int, v: Tensor, target: Tensor, x: Tensor, x_next: Tensor) -> Tensor:
        return self.weights[j] * (v - target).square().mean()

    def _surrogate(self, j: int, v: Tensor, target: Tensor, x: Tensor, x_next: Tensor) -> Tensor:
        """REINFORCE by `torch.distributions`, with the KL as its baseline."""
        a, c, _, s = self.coefficients[j]
        x, x_next, target, v = x.double(), x_next.double(), target.double(), v.double()
        ours = torch.distributions.Normal(a * x + c * v, s)
        theirs = torch.distributions.Normal(a * x + c * target, s)

        def over_latent(values: Tensor) -> Tensor:
            return values.flatten(1).sum(1)

        log_ratio = over_latent(ours.log_prob(x_next) - theirs.log_prob(x_next))
        advantage = log_ratio - over_latent(torch.distributions.kl_divergence(ours, theirs))
        return (advantage.detach() * over_latent(ours.log_prob(x_next)) / x[0].numel()).mean()


def load_teacher(folder: str) -> nn.Module:
    return PeftModel.from_pretrained(make_transformer(), folder).eval()


def kl_weight(c: float, s: float) -> float:
    return c**2 / (2 * s**2) if s else c**2 / 2


def three_pass(
    trainer: DiffusionOPDTrainer,
    teachers: dict[str, str],
    steps: int = 4,
    sampler: str = "ode",
    skip: int = 1,
    **options: Any,
) -> ThreePass:
    """The reference of a trainer of the tiny pipeline, with these LoRAs as teachers."""
    levels = sd3_levels(steps)
    table = sampler_table(sampler, levels)
    coefficients = list(zip(*(column.tolist() for column in (table.a, table.c, table.b, table.s)), strict=True))
    trained = coefficients[: steps - skip]
    return ThreePass(
        pipeline=make_pipeline(),
        coefficients=trained,
        levels=levels[: steps - skip],
        weights=[kl_weight(c, s) for _, c, _, s in trained],
        teachers=options.pop("roles", None) or {task: [Role(load_teacher(f))] for task, f in teachers.items()},
        seed=trainer.args.seed,
        **options,
    )
