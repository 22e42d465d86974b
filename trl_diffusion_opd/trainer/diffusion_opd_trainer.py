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
from ..algorithms.fixed_states import FixedStates
from ..algorithms.flow import velocity_gap_sq
from ..algorithms.opd import StepPlan, branch_gap_sq, policy_gradient_loss
from ..algorithms.rollout import FIXED_DRAW, STEP_DRAW, sample_generators, walk
from ..algorithms.samplers import default_skip_last_steps, sampler_table
from ..data.readers import Texts
from ..data.tasks import task_rows
from ..guards.files import JSON
from ..guards.redaction import shown
from ..models.backbone import STUDENT
from ..models.lora_adapter import rescaled_factors
from ..models.roles import frozen_roles
from ..models.student import STUDENT_ADAPTER
from ..models.targets import State, anchor_scales
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
from .target_checks import extrapolation_warning, target_problems
from .teaching import load_teachers


logger = logging.getLogger(__name__)

# Samples of a task on a process whose fixed states are compared. Their teachers' velocities are kept in host memory.
_FIXED_SAMPLES = 4
# How many tasks' fixed states are kept. Evaluations on ever new prompts would keep ever more.
_FIXED_TASKS = 64


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
            plan = parts.method["plan"] = StepPlan.of(
                table, args.loss_weighting, skip, args.timestep_density, args.unbiased_timesteps
            )
            if args.num_trained_timesteps is not None and args.num_trained_timesteps > len(plan):
                problems.append(
                    f"num_trained_timesteps={args.num_trained_timesteps}: only {len(plan)} of the {len(table)} steps "
                    f"can be trained, since skip_last_steps leaves out the last {skip}."
                )
        load_teachers(parts, problems, args.teacher_guidance_scale, args.batch_teachers)
        if "bank" in parts.method:
            problems += target_problems(args, parts.method["bank"], parts.velocity_field)

    def _start(self) -> None:
        self._branches = self.args.guidance_branch_weight > 0
        self._fixed_states: dict[tuple[str, ...], FixedStates] = {}
        self._noise_floor: float | None = None
        self._measured_floor_at = -1
        self._lost_in_rounding: set[str] = set()
        if self.is_world_process_zero():
            self._print_teachers(self.bank)
            tables.print_steps(self.plan, self.args.loss_weighting)
            tables.print_trained(self.student.parameters())
            if (warning := extrapolation_warning(self.args.teacher_extrapolation)) is not None:
                logger.warning(warning)

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
        squares: dict[int, Tensor] = {}

        def velocity(j: int, x: Tensor, z: Tensor | None) -> Tensor:
            state = self._state(j, x)
            if j not in steps:
                with torch.no_grad():
                    if not self.args.on_policy:
                        return self._guided(self._target_at(task, state, texts))
                    with self._part("rollout"):
                        return self.velocity_field(
                            x, state.t, texts.student, self.args.guidance_scale, self.student.model
                        )
            with torch.no_grad():
                target = self._target_at(task, state, texts)
                if j == last:
                    self._measure_noise_floor(x, state.t, texts.student)
            with self._gradient_sync(model, last=j == last):
                student = self._student_velocity(model, x, state.t, texts.student, branches=self._branches)
                loss = self._step_loss(j, student, target, z)
                if self.args.beta > 0:
                    loss = loss + self.args.beta * self._base_loss(j, student, state, texts)
                self._backward(share * steps[j] * loss.mean())
            student = student.detach()
            squares[j] = self._squares(student, target)
            return self._guided(student if self.args.on_policy else target)

        x = self.velocity_field.initial_latents(texts.student, generators)
        walk(velocity, x, self.plan.table.head(last + 1), generators)
        loss = self._record(task, steps, squares) * self.rounds.share(task)
        self._end_micro_batch()
        return loss

    def teacher_scales(self, task: str) -> set[float]:
        # What the target is seen from reads what the teachers read.
        roles = () if self.bank is None else self.bank.teachers.get(task, ())
        return super().teacher_scales(task) | anchor_scales(roles, self.args.teacher_extrapolation)

    def _state(self, j: int, x: Tensor) -> State:
        t = float(self.plan.table.levels[j])
        return State(self.bank, self.velocity_field, x, t, self._branches, self._part)

    def _target_at(self, task: str, state: State, texts: Texts) -> Tensor:
        """What the student is taught at a state; with `guidance_branch_weight`, the branches too."""
        return state.target(self.bank.teachers[task], texts.teacher, self.args.teacher_extrapolation)

    def _guided(self, velocity: Tensor) -> Tensor:
        """The guided velocity, which is the first of the branches."""
        return velocity[0] if self._branches else velocity

    def _squares(self, student: Tensor, target: Tensor) -> Tensor:
        """
        The squared gap of the guided velocities and the squared norm of the target's, averaged over a micro-batch; with
        `guidance_branch_weight` also the squared gap that is trained. Shape `(2,)` or `(3,)`.
        """
        one, other = self._guided(student), self._guided(target)
        squares = [velocity_gap_sq(one, other), other.float().square()]
        if self._branches:
            squares.append(branch_gap_sq(student, target, self.args.guidance_branch_weight))
        return torch.stack([of_samples.mean() for of_samples in squares])

    def _drawn_steps(self) -> dict[int, float]:
        """Draws the trained steps of this update, with their inverse probabilities. The same on every process."""
        return self.plan.draw(self.args.num_trained_timesteps, [self.args.seed, self.state.global_step, STEP_DRAW])

    def _step_loss(self, j: int, student: Tensor, target: Tensor, z: Tensor | None) -> Tensor:
        weight, table = float(self.plan.weights[j]), self.plan.table
        if self.args.loss_type == "policy_gradient":
            return policy_gradient_loss(student, target, z, float(table.c[j]), float(table.s[j]), weight)
        if self._branches:
            return weight * branch_gap_sq(student, target, self.args.guidance_branch_weight)
        return weight * velocity_gap_sq(student, target)

    def _base_loss(self, j: int, student: Tensor, state: State, texts: Texts) -> Tensor:
        with torch.no_grad():
            base = state.base(texts.prompt, self.args.guidance_scale)
        return float(self.plan.weights[j]) * velocity_gap_sq(self._guided(student), self._guided(base))

    def base_scales(self, task: str) -> set[float]:
        return {self.args.guidance_scale} if self.args.beta > 0 else set()

    def _record(self, task: str, steps: dict[int, float], squares: dict[int, Tensor]) -> Tensor:
        """
        Gathers what [`_squares`] returned at each step on all processes, refuses non-finite ones, and logs metrics.
        Returns the loss.
        """
        order = sorted(squares)
        local = torch.stack([squares[j] for j in order], dim=1)
        everyone = self._gather_finite(task, {j: float(self.plan.table.levels[j]) for j in order}, local)
        gap, norm, *trained = everyone.mean(0)
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
        return self.plan.loss(trained[0] if trained else gap, steps).to(local.device, torch.float32)

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
        """
        Computes loss and KL on the training grid for each task's first evaluation prompts, one micro-batch; and the KL
        on fixed states of its teachers.
        """
        losses, kls, fixed = [], {}, {}
        for task, rows in task_rows(dataset, self.args.task_column).items():
            size = self.args.per_device_eval_batch_size
            first = self.accelerator.process_index * size
            indices = list(range(first, first + size))
            texts = self.texts(task, [dataset[int(row)] for row in np.resize(rows, first + size)[first:]])
            loss, kl = self._walk_gap(task, texts, indices)
            losses.append(loss)
            kls[f"{metric_key_prefix}_kl/{task}"] = kl
            fixed[f"{metric_key_prefix}_fixed_kl/{task}"] = self._fixed_kl(task, dataset, rows)
        return {f"{metric_key_prefix}_loss": sum(losses) / len(losses), **kls, **fixed}

    @classmethod
    def method_metrics(cls, dataset: Dataset, args: DiffusionConfig, with_teachers: bool) -> list[str]:
        tasks = list(task_rows(dataset, args.task_column))
        return ["loss", *(f"{name}/{task}" for name in ("kl", "fixed_kl") for task in tasks)]

    def _walk_gap(self, task: str, texts: Texts, indices: list[int]) -> tuple[float, float]:
        generators = sample_generators([self.args.seed, STEP_DRAW, self.tasks.index(task)], indices)
        squares = []

        def velocity(j: int, x: Tensor, z: Tensor | None) -> Tensor:
            state = self._state(j, x)
            network = self.velocity_field.branches if self._branches else self.velocity_field
            student = network(x, state.t, texts.student, self.args.guidance_scale, self.student.model)
            squares.append(self._squares(student, self._target_at(task, state, texts)))
            return self._guided(student)

        x = self.velocity_field.initial_latents(texts.student, generators)
        walk(velocity, x, self.plan.walked, generators)
        means = self.accelerator.gather(torch.stack(squares, dim=1)[None]).cpu().double().mean(0)
        return float(self.plan.loss(means[-1 if self._branches else 0])), float(self.plan.kl(means[0]))

    def _fixed_kl(self, task: str, dataset: Dataset, rows: np.ndarray) -> float:
        """
        The student's KL on its teachers' own trajectories and on their noised images, for a few of a task's first
        prompts. The teachers compute their velocities there in the first evaluation only. A student that is its own
        teacher is compared with what it began as.
        """
        field, process = self.velocity_field, self.accelerator.process_index
        size = min(_FIXED_SAMPLES, self.args.per_device_eval_batch_size)
        every = [dataset[int(row)] for row in np.resize(rows, size * self.accelerator.num_processes)]
        # Of all processes, which must all find the states that are kept, or none.
        key = (task, *self.texts(task, every).teacher)
        numbers = range(process * size, (process + 1) * size)
        texts = self.texts(task, [every[n] for n in numbers])
        roles = frozen_roles(self.bank.teachers[task])

        def teacher(x: Tensor, t: float) -> Tensor:
            return State(self.bank, field, x, t).target(roles, texts.teacher, self.args.teacher_extrapolation)

        if key not in self._fixed_states:
            if len(self._fixed_states) == _FIXED_TASKS:
                self._fixed_states.clear()
            generators = sample_generators([self.args.seed, FIXED_DRAW, self.tasks.index(task)], numbers)
            start = field.initial_latents(texts.student, generators)
            self._fixed_states[key] = FixedStates.of(teacher, start, generators, self.plan)
        scale, network = self.args.guidance_scale, self.student.model
        # One kind of states at a time: both together could need more memory than a micro-batch.
        kl = self._fixed_states[key].kl(
            lambda x, t: torch.cat([field(kind, t, texts.student, scale, network) for kind in x.chunk(2)])
        )
        return float(self.accelerator.gather(kl.to(self.accelerator.device, torch.float32)[None]).double().mean())

    def _card_fields(self) -> MethodFacts:
        args = self.args
        drawn = "" if args.num_trained_timesteps is None else f", {args.num_trained_timesteps} drawn for each update"
        if args.timestep_density is not None:
            a, b = args.timestep_density
            drawn += f" from Beta({a:g}, {b:g}){'' if args.unbiased_timesteps else ', not corrected for it'}"
        beyond = {} if args.teacher_extrapolation == 1 else {"target": _target_words(args.teacher_extrapolation)}
        branches = (
            {"branches of guidance": f"matched, weight {args.guidance_branch_weight:g}"} if self._branches else {}
        )
        return {
            "method": "The student sampled its own trajectories. At each step it was trained to match the velocity of the "
            "frozen teacher of the prompt's task.",
            "teachers": self.bank.manifest(),
            "settings": {
                "loss": f"{args.loss_type}, weighting {args.loss_weighting}, beta {args.beta}",
                "trained steps": f"{len(self.plan)} of {args.num_inference_steps}{drawn}",
                **beyond,
                **branches,
            },
            "steps_drawn": args.num_trained_timesteps is not None,
        }


def _target_words(extrapolation: float) -> str:
    return f"{extrapolation:g} times as far from the base as the teachers (teacher_extrapolation)"
