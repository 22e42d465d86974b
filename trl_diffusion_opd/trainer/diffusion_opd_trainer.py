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

"""On-policy distillation of several frozen teachers into one student, one pass along each trajectory."""

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

    The student walks its own trajectory for the prompts of every task. At each state it visits, the task's frozen teacher
    says where it would go, and the student is pulled there by the closed-form KL of their transitions. The student's
    forward of the walk is the training forward, so nothing of the trajectory is stored.

    Example:

    ```python
    from trl_diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer, tiny

    trainer = DiffusionOPDTrainer(
        model=tiny.BASE,
        teachers=tiny.TEACHERS,
        args=DiffusionOPDConfig("student", height=32, width=32, max_sequence_length=12, guidance_scale=1.0, max_steps=50),
        train_dataset=tiny.dataset("train"),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            The base: a Hub id, a folder, or a pipeline, whose transformer is then wrapped in place.
        teachers (`str`, [`TeacherConfig`], `list` of these, or `dict` from task to any of these):
            The frozen teachers of each task; without a dict they serve every prompt. A string is `"base"`, a folder, or
            `owner/repo[/sub/folder][@revision]`. A list is a weighted mean of velocities.
        reward_funcs (function, `list` or `dict` from task to either, *optional*):
            Rewards that are measured on the images of evaluations. They never enter the loss.
        args ([`DiffusionOPDConfig`], *optional*):
            Configuration. If not given, the default with an `output_dir` named after the model.
        train_dataset ([`~datasets.Dataset`]):
            Columns `prompt` and `task`; others are passed to the reward functions.
        eval_dataset ([`~datasets.Dataset`] or `dict` of them, *optional*)
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*)
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler, if not those of `args`.
        quantization_config ([`~diffusers.PipelineQuantizationConfig`] or a config of diffusers for a model, *optional*):
            How a base that is given by name is quantised, by bitsandbytes or torchao; one for a model is the transformer's.
            The LoRA on it stays float32.
        peft_config ([`~peft.LoraConfig`], *optional*, defaults to `"default"`):
            The student's LoRA. `"default"` is the paper's (rank 32, alpha 64, attention projections); `None` trains all
            weights, and a frozen copy of the base then serves the LoRA teachers.

    Raises:
        [`ValueError`]: before the first step, with everything that is wrong in one message.
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
                    f"num_trained_timesteps={args.num_trained_timesteps}: only {len(plan)} steps are "
                    f"trained of {len(table)}, without the last {skip} (skip_last_steps)."
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
        What a run would do, without one: an update's worth of forwards, and an image of the base, of each teacher and of the
        student, so that a wrong LoRA or a wrong guidance scale is seen before the run.

        Prints, for every task, the KL and the velocity gap that the first update would see, memory, and the time of an
        update and of the run. The images go to `dry_run/` in the output folder, one file each and `dry_run.png` with all of
        them. Nothing is trained, pushed or reported to a tracker. Call it before `train`, on all processes.

        Returns:
            `dict`: what is printed, as [`~dry_run.dry_run`] describes it.
        """
        return dry_run.dry_run(self, self.bank, self.plan)

    # Training

    # Trainer expects a dict of tensors. Here a micro-batch is a list of rows.
    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: list[Row], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """
        Walks the trajectory of one task's prompts once. At every trained step: the teacher's velocity, the student's, the
        weighted gap, its backward, and on to the next state.
        """
        self._in_eval_mode(model)
        task, positions = self.turn(self._micro_step, inputs)
        prompts = [row["prompt"] for row in inputs]
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
                        return self._target(task, x, t, prompts)
                    with self._part("rollout"):
                        return self.velocity_field(x, t, prompts, self.args.guidance_scale, self.student.model)
            with torch.no_grad():
                target = self._target(task, x, t, prompts)
                if j == last:
                    self._measure_noise_floor(x, t, prompts)
            with self._gradient_sync(model, last=j == last):
                student = self._student_velocity(model, x, t, prompts)
                loss = self._step_loss(j, student, target, z)
                if self.args.beta > 0:
                    loss = loss + self.args.beta * self._base_loss(j, student, x, t, prompts)
                self._backward(share * steps[j] * loss.mean())
            student = student.detach()
            gaps[j], norms[j] = velocity_gap_sq(student, target).mean(), target.float().square().mean()
            return student if self.args.on_policy else target

        x = self.velocity_field.initial_latents(prompts, generators)
        walk(velocity, x, self.plan.table.head(last + 1), generators)
        loss = self._record(task, steps, gaps, norms) * self.rounds.share(task)
        self._end_micro_batch()
        return loss

    def _drawn_steps(self) -> dict[int, float]:
        """The trained steps of this update and the inverse of their probabilities: the same on every process."""
        return self.plan.draw(self.args.num_trained_timesteps, [self.args.seed, self.state.global_step, STEP_DRAW])

    def _step_loss(self, j: int, student: Tensor, target: Tensor, z: Tensor | None) -> Tensor:
        weight, table = float(self.plan.weights[j]), self.plan.table
        if self.args.loss_type == "policy_gradient":
            return policy_gradient_loss(student, target, z, float(table.c[j]), float(table.s[j]), weight)
        return weight * velocity_gap_sq(student, target)

    def _base_loss(self, j: int, student: Tensor, x: Tensor, t: float, prompts: list[str]) -> Tensor:
        with torch.no_grad(), self._part("reference"), self.bank.use(None) as transformer:
            base = self.velocity_field(x, t, prompts, self.args.guidance_scale, transformer)
        return float(self.plan.weights[j]) * velocity_gap_sq(student, base)

    def _record(self, task: str, steps: dict[int, float], gaps: dict[int, Tensor], norms: dict[int, Tensor]) -> Tensor:
        """Gathers the squared gaps of all processes, refuses what is not finite, keeps the metrics; the weighted loss."""
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
        The KL that two equal networks show, once a log: the student against itself with its LoRA factors rescaled, which
        changes nothing but the rounding. A KL near it says nothing.
        """
        update = self.state.global_step
        interval = max(int(self.state.logging_steps), 1)  # 0 where logs are by epoch
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
        Says once a task that its KL is mostly rounding. Rounding adds to what is measured, so the KL hardly falls below
        the floor itself: less than twice the floor means that less than the floor is left of it.
        """
        floor = logs.get("noise_floor", 0.0)
        for task in self.tasks:
            kl = logs.get(f"kl/{task}", math.inf)
            if kl < 2 * floor and task not in self._lost_in_rounding:
                self._lost_in_rounding.add(task)
                logger.warning(
                    f"kl/{shown(task)} is {kl:.2g} at update {self.state.global_step}, with a noise_floor of {floor:.2g}: what is "
                    f"left of the gap between the student and the teacher of task {task!r} is below the rounding of this "
                    "precision, and to go on follows rounding. Stop here, or, where the base is in half precision, go on "
                    "with dtype='float32' and bf16=False."
                )

    # Evaluation and files

    @torch.no_grad()
    def _evaluate_method(self, dataset: Dataset, metric_key_prefix: str) -> dict[str, float]:
        """The loss and the KL on the first prompts of the evaluation, one micro-batch a task on the training grid."""
        losses, kls = [], {}
        for task, rows in task_rows(dataset, self.args.task_column).items():
            size = self.args.per_device_eval_batch_size
            first = self.accelerator.process_index * size
            indices = list(range(first, first + size))
            prompts = [dataset[int(row)]["prompt"] for row in np.resize(rows, first + size)[first:]]
            loss, kl = self._walk_gap(task, prompts, indices)
            losses.append(loss)
            kls[f"{metric_key_prefix}_kl/{task}"] = kl
        return {f"{metric_key_prefix}_loss": sum(losses) / len(losses), **kls}

    @classmethod
    def method_metrics(cls, dataset: Dataset, args: DiffusionConfig, with_teachers: bool) -> list[str]:
        return ["loss", *(f"kl/{task}" for task in task_rows(dataset, args.task_column))]

    def _walk_gap(self, task: str, prompts: list[str], indices: list[int]) -> tuple[float, float]:
        generators = sample_generators([self.args.seed, STEP_DRAW, self.tasks.index(task)], indices)
        gaps = []

        def velocity(j: int, x: Tensor, z: Tensor | None) -> Tensor:
            t = float(self.plan.table.levels[j])
            student = self.velocity_field(x, t, prompts, self.args.guidance_scale, self.student.model)
            gaps.append(velocity_gap_sq(student, self._target(task, x, t, prompts)).mean())
            return student

        x = self.velocity_field.initial_latents(prompts, generators)
        walk(velocity, x, self.plan.walked, generators)
        gap = self.accelerator.gather(torch.stack(gaps)[None]).cpu().double().mean(0)
        return float(self.plan.loss(gap)), float(self.plan.kl(gap))

    def _card_fields(self) -> MethodFacts:
        args = self.args
        drawn = "" if args.num_trained_timesteps is None else f", {args.num_trained_timesteps} drawn for each update"
        return {
            "method": "The student walked its own trajectories; at each state the frozen teacher of the prompt's task gave "
            "the velocity to follow.",
            "teachers": self.bank.manifest(),
            "settings": {
                "loss": f"{args.loss_type}, weighting {args.loss_weighting}, beta {args.beta}",
                "trained steps": f"{len(self.plan)} of {args.num_inference_steps}{drawn}",
            },
        }
