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

"""What the trainers by reward share: rollouts in groups, their scores and advantages, several updates on each. No loss."""

import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from ..algorithms.advantages import constant_groups, group_advantages, weighted_rewards
from ..algorithms.rollout import sample_generators
from ..models.backbone import BASE, Backbone
from ..models.old_policy import OLD
from ..problems import Problems
from ..reporting import console as tables
from ..rewards import RewardFuncs, Scorer, reward_name
from . import dry_run_rl
from .base_trainer import DiffusionTrainer
from .checks import scored_data_problems
from .evaluating_trainer import gathered
from .failed_start import gives_back
from .rl_config import DiffusionRLConfig


logger = logging.getLogger(__name__)


@dataclass
class Rollout:
    """
    A micro-batch of completions.

    Attributes:
        task (`str`), prompts (`list[str]`)
        positions (`list[int]`): numbers of its completions among the task's of this round, over all processes.
        latents (`Tensor` of shape `(B, ...)`): the completions at level 0, before they are decoded.
        record: what the method's walk kept.
        advantages (`Tensor` of shape `(B,)`, float32): known when the round is scored.
    """

    task: str
    prompts: list[str]
    positions: list[int]
    latents: Tensor
    record: Any
    advantages: Tensor


class DiffusionRLTrainer(DiffusionTrainer):
    """
    Base of the trainers by reward.

    A round draws groups of completions of its prompts, scores them, and computes advantages. Then `num_iterations`
    optimizer steps use them, micro-batch by micro-batch as they were drawn. A trainer derives from it and overrides
    [`_draw_rollout`] (the walk) and [`_train_on`] (the loss and its backwards).

    Args:
        reward_funcs (function, `list` or `dict` from task to either):
            What is maximised. A name is a reward of this package or an import path. Every task needs one at least.
        model, args, train_dataset, eval_dataset, callbacks, optimizers, quantization_config, peft_config:
            As [`DiffusionTrainer`] takes them.
    """

    args: DiffusionRLConfig
    _parts = (*DiffusionTrainer._parts, "rollout", "decoding", "rewards", "reference")
    backbone: Backbone | None = None  # a trainer's `_setup` makes it where another role than the student's is played

    @gives_back
    def __init__(
        self,
        model: str | DiffusionPipeline,
        reward_funcs: RewardFuncs,
        args: DiffusionRLConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | str | None = "default",
    ):
        self._given_rewards = reward_funcs
        self._given_prompts = train_dataset
        self._rollouts: list[Rollout] = []
        self._constant: dict[str, list[bool]] = {}
        self._applied: set[str] = set()  # rewards with a value in this round
        self._without_signal: set[str] = set()
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            reward_funcs=reward_funcs,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self._repeats, self._passes = self.args.num_generations, self.args.num_iterations
        if self.backbone is not None:
            self.backbone.to(self.accelerator.device)
        if self.is_world_process_zero():
            rewards = {
                task: {name: self.reward_weights[name] for name in map(reward_name, functions)}
                for task, functions in self.reward_funcs.items()
            }
            completions = self.args.train_batch_size * self.args.world_size * self._micro_batches
            of_a_round = completions // self.args.num_generations
            prompts = {task: len(rows) for task, rows in self._task_rows.items()}
            tables.print_rewards(prompts, rewards, of_a_round, self.args.num_generations)
            tables.print_trained(self.student.parameters())

    # Hooks of the trainers

    def _draw_rollout(self, task: str, prompts: list[str], generators: list[torch.Generator]) -> tuple[Tensor, Any]:
        """
        Walks from noise to completions with the student as it is. Called without gradients.

        Args:
            task (`str`), prompts (`list[str]`): one prompt a completion.
            generators (`list[torch.Generator]`): one a completion; all of its noise comes from it.

        Returns:
            `tuple`: the latents at level 0, and what [`_train_on`] needs of the walk.
        """
        raise NotImplementedError

    def _train_on(self, model: nn.Module, rollout: Rollout) -> Tensor:
        """
        Runs the backwards of one micro-batch: each under [`_gradient_sync`], its mean loss times [`_task_share`].

        Returns:
            `Tensor`: the micro-batch's loss, detached, times its share.
        """
        raise NotImplementedError

    # Before the first step

    def _setup(self, model: nn.Module, problems: Problems) -> None:
        super()._setup(model, problems)
        args = self.args
        unrewarded = [task for task, functions in self.reward_funcs.items() if not functions]
        if self._given_rewards is None:
            problems.append("reward_funcs is missing: the rewards are what is trained for.")
        elif unrewarded:
            problems.append(
                f"reward_funcs: tasks {unrewarded} have none, so their prompts would teach nothing. Give each a reward, or "
                "leave out their prompts."
            )
        # The base looks at the prompts that are evaluated.
        problems += scored_data_problems(self.reward_funcs, self._given_prompts, None, args.task_column)
        if self.tasks:
            self._set_reward_weights(problems)
            self._check_groups(problems)

    def _equip(self, backbone: Backbone, problems: Problems) -> Backbone:
        """Has the networks beside the student's compute as the arguments say."""
        with problems.collect():
            for network in backbone.networks():
                self._use_attention_backend(network, as_student=False)
        return backbone

    def _reward_names(self) -> list[str]:
        """Names of the reward functions in the order in which they were given."""
        tasks = self._given_rewards if isinstance(self._given_rewards, Mapping) else self.tasks
        names = [reward_name(function) for task in tasks for function in self.reward_funcs.get(task, [])]
        return list(dict.fromkeys(names))

    def _set_reward_weights(self, problems: Problems) -> None:
        names = self._reward_names()
        weights = [1.0] * len(names) if self.args.reward_weights is None else self.args.reward_weights
        if names and len(weights) != len(names):
            problems.append(
                f"reward_weights has {len(weights)} values for {len(names)} reward functions. Give one for each, in this "
                f"order: {', '.join(names)}."
            )
        elif names and not any(weights):
            problems.append(
                f"reward_weights={weights}: all are 0, so nothing would be trained for. Give one of {', '.join(names)} a weight."
            )
        self.reward_weights = dict(zip(names, map(float, weights), strict=False))

    def _check_groups(self, problems: Problems) -> None:
        args, size = self.args, self.args.num_generations
        others = args.world_size * self._micro_batches
        if size < 1 or args.train_batch_size * others % size == 0:
            return
        fitting = math.lcm(size, others) // others
        fitting *= max(1, round(args.train_batch_size / fitting))
        problems.append(
            f"A task has {args.train_batch_size * others} completions a round (per_device_train_batch_size="
            f"{args.train_batch_size} x {args.world_size} process(es) x {self._micro_batches} micro-batch(es) of the task), "
            f"which are not whole groups of num_generations={size}. Use per_device_train_batch_size={fitting}."
        )

    def dry_run(self) -> dict[str, Any]:
        """
        What a run would do, without one: the first round is drawn and scored, and one micro-batch of each task goes forward
        and backward.

        Prints, for every task, its rewards (mean and spread) and the share of its groups that have no signal; the seconds of
        drawing and of each reward; seconds and network forwards of an update and of the run; and memory. Images of the
        first prompt of each task, as an evaluation and as the round draws it, go to `dry_run/` in the output folder.
        Nothing is trained, pushed or reported to a tracker. Call it before `train`, on all processes.

        Returns:
            `dict`: what is printed, as [`~dry_run_rl.dry_run`] describes it.
        """
        return dry_run_rl.dry_run(self)

    def _frozen_networks(self) -> list[nn.Module]:
        """What else than the student computes velocities here."""
        return [] if self.backbone is None else self.backbone.networks()

    def _frozen_parts(self) -> dict[str, list[Tensor]]:
        frozen: dict[str, Any] = {} if self.backbone is None else self.backbone.frozen()
        return {{BASE: "frozen base", OLD: "old policy"}[role]: weights for role, weights in frozen.items()}

    # Rounds

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """
        The micro-batches of an optimizer step: completions, where the loader has prompts.

        Trainer asks for all of a step at once, which is a whole round. The first step of a round draws and scores, the
        others train on the same completions.

        Raises:
            [`RuntimeError`]: if the rows of such another step are not those that were drawn for.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and self.state.global_step % self.args.num_iterations == 0:
            self._rollouts = self._roll_out(batches)
        elif batches:
            prompts = [[row["prompt"] for row in rows] for rows in batches]
            if prompts != [rollout.prompts for rollout in self._rollouts]:
                raise RuntimeError(
                    f"Update {self.state.global_step + 1} goes on with a round's completions (num_iterations="
                    f"{self.args.num_iterations}), and the data loader has other prompts than they were drawn for."
                )
        return self._rollouts if batches else [], num_items

    def training_step(
        self, model: nn.Module, inputs: Rollout, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        self._in_eval_mode(model)
        loss = self._train_on(model, inputs)
        self._end_micro_batch()
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Trainer would look for a language model's inputs in a rollout. Not counted, as in the other trainers here."""
        return 0

    @torch.no_grad()
    def _roll_out(self, batches: list[list[dict[str, Any]]]) -> list[Rollout]:
        """Draws and scores the completions of a round, task by task, each scored while the next ones are drawn."""
        self.accelerator.unwrap_model(self.model).eval()
        rollouts: dict[int, Rollout] = {}
        seconds: dict[str, float] = defaultdict(float)
        for k, task in enumerate(self.tasks):
            numbers = range(k, len(batches), len(self.tasks))
            start = time.perf_counter()
            with Scorer(self.reward_funcs[task], self.state, self.args.reward_timeout, task=task) as scorer:
                for i in numbers:
                    _, positions = self._micro_batch(i, batches[i])
                    prompts = [row["prompt"] for row in batches[i]]
                    generators = sample_generators([self.args.seed, self.state.global_step, k], positions)
                    latents, record = self._draw_rollout(task, prompts, generators)
                    rollouts[i] = Rollout(task, prompts, positions, latents, record, latents.new_zeros(len(prompts)))
                    with self._part("decoding"):
                        images = self.velocity_field.decode(latents, prompts)
                    with self._part("rewards"):
                        scorer.submit(batches[i], images)
                seconds["generation_time"] += time.perf_counter() - start - scorer.waited
                with self._part("rewards"):
                    scores = scorer.results()
            for name, taken in scorer.seconds.items():
                seconds[f"reward_time/{name}"] += taken
            for name, values in gathered(scorer.log.metrics).items():
                self._metrics["train"][name] += values
            self._set_advantages(task, [rollouts[i] for i in numbers], scores)
        for name, value in seconds.items():
            self._metrics["train"][name].append(value)
        self._warn_without_signal()
        return [rollouts[i] for i in range(len(batches))]

    def _set_advantages(self, task: str, rollouts: list[Rollout], scores: dict[str, list[float | None]]) -> None:
        """Advantages of a task's completions, from the scores of all processes' groups."""
        args, metrics = self.args, self._metrics["train"]
        positions = [position for rollout in rollouts for position in rollout.positions]
        prompts = [prompt for rollout in rollouts for prompt in rollout.prompts]
        columns = list(scores)
        rows = zip(positions, prompts, *scores.values(), strict=True)
        # In the order of the prompts: the same on any number of processes.
        everyone = sorted(gather_object(list(rows)), key=lambda row: row[0])
        self._check_drawn_groups(task, everyone)
        values = torch.tensor(
            [[math.nan if value is None else value for value in row[2:]] for row in everyone], dtype=torch.float64
        )
        for name, column in zip(columns, values.T, strict=True):
            metrics[f"rewards/{name}/mean"].append(float(column.nanmean()))
            metrics[f"rewards/{name}/std"].append(_std(column))
        # A combined reward's parts are logged, and not added once more.
        names = [reward_name(function) for function in self.reward_funcs[task]]
        rewards = values[:, [columns.index(name) for name in names]]
        weights = torch.tensor([self.reward_weights[name] for name in names], dtype=torch.float64)
        total = weighted_rewards(rewards, weights)
        constant = constant_groups(total, args.num_generations)
        for name, value in (
            ("reward", float(total.nanmean())),
            (f"reward/{task}", float(total.nanmean())),
            ("reward_std", _std(total)),
            ("frac_reward_zero_std", float(constant.double().mean())),
        ):
            metrics[name].append(value)
        for name, of_reward, column in zip(
            names, constant_groups(rewards, args.num_generations).T, rewards.T, strict=True
        ):
            if not column.isnan().all():
                self._applied.add(name)
            if self.reward_weights[name] != 0:  # else it is only watched
                self._constant.setdefault(name, []).append(bool(of_reward.all()))
        advantages = group_advantages(
            rewards,
            weights,
            args.num_generations,
            args.scale_rewards,
            args.multi_objective_aggregation,
            args.advantage_clip,
        )
        for rollout in rollouts:
            rollout.advantages = advantages[rollout.positions].to(rollout.latents.device, torch.float32)

    def _check_drawn_groups(self, task: str, rows: list[tuple[Any, ...]]) -> None:
        """
        Completions are compared within their group, which their positions tell: each group must be of one prompt.

        Raises:
            [`RuntimeError`]: on all processes, if one is not. `rows` are those of all, `(position, prompt, ...)` in order.
        """
        size = self.args.num_generations
        groups = [{row[1] for row in rows[first : first + size]} for first in range(0, len(rows), size)]
        if [row[0] for row in rows] != list(range(len(rows))) or any(len(prompts) > 1 for prompts in groups):
            raise RuntimeError(
                f"The completions of task {task!r} in update {self.state.global_step + 1} are not whole groups of num_generations="
                f"{size} of one prompt each, so they cannot be compared. Leave get_train_dataloader as it is."
            )

    def _warn_without_signal(self) -> None:
        """Says once of a reward that it was the same within every group of a round: it then teaches nothing."""
        for name, of_tasks in self._constant.items():
            if all(of_tasks) and name not in self._without_signal:
                self._without_signal.add(name)
                if self.is_world_process_zero() and name not in self._applied:
                    logger.warning(
                        f"Reward {name!r} was None for every image of update {self.state.global_step + 1}, so it teaches "
                        "nothing. Look at what it needs of the prompts and of the columns. This is said once."
                    )
                elif self.is_world_process_zero():
                    logger.warning(
                        f"Reward {name!r} had one value in every group of update {self.state.global_step + 1}, so it says "
                        "nothing of which completion is better. If this goes on, give it degrees, choose prompts that "
                        "sometimes succeed, or raise num_generations. This is said once."
                    )
        self._constant.clear()
        self._applied.clear()

    # Files

    def _check_resume(self, folder: Path) -> list[str]:
        problems = super()._check_resume(folder)
        step, n = json.loads((folder / TRAINER_STATE_NAME).read_text())["global_step"], self.args.num_iterations
        if step % n:
            problems.append(
                f"it is from the middle of a round: update {step} with num_iterations={n}. Resume from a checkpoint whose "
                f"number is a multiple of {n}."
            )
        return problems

    def _card_fields(self) -> dict[str, Any]:
        args = self.args
        rewards = {
            task: ", ".join(f"{name} x {self.reward_weights[name]:g}" for name in map(reward_name, functions))
            for task, functions in self.reward_funcs.items()
        }
        return {
            "settings": {
                "rewards": "; ".join(f"{task}: {names}" for task, names in rewards.items()),
                "groups": f"{args.num_generations} completions a prompt, {args.num_iterations} update(s) on each round, "
                f"advantages scaled by {args.scale_rewards} and clipped at {args.advantage_clip:g}",
            },
        }


def _std(values: Tensor) -> float:
    applicable = values[~values.isnan()]
    return float(applicable.std()) if len(applicable) > 1 else math.nan
