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

"""The base of trainers that learn from rewards: it draws, scores and trains on groups of images. It has no loss."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from ..acceleration.quantization import QuantizationConfig
from ..algorithms.advantages import constant_groups, group_advantages, weighted_rewards
from ..algorithms.rollout import sample_generators
from ..guards.files import JSON
from ..models.backbone import BASE, Backbone
from ..models.old_policy import OLD
from ..problems import Problems
from ..reporting import console as tables
from ..reporting.model_card import MethodFacts
from ..rewards import RewardFuncs, Row, Scorer, reward_name
from . import dry_run_rl
from .base_trainer import DiffusionTrainer
from .checks import scored_data_problems
from .image_evaluator import gathered
from .preparation import Parts
from .rl_config import DiffusionRLConfig
from .rl_round import Rollout, Round
from .training_pictures import FrozenModel, base_model


logger = logging.getLogger(__name__)


class DiffusionRLTrainer(DiffusionTrainer):
    """
    Base class of the trainers that learn from rewards.

    A round draws groups of completions (images) for its prompts, scores them, and computes advantages. Then
    `num_iterations` optimizer steps train on them, in the micro-batches in which they were drawn. A trainer derives
    from it and overrides [`_draw_rollout`] (which draws the images), [`losses`] and [`_record`].

    Args:
        reward_funcs (function, `list` or `dict` from task to either):
            The rewards to maximize. A name is a reward of this package or an import path. Every task needs at least
            one.
        model, args, train_dataset, eval_dataset, callbacks, optimizers, quantization_config, peft_config:
            As [`DiffusionTrainer`] takes them.
    """

    args: DiffusionRLConfig
    timed_parts = (*DiffusionTrainer.timed_parts, "rollout", "decoding", "rewards", "reference")
    on_reward_timeout = "raise"
    reward_weights: dict[str, float]
    backbone: Backbone | None = (
        None  # made by a trainer's `prepare_method` if networks besides the student are computed
    )

    def __init__(
        self,
        model: str | DiffusionPipeline,
        reward_funcs: RewardFuncs,
        args: DiffusionRLConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: QuantizationConfig = None,
        peft_config: PeftConfig | str | None = "default",
    ):
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

    # Hooks of the trainers

    def _draw_rollout(self, task: str, prompts: list[str], generators: list[torch.Generator]) -> tuple[Tensor, object]:
        """
        Draws completions with the current student. Called without gradients, which it may turn on.

        Args:
            task (`str`), prompts (`list[str]`): the task, and one prompt for each completion.
            generators (`list[torch.Generator]`): one for each completion, for all of its noise.

        Returns:
            `tuple`: the latents at level 0, and the record of the trajectory that [`losses`] needs.
        """
        raise NotImplementedError

    def losses(self, model: nn.Module, rollout: Rollout) -> list[Callable[[], tuple[Tensor, Tensor]]]:
        """
        Returns one function for each forward of a micro-batch, in order. Each returns its share of the update's loss
        and figures of shape `(k,)` for [`_record`]. The backward of a loss runs before the next function is called.
        """
        raise NotImplementedError

    def _record(self, rollout: Rollout, figures: Tensor) -> Tensor:
        """
        Logs the metrics of a micro-batch over all processes. All processes stop if one is not finite.

        Args:
            rollout ([`Rollout`]): the micro-batch.
            figures (`Tensor` of shape `(k, n)`): the k figures of its n forwards.

        Returns:
            `Tensor`: the micro-batch's loss, times its share in the update.
        """
        raise NotImplementedError

    # Before the first step

    @classmethod
    def prepare_method(cls, parts: Parts, problems: Problems) -> None:
        args = parts.args
        assert isinstance(args, DiffusionRLConfig)
        unrewarded = [task for task, functions in parts.reward_funcs.items() if not functions]
        if parts.given_rewards is None:
            problems.append("reward_funcs is missing: this trainer maximizes rewards, so it needs at least one.")
        elif unrewarded:
            problems.append(
                f"reward_funcs: tasks {unrewarded} have no reward, so nothing can be learned from their prompts. Give "
                "each task a reward, or leave out its prompts."
            )
        # The base class only checks the prompts of evaluations.
        problems += scored_data_problems(parts.reward_funcs, parts.train_dataset, None, args.task_column)
        if parts.rounds.tasks:
            parts.method["reward_weights"] = _reward_weights(parts, problems)
            problems += _group_problems(args, parts.rounds.micro_batches)

    def _start(self) -> None:
        self.repeats, self.passes = self.args.num_generations, self.args.num_iterations
        self._rollouts: list[Rollout] = []
        self._without_signal: set[str] = set()
        if self.backbone is not None:
            self.backbone.to(self.accelerator.device)
        if self.is_world_process_zero():
            rewards = {
                task: {name: self.reward_weights[name] for name in map(reward_name, functions)}
                for task, functions in self.reward_funcs.items()
            }
            of_a_round = self.samples_of_task // self.repeats
            tables.print_rewards(self.rounds.counts, rewards, of_a_round, self.repeats)
            tables.print_trained(self.student.parameters())

    def dry_run(self) -> dict[str, JSON]:
        """
        Shows what a run would do, without training. It draws and scores the first round, and runs the forward and
        backward of one micro-batch of each task.

        Prints for every task its rewards (mean and spread) and the share of groups without signal; the seconds of
        drawing and of each reward; seconds and network forwards of an update and of the run; and memory. Images of
        each task's first prompt, drawn as in an evaluation and as in the round, are saved to `dry_run/` in the output
        folder. Nothing is trained, pushed or sent to a tracker. Call it before `train`, on all processes.

        Returns:
            `dict`: the printed figures, as [`~dry_run_rl.dry_run`] describes them.
        """
        return dry_run_rl.dry_run(self, self.roll_out, self.losses, self.frozen_networks())

    def _scored_datasets(self) -> list[Dataset]:
        return [self.train_dataset]

    def frozen_models(self, task: str) -> list[FrozenModel]:
        return base_model(self.student, self.backbone, self.args.evaluation_guidance, self.state)

    def frozen_networks(self) -> list[nn.Module]:
        """The networks besides the student that compute velocities."""
        return [] if self.backbone is None else self.backbone.networks()

    def frozen_parts(self) -> dict[str, list[nn.Parameter]]:
        frozen = {} if self.backbone is None else self.backbone.frozen()
        return {{BASE: "frozen base", OLD: "old policy"}[role]: weights for role, weights in frozen.items()}

    # Rounds

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Row]], num_batches: int, device: torch.device
    ) -> tuple[list[Rollout], Tensor | int | None]:
        """
        Returns the micro-batches of an optimizer step: completions, drawn for the loader's prompts.

        Trainer asks for all micro-batches of a step at once; they are a whole round. The round's first step draws and
        scores completions, and the others train on the same ones.

        Raises:
            [`RuntimeError`]: if the loader gives a later step other prompts than the completions were drawn for.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and self.state.global_step % self.args.num_iterations == 0:
            drawn = self.roll_out(batches)
            self._rollouts = drawn.rollouts
            self._log_round(drawn)
        elif batches:
            pairs = zip(batches, self._rollouts, strict=True)
            if any(self.texts(rollout.task, rows).prompt != rollout.prompts for rows, rollout in pairs):
                raise RuntimeError(
                    f"Update {self.state.global_step + 1} trains on the completions of the round before it "
                    f"(num_iterations={self.args.num_iterations}), but the data loader gives other prompts than they "
                    "were drawn for."
                )
        return self._rollouts if batches else [], num_items

    # The type of `inputs` differs from Trainer's, whose inputs are a dict of tensors.
    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: Rollout, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        self._in_eval_mode(model)
        losses, figures = self.losses(model, inputs), []
        for i, loss_of in enumerate(losses):
            with self._gradient_sync(model, last=i == len(losses) - 1):
                loss, of_step = loss_of()
                self._backward(loss)
            figures.append(of_step)
        mean = self._record(inputs, torch.stack(figures, dim=1))
        self._end_micro_batch()
        return mean

    def floating_point_ops(self, inputs: object) -> int:
        """Returns 0: FLOPs are not counted. Trainer's own method would look for a language model's inputs."""
        return 0

    @torch.no_grad()
    def roll_out(self, batches: list[list[Row]]) -> Round:
        """Draws and scores the completions of a round, task by task. Each batch is scored while the next is drawn."""
        self.student.model.eval()
        rollouts: dict[int, Rollout] = {}
        drawn = Round([])
        for k, task in enumerate(self.tasks):
            numbers = range(k, len(batches), len(self.tasks))
            start = time.perf_counter()
            with Scorer(self.reward_funcs[task], self.state, self.args.reward_timeout, task=task) as scorer:
                for i in numbers:
                    _, positions = self.turn(i, batches[i])
                    prompts = self.texts(task, batches[i]).prompt
                    generators = sample_generators([self.args.seed, self.state.global_step, k], positions)
                    latents, record = self._draw_rollout(task, prompts, generators)
                    rollouts[i] = Rollout(task, prompts, positions, latents, record, latents.new_zeros(len(prompts)))
                    with self._part("decoding"):
                        images = self.velocity_field.decode(latents, prompts)
                    with self._part("rewards"):
                        scorer.submit(batches[i], images)
                drawn.seconds["generation_time"] += time.perf_counter() - start - scorer.waited
                with self._part("rewards"):
                    scores = scorer.results()
            for name, taken in scorer.seconds.items():
                drawn.seconds[f"reward_time/{name}"] += taken
            for name, values in gathered(scorer.log.metrics).items():
                drawn.logged[name] += values
            self._set_advantages(task, [rollouts[i] for i in numbers], scores, drawn)
        drawn.rollouts = [rollouts[i] for i in range(len(batches))]
        return drawn

    def _set_advantages(
        self, task: str, rollouts: list[Rollout], scores: dict[str, list[float | None]], drawn: Round
    ) -> None:
        """Sets the advantages of a task's completions, from the scores of all processes."""
        args, size = self.args, self.args.num_generations
        positions = [position for rollout in rollouts for position in rollout.positions]
        prompts = [prompt for rollout in rollouts for prompt in rollout.prompts]
        columns = list(scores)
        rows = zip(positions, prompts, *scores.values(), strict=True)
        # Sorted by position, so that the result does not depend on the number of processes.
        everyone = sorted(gather_object(list(rows)), key=lambda row: row[0])
        self._check_drawn_groups(task, everyone)
        values = torch.tensor(
            [[math.nan if value is None else value for value in row[2:]] for row in everyone], dtype=torch.float64
        )
        figures = drawn.figures[task] = {}
        for name, column in zip(columns, values.T, strict=True):
            figures[f"rewards/{name}/mean"] = float(column.nanmean())
            figures[f"rewards/{name}/std"] = _std(column)
        # The parts of a combined reward are logged, but not added again.
        names = [reward_name(function) for function in self.reward_funcs[task]]
        rewards = values[:, [columns.index(name) for name in names]]
        weights = torch.tensor([self.reward_weights[name] for name in names], dtype=torch.float64)
        total = weighted_rewards(rewards, weights)
        figures["reward"] = figures[f"reward/{task}"] = float(total.nanmean())
        figures["reward_std"] = _std(total)
        figures["frac_reward_zero_std"] = float(constant_groups(total, size).double().mean())
        for name, of_reward, column in zip(names, constant_groups(rewards, size).T, rewards.T, strict=True):
            if not column.isnan().all():
                drawn.applied.add(name)
            if self.reward_weights[name] != 0:  # with weight 0 it is only logged
                drawn.constant[name] = drawn.constant.get(name, True) and bool(of_reward.all())
        advantages = group_advantages(
            rewards, weights, size, args.scale_rewards, args.multi_objective_aggregation, args.advantage_clip
        )
        for rollout in rollouts:
            rollout.advantages = advantages[rollout.positions].to(rollout.latents.device, torch.float32)

    def _check_drawn_groups(self, task: str, rows: list[tuple]) -> None:
        """
        Checks that each group has one prompt. Positions define the groups; `rows` are `(position, prompt, ...)` of all
        processes, sorted.

        Raises:
            [`RuntimeError`]: on all processes, if a group is incomplete or has several prompts.
        """
        size = self.args.num_generations
        groups = [{row[1] for row in rows[first : first + size]} for first in range(0, len(rows), size)]
        if [row[0] for row in rows] != list(range(len(rows))) or any(len(prompts) > 1 for prompts in groups):
            raise RuntimeError(
                f"The completions of task {task!r} in update {self.state.global_step + 1} are not whole groups of "
                f"num_generations={size} with one prompt each, so they cannot be compared. Don't override "
                "get_train_dataloader."
            )

    def _log_round(self, drawn: Round) -> None:
        """Logs a round's metrics. Warns, once for each reward, if it was constant within every group."""
        metrics = self._metrics["train"]
        for name, values in drawn.logged.items():
            metrics[name] += values
        for figures in drawn.figures.values():
            for name, value in figures.items():
                metrics[name].append(value)
        for name, value in drawn.seconds.items():
            metrics[name].append(value)
        for name, warning in drawn.warnings(self.state.global_step + 1).items():
            if name not in self._without_signal and self.is_world_process_zero():
                logger.warning(warning)
            self._without_signal.add(name)

    # Files

    def _check_resume(self, folder: Path) -> list[str]:
        problems = super()._check_resume(folder)
        step, n = json.loads((folder / TRAINER_STATE_NAME).read_text())["global_step"], self.args.num_iterations
        if step % n:
            problems.append(
                f"it is from the middle of a round: update {step} with num_iterations={n}. Resume from a checkpoint "
                f"with a number that is a multiple of {n}."
            )
        return problems

    def _card_fields(self) -> MethodFacts:
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


def _reward_weights(parts: Parts, problems: Problems) -> dict[str, float]:
    """The weight of each reward by name, in the order in which the rewards were given."""
    args = parts.args
    assert isinstance(args, DiffusionRLConfig)
    tasks = parts.given_rewards if isinstance(parts.given_rewards, Mapping) else parts.rounds.tasks
    functions = [function for task in tasks for function in parts.reward_funcs.get(task, [])]
    names = list(dict.fromkeys(map(reward_name, functions)))
    weights = [1.0] * len(names) if args.reward_weights is None else args.reward_weights
    if names and len(weights) != len(names):
        problems.append(
            f"reward_weights has {len(weights)} values for {len(names)} reward functions. Give one for each, in this "
            f"order: {', '.join(names)}."
        )
    elif names and not any(weights):
        problems.append(
            f"reward_weights={weights}: all are 0, so there is nothing to learn. Give one of {', '.join(names)} a "
            "weight."
        )
    return dict(zip(names, map(float, weights), strict=False))


def _group_problems(args: DiffusionRLConfig, micro_batches: int) -> list[str]:
    size, others = args.num_generations, args.world_size * micro_batches
    if size < 1 or args.train_batch_size * others % size == 0:
        return []
    fitting = math.lcm(size, others) // others
    fitting *= max(1, round(args.train_batch_size / fitting))
    return [
        f"A task has {args.train_batch_size * others} completions a round (per_device_train_batch_size="
        f"{args.train_batch_size} x {args.world_size} process(es) x {micro_batches} micro-batch(es) of the task), "
        f"which can't be split into groups of num_generations={size}. Use per_device_train_batch_size={fitting}."
    ]


def equip(parts: Parts, backbone: Backbone, problems: Problems) -> Backbone:
    """Sets the attention backend of the networks besides the student."""
    with problems.collect():
        for network in backbone.networks():
            parts.use_attention_backend(network)
    return backbone
