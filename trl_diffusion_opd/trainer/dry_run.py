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

"""The dry run of distillation: shows the first update's figures, memory, time, and an image of every model."""

import math
from collections.abc import Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..algorithms.flow import velocity_gap_sq
from ..algorithms.opd import StepPlan, extrapolated_target
from ..algorithms.rollout import sample_generators, walk
from ..data.readers import Texts
from ..guards.files import JSON
from ..models.lora_adapter import rescaled_factors
from ..models.targets import anchor_scales
from ..models.teachers import Role, TeacherBank
from ..reporting import console as tables
from .base_trainer import DiffusionTrainer
from .diffusion_opd_config import DiffusionOPDConfig
from .dry_run_shared import (
    Clock,
    Peak,
    as_in_training,
    first_update,
    taught_report,
)


def dry_run(trainer: DiffusionTrainer, bank: TeacherBank, plan: StepPlan) -> dict[str, JSON]:
    """
    Shows what `trainer.train()` would do, without training. See [`DiffusionOPDTrainer.dry_run`].

    For each task it samples one micro-batch of the first update over the trained steps, computes the velocities of
    student, teachers and base, and runs one forward and backward. No weight and no random state changes.

    Args:
        trainer ([`DiffusionTrainer`]): a trainer that has not trained yet. All processes must call this function.
        bank ([`TeacherBank`]), plan ([`StepPlan`]): its teachers, and the steps that it trains.

    Returns:
        `dict`:
        - `"tasks"`: for each task `"kl"`, `"velocity_gap"` and `"noise_floor"` as in the logged metrics, over all
          trained steps; `"teachers"`, a list with each teacher's `"gap_to_base"` (relative norm of the difference to
          the base's velocity, at the teacher's guidance scale) and `"rounding"` (the same for two equal networks); and
          `"rewards"` by model and name.
        - `"separability"`: for each two tasks with different teachers `"tasks"`, `"identical_prompts"`,
          `"identical_share"`, `"accuracy"` and `"disagreement"`, as [`separability.Pair`] describes them.
        - `"memory"`: for each part `{"dtype", "bytes", "how"}`, as in [`estimate_memory`], on one process without
          sharding.
        - `"seconds_per_update"`, `"updates"`, `"seconds"`: the time of sampling and backward alone.
        - `"warnings"`: a list of sentences.
    """
    assert isinstance(trainer.args, DiffusionOPDConfig)
    sampler = trainer.make_sampler()
    batches = first_update(trainer, sampler)
    tasks, costs, activations = {}, [], []
    with as_in_training(trainer):
        for i in range(len(trainer.tasks)):  # the first micro-batch of each task
            rows = [trainer.train_dataset[row] for row in batches[i]]
            task, positions = trainer.turn(i, rows)
            texts = trainer.texts(task, rows)
            tasks[task], cost = _walk(trainer, bank, plan, task, texts, positions)
            cost["update"], used = _forward_backward(trainer, float(plan.table.levels[0]), texts.student, positions)
            costs.append(cost)
            activations.append(used)
        pairs = trainer.task_comparison().pairs(sampler, thorough=True)
    seconds = update_seconds(trainer.args, plan, trainer.rounds.micro_batches, costs)
    return taught_report(trainer, sampler, tasks, seconds, max(activations), pairs, tables.print_dry_run)


# An update's forwards


@torch.no_grad()
def _walk(
    trainer: DiffusionTrainer, bank: TeacherBank, plan: StepPlan, task: str, texts: Texts, positions: list[int]
) -> tuple[dict[str, JSON], dict[str, float]]:
    """Returns a task's figures, and the seconds of a step's forwards: `"student"`, `"target"` and `"base"`."""
    args, field, roles, levels = trainer.args, trainer.velocity_field, bank.teachers[task], plan.table.levels.tolist()
    assert isinstance(args, DiffusionOPDConfig)
    generators = sample_generators([args.seed, trainer.state.global_step, trainer.tasks.index(task)], positions)
    clock = Clock(trainer.accelerator.device)
    # For each step: the squared gap of student and target, the squared norm of the target, and for each teacher the
    # squared gap to the base and the squared norm of its velocity.
    squares: list[list[Tensor]] = []
    rounding = [bank.backbone.rounding(trainer.mixed_dtype)] * len(roles)
    shares_forwards = len(bank.forwards(roles)) < len(roles)

    def velocity(j: int, x: Tensor, z: Tensor | None) -> Tensor:
        t = levels[j]
        with clock("student"):
            student = field(x, t, texts.student, args.guidance_scale, trainer.student.model)
        target, of_base, of_teachers = torch.zeros_like(x), torch.zeros_like(x), []
        for i, role in enumerate(roles):
            with clock(f"teacher {i}"):
                own = bank.velocity(field, role, x, t, texts.teacher)
            # The base reads what the teacher reads: their weights are compared.
            with bank.use(None) as module, clock("base"):
                base = field(x, t, texts.teacher, role.guidance_scale, module)
            of_teachers += [velocity_gap_sq(own, base).mean(), own.square().mean()]
            target += role.weight * own
            of_base += role.weight * base
            if j == len(plan) - 1 and role.teacher.kind == "lora":
                with bank.use(role) as module, rescaled_factors(module, role.teacher.name):
                    again = bank.velocity(field, role, x, t, texts.teacher)
                rounding[i] = max(rounding[i], math.sqrt(velocity_gap_sq(own, again).mean() / own.square().mean()))
        if shares_forwards:
            with clock("teachers"):
                bank.mean_velocity(field, roles, x, t, texts.teacher)
        if anchor_scales(roles, args.teacher_extrapolation):
            target = extrapolated_target(target, of_base, args.teacher_extrapolation)
        squares.append([velocity_gap_sq(student, target).mean(), target.square().mean(), *of_teachers])
        return student if args.on_policy else target

    walk(velocity, field.initial_latents(texts.student, generators), plan.walked, generators)
    local = torch.stack([torch.stack(row) for row in squares])
    sums = trainer.accelerator.gather(local[None]).cpu().double().mean(0)
    rounding = [max(column) for column in zip(*gather_object([rounding]), strict=True)]
    gap, norm = sums[:, 0], sums[:, 1]
    figures = {
        "kl": float(plan.kl(gap)),
        "velocity_gap": math.sqrt(gap.sum() / norm.sum()),
        "noise_floor": float(plan.kl(norm)) * max(rounding) ** 2,
        "teachers": [
            {
                "teacher": role.label,
                "kind": role.teacher.kind,
                "guidance_scale": role.guidance_scale,
                "gap_to_base": math.sqrt(sums[:, 2 + 2 * i].sum() / sums[:, 3 + 2 * i].sum()),
                "rounding": rounding[i],
            }
            for i, role in enumerate(roles)
        ],
    }
    return figures, _costs(args, roles, texts, clock, "teachers" if shares_forwards else None)


def _costs(
    args: DiffusionOPDConfig, roles: Sequence[Role], texts: Texts, clock: Clock, together: str | None
) -> dict[str, float]:
    """
    The seconds that [`update_seconds`] takes, of one step. `together` is the clock's name for the teachers' shared
    forwards, if they share some.
    """
    teachers = [together] if together is not None else [f"teacher {i}" for i in range(len(roles))]
    anchors, base = anchor_scales(roles, args.teacher_extrapolation), clock.median("base")
    shared = texts.prompt == texts.teacher and args.guidance_scale in anchors
    return {
        "student": clock.median("student"),
        "target": sum(map(clock.median, teachers)) + len(anchors) * base,
        "base": 0.0 if args.beta == 0 or shared else base,
    }


def _forward_backward(
    trainer: DiffusionTrainer, level: float, prompts: list[str], positions: list[int]
) -> tuple[float, int]:
    """Measures the seconds and the bytes on the device of the student's forward and backward at one step."""
    device, field = trainer.accelerator.device, trainer.velocity_field
    x = field.initial_latents(prompts, sample_generators([trainer.args.seed], positions))
    parameters = trainer.student.parameters()
    clock, used = Clock(device), 0
    for _ in range(3):
        peak = Peak(device)
        with clock("update"):
            velocity = field(x, level, prompts, trainer.args.guidance_scale, trainer.student.model)
            loss = velocity_gap_sq(velocity, x).mean()
            peak.look()
            # Not backward(): the parameters' own gradients stay as they are.
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        used = max(used, peak.without(gradients))
        del gradients, loss, velocity
    return clock.median("update"), used


# Time


def update_seconds(
    args: DiffusionOPDConfig, plan: StepPlan, micro_batches: int, costs: list[dict[str, float]]
) -> float:
    """
    Estimates the seconds of an update from the seconds of its steps.

    Args:
        args ([`DiffusionOPDConfig`]), plan ([`StepPlan`]): the config, and the trained steps.
        micro_batches (`int`): micro-batches of each task in an update.
        costs (`list[dict[str, float]]`): for each task, measured on one micro-batch: the seconds of one step's
            `"student"` forward, of those for the `"target"`, of the `"base"` for `beta` alone, and of the forward and
            backward of an `"update"`.
    """
    seconds = 0.0
    walked, trained = plan.expected_steps(args.num_trained_timesteps)
    for cost in costs:
        seconds += trained * (cost["target"] + cost["update"] + cost["base"])
        seconds += (walked - trained) * cost["student" if args.on_policy else "target"]
    return seconds * micro_batches
