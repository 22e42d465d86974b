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

"""The base of all trainers of this package: rounds of tasks, evaluation, logs and files. It has no loss."""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import IntervalStrategy, TrainOutput, speed_metrics
from trl.models.utils import _ForwardRedirection
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import identity

from ..acceleration.processes import lost_process_named
from ..acceleration.quantization import QuantizationConfig
from ..acceleration.sharding import is_split, leave_precision_alone, leave_precision_to_the_model
from ..algorithms.separability import conflict_warning
from ..checkpointing import checkpoint
from ..checkpointing.resume import comparable_after
from ..checkpointing.run_folder import one_run_at_a_time
from ..checkpointing.stopping import StopRequest
from ..data.readers import read_columns
from ..data.source_images import plain_source_images
from ..data.tasks import TaskSampler, plain_dataset
from ..models.merge import MergeReport
from ..models.student import Student
from ..models.teachers import TeacherBank, TeacherSpec
from ..profiling.timing import UpdateCost
from ..reporting import console as tables
from ..reporting.model_card import MethodFacts
from ..reporting.run_lines import use_lines
from ..reporting.trackers import use_public_trackers
from ..rewards import RewardFuncs, Row
from ..rewards.scoring import OnTimeout
from .base_config import DiffusionConfig
from .conflicts import TaskComparison
from .encoding import PromptEncoding
from .image_evaluator import ImageEvaluator
from .passes import StudentPasses
from .preparation import Method, Parts, prepare
from .references import BaseAndTeachers
from .reward_trial import try_rewards
from .run_callback import RunCallback
from .run_files import RunFiles
from .run_logs import RunLogs
from .teaching import place
from .training_pictures import FrozenModel, TrainingPictures, base_model, teacher_models


logger = logging.getLogger(__name__)


class DiffusionTrainer(Method, StudentPasses, PromptEncoding, RunLogs, RunFiles, _BaseTrainer):
    """
    Base class of the diffusion trainers. It trains a diffusers pipeline, on prompts of several tasks.

    A trainer derives from it and overrides [`prepare_method`] (what else to load, and to refuse, before the first
    step) and [`training_step`].

    Attributes:
        tasks (`list[str]`), rounds ([`Rounds`]): the tasks of the training data, and their shares of an update.
        reward_funcs (`dict[str, list[Callable]]`): the rewards of each task.
        student ([`Student`]): the trained weights and their average.
        base_pipeline ([`~diffusers.DiffusionPipeline`]): the pipeline, whose transformer is the student.
        velocity_field ([`VelocityField`]): the pipeline's velocity on the noise levels of training.
        evaluator ([`ImageEvaluator`]): draws and scores images of the student.
        bank ([`TeacherBank`], *optional*): the loaded teachers.
        merge_report ([`MergeReport`], *optional*): with `student_init="merge"`, the error of the student's start.
    """

    loss_is_scaled_for_ga = True  # type: ignore[assignment]  # the loss includes the task's share of the round
    args: DiffusionConfig
    # How often each prompt is repeated in a round, and each round in an epoch.
    repeats, passes = 1, 1
    changes: list[dict[str, object]] = []  # settings that resumes of this run have changed: see `checkpoint.begin`
    was_finished = False  # whether a resume has found nothing left to train
    bank: TeacherBank | None = None
    merge_report: MergeReport | None = None
    timed_parts: tuple[str, ...] = ("data", "encoding", "student", "backward", "optimizer")  # of an update
    on_reward_timeout: OnTimeout = "none"  # as in `Scorer`
    _has_compared = False

    def __init__(
        self,
        model: str | DiffusionPipeline,
        args: DiffusionConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        reward_funcs: RewardFuncs | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: QuantizationConfig = None,
        peft_config: PeftConfig | str | None = "default",
        teachers: TeacherSpec | Mapping[str, TeacherSpec] | None = None,
    ):
        with ExitStack() as undo:  # if anything fails, the caller's pipeline is restored
            parts = prepare(
                type(self),
                undo,
                model=model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                reward_funcs=reward_funcs,
                teachers=teachers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
            super().__init__(
                model=parts.student,
                args=parts.args,
                data_collator=identity,
                train_dataset=parts.train_dataset,
                eval_dataset=parts.eval_dataset,
                callbacks=callbacks,
                optimizers=optimizers,
            )
            self._settle(parts)
            self._take(parts)
            self._start()
            self._say_start(parts.start_lines)
            undo.pop_all()

    def _settle(self, parts: Parts) -> None:
        """Configures accelerate, which exists from now on."""
        if self.is_fsdp_enabled:
            leave_precision_alone(self.accelerator.state.fsdp_plugin)
        self._mixed_precision = self.accelerator.mixed_precision
        if self.is_deepspeed_enabled:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            leave_precision_to_the_model(config, parts.student, self.accelerator.device)
            # Trainer has set it again. DiffusionConfig says why it must be unset.
            unset_hf_deepspeed_config()

    def _take(self, parts: Parts) -> None:
        args, field = parts.args, parts.velocity_field
        self.base_pipeline, self.velocity_field, self.offload = parts.pipeline, field, parts.offload
        self.rounds, self.tasks, self.reward_funcs = parts.rounds, parts.rounds.tasks, parts.reward_funcs
        average = args.ema_decay, args.ema_update_interval
        follow = None if parts.average_copy is None else parts.average_copy.take
        self.student = Student(parts.student, parts.pipeline, *average, args.hub_base_model, follow)
        grid = field.with_steps(args.eval_num_inference_steps)
        self.evaluator = ImageEvaluator(grid, self.student, self.tasks, self.reward_funcs, args, self.accelerator)
        self.readers = self.evaluator.readers
        self._pictures = TrainingPictures(self.evaluator, self.frozen_models)
        self.__dict__.update(parts.method)
        self.base_and_teachers = BaseAndTeachers(self.evaluator, self.bank)
        self.add_callback(RunCallback(self._begin_run, self._warn_of_idle_weights, self._end_update))
        self._stop = StopRequest(self.accelerator, say=tables.print_unwrapped)
        self.add_callback(self._stop)
        use_public_trackers(self.callback_handler.callbacks)
        use_lines(self.callback_handler.callbacks)
        self.offload.rest()
        self._redirect = _ForwardRedirection()
        self._micro_step = 0
        dataset = parts.train_dataset
        columns = read_columns(dataset, of_teachers=self.bank is not None)
        columns += [args.task_column] if args.task_column in dataset.column_names else []
        self.prompts = dataset.select_columns(columns)
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._cost = UpdateCost(self.timed_parts, self.accelerator.device)
        self._part = self._cost.part
        for one in self._fields():
            one.encoding = lambda: self._part("encoding")
        if self.bank is not None:
            compiling = (args.torch_compile_backend, args.torch_compile_mode) if args.torch_compile else None
            place(self.bank, self.accelerator.device, self.student, compiling)

    # Hooks of the trainers

    def _start(self) -> None:
        """Prints what will be trained. Called at the end of the constructor."""

    def _print_teachers(self, bank: TeacherBank) -> None:
        lost = None if self.merge_report is None else self.merge_report.error
        tables.print_teachers(bank.summary(), self.rounds.counts, lost)

    def _evaluate_method(self, dataset: Dataset, metric_key_prefix: str) -> dict[str, float]:
        """Returns the method's own metrics of an evaluation, such as its loss on the prompts."""
        return {}

    def _card_fields(self) -> MethodFacts:
        """Returns the method's fields of [`CardFacts`], all optional: `method`, `teachers`, `settings`, `no_walk`."""
        return {}

    def frozen_parts(self) -> dict[str, list[nn.Parameter]]:
        """The method's weights besides the student's and the pipeline's, by name."""
        if self.bank is None:
            return {}
        name = "teachers" if self.student.is_lora else "teachers and frozen base"
        own = {f"teacher {own.source}": list(own.backbone.parameters()) for own in self.bank.own_pipelines()}
        return {name: list(self.bank.backbone.parameters()), **own}

    def trained_beside(self) -> list[nn.Parameter]:
        """Those of the method's weights that are trained by an optimizer of their own, when the student is not."""
        return []

    @property
    def trained_scale(self) -> float:
        return self.args.guidance_scale

    def task_comparison(self) -> TaskComparison:
        """Makes the object that compares tasks with different teachers."""
        assert self.bank is not None
        return TaskComparison(
            field=self.velocity_field,
            bank=self.bank,
            student=self.student.model,
            accelerator=self.accelerator,
            rounds=self.rounds,
            prompts=self.prompts,
            readers=self.readers,
            batch_size=self.micro_batch_size,
            guidance_scale=self.trained_scale,
            seed=self.args.seed,
            mixed_dtype=self.mixed_dtype,
            rest=self.offload.rest,
        )

    def _compare_tasks(self) -> None:
        """
        Prints, once, how well tasks can be told apart, and warns of those that can't and whose teachers disagree.
        """
        if self.bank is None or self._has_compared:
            return
        self._has_compared = True
        self._in_eval_mode(self.model)
        pairs = self.task_comparison().pairs(self.make_sampler())
        if self.is_world_process_zero():
            tables.print_pairs(pairs)
            if (warning := conflict_warning(pairs)) is not None:
                logger.warning(warning)

    # Trainer's hooks

    def _build_accelerator_args(self, **kwargs: object) -> dict[str, object]:
        # accelerate would compile the student only, as a whole. The blocks are compiled already, the teachers' too.
        accelerator_args = super()._build_accelerator_args(**kwargs)
        return {name: value for name, value in accelerator_args.items() if name != "dynamo_plugin"}

    def _send_telemetry(self) -> None:
        """Sends nothing. TRL's own method would read a language model's config."""

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = self.train_dataset.column_names

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> TaskSampler:
        self._sampler = self.make_sampler()
        return self._sampler

    def make_sampler(self) -> TaskSampler:
        # The order depends only on the data seed, so it is the same on every process.
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return self.rounds.sampler(
            self.micro_batch_size * self.accelerator.num_processes, seed, self.repeats, self.passes
        )

    @property
    def micro_batch_size(self) -> int:
        """Samples of a micro-batch on a process."""
        return self._train_batch_size

    @property
    def samples_of_task(self) -> int:
        """Samples of a task in an update, over all processes."""
        return self.micro_batch_size * self.accelerator.num_processes * self.rounds.micro_batches

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed at the end: Trainer would take one more update
            self.control.should_training_stop = True
            return
        # accelerate does not pass set_epoch on through the wrappers around a sampler (sharding, resuming).
        self._sampler.set_epoch(kwargs["epoch"])
        self._micro_step = 0  # an epoch begins with a whole round, also if it is resumed
        super()._run_epoch(*args, **kwargs)

    def _begin_run(self) -> None:
        """Prints and logs what there is before the first update. All processes must call it."""
        checkpoint.restore_best(self.args.output_dir, self.state, comparable_after(self.changes))
        self._say_average(self.state.max_steps)
        if self.state.global_step > 0:
            self._pictures.logged_at = self.state.global_step  # resumed: the run before has drawn it
        self._log_completions()
        if self.state.global_step == 0:
            self._compare_tasks()
        self._begin_costs()

    def _end_update(self) -> None:
        """Steps the moving average after an update, before it is evaluated or saved."""
        self._encode_together([])  # an evaluation's prompts belong to no update
        self.student.update_ema(self.state.global_step)
        self._cost.stop()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        Trains, or resumes an interrupted run. Only one run at a time can train into an output folder.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Folder of a checkpoint, or `True` for the last complete one in `output_dir`.

        Returns:
            `TrainOutput`: the number of updates, the mean loss, and Trainer's other metrics.

        Raises:
            [`ValueError`]: if the checkpoint is damaged, or its run cannot be continued with these settings; or if a
                reward that the run will call cannot score images.
        """
        with (
            one_run_at_a_time(self.args.output_dir, self.accelerator),
            lost_process_named(
                lambda: f"in update {self.state.global_step + 1}",
                lambda: checkpoint.resume_advice(self.args.output_dir),
            ),
            # PEFT casts a float32 LoRA's input to float32, and autocast casts it back: a waste for whole activations.
            disable_input_dtype_casting(self.model),
            self._stop.listening(),
        ):
            try_rewards(self.evaluator, self._scored_datasets(), self.on_reward_timeout, self.state)
            self.offload.rest()
            checkpoint.set_incomplete_aside(self.args.output_dir, self.accelerator)
            drawn_now = self._pictures.logged_at == 0 == self.state.global_step
            if not drawn_now:  # they are of an earlier training of this trainer
                self._pictures.logged_at = -1
            begun = checkpoint.begin(
                self.args.output_dir,
                resume_from_checkpoint,
                self.accelerator,
                self._check_resume,
                self._changes_since,
                drawn_now=drawn_now,
            )
            self.run, self.changes = begun.run, begun.record
            self.was_finished = 0 < self.args.max_steps <= begun.update
            if self.was_finished:  # nothing is trained, so no change takes effect
                self.changes = self.changes[: len(self.changes) - len(begun.changes)]
                begun = replace(begun, changes=[])
            if begun.folder is not None and self.accelerator.is_main_process:
                tables.print_resume(begun.folder.name, begun.update, [change.row() for change in begun.changes])
                if comparable_after(self.changes) == begun.update:
                    tables.print_line("Evaluations now measure something else: the best so far begins anew.")
            return super().train(None if begun.folder is None else str(begun.folder), *args, **kwargs)

    def _scored_datasets(self) -> list[Dataset]:
        """The datasets whose images the rewards score during training."""
        args, dataset = self.args, self.eval_dataset
        if args.eval_strategy == IntervalStrategy.NO and not args.eval_on_start and not args.log_completions:
            return []
        if dataset is None:
            return [self.train_dataset]
        return list(dataset.values()) if isinstance(dataset, Mapping) else [dataset]

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Row]], num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Returns the micro-batches of an optimizer step. Trainer asks for all at once, so an update begins here."""
        self._cost.start()
        with self._part("data"):
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            with self._part("encoding"):
                self._encode_together(self._companies())
        if self.offload.modules:  # encode all prompts of the round now, so that the encoders can leave the device
            for i, rows in enumerate(batches):
                self._encode_ahead(self.turn(i, rows)[0], rows)
            with self._part("encoding"):
                self.offload.rest()
        return batches, num_items

    def turn(self, number: int, rows: list[Row]) -> tuple[str, list[int]]:
        """Returns a micro-batch's task, and its samples' positions among the task's. See [`Rounds.turn`]."""
        process = self.accelerator.process_index, self.accelerator.num_processes
        return self.rounds.turn(number, rows, self.micro_batch_size, self.state.global_step + 1, process)

    def _end_micro_batch(self) -> None:
        self._micro_step = (self._micro_step + 1) % len(self.rounds)
        if self._micro_step == 0:
            self._cost.clock.go_on_with("optimizer")

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        # Trainer's last call before the optimizer's step. The norm is the same on every process.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # With fp16 an overflow is normal: the scaler skips the step and lowers its scale.
        if norm is not None and not self.args.fp16 and not math.isfinite(norm):
            raise FloatingPointError(
                f"The gradient of update {self.state.global_step + 1} is not finite (norm {float(norm)}). Training "
                "stops before the optimizer's step; the last checkpoint is untouched. Try dtype float32."
            )
        return norm

    # Evaluation

    def evaluate(
        self,
        eval_dataset: str | Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Draws images for the prompts of `eval_dataset` with the averaged weights and scores them.

        The noise of an image depends only on the seed, its task and its number, so evaluations can be compared.

        Returns:
            `dict[str, float]`: `eval_{task}/{reward}` for every reward, `eval_reward` (the mean over tasks of their
            rewards' means, on a common scale: see [`on_common_scale`]), and timings: the seconds of drawing,
            `eval_generation_time`, and of each reward meanwhile, `eval_reward_time/{reward}`. With a dict of datasets,
            the names are `eval_{name}_…`.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]  # type: ignore[index]  # a name is a key of a dict of datasets
        if isinstance(dataset, Mapping):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if dataset is None:
            raise ValueError("Evaluation needs an eval_dataset.")
        dataset = plain_source_images(plain_dataset(dataset, self.args.task_column), self.args.source_images_column)
        self._in_eval_mode(self.model)
        references = self.base_and_teachers.of(dataset, self.state, self.run if self.is_in_train else None)
        start = time.time()
        metrics, count = self.evaluator.evaluate(
            dataset,
            metric_key_prefix,
            self.state,
            lambda: self._evaluate_method(dataset, metric_key_prefix),
            references,
        )
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=count)
        self.log(metrics)
        self._print_evaluation(metrics, dataset, metric_key_prefix, references)
        self._log_completions()  # the first log opens the trackers
        self.offload.rest()
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def frozen_models(self, task: str) -> list[FrozenModel]:
        """The frozen models whose images are shown beside the student's: the base, and the task's teachers."""
        backbone = None if self.bank is None else self.bank.backbone
        models = base_model(self.student, backbone, self.args.evaluation_guidance, self.state)
        return models if self.bank is None else models + teacher_models(self.bank, task)

    @contextmanager
    def averaged_student(self) -> Iterator[nn.Module]:
        """Context that yields the student's network with its averaged weights. Afterwards it offloads the encoders."""
        with self.student.ema_weights():
            yield self.student.model
        self.offload.rest()

    def pipeline(self, *args: object, **kwargs: object) -> Any:
        """
        Calls the pipeline with the student's averaged weights. Takes the arguments of the pipeline's `__call__`.

        Raises:
            [`RuntimeError`]: if FSDP or ZeRO-3 has split the model among processes.
        """
        if is_split(self.model):
            raise RuntimeError(
                "trainer.pipeline(...) needs the whole model, but it is split among the processes. Call "
                "trainer.save_model(folder) on all of them and load the folder into a pipeline, or use "
                "trainer.evaluate()."
            )
        with self.averaged_student(), torch.no_grad():
            return self.base_pipeline(*args, **kwargs)

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training log: it gets the metrics gathered since the one before
            self._add_metrics(logs, self.samples_of_task * len(self.tasks))
        super().log(logs, start_time)
