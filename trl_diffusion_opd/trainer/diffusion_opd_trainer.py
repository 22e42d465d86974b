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

"""Distils several frozen teachers into one student, on the trajectories that the student itself samples."""

import logging
import math
from collections.abc import Mapping

import numpy as np
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch import Tensor, nn
from transformers import TrainerCallback

from ..acceleration.quantization import QuantizationConfig
from ..algorithms.flow import velocity_gap_sq
from ..algorithms.opd import StepPlan, policy_gradient_loss
from ..algorithms.rollout import STEP_DRAW, sample_generators, walk
from ..algorithms.samplers import default_skip_last_steps, sampler_table
from ..data.readers import Texts
from ..data.tasks import task_rows
from ..guards.files import JSON
from ..guards.redaction import shown
from ..models.backbone import STUDENT
from ..models.lora_adapter import rescaled_factors
from ..models.student import STUDENT_ADAPTER
from ..models.teacher_config import TeacherSpec
from ..models.teachers import TeacherBank
from ..problems import Problems
from ..reporting import console as tables
from ..reporting.model_card import MethodFacts
from ..rewards import RewardFuncs, Row
from . import dry_run
from .base_config import DiffusionConfig
from .base_trainer import DiffusionTrainer
from .diffusion_opd_config import DiffusionOPDConfig
from .preparation import Parts
from .teaching import load_teachers


logger = logging.getLogger(__name__)


class DiffusionOPDTrainer(DiffusionTrainer):
    """
    Trainer for on-policy distillation of diffusion models ([DiffusionOPD](https://huggingface.co/papers/2605.15055)).

    For each prompt the student generates an image. At every denoising step, the frozen teacher of the prompt's task
    computes its own velocity at the same latents, and the loss is the weighted squared difference of the two
    velocities: the exact KL between their steps. The student's forward that draws the image is also the one that is
        trained, so no
    trajectory is stored.

    Example:

    ```python
    from trl_diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer, tiny

    trainer = DiffusionOPDTrainer(
        model=tiny.BASE,
        teachers=tiny.TEACHERS,
        args=DiffusionOPDConfig("student", height=32, width=32, max_sequence_length=12, guidance_scale=1.0,
        max_steps=50), train_dataset=tiny.dataset("train"),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            The base: a Hub id, a folder, or a loaded pipeline. The transformer of a loaded pipeline is wrapped in
            place.
        teachers (`str`, [`TeacherConfig`], `list` of these, or `dict` from task to any of these):
            The frozen teachers of each task. Without a dict, they serve every prompt. A string is `"base"`, a folder,
            or `owner/repo[/sub/folder][@revision]`. The target of a list is the weighted mean of its velocities.
        reward_funcs (function, `list` or `dict` from task to either, *optional*):
            Rewards that are measured on the images of evaluations. They never enter the loss.
        args ([`DiffusionOPDConfig`], *optional*):
            Configuration. By default, that of the class, with an `output_dir` named after the model.
        train_dataset ([`~datasets.Dataset`]):
            The prompts: columns `prompt` and `task`, and `teacher_prompt` where teachers read something else. All
            columns are passed to the reward functions.
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
            all weights; the LoRA teachers then use a frozen copy of the base.

    Raises:
        [`ValueError`]: before the first step, if anything is wrong. One message lists everything.
    """

    _tag_names = ["trl", "diffusion-opd"]
    _name = "DiffusionOPD"
    _paper = {
        "title": "DiffusionOPD",
        "id": "2605.15055",
        "citation": "@article{diffusionopd,\n    title  = {{DiffusionOPD}},\n    eprint = {arXiv:2605.15055},\n}",
    }
    args: DiffusionOPDConfig
    bank: TeacherBank
    plan: StepPlan
    config_class = DiffusionOPDConfig
    timed_parts = (*DiffusionTrainer.timed_parts, "teacher", "rollout", "reference", "noise_floor")

    def __init__(
        self,
        model: str | DiffusionPipeline,
        teachers: TeacherSpec | Mapping[str, TeacherSpec],
        reward_funcs: RewardFuncs | None = None,
        args: DiffusionOPDConfig | None = None,
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
        assert isinstance(args, DiffusionOPDConfig)
        with problems.collect():
            table = sampler_table(args.sampler, parts.velocity_field.levels, args.noise_level)
            skip = default_skip_last_steps(args.sampler) if args.skip_last_steps is None else args.skip_last_steps
            plan = parts.method["plan"] = StepPlan.of(table, args.loss_weighting, skip)
            if args.num_trained_timesteps is not None and args.num_trained_timesteps > len(plan):
                problems.append(
                    f"num_trained_timesteps={args.num_trained_timesteps}: only {len(plan)} of the {len(table)} steps "
                    f"can be trained, since skip_last_steps leaves out the last {skip}."
                )
        load_teachers(parts, problems, args.teacher_guidance_scale, args.batch_teachers)

    def _start(self) -> None:
        self._noise_floor: float | None = None
        self._measured_floor_at = -1
        self._lost_in_rounding: set[str] = set()
        if self.is_world_process_zero():
            self._print_teachers(self.bank)
            tables.print_steps(self.plan, self.args.loss_weighting)
            tables.print_trained(self.student.parameters())

    def dry_run(self) -> dict[str, JSON]:
        """
        Shows what a run would do, without training. It draws an image of the base, each teacher and the student, so
        that a wrong LoRA or a wrong guidance scale is seen before the run.

        Prints for every task the KL and the velocity gap of the first update, then memory, and the time of an update
        and of the run. The images are saved to `dry_run/` in the output folder, one file each, and `dry_run.png` with
        all of them. Nothing is trained, pushed or sent to a tracker. Call it before `train`, on all processes.

        Returns:
            `dict`: the printed figures, as [`~dry_run.dry_run`] describes them.
        """
        return dry_run.dry_run(self, self.bank, self.plan)

    # Training

    # The type of `inputs` differs from Trainer's, whose inputs are a dict of tensors.
    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: list[Row], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """
        Samples a trajectory for one task's prompts. At every trained step it computes the teacher's and the student's
        velocity and runs the backward of their weighted squared difference, then goes on to the next state.
        """
        self._in_eval_mode(model)
        task, positions = self.turn(self._micro_step, inputs)
        texts = self.texts(task, inputs)
        generators = sample_generators([self.args.seed, self.state.global_step, self.tasks.index(task)], positions)
        steps = self._drawn_steps()
        last = max(steps)
        share = self.rounds.share(task) / len(self.plan)
        gaps: dict[int, Tensor] = {}
        norms: dict[int, Tensor] = {}

        def velocity(j: int, x: Tensor, z: Tensor | None) -> Tensor:
            t = float(self.plan.table.levels[j])
            if j not in steps:
                with torch.no_grad():
                    if not self.args.on_policy:
                        return self._target(task, x, t, texts)
                    with self._part("rollout"):
                        return self.velocity_field(x, t, texts.student, self.args.guidance_scale, self.student.model)
            with torch.no_grad():
                target = self._target(task, x, t, texts)
                if j == last:
                    self._measure_noise_floor(x, t, texts.student)
            with self._gradient_sync(model, last=j == last):
                student = self._student_velocity(model, x, t, texts.student)
                loss = self._step_loss(j, student, target, z)
                if self.args.beta > 0:
                    loss = loss + self.args.beta * self._base_loss(j, student, x, t, texts)
                self._backward(share * steps[j] * loss.mean())
            student = student.detach()
            gaps[j], norms[j] = velocity_gap_sq(student, target).mean(), target.float().square().mean()
            return student if self.args.on_policy else target

        x = self.velocity_field.initial_latents(texts.student, generators)
        walk(velocity, x, self.plan.table.head(last + 1), generators)
        loss = self._record(task, steps, gaps, norms) * self.rounds.share(task)
        self._end_micro_batch()
        return loss

    def _drawn_steps(self) -> dict[int, float]:
        """Draws the trained steps of this update, with their inverse probabilities. The same on every process."""
        return self.plan.draw(self.args.num_trained_timesteps, [self.args.seed, self.state.global_step, STEP_DRAW])

    def _step_loss(self, j: int, student: Tensor, target: Tensor, z: Tensor | None) -> Tensor:
        weight, table = float(self.plan.weights[j]), self.plan.table
        if self.args.loss_type == "policy_gradient":
            return policy_gradient_loss(student, target, z, float(table.c[j]), float(table.s[j]), weight)
        return weight * velocity_gap_sq(student, target)

    def _base_loss(self, j: int, student: Tensor, x: Tensor, t: float, texts: Texts) -> Tensor:
        with torch.no_grad(), self._part("reference"), self.bank.use(None) as transformer:
            base = self.velocity_field(x, t, texts.prompt, self.args.guidance_scale, transformer)
        return float(self.plan.weights[j]) * velocity_gap_sq(student, base)

    def base_scales(self, task: str) -> set[float]:
        return {self.args.guidance_scale} if self.args.beta > 0 else set()

    def _record(self, task: str, steps: dict[int, float], gaps: dict[int, Tensor], norms: dict[int, Tensor]) -> Tensor:
        """Gathers the squared gaps of all processes, refuses non-finite ones, and logs metrics. Returns the loss."""
        order = sorted(gaps)
        local = torch.stack([torch.stack([gaps[j] for j in order]), torch.stack([norms[j] for j in order])])
        everyone = self._gather_finite(task, {j: float(self.plan.table.levels[j]) for j in order}, local)
        gap, norm = everyone.mean(0)
        kl = float(self.plan.kl(gap, steps))
        for name, value in (
            ("kl", kl),
            (f"kl/{task}", kl),
            (f"velocity_gap/{task}", math.sqrt(gap.sum() / norm.sum())),
        ):
            self._metrics["train"][name].append(value)
        if self._noise_floor is not None:
            self._metrics["train"]["noise_floor"].append(self._noise_floor)
            self._noise_floor = None
        return self.plan.loss(gap, steps).to(local.device, torch.float32)

    def _measure_noise_floor(self, x: Tensor, t: float, prompts: list[str]) -> None:
        """
        Measures, once for each log, the KL that rounding alone causes: the student is compared with itself after its
        LoRA factors are rescaled, which changes only the rounding. A KL near this floor means nothing.
        """
        update = self.state.global_step
        interval = max(int(self.state.logging_steps), 1)  # it is 0 if logs are by epoch
        if not self.student.is_lora or update == self._measured_floor_at or update % interval:
            return
        self._measured_floor_at = update
        scale = self.args.guidance_scale
        with self._part("noise_floor"), self.bank.backbone.use(STUDENT) as network:
            one = self.velocity_field(x, t, prompts, scale, network)
            with rescaled_factors(network, STUDENT_ADAPTER):
                two = self.velocity_field(x, t, prompts, scale, network)
        self._noise_floor = float(self.plan.kl_weights.mean()) * float(velocity_gap_sq(one, two).mean())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self.is_world_process_zero():
            self._warn_of_rounding(logs)

    def _warn_of_rounding(self, logs: dict[str, float]) -> None:
        """
        Warns, once for each task, when its KL is mostly rounding. Rounding adds to the measured KL, so the KL hardly
        falls below the floor. If it is less than twice the floor, the true KL is less than the floor.
        """
        floor = logs.get("noise_floor", 0.0)
        for task in self.tasks:
            kl = logs.get(f"kl/{task}", math.inf)
            if kl < 2 * floor and task not in self._lost_in_rounding:
                self._lost_in_rounding.add(task)
                logger.warning(
                    f"kl/{shown(task)} is {kl:.2g} at update {self.state.global_step}, with a noise_floor of "
                    f"{floor:.2g}: the remaining gap between the student and the teacher of task {task!r} is smaller "
                    "than the rounding of this precision, so further updates only follow rounding. Stop here. Or, if "
                    "the base is in half precision, go on with dtype='float32' and bf16=False."
                )

    # Evaluation and files

    @torch.no_grad()
    def _evaluate_method(self, dataset: Dataset, metric_key_prefix: str) -> dict[str, float]:
        """Computes loss and KL on the training grid for each task's first evaluation prompts, one micro-batch."""
        losses, kls = [], {}
        for task, rows in task_rows(dataset, self.args.task_column).items():
            size = self.args.per_device_eval_batch_size
            first = self.accelerator.process_index * size
            indices = list(range(first, first + size))
            texts = self.texts(task, [dataset[int(row)] for row in np.resize(rows, first + size)[first:]])
            loss, kl = self._walk_gap(task, texts, indices)
            losses.append(loss)
            kls[f"{metric_key_prefix}_kl/{task}"] = kl
        return {f"{metric_key_prefix}_loss": sum(losses) / len(losses), **kls}

    @classmethod
    def method_metrics(cls, dataset: Dataset, args: DiffusionConfig, with_teachers: bool) -> list[str]:
        return ["loss", *(f"kl/{task}" for task in task_rows(dataset, args.task_column))]

    def _walk_gap(self, task: str, texts: Texts, indices: list[int]) -> tuple[float, float]:
        generators = sample_generators([self.args.seed, STEP_DRAW, self.tasks.index(task)], indices)
        gaps = []

        def velocity(j: int, x: Tensor, z: Tensor | None) -> Tensor:
            t = float(self.plan.table.levels[j])
            student = self.velocity_field(x, t, texts.student, self.args.guidance_scale, self.student.model)
            gaps.append(velocity_gap_sq(student, self._target(task, x, t, texts)).mean())
            return student

        x = self.velocity_field.initial_latents(texts.student, generators)
        walk(velocity, x, self.plan.walked, generators)
        gap = self.accelerator.gather(torch.stack(gaps)[None]).cpu().double().mean(0)
        return float(self.plan.loss(gap)), float(self.plan.kl(gap))

    def _card_fields(self) -> MethodFacts:
        args = self.args
        drawn = "" if args.num_trained_timesteps is None else f", {args.num_trained_timesteps} drawn for each update"
        return {
            "method": "The student sampled its own trajectories. At each step it was trained to match the velocity of the "
            "frozen teacher of the prompt's task.",
            "teachers": self.bank.manifest(),
            "settings": {
                "loss": f"{args.loss_type}, weighting {args.loss_weighting}, beta {args.beta}",
                "trained steps": f"{len(self.plan)} of {args.num_inference_steps}{drawn}",
            },
            "steps_drawn": args.num_trained_timesteps is not None,
        }
