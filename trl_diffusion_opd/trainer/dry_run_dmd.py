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

"""The dry run of distribution matching: the first update's figures, memory, time, and an image of every model."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..algorithms.dmd import image_of
from ..algorithms.flow import velocity_gap_sq
from ..algorithms.rollout import sample_generators
from ..guards.files import JSON
from ..models.fake_score import FAKE, FakeScore
from ..models.teachers import TeacherBank
from ..reporting import console as tables
from ..rewards.base import Row
from .base_trainer import DiffusionTrainer
from .diffusion_dmd_config import DiffusionDMDConfig
from .drawn import Drawn
from .dry_run_shared import (
    Clock,
    Peak,
    as_in_training,
    first_update,
    taught_report,
)


_Renoised = Callable[[Drawn, list[torch.Generator]], tuple[Tensor, Tensor, Tensor]]
_Loss = Callable[[nn.Module, Drawn, list[torch.Generator]], Tensor]


def dry_run(
    trainer: DiffusionTrainer,
    bank: TeacherBank,
    fake: FakeScore,
    draw: Callable[[int, list[Row]], Drawn],
    renoised: _Renoised,
    fake_loss: _Loss,
) -> dict[str, JSON]:
    """
    Shows what `trainer.train()` would do, without training. See [`DiffusionDMDTrainer.dry_run`].

    For each task it walks one micro-batch of the first update, computes the velocities of teachers, base and fake at
    its noised images, and runs one forward and backward of student and fake. No weight and no random state changes.

    Args:
        trainer ([`DiffusionTrainer`]): a trainer that has not trained yet. All processes must call this function.
        bank ([`TeacherBank`]), fake ([`FakeScore`]): its teachers, and the fake score.
        draw, renoised, fake_loss: the trainer's functions for a walk, for noised images and for the fake's loss.

    Returns:
        `dict`:
        - `"tasks"`: for each task `"score_gap"` as in the logged metrics; `"teachers"`, a list with each teacher's
          `"gap_to_base"` and `"rounding"` as in [`~dry_run.dry_run`]; and `"rewards"` by model and name.
        - `"separability"`, `"memory"`, `"seconds_per_update"`, `"updates"`, `"seconds"`, `"warnings"`: as there.
    """
    sampler = trainer.make_sampler()
    batches = first_update(trainer, sampler)
    tasks, seconds, activations = {}, 0.0, []
    with as_in_training(trainer):
        for i in range(len(trainer.tasks)):  # the first micro-batch of each task
            rows = [trainer.train_dataset[row] for row in batches[i]]
            clock = Clock(trainer.accelerator.device)
            with clock("walk"):
                drawn = draw(i, rows)
            tasks[drawn.task] = _figures(trainer, bank, drawn, renoised, clock)
            activations.append(_passes(trainer, bank, fake, drawn, fake_loss, clock))
            seconds += _seconds(trainer, clock, len(bank.teachers[drawn.task]))
        pairs = trainer.task_comparison().pairs(sampler, thorough=True)
    seconds = seconds * trainer.rounds.micro_batches
    return taught_report(trainer, sampler, tasks, seconds, max(activations), pairs, tables.print_dmd_dry_run)


@torch.no_grad()
def _figures(
    trainer: DiffusionTrainer, bank: TeacherBank, drawn: Drawn, renoised: _Renoised, clock: Clock
) -> dict[str, JSON]:
    """Compares the velocities of teachers, base and fake at a micro-batch's noised images."""
    field, texts, roles = trainer.velocity_field, drawn.texts, bank.teachers[drawn.task]
    x, levels, _ = renoised(drawn, drawn.generators)
    t = levels.tolist()
    with bank.backbone.use(FAKE) as network, clock("fake"):
        fake = field(x, t, texts.student, 1.0, network)
    squares, target = [], torch.zeros_like(x)
    for i, role in enumerate(roles):
        with clock(f"teacher {i}"):
            own = bank.velocity(field, role, x, t, texts.teacher)
        with bank.use(None) as network:
            base = field(x, t, texts.prompt, role.guidance_scale, network)
        squares += [velocity_gap_sq(own, base).mean(), own.square().mean()]
        target += role.weight * own
    squares += [velocity_gap_sq(fake, target).mean(), target.square().mean()]
    sums = trainer.accelerator.gather(torch.stack(squares)[None]).cpu().double().mean(0)
    return {
        "score_gap": math.sqrt(sums[-2] / sums[-1]),
        "teachers": [
            {
                "teacher": role.label,
                "kind": role.teacher.kind,
                "guidance_scale": role.guidance_scale,
                "gap_to_base": math.sqrt(sums[2 * i] / sums[2 * i + 1]),
                "rounding": bank.backbone.rounding(trainer.mixed_dtype),
            }
            for i, role in enumerate(roles)
        ],
    }


def _passes(
    trainer: DiffusionTrainer, bank: TeacherBank, fake: FakeScore, drawn: Drawn, fake_loss: _Loss, clock: Clock
) -> int:
    """Measures the seconds of a forward and backward of student and fake. Returns the bytes of the student's."""
    args, used = trainer.args, 0
    levels = drawn.levels.tolist()
    for _ in range(3):
        peak = Peak(trainer.accelerator.device)
        with clock("student's update"):
            v = trainer.velocity_field(
                drawn.start, levels, drawn.texts.student, args.guidance_scale, trainer.student.model
            )
            loss = image_of(drawn.start, v, drawn.levels).square().mean()
            peak.look()
            # Not backward(): the parameters' own gradients stay as they are.
            gradients = torch.autograd.grad(loss, trainer.student.parameters(), allow_unused=True)
        used = max(used, peak.without(gradients))
        del gradients, loss, v
    with fake.trained():
        weights: Sequence[nn.Parameter] = list(fake.named_parameters().values())
        for _ in range(3):
            with bank.backbone.use(FAKE) as network, clock("fake's update"):
                generators = sample_generators([args.seed], drawn.positions)
                torch.autograd.grad(fake_loss(network, drawn, generators).mean(), weights, allow_unused=True)
    return used


def _seconds(trainer: DiffusionTrainer, clock: Clock, teachers: int) -> float:
    """Seconds of a micro-batch in an update."""
    args = trainer.args
    assert isinstance(args, DiffusionDMDConfig)
    once = ["walk", "fake", "student's update", *(f"teacher {i}" for i in range(teachers))]
    return sum(map(clock.median, once)) + args.fake_updates * clock.median("fake's update")
