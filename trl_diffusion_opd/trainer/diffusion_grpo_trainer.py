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

"""Trains a diffusion model with GRPO: the noise of each denoising step is the action."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..algorithms.grpo import grpo_loss, transition_kl
from ..algorithms.rollout import WINDOW_DRAW, walk
from ..algorithms.samplers import SamplerTable, sampler_table, sde_window
from ..models.backbone import BASE, Backbone
from ..problems import Problems
from ..reporting import console as tables
from ..reporting.model_card import MethodFacts
from .diffusion_grpo_config import DiffusionGRPOConfig
from .preparation import Parts
from .rl_round import Rollout
from .rl_trainer import DiffusionRLTrainer, equip


@dataclass
class Transition:
    """
    One trained denoising step of a rollout.

    Attributes:
        x (`Tensor` of shape `(B, ...)`): the latents before the step.
        v (`Tensor` of the same shape):
            the velocity of the network that drew the image. With `one_pass` it has its graph, until its backward.
        z (`Tensor` of the same shape): the noise that was added.
    """

    x: Tensor
    v: Tensor
    z: Tensor


class DiffusionGRPOTrainer(DiffusionRLTrainer):
    """
    Trainer for GRPO of diffusion models: [Flow-GRPO](https://huggingface.co/papers/2505.05470),
    [GRPO-Guard](https://huggingface.co/papers/2510.22319) and [Flow-DPPO](https://huggingface.co/papers/2606.11025).
    [DanceGRPO](https://huggingface.co/papers/2505.07818) is the `sampler` `"dance_sde"`,
    [MixGRPO](https://huggingface.co/papers/2507.21802) an `sde_window_size`.

    For each prompt it draws a group of images with a stochastic sampler and scores them. The denoising steps of images
    that are better than the rest of their group are made more probable, those of the others less. With several tasks,
    each with its rewards, this is multi-task RL.

    Example:

    ```python
    from trl_diffusion_opd import DiffusionGRPOConfig, DiffusionGRPOTrainer, tiny

    trainer = DiffusionGRPOTrainer(
        model=tiny.BASE,
        reward_funcs=tiny.graded_rewards,
        args=DiffusionGRPOConfig(
            "teacher", height=32, width=32, max_sequence_length=12, guidance_scale=1.0, max_steps=50,
            per_device_train_batch_size=48, num_generations=12,
        ),
        train_dataset=tiny.dataset("train"),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            The base: a Hub id, a folder, or a loaded pipeline. The transformer of a loaded pipeline is wrapped in
            place.
        reward_funcs (function, `list` or `dict` from task to either):
            The rewards to maximize. A name is a reward of this package or an import path. Every task needs at least
            one.
        args ([`DiffusionGRPOConfig`], *optional*):
            Configuration. By default, that of the class, with an `output_dir` named after the model.
        train_dataset ([`~datasets.Dataset`]):
            The prompts: columns `prompt` and, with several tasks, `task`. Other columns are passed to the reward
            functions.
        eval_dataset ([`~datasets.Dataset`] or `dict` of them, *optional*):
            Prompts of evaluations, with the same columns.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Further callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler to use instead of those of `args`.
        quantization_config ([`~diffusers.PipelineQuantizationConfig`] or diffusers' config for a model, *optional*):
            How a base that is given by name is quantized, with bitsandbytes or torchao. A config for a model is
            applied to the transformer. The LoRA stays float32.
        peft_config ([`~peft.LoraConfig`], *optional*, defaults to `"default"`):
            The trained LoRA. `"default"` has rank 32, alpha 64, and the attention projections. `None` trains all
            weights; the KL to the base then uses a frozen copy.

    Raises:
        [`ValueError`]: before the first step, if anything is wrong. One message lists everything.
    """

    _tag_names = ["trl", "grpo"]
    _name = "GRPO"
    _paper = {
        "title": "Flow-GRPO",
        "id": "2505.05470",
        "citation": "@article{flowgrpo,\n    title  = {{Flow-GRPO}},\n    eprint = {arXiv:2505.05470},\n}",
    }
    args: DiffusionGRPOConfig
    table: SamplerTable
    window_size: int
    config_class = DiffusionGRPOConfig

    # Before the first step

    @classmethod
    def prepare_method(cls, parts: Parts, problems: Problems) -> None:
        super().prepare_method(parts, problems)
        args = parts.args
        assert isinstance(args, DiffusionGRPOConfig)
        parts.method["window_size"] = args.sde_window_size or len(args.sde_range())
        if args.beta > 0:
            parts.method["backbone"] = equip(parts, Backbone.of(parts.student), problems)
        with problems.collect():
            table = parts.method["table"] = sampler_table(args.sampler, parts.velocity_field.levels, args.noise_level)
            sde_window(table, args.sde_range())

    def _start(self) -> None:
        super()._start()
        if self.is_world_process_zero():
            sliding = self.args.sde_window_schedule == "sliding"
            shift_every = self.args.sde_window_shift_every if sliding else None
            tables.print_sde_steps(self.table, self.args.sde_range(), self.window_size, shift_every)

    # Training

    def _window(self) -> range:
        """The steps of this round that have noise and are trained. The same on every process and after a resume."""
        args, steps = self.args, self.args.sde_range()
        # The round's first update: all updates of a round use the same window.
        first_update = self.state.global_step // args.num_iterations * args.num_iterations
        last = len(steps) - self.window_size
        if args.sde_window_schedule == "sliding":
            offset = min(first_update // args.sde_window_shift_every, last)
        else:
            seed = np.random.SeedSequence([args.seed, first_update, WINDOW_DRAW])
            offset = int(np.random.default_rng(seed).integers(last + 1))
        return steps[offset : offset + self.window_size]

    def _draw_rollout(
        self, task: str, prompts: list[str], generators: list[torch.Generator]
    ) -> tuple[Tensor, dict[int, Transition]]:
        table = sde_window(self.table, self._window())
        levels = table.levels.tolist()
        transitions: dict[int, Transition] = {}

        def velocity(j: int, x: Tensor, z: Tensor | None) -> Tensor:
            in_window = z is not None  # only its steps have noise
            with self._part("rollout"), torch.set_grad_enabled(in_window and self.args.one_pass):
                v = self.velocity_field(x, levels[j], prompts, self.args.guidance_scale, self.student.model)
            if z is not None:
                transitions[j] = Transition(x, v, z)
            return v.detach()

        x = self.velocity_field.initial_latents(prompts, generators)
        return self.velocity_field.clean(walk(velocity, x, table, generators)), transitions

    def losses(self, model: nn.Module, rollout: Rollout) -> list[Callable[[], tuple[Tensor, Tensor]]]:
        """For each trained step: the clipped loss of the student's probability ratio, plus the KL to the base."""
        share = self.rounds.share(rollout.task) / len(rollout.record)
        return [partial(self._loss, model, rollout, j, transition, share) for j, transition in rollout.record.items()]

    @property
    def graphs_alive(self) -> int:
        return self.window_size * len(self.rounds) if self.args.one_pass else 1

    def _loss(
        self, model: nn.Module, rollout: Rollout, j: int, transition: Transition, share: float
    ) -> tuple[Tensor, Tensor]:
        args, advantages = self.args, rollout.advantages
        t, dt = float(self.table.levels[j]), float(self.table.levels[j + 1] - self.table.levels[j])
        c, s = float(self.table.c[j]), float(self.table.s[j])
        if args.one_pass:
            v = self._as_forward(model, transition.v)
        else:
            v = self._student_velocity(model, transition.x, t, rollout.prompts)
        loss, ratio, removed = grpo_loss(
            args.loss_type,
            v,
            transition.v.detach(),
            transition.z,
            advantages,
            c=c,
            s=s,
            dt=dt,
            epsilon=args.epsilon,
            divergence_threshold=args.divergence_threshold,
        )
        kl = torch.zeros_like(loss)
        if self.backbone is not None:
            with torch.no_grad(), self._part("reference"), self.backbone.use(BASE) as base:
                v_base = self.velocity_field(transition.x, t, rollout.prompts, args.guidance_scale, base)
            kl = transition_kl(v, v_base, c, s)
            loss = loss + args.beta * kl
        deviation = (ratio - 1).abs().max()
        extreme = (advantages.abs() >= args.advantage_clip).float().mean()
        removed_share = removed.to(loss.dtype).mean()
        figures = torch.stack([loss.detach().mean(), kl.detach().mean(), removed_share, deviation, extreme])
        return share * loss.mean(), figures

    def _record(self, rollout: Rollout, figures: Tensor) -> Tensor:
        levels = {j: float(self.table.levels[j]) for j in rollout.record}
        everyone = self._gather_finite(rollout.task, levels, figures)
        loss, kl, clipped, _, extreme = everyone.mean((0, 2)).tolist()
        metrics = self._metrics["train"]
        metrics["clip_ratio/region_mean"].append(clipped)
        metrics["clip_ratio/advantages"].append(extreme)
        metrics["ratio/max_deviation"].append(float(everyone[:, 3].max()))
        if self.backbone is not None:
            metrics["kl"].append(kl)
            metrics[f"kl/{rollout.task}"].append(kl)
        n = len(rollout.record)
        return torch.tensor(loss, device=figures.device) * n * (self.rounds.share(rollout.task) / n)

    def _card_fields(self) -> MethodFacts:
        args, fields = self.args, super()._card_fields()
        noisy = f"{self.window_size} of {args.num_inference_steps}"
        fields["method"] = (
            "For each prompt, a group of images was drawn with a stochastic sampler and scored. The denoising steps "
            "of the better images were made more probable."
        )
        bound = f"epsilon {args.epsilon:g}"
        if args.loss_type == "dppo":
            bound = f"divergence threshold {args.divergence_threshold:g}"
        if args.sde_window_schedule == "sliding":
            noisy += f", moved on by one every {args.sde_window_shift_every} updates"
        fields["settings"]["loss"] = f"{args.loss_type}, {bound}, beta {args.beta:g}"
        fields["settings"]["steps with noise and loss"] = noisy
        return fields
