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

"""Distils several teachers into one student by matching distributions: DMD2 and TDM, for students of few steps."""

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from ..acceleration.quantization import QuantizationConfig
from ..algorithms.dmd import fake_loss, image_of, noise_left, noised_further, renoise_levels, student_loss
from ..algorithms.flow import velocity_gap_sq
from ..algorithms.rollout import FAKE_DRAW, RENOISE_DRAW, gaussian, sample_generators, walk
from ..algorithms.samplers import SamplerTable, sampler_table
from ..guards.files import JSON
from ..guards.finite import not_finite
from ..hub.files import FAKE_OPTIMIZER_FILE, FAKE_SCORE_FILE
from ..models.fake_score import FAKE, FakeScore
from ..models.teacher_config import TeacherSpec
from ..models.teachers import TeacherBank
from ..problems import Problems
from ..reporting import console as tables
from ..reporting.model_card import MethodFacts
from ..rewards import RewardFuncs, Row
from . import dry_run_dmd
from .base_trainer import DiffusionTrainer
from .checks import own_level_problems
from .diffusion_dmd_config import DiffusionDMDConfig
from .drawn import Drawn
from .preparation import Parts
from .teaching import load_teachers


class DiffusionDMDTrainer(DiffusionTrainer):
    """
    Trainer for distribution matching distillation from several teachers: [DMD2](https://huggingface.co/papers/2405.14867)
    and [TDM](https://huggingface.co/papers/2503.06674).

    The student draws images in `num_inference_steps` steps. They are noised again, and the prompt's teacher (the real
    score) and a copy of the student that has learnt to denoise the student's images (the fake score) say there how the
    teacher's images differ from the student's. The student's images move that way. Since no trajectory is followed, a
    student of 4 steps can have teachers of 40.

    Example:

    ```python
    from trl_diffusion_opd import DiffusionDMDConfig, DiffusionDMDTrainer, tiny

    trainer = DiffusionDMDTrainer(
        model=tiny.BASE,
        teachers=tiny.TEACHERS,
        args=DiffusionDMDConfig("student", num_inference_steps=4, height=32, width=32, max_sequence_length=12,
        guidance_scale=1.0, max_steps=50), train_dataset=tiny.dataset("train"),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            The base: a Hub id, a folder, or a loaded pipeline. The transformer of a loaded pipeline is wrapped in
            place.
        teachers (`str`, [`TeacherConfig`], `list` of these, or `dict` from task to any of these):
            The frozen teachers of each task, as for [`DiffusionOPDTrainer`].
        reward_funcs (function, `list` or `dict` from task to either, *optional*):
            Rewards that are measured on the images of evaluations. They never enter the loss.
        args ([`DiffusionDMDConfig`], *optional*):
            Configuration. By default, that of the class, with an `output_dir` named after the model.
        train_dataset ([`~datasets.Dataset`]):
            The prompts: columns `prompt` and, with several tasks, `task`. Other columns are passed to the reward
            functions.
        eval_dataset ([`~datasets.Dataset`] or `dict` of them, *optional*):
            Prompts of evaluations, with the same columns.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Further callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            The student's optimizer and scheduler, to use instead of those of `args`.
        quantization_config ([`~diffusers.PipelineQuantizationConfig`] or diffusers' config for a model, *optional*):
            How a base that is given by name is quantized, with bitsandbytes or torchao. A config for a model is
            applied to the transformer. The LoRAs of student and fake stay float32.
        peft_config ([`~peft.LoraConfig`], *optional*, defaults to `"default"`):
            The student's LoRA, as for [`DiffusionOPDTrainer`]; the fake is a second one of the same shape. `None`
            trains all weights; then the fake is a whole network.

    Raises:
        [`ValueError`]: before the first step, if anything is wrong. One message lists everything.
    """

    _tag_names = ["trl", "diffusion-dmd"]
    _name = "DiffusionDMD"
    _paper = {
        "title": "Improved Distribution Matching Distillation for Fast Image Synthesis",
        "id": "2405.14867",
        "citation": "@article{dmd2,\n    title  = {{Improved Distribution Matching Distillation for Fast Image "
        "Synthesis}},\n    eprint = {arXiv:2405.14867},\n}",
    }
    args: DiffusionDMDConfig
    bank: TeacherBank
    table: SamplerTable
    fake: FakeScore
    config_class = DiffusionDMDConfig
    timed_parts = (*DiffusionTrainer.timed_parts, "teacher", "rollout", "fake", "fake_backward", "reference")

    def __init__(
        self,
        model: str | DiffusionPipeline,
        teachers: TeacherSpec | Mapping[str, TeacherSpec],
        reward_funcs: RewardFuncs | None = None,
        args: DiffusionDMDConfig | None = None,
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
            teachers=teachers,
        )

    # Before the first step

    @classmethod
    def prepare_method(cls, parts: Parts, problems: Problems) -> None:
        args = parts.args
        assert isinstance(args, DiffusionDMDConfig)
        with problems.collect():
            table = parts.method["table"] = sampler_table(args.sampler, parts.velocity_field.levels, args.noise_level)
            if (left := noise_left(table)) > 0:
                problems.append(
                    f"sampler={args.sampler!r} leaves noise in its last state (standard deviation {left:.2g} beyond "
                    f"the level {float(table.levels[-1]):.2g} of the grid's end), so the student's walk does not end "
                    "at an image x0, whose distribution could be matched. Use ode, dpm2m, cps or ddim."
                )
        problems += own_level_problems(parts.transformer, args)
        load_teachers(parts, problems, args.teacher_guidance_scale, args.batch_teachers)
        if "bank" in parts.method:  # student_init='merge' has set the student's start by now
            with problems.collect():
                fake = parts.method["fake"] = FakeScore(parts.method["bank"].backbone, parts.student)
                if not fake.is_lora:
                    parts.use_attention_backend(fake.network)

    def _start(self) -> None:
        # It gives the pipeline's shift: a level for each timestep of the scheduler.
        self._fine_levels = self.velocity_field.with_all_levels().levels
        network: Any = self.fake.network
        if not self.fake.is_lora:  # accelerate prepares the student alone
            if self.mixed_dtype is not None:
                autocast = torch.autocast(self.accelerator.device.type, self.mixed_dtype)
                network.forward = convert_outputs_to_fp32(autocast(network.forward))
            if self.args.activation_checkpointing:
                network.enable_gradient_checkpointing()
        if self.is_world_process_zero():
            self._print_teachers(self.bank)
            tables.print_trained(self.student.parameters())
            args = self.args
            tables.print_line(
                f"{args.loss_type}: a student of {len(self.table)} steps; before each of its updates {args.fake_updates} "
                f"of the fake score, with learning rate {args.fake_learning_rate:g}."
            )

    def dry_run(self) -> dict[str, JSON]:
        """
        Shows what a run would do, without training. It draws an image of the base, each teacher and the student, so
        that a wrong LoRA or a wrong guidance scale is seen before the run.

        Prints for every task how far the scores of teacher and fake are apart, then memory, and the time of an update
        and of the run. The images are saved to `dry_run/` in the output folder, one file each, and `dry_run.png` with
        all of them. Nothing is trained, pushed or sent to a tracker. Call it before `train`, on all processes.

        Returns:
            `dict`: the printed figures, as [`~dry_run_dmd.dry_run`] describes them.
        """
        return dry_run_dmd.dry_run(self, self.bank, self.fake, self.draw, self._renoised, self._fake_loss)

    def trained_beside(self) -> list[nn.Parameter]:
        return list(self.fake.named_parameters().values())

    def frozen_parts(self) -> dict[str, list[nn.Parameter]]:
        fake = list(self.fake.named_parameters().values())
        own = {id(parameter) for parameter in fake}
        others = {name: [p for p in part if id(p) not in own] for name, part in super().frozen_parts().items()}
        return {**others, "fake score": fake}

    @property
    def student_scales(self) -> set[float]:
        return {self.trained_scale, 1.0}  # the fake is conditional only

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.fake.optimizer is None:
            self._start_fake_optimizer()
        if resume_from_checkpoint is not None:
            self.fake.load_optimizer(resume_from_checkpoint)
        return prepared

    def _start_fake_optimizer(self) -> None:
        """Makes the fake's optimizer: of the student's kind, with its own learning rate and betas."""
        args = self.args
        given = {
            "learning_rate": args.fake_learning_rate,
            "adam_beta1": args.fake_adam_beta1,
            "adam_beta2": args.fake_adam_beta2,
        }
        kept = {name: vars(args)[name] for name in given}
        vars(args).update(given)
        try:
            kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        finally:
            vars(args).update(kept)
        self.fake.start_optimizer(kind, {**options, "weight_decay": args.weight_decay})

    # The student's walks

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Row]], num_batches: int, device: torch.device
    ) -> tuple[list[Drawn], Tensor | int | None]:
        """
        Returns the micro-batches of an optimizer step: the states of the student's walks for the loader's prompts.
        Before, the fake score has learnt the images of these walks.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        drawn = [self.draw(number, rows) for number, rows in enumerate(batches)]
        if drawn:
            self._train_fake(drawn)
        return drawn, num_items

    def floating_point_ops(self, inputs: object) -> int:
        """Returns 0: FLOPs are not counted. Trainer's own method would look for a language model's inputs."""
        return 0

    @torch.no_grad()
    def draw(self, number: int, rows: list[Row]) -> Drawn:
        """Walks the student's steps for a micro-batch, and keeps the states at one step of each sample."""
        self._in_eval_mode(self.model_wrapped)
        task, positions = self.turn(number, rows)
        texts = self.texts(task, rows)
        entropy = [self.args.seed, self.state.global_step, self.tasks.index(task)]
        generators = sample_generators([*entropy, RENOISE_DRAW], positions)
        steps = torch.tensor([int(torch.randint(len(self.table), (1,), generator=one)) for one in generators])
        noise, levels = sample_generators(entropy, positions), self.table.levels
        x = self.velocity_field.initial_latents(texts.student, noise)
        start, image, end = (torch.empty_like(x) for _ in range(3))

        def velocity(j: int, x: Tensor, z: Tensor | None) -> Tensor:
            t = float(levels[j])
            with self._part("rollout"):
                v = self.velocity_field(x, t, texts.student, self.args.guidance_scale, self.student.model)
            here, before = ((steps == step).to(x.device) for step in (j, j - 1))
            start[here], image[here], end[before] = x[here], image_of(x, v, t)[here], x[before]
            return v

        # Always to the end: each process walks equally far.
        x = walk(velocity, x, self.table, noise)
        last = (steps == len(self.table) - 1).to(x.device)
        end[last] = x[last]
        end_levels = levels[steps + 1]
        if self.args.loss_type == "dmd2":
            end, end_levels = image, torch.zeros_like(end_levels)
        return Drawn(task, texts, positions, generators, start, levels[steps], image, end, end_levels)

    def _renoised(self, drawn: Drawn, generators: list[torch.Generator]) -> tuple[Tensor, Tensor, Tensor]:
        """Noises each sample to a level of its own. Returns the states, their levels and the fresh noise."""
        args = self.args
        q = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
        z = gaussian(generators, drawn.end)
        if args.loss_type == "dmd2":
            ends = [(0.0, 1.0)] * len(q)
        else:
            ends = list(zip(drawn.end_levels.tolist(), drawn.levels.tolist(), strict=True))
        t = renoise_levels(q, ends, self._fine_levels, args.min_renoise_level, args.max_renoise_level)
        lowest, highest = self.velocity_field.trained_levels
        t = t.clamp(lowest, highest)
        return noised_further(drawn.end, z, drawn.end_levels, t), t, z

    # Training

    def _train_fake(self, drawn: list[Drawn]) -> None:
        """Takes the fake's updates on the images of a round. Each covers all tasks, as the student's does."""
        seed, update = self.args.seed, self.state.global_step
        generators = [
            sample_generators([seed, update, self.tasks.index(one.task), FAKE_DRAW], one.positions) for one in drawn
        ]
        losses: dict[str, list[Tensor]] = {one.task: [] for one in drawn}
        norms = []
        with self.fake.trained():
            for _ in range(self.args.fake_updates):
                for i, (one, own) in enumerate(zip(drawn, generators, strict=True)):
                    # FSDP2 reduces the gradients in the last backward. DDP knows nothing of the fake.
                    is_last = i == len(drawn) - 1
                    with nullcontext() if is_last else self.accelerator.no_sync(self.model_wrapped):
                        # The backward computes checkpointed blocks again, and needs the fake active.
                        with self.bank.backbone.use(FAKE) as network:
                            with self._part("fake"):
                                loss = self._fake_loss(network, one, own).mean()
                            with self._part("fake_backward"):
                                (self.rounds.share(one.task) * loss).backward()
                    losses[one.task].append(loss.detach())
                with self._part("optimizer"):
                    norms.append(self.fake.step(self.args.max_grad_norm))
        metrics = self._metrics["train"]
        for task, of_task in losses.items():
            everyone = self._gather_finite(task, None, torch.stack(of_task).mean()[None, None])
            metrics[f"fake_loss/{task}"].append(float(everyone.mean()))
        if not all(map(math.isfinite, norms)):
            raise FloatingPointError(
                f"The gradient of the fake score is not finite in update {update + 1}. Training stops; the last "
                "checkpoint is untouched. Try a smaller fake_learning_rate, or dtype float32."
            )
        metrics["fake_grad_norm"].append(sum(norms) / len(norms))

    def _fake_loss(self, network: nn.Module, drawn: Drawn, generators: list[torch.Generator]) -> Tensor:
        x, t, eps = self._renoised(drawn, generators)
        v = self.velocity_field(x, t.tolist(), drawn.texts.student, 1.0, network)
        loss = fake_loss(v, x, t, drawn.image, eps, self.args.loss_type)
        # The fake learns as its network was trained. TDM's weights are ratios of signal and noise, the same for all.
        weights = self.velocity_field.output_weights(t.tolist()) if self.args.loss_type == "dmd2" else None
        return loss if weights is None else loss * torch.tensor(weights, device=loss.device, dtype=loss.dtype)

    # The type of `inputs` differs from Trainer's, whose inputs are a dict of tensors.
    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: Drawn, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Replays one step of each sample with gradient, and moves its image by the difference of fake and teacher."""
        self._in_eval_mode(model)
        task, texts = inputs.task, inputs.texts
        with torch.no_grad():
            x, t, _ = self._renoised(inputs, inputs.generators)
            real = self._target(task, x, t.tolist(), texts)
            with self._part("reference"), self.bank.backbone.use(FAKE) as network:
                fake = self.velocity_field(x, t.tolist(), texts.student, 1.0, network)
        with self._gradient_sync(model, last=True):
            v = self._student_velocity(model, inputs.start, inputs.levels.tolist(), texts.student)
            image = image_of(inputs.start, v, inputs.levels)
            loss = student_loss(image, x, t, real, fake, self.args.loss_type, self.args.huber_c).mean()
            self._backward(self.rounds.share(task) * loss)
        figures = torch.stack([loss.detach(), velocity_gap_sq(fake, real).mean(), real.float().square().mean()])
        mean = self._record(task, figures)
        self._end_micro_batch()
        return (mean * self.rounds.share(task)).to(x.device, torch.float32)

    def _record(self, task: str, figures: Tensor) -> Tensor:
        """Logs a micro-batch's metrics, and returns the mean loss over processes. All stop if one is not finite."""
        loss, gap, norm = self._gather_finite(task, None, figures[:, None]).mean((0, 2))
        metrics = self._metrics["train"]
        metrics[f"loss/{task}"].append(float(loss))
        metrics[f"score_gap/{task}"].append(math.sqrt(gap / norm))
        return loss

    # Files

    def _save_state(self, folder: Path) -> None:
        super()._save_state(folder)
        self.fake.save(folder, self.args.should_save)
        if not self.args.save_only_model:
            self.fake.save_optimizer(folder, self.args.should_save)

    def _load_state(self, folder: Path) -> None:
        super()._load_state(folder)
        self.fake.load(folder)

    def _check_resume(self, folder: Path) -> list[str]:
        problems = super()._check_resume(folder)
        missing = [name for name in (FAKE_SCORE_FILE, FAKE_OPTIMIZER_FILE) if not (folder / name).exists()]
        if missing:
            problems.append(
                f"it has no {' and '.join(missing)}: it was not saved by a {type(self).__name__}, or with "
                "save_only_model=True."
            )
        return problems

    def _not_finite(self) -> list[str]:
        return [*super()._not_finite(), *not_finite(self.fake.states())]

    def _card_fields(self) -> MethodFacts:
        args = self.args
        paper = "DMD2 (arXiv 2405.14867)" if args.loss_type == "dmd2" else "TDM (arXiv 2503.06674)"
        return {
            "method": "The student drew its own images. They were moved to where the score of the frozen teacher of the "
            "prompt's task and that of a copy of the student, trained on the student's images, differ.",
            "teachers": self.bank.manifest(),
            "settings": {
                "loss": f"distribution matching, {paper}"
                + (f", huber_c {args.huber_c:g}" * (args.loss_type == "tdm")),
                "steps of the student": str(args.num_inference_steps),
                "fake score": f"{args.fake_updates} update(s) before each of the student's, learning rate "
                f"{args.fake_learning_rate:g}, Adam betas {args.fake_adam_beta1:g} and {args.fake_adam_beta2:g}",
                "levels": f"{args.min_renoise_level:g} to {args.max_renoise_level:g} before the shift",
            },
        }
