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

"""Trains a diffusion model with DiffusionNFT: it learns from scored images that are noised again."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..algorithms.flow import noised, velocity_gap_sq
from ..algorithms.nft import draw_levels, nft_loss, old_policy_decay, optimality
from ..algorithms.rollout import FORWARD_NOISE, LEVEL_DRAW, gaussian, sample_generators, walk
from ..algorithms.samplers import SamplerTable, sampler_table
from ..models.backbone import BASE, Backbone
from ..models.old_policy import OLD, OLD_POLICY_FILE, OldPolicy
from ..problems import Problems
from ..reporting.model_card import MethodFacts
from .diffusion_nft_config import DiffusionNFTConfig
from .preparation import Parts
from .rl_round import Rollout
from .rl_trainer import DiffusionRLTrainer, equip


class _OldPolicyCallback(TrainerCallback):
    """Moves the old policy toward the student after each round, before a checkpoint is saved."""

    def __init__(self, trainer: "DiffusionNFTTrainer"):
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step % self.trainer.args.num_iterations == 0:
            self.trainer.follow()


class DiffusionNFTTrainer(DiffusionRLTrainer):
    """
    Trainer for reinforcement learning on the forward process
    ([DiffusionNFT](https://huggingface.co/papers/2509.16117)).

    For each prompt an old policy, a frozen copy of the student that follows it after every round, draws a group of
    images with any sampler. The images are scored and noised again. A flow-matching loss moves the student toward
    images that are better than the rest of their group, and away from worse ones.

    Example:

    ```python
    from trl_diffusion_opd import DiffusionNFTConfig, DiffusionNFTTrainer, tiny

    args = DiffusionNFTConfig(
        "teacher", height=32, width=32, max_sequence_length=12, num_generations=12, per_device_train_batch_size=24
    )
    trainer = DiffusionNFTTrainer(
        model=tiny.BASE,
        reward_funcs=tiny.graded_rewards,
        args=args,
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
        args ([`DiffusionNFTConfig`], *optional*):
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
            The student's LoRA. `"default"` is the paper's (rank 32, alpha 64, attention projections). `None` trains
            all weights; then the old policy is a whole copy, and with `beta` there is another copy of the base.

    Raises:
        [`ValueError`]: before the first step, if anything is wrong. One message lists everything.
    """

    _tag_names = ["trl", "diffusion-nft"]
    _name = "DiffusionNFT"
    _paper = {
        "title": "DiffusionNFT: Online Diffusion Reinforcement with Forward Process",
        "id": "2509.16117",
        "citation": "@article{diffusionnft,\n    title  = {{DiffusionNFT: Online Diffusion Reinforcement with Forward "
        "Process}},\n    eprint = {arXiv:2509.16117},\n}",
    }
    args: DiffusionNFTConfig
    table: SamplerTable
    old_policy: OldPolicy
    backbone: Backbone
    config_class = DiffusionNFTConfig

    # Before the first step

    @classmethod
    def prepare_method(cls, parts: Parts, problems: Problems) -> None:
        super().prepare_method(parts, problems)
        args = parts.args
        assert isinstance(args, DiffusionNFTConfig)
        with problems.collect():
            parts.method["table"] = sampler_table(args.sampler, parts.velocity_field.levels, args.noise_level)
        backbone = parts.method["backbone"] = Backbone.of(parts.student, with_base=args.beta > 0)
        parts.method["old_policy"] = OldPolicy(backbone, parts.student)
        equip(parts, backbone, problems)

    def _start(self) -> None:
        super()._start()
        # PEFT's own switches change requires_grad, so check that no weight of the old policy is trained.
        frozen = {id(p) for p in self.old_policy.named_parameters().values()}
        assert not frozen & {id(p) for p in self.student.parameters()}, "the old policy is trainable"
        self.add_callback(_OldPolicyCallback(self))

    # Training

    def _draw_rollout(self, task: str, prompts: list[str], generators: list[torch.Generator]) -> tuple[Tensor, None]:
        """Draws images with the old policy. Nothing of their trajectories is kept."""
        levels = self.table.levels.tolist()
        x = self.velocity_field.initial_latents(prompts, generators)
        with self.backbone.use(OLD) as transformer:

            def velocity(j: int, x: Tensor, z: Tensor | None) -> Tensor:
                with self._part("rollout"):
                    return self.velocity_field(x, levels[j], prompts, self.args.guidance_scale, transformer)

            return self.velocity_field.clean(walk(velocity, x, self.table, generators)), None

    def losses(self, model: nn.Module, rollout: Rollout) -> list[Callable[[], tuple[Tensor, Tensor]]]:
        """For each noise level of this update: the NFT loss on newly noised images, plus the distance to the base."""
        entropy = [self.args.seed, self.state.global_step, self.tasks.index(rollout.task), FORWARD_NOISE]
        generators = sample_generators(entropy, rollout.positions)
        levels = self._drawn_levels()
        share = self.rounds.share(rollout.task) / len(levels)
        noises = [gaussian(generators, rollout.latents) for _ in levels]
        r = optimality(rollout.advantages, self.args.advantage_clip)
        return [partial(self._loss, model, rollout, r, t, eps, share) for t, eps in zip(levels, noises, strict=True)]

    def _loss(
        self, model: nn.Module, rollout: Rollout, r: Tensor, t: float, eps: Tensor, share: float
    ) -> tuple[Tensor, Tensor]:
        args, prompts, x0 = self.args, rollout.prompts, rollout.latents
        # As in the paper's code. If student and old policy are equal, the gradient is then that of flow matching times
        # the clipped advantage, for any advantage_clip and nft_beta.
        scale = args.advantage_clip / args.nft_beta
        x = noised(x0, eps, t)
        with torch.no_grad(), self._part("reference"), self.backbone.use(OLD) as network:
            old = self.velocity_field(x, t, prompts, args.guidance_scale, network)
        student = self._student_velocity(model, x, t, prompts)
        loss = scale * nft_loss(student, old, eps - x0, t, r, args.nft_beta, args.loss_weighting).mean()
        kl = loss.new_zeros(())
        if args.beta > 0:
            with torch.no_grad(), self._part("reference"), self.backbone.use(BASE) as network:
                base = self.velocity_field(x, t, prompts, args.guidance_scale, network)
            kl = velocity_gap_sq(student, base).mean()
        gap, norm = velocity_gap_sq(student.detach(), old).mean(), old.float().square().mean()
        figures = torch.stack([loss.detach(), kl.detach(), gap, norm])
        return share * (loss + args.beta * kl), figures

    def _drawn_levels(self) -> list[float]:
        """Draws the noise levels of this update. The same for all tasks and on every process."""
        seed = np.random.SeedSequence([self.args.seed, self.state.global_step, LEVEL_DRAW])
        k = self.args.num_trained_timesteps or len(self.table)
        levels, generator = self.table.levels.tolist(), np.random.default_rng(seed)
        return draw_levels(levels, k, self.args.timestep_sampling, generator, self.velocity_field.trained_levels)

    def _record(self, rollout: Rollout, figures: Tensor) -> Tensor:
        task, levels = rollout.task, self._drawn_levels()
        sizes, clip = rollout.advantages.abs(), self.args.advantage_clip
        of_images = torch.stack([(sizes / clip).mean(), (sizes >= clip).float().mean()])
        values = torch.cat([figures.float(), of_images[:, None].expand(2, len(levels))])
        loss, kl, gap, norm, signal, clipped = self._gather_finite(task, dict(enumerate(levels)), values).mean(0)
        metrics = self._metrics["train"]
        metrics["signal"].append(float(signal.mean()))
        metrics["clip_ratio"].append(float(clipped.mean()))
        metrics[f"old_gap/{task}"].append(float((gap.sum() / norm.sum()).sqrt()))
        if self.args.beta > 0:
            metrics["kl"].append(float(kl.mean()))
            metrics[f"kl/{task}"].append(float(kl.mean()))
        return loss.mean().to(figures.device, torch.float32) * self.rounds.share(task)

    def follow(self) -> None:
        """Moves the old policy toward the student."""
        args = self.args
        decay = old_policy_decay(
            self.state.global_step, args.old_policy_decay_rate, args.old_policy_decay_max, args.old_policy_decay_start
        )
        self.old_policy.follow(self.student.named_parameters(), decay)
        self._metrics["train"]["old_policy_decay"].append(decay)

    # Files

    def _save_state(self, folder: Path) -> None:
        super()._save_state(folder)
        self.old_policy.save(folder, self.args.should_save)

    def _load_state(self, folder: Path) -> None:
        super()._load_state(folder)
        self.old_policy.load(folder)

    def _check_resume(self, folder: Path) -> list[str]:
        problems = super()._check_resume(folder)
        if not (folder / OLD_POLICY_FILE).exists():
            problems.append(f"it has no old policy ({OLD_POLICY_FILE}), so no {type(self).__name__} has saved it.")
        return problems

    def _card_fields(self) -> MethodFacts:
        args, fields = self.args, super()._card_fields()
        fields["method"] = (
            "For each prompt, an old policy drew a group of images, which were scored and noised again. A "
            "flow-matching loss moved the student toward the better images and away from the worse ones."
        )
        fields["settings"] |= {
            "loss": f"weighting {args.loss_weighting}, nft_beta {args.nft_beta}, beta {args.beta}",
            "trained levels": f"{args.num_trained_timesteps or len(self.table)}, by {args.timestep_sampling}",
            "old policy": f"keeps min({args.old_policy_decay_rate} (i - {args.old_policy_decay_start}), "
            f"{args.old_policy_decay_max}) of itself after update i",
        }
        return fields
