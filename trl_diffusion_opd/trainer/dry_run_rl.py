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

"""The dry run of training by reward: draws and scores one round, and shows the cost of an update and some images."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..data.tasks import TaskSampler
from ..guards.files import JSON
from ..reporting import console as tables
from ..rewards.base import Row
from ..rewards.scoring import score_names
from .base_trainer import DiffusionTrainer
from .dry_run_shared import (
    Clock,
    Forwards,
    Peak,
    Pictures,
    as_in_training,
    counted,
    draw,
    first_update,
    in_use,
    memory,
    number_of_updates,
    score_pictures,
    write_pictures,
)
from .rl_round import Rollout, Round


logger = logging.getLogger(__name__)

# The most completions of a task's first prompt that are shown.
_SHOWN = 4


Losses = list[Callable[[], tuple[Tensor, Tensor]]]


def dry_run(
    trainer: DiffusionTrainer,
    roll_out: Callable[[list[list[Row]]], Round],
    losses: Callable[[nn.Module, Rollout], Losses],
    frozen: list[nn.Module],
) -> dict[str, JSON]:
    """
    Shows what `trainer.train()` would do, without training. See [`DiffusionRLTrainer.dry_run`].

    It draws and scores the first round as training would, and runs the backward of one micro-batch's loss of each
    task. No weight, gradient, metric or random state changes.

    Args:
        trainer ([`DiffusionTrainer`]): a trainer that has not trained yet. All processes must call this function.
        roll_out, losses (`Callable`): its methods, as [`DiffusionRLTrainer`] describes them.
        frozen (`list[nn.Module]`): the networks besides the student that compute velocities.

    Returns:
        `dict`:
        - `"tasks"`: for each task `"prompts"` and `"completions"` of a round; `"frac_reward_zero_std"`, the share of
          its groups without signal; `"rewards"`, by name `"mean"` and `"std"` over the round, NaN for a reward that
          applies to nothing; and on the main process `"images"`, by caption and reward the score of each image that is
          shown.
        - `"generation_time"`, `"reward_time"`: seconds of drawing the round, and of each reward meanwhile.
        - `"forwards_per_update"`, `"backwards_per_update"`, `"forwards"`, `"backwards"`: samples that the networks
          compute in an update and in the run, over all processes. With guidance each sample counts twice.
        - `"seconds_per_update"`, `"updates"`, `"seconds"`: the time of rounds and losses alone.
        - `"memory"`: for each part `{"dtype", "bytes", "how"}`, as in [`estimate_memory`], and the tensors of a round;
          on one process without sharding.
        - `"warnings"`: names of rewards that had one value within every group.
    """
    sampler = trainer.make_sampler()
    batches = [[trainer.train_dataset[row] for row in rows] for rows in first_update(trainer, sampler)]
    device = trainer.accelerator.device
    clock, start, peak = Clock(device), in_use(device), Peak(device)
    with as_in_training(trainer) as model:
        model.eval()
        networks = [model, *frozen]
        with counted(networks) as of_round, clock("round"):
            drawn = roll_out(batches)
        peak.look()
        kept = in_use(device) - start
        in_round = sum(value.nbytes for value in _tensors(drawn.rollouts))
        of_losses, used = _losses(trainer, partial(losses, model), drawn.rollouts, networks, clock)
    warnings = drawn.warnings(trainer.state.global_step + 1)
    report = {
        "tasks": _of_tasks(trainer, drawn),
        "generation_time": drawn.seconds["generation_time"],
        "reward_time": _below("reward_time", drawn.seconds),
        **_cost(trainer, sampler, clock, of_round, of_losses),
        "memory": memory(
            trainer, {"round": in_round}, max(peak.bytes, kept + used, 0), "a round and of a forward and backward"
        ),
        "warnings": sorted(warnings),
    }
    _show(trainer, report, _draw(trainer, drawn.rollouts, batches), warnings.values())
    return report


def _show(trainer: DiffusionTrainer, report: dict[str, JSON], pictures: Pictures, warnings: Iterable[str]) -> None:
    """On the main process, adds the scores of the images to the report and prints it."""
    if trainer.accelerator.is_main_process:
        for warning in warnings:
            logger.warning(warning)
        scored = score_pictures(trainer.evaluator, pictures, trainer.state)
        for task, of_task in scored.items():
            report["tasks"][task]["images"] = of_task
        write_pictures(trainer.args.output_dir, pictures, scored)
        tables.print_rl_dry_run(report, trainer.accelerator.device.type)
    trainer.accelerator.wait_for_everyone()


def _cost(
    trainer: DiffusionTrainer, sampler: TaskSampler, clock: Clock, of_round: Forwards, of_losses: Forwards
) -> dict[str, JSON]:
    """Estimates seconds and samples of an update and of the run, from one round and one micro-batch's loss a task."""
    passes, processes = trainer.passes, trainer.accelerator.num_processes
    micro_batches, updates = trainer.rounds.micro_batches, number_of_updates(trainer, sampler)
    seconds = clock.median("round") / passes
    seconds += micro_batches * sum(clock.median(f"loss {task}") for task in trainer.tasks)
    seconds = max(gather_object([seconds]))
    forwards = processes * (of_round.forwards / passes + micro_batches * of_losses.forwards)
    # In GRPO's one pass the forwards of the round have gradients.
    backwards = round(processes * (of_round.backwards / passes + micro_batches * of_losses.backwards))
    return {
        "forwards_per_update": forwards,
        "backwards_per_update": backwards,
        "seconds_per_update": seconds,
        "updates": updates,
        "forwards": round(forwards * updates),
        "backwards": backwards * updates,
        "seconds": seconds * updates,
    }


def _losses(
    trainer: DiffusionTrainer,
    losses: Callable[[Rollout], Losses],
    rollouts: list[Rollout],
    networks: list[nn.Module],
    clock: Clock,
) -> tuple[Forwards, int]:
    """Computes the loss of each task's first micro-batch. Returns the samples computed, and the bytes used."""
    parameters, device = trainer.student.parameters(), trainer.accelerator.device

    def take(rollout: Rollout, again: bool = False) -> int:
        peak, used = Peak(device), 0
        for loss_of in losses(rollout):
            loss, _ = loss_of()
            peak.look()
            # Not backward(): the parameters' own gradients stay as they are.
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=again)
            used = max(used, peak.without(gradients))
        return used

    used = [take(rollouts[0], again=True)]  # a first call that is not timed, since it sets things up
    with counted(networks) as count:
        for task, rollout in zip(trainer.tasks, rollouts, strict=False):
            with clock(f"loss {task}"):
                used.append(take(rollout))
    return count, max(used)


def _tensors(rollouts: list[Rollout]) -> Iterator[Tensor]:
    for value in tree_leaves([vars(rollout) for rollout in rollouts]):
        if isinstance(value, Tensor):
            yield value


def _below(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix(f"{prefix}/"): value for name, value in metrics.items() if name.startswith(f"{prefix}/")}


def _of_tasks(trainer: DiffusionTrainer, drawn: Round) -> dict[str, dict[str, JSON]]:
    """The figures of a round, by task."""
    completions = trainer.samples_of_task
    figures = {}
    for task, of_task in drawn.figures.items():
        names = [name for function in trainer.reward_funcs[task] for name in score_names(function)]
        figures[task] = {
            "prompts": completions // trainer.repeats,
            "completions": completions,
            "frac_reward_zero_std": of_task["frac_reward_zero_std"],
            "rewards": {
                name: {figure: of_task[f"rewards/{name}/{figure}"] for figure in ("mean", "std")} for name in names
            },
        }
    return figures


def _draw(trainer: DiffusionTrainer, rollouts: list[Rollout], batches: list[list[Row]]) -> Pictures:
    """Draws each task's first prompt as in an evaluation, and decodes completions of its group as they were scored."""
    scale = trainer.args.evaluation_guidance
    shown = min(_SHOWN, trainer.repeats, trainer.micro_batch_size)
    pictures: Pictures = {}
    for task, rollout, rows in zip(trainer.tasks, rollouts, batches, strict=False):
        with trainer.student.ema_weights():
            image = draw(trainer.evaluator, trainer.evaluator.student_velocity(), task, rollout.prompts[0])
        completions = trainer.velocity_field.decode(rollout.latents[:shown], rollout.prompts[:shown])
        captions = {f"completion {i}": completion for i, completion in enumerate(completions, start=1)}
        pictures[task] = rows[0], {f"student, CFG {scale:g}": image, **captions}
    return pictures
