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

"""What a run by reward would do, shown before it starts: a round drawn and scored, what an update costs, and pictures."""

import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..reporting import console as tables
from ..rewards.scoring import score_names
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


if TYPE_CHECKING:
    from .rl_trainer import DiffusionRLTrainer, Rollout

logger = logging.getLogger(__name__)

# Completions of a task's first prompt that are shown.
_SHOWN = 4


def dry_run(trainer: "DiffusionRLTrainer") -> dict[str, Any]:
    """
    Shows what `trainer.train()` would do, without training: see [`DiffusionRLTrainer.dry_run`].

    The first round is drawn and scored as training will do it, and the loss of one micro-batch of each task goes backward.
    No weight, gradient, metric or random state changes.

    Args:
        trainer ([`DiffusionRLTrainer`]): one that has not trained yet. Called on all processes.

    Returns:
        `dict`:
        - `"tasks"`: by task `"prompts"` and `"completions"` of a round, `"frac_reward_zero_std"` (the share of its groups
          without signal), `"rewards"`: by name `"mean"` and `"std"` over the round, NaN where it applies to nothing; and
          `"images"`: by caption and reward the score of each image that is shown (on the main process).
        - `"generation_time"`, `"reward_time"`: seconds of the round, the latter by reward and meanwhile.
        - `"forwards_per_update"`, `"backwards_per_update"`, `"forwards"`, `"backwards"`: samples that networks see, of an
          update and of the run, over all processes. Guidance shows each sample twice.
        - `"seconds_per_update"`, `"updates"`, `"seconds"`: of rounds and losses alone.
        - `"memory"`: by part, `{"dtype", "bytes", "how"}`, as [`estimate_memory`] says, and the tensors of a round; on one
          process and without sharding.
        - `"warnings"`: names of rewards that had one value in every group.
    """
    sampler = trainer._get_train_sampler()
    batches = [[trainer.train_dataset[row] for row in rows] for rows in first_update(trainer, sampler)]
    args, device = trainer.args, trainer.accelerator.device
    clock, start, peak = Clock(device), in_use(device), Peak(device)
    with as_in_training(trainer) as model, _untouched(trainer):
        model.eval()
        networks = [model, *trainer._frozen_networks()]
        with counted(networks) as of_round, clock("round"):
            rollouts = trainer._roll_out(batches)
        peak.look()
        kept = in_use(device) - start
        in_round = sum(value.nbytes for value in _tensors(rollouts))
        metrics, constant = trainer._metrics["train"], sorted(trainer._without_signal)
        of_losses, used = _losses(trainer, model, rollouts, networks, clock)
    passes, processes, micro_batches = args.num_iterations, trainer.accelerator.num_processes, trainer._micro_batches
    seconds = clock.median("round") / passes
    seconds += micro_batches * sum(clock.median(f"loss {task}") for task in trainer.tasks)
    updates = number_of_updates(trainer, sampler)
    forwards = processes * (of_round.forwards / passes + micro_batches * of_losses.forwards)
    backwards = processes * micro_batches * of_losses.backwards
    seconds = max(gather_object([seconds]))
    report = {
        "tasks": _of_tasks(trainer, metrics),
        "generation_time": metrics["generation_time"][0],
        "reward_time": {name: values[0] for name, values in _below("reward_time", metrics).items()},
        "forwards_per_update": forwards,
        "backwards_per_update": backwards,
        "seconds_per_update": seconds,
        "updates": updates,
        "forwards": round(forwards * updates),
        "backwards": backwards * updates,
        "seconds": seconds * updates,
        "memory": memory(
            trainer, {"round": in_round}, max(peak.bytes, kept + used, 0), "a round and of a forward and backward"
        ),
        "warnings": constant,
    }
    pictures = _draw(trainer, rollouts, batches)
    if trainer.accelerator.is_main_process:
        scored = score_pictures(trainer, pictures)
        for task, of_task in scored.items():
            report["tasks"][task]["images"] = of_task
        write_pictures(trainer, pictures, scored)
        tables.print_rl_dry_run(report, device.type)
    trainer.accelerator.wait_for_everyone()
    return report


@contextmanager
def _untouched(trainer: "DiffusionRLTrainer") -> Iterator[None]:
    """Gives the trainer's notes back as they were, and reduces no gradients meanwhile."""
    metrics, constant, without_signal = trainer._metrics, trainer._constant, trainer._without_signal
    state = trainer.accelerator.gradient_state
    sync_gradients = state.sync_gradients
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer._constant, trainer._without_signal = {}, set()
    state._set_sync_gradients(False)
    try:
        yield
    finally:
        trainer._metrics, trainer._constant, trainer._without_signal = metrics, constant, without_signal
        state._set_sync_gradients(sync_gradients)


def _losses(
    trainer: "DiffusionRLTrainer", model: nn.Module, rollouts: "list[Rollout]", networks: list[nn.Module], clock: Clock
) -> tuple[Forwards, int]:
    """Takes the loss of each task's first micro-batch: what the networks see, and the bytes that it needs."""
    parameters = trainer.student.parameters()
    used = 0

    def backward(loss: Tensor) -> None:
        nonlocal used
        peak.look()
        # Not backward(): the parameters' own gradients stay as they are.
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        used = max(used, peak.without(gradients))

    trainer._backward = backward  # type: ignore[method-assign]
    try:
        peak = Peak(trainer.accelerator.device)
        trainer._train_on(model, rollouts[0])  # the first one sets things up
        with counted(networks) as count:
            for task, rollout in zip(trainer.tasks, rollouts, strict=False):
                peak = Peak(trainer.accelerator.device)
                with clock(f"loss {task}"):
                    trainer._train_on(model, rollout)
    finally:
        del trainer._backward  # the class's own is behind it
    return count, used


def _tensors(rollouts: "list[Rollout]") -> Iterator[Tensor]:
    for value in tree_leaves([vars(rollout) for rollout in rollouts]):
        if isinstance(value, Tensor):
            yield value


def _below(prefix: str, metrics: dict[str, list[float]]) -> dict[str, list[float]]:
    return {
        name.removeprefix(f"{prefix}/"): values for name, values in metrics.items() if name.startswith(f"{prefix}/")
    }


def _of_tasks(trainer: "DiffusionRLTrainer", metrics: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """A round's figures by task. A metric has a value for each task that it has part in, in their order."""
    completions = trainer._train_batch_size * trainer.accelerator.num_processes * trainer._micro_batches
    values = {name: iter(of_name) for name, of_name in metrics.items()}
    figures = {}
    for task in trainer.tasks:
        names = [name for function in trainer.reward_funcs[task] for name in score_names(function)]
        figures[task] = {
            "prompts": completions // trainer.args.num_generations,
            "completions": completions,
            "frac_reward_zero_std": next(values["frac_reward_zero_std"]),
            "rewards": {
                name: {figure: next(values[f"rewards/{name}/{figure}"]) for figure in ("mean", "std")}
                for name in names
            },
        }
    return figures


def _draw(trainer: "DiffusionRLTrainer", rollouts: "list[Rollout]", batches: list[list[dict[str, Any]]]) -> Pictures:
    """For each task's first prompt what an evaluation draws, and completions of its group as they were scored."""
    scale = trainer.args.evaluation_guidance
    model = trainer.accelerator.unwrap_model(trainer.model)
    shown = min(_SHOWN, trainer.args.num_generations, trainer._train_batch_size)
    pictures: Pictures = {}
    for task, rollout, rows in zip(trainer.tasks, rollouts, batches, strict=False):
        with trainer.student.ema_weights():
            image = draw(trainer, model, task, rollout.prompts[0], scale)
        completions = trainer.velocity_field.decode(rollout.latents[:shown], rollout.prompts[:shown])
        captions = {f"completion {i}": completion for i, completion in enumerate(completions, start=1)}
        pictures[task] = rows[0], {f"student, CFG {scale:g}": image, **captions}
    return pictures
