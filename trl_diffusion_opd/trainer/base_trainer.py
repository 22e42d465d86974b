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

"""What every trainer of this package shares: the pipeline, the student, rounds of tasks, evaluation, files. No loss."""

import copy
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from datasets.utils.py_utils import convert_file_size_to_int
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import SaveStrategy
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import identity

from ..acceleration.attention import use_attention_backend
from ..acceleration.compilation import compile_blocks
from ..acceleration.offload import Offload, offloaded
from ..acceleration.processes import lost_process_named
from ..acceleration.quantization import base_weight, exempt_from_broadcast
from ..acceleration.sharding import leave_precision_alone, leave_precision_to_the_model
from ..checkpointing import checkpoint
from ..checkpointing.resume import Change, KeptSettings, changes_since, prompts_of
from ..checkpointing.run_folder import folder_problems, one_run_at_a_time
from ..checkpointing.stopping import StopRequest
from ..data.tasks import TaskSampler, plain_dataset, task_of, task_rows
from ..guards.files import write_json
from ..guards.finite import not_finite
from ..guards.redaction import public_arguments, public_name, shown
from ..hub import push as hub
from ..hub.files import ARGUMENTS_FILE
from ..hub.repository import PushError, make_repository, repository_name, repository_problems
from ..models.average import average_line, lag_problem
from ..models.lora_config import layer_problems
from ..models.student import STUDENT_ADAPTER, Student, default_lora_config
from ..models.teachers import TeacherError, add_adapter, parse_teacher, read_lora
from ..pipelines.fingerprints import encoder_fingerprint
from ..pipelines.loading import load_pipeline
from ..pipelines.prompt_store import PromptStore
from ..pipelines.velocity import VelocityField
from ..problems import Problems
from ..profiling.flops import matmul_rate
from ..profiling.timing import UpdateCost
from ..reporting import console as tables
from ..reporting.model_card import CardFacts, write_model_card
from ..reporting.trackers import use_public_trackers
from ..rewards import RewardFuncs, rewards_by_task
from .base_config import MERGE, DiffusionConfig
from .best_metric import metric_problems
from .checks import (
    evaluation_data_problems,
    launch_problems,
    loader_problems,
    loading_problems,
    model_problems,
    scored_data_problems,
    training_data_problems,
)
from .evaluating_trainer import EvaluatingTrainer, applicable_mean
from .failed_start import gives_back, restorer, without_student


logger = logging.getLogger(__name__)


class _StudentCallback(TrainerCallback):
    """Shows where training starts, and steps the moving average after every update, before it is evaluated or saved."""

    def __init__(self, trainer: "DiffusionTrainer"):
        self.trainer = trainer
        self._has_looked = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        checkpoint.restore_best(args.output_dir, state)
        if state.global_step >= state.max_steps:
            logger.warning(
                f"This run is finished: it has made {state.global_step} of {state.max_steps} updates. To extend it, set a larger "
                "max_steps (or num_train_epochs)."
            )
        self.trainer._say_average(state.max_steps)
        self.trainer._log_completions()
        if state.global_step == 0:
            self.trainer._compare_tasks()
        self.trainer._begin_costs()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._has_looked:
            self._has_looked = True
            self.trainer._warn_of_idle_weights()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.velocity_field.encode_together([])  # an evaluation's prompts belong to no update
        self.trainer.student.update_ema(state.global_step)
        self.trainer._cost.stop()


class DiffusionTrainer(EvaluatingTrainer):
    """
    Base of the diffusion trainers: a diffusers pipeline in place of a language model, and prompts of several tasks.

    A trainer derives from it and overrides [`_setup`] (what else it loads and refuses before the first step) and
    [`training_step`].
    """

    loss_is_scaled_for_ga = True  # a task's share of the round is in the loss
    args: DiffusionConfig
    _undo: ExitStack  # what a failed start undoes, made by `gives_back`
    _config_class: type[DiffusionConfig]
    # How often a prompt comes in a round, and a round in an epoch.
    _repeats, _passes = 1, 1
    # The run that a training belongs to, and what its resumes have changed: see `checkpoint.begin`.
    run: str
    changes: list[dict[str, Any]] = []
    _teacher_specs: Any = None
    # What the seconds of an update are made of.
    _parts: tuple[str, ...] = ("data", "encoding", "student", "backward", "optimizer")

    @gives_back
    def __init__(
        self,
        model: str | DiffusionPipeline,
        args: DiffusionConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        reward_funcs: RewardFuncs | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | str | None = "default",
    ):
        if args is None:
            name = model if isinstance(model, str) else str(model.config.get("_name_or_path"))
            method = self._config_class.__name__.removeprefix("Diffusion").removesuffix("Config")
            args = self._config_class(f"{name.rstrip('/').split('/')[-1]}-{method}")
        if not isinstance(args, self._config_class):
            raise ValueError(
                f"args is a {type(args).__name__}, which is for another trainer: {type(self).__name__} takes a "
                f"{self._config_class.__name__}."
            )
        self._offload = Offload([], args.device)
        set_seed(args.seed)  # before the LoRA's random initialisation
        self._pipeline = load_pipeline(model, args.dtype, _dict(args.model_init_kwargs), quantization_config)
        if isinstance(model, DiffusionPipeline):
            self._undo.callback(restorer(self._components()))
        transformer: Any = self._pipeline.components.get("transformer")
        self.args = args
        if isinstance(train_dataset, Dataset):
            train_dataset = plain_dataset(train_dataset, args.task_column)
        eval_dataset = plain_dataset(eval_dataset, args.task_column)
        problems = Problems(training_data_problems(train_dataset, args.task_column))
        self._task_rows = {} if problems else task_rows(train_dataset, args.task_column)
        self.tasks = list(self._task_rows)
        self.reward_funcs: dict[str, list[Callable[..., Any]]] = {}
        if self.tasks:
            unscored = Problems(evaluation_data_problems(eval_dataset, args.task_column, self.tasks))
            with unscored.collect():
                self.reward_funcs = rewards_by_task(reward_funcs, self.tasks)
            problems += unscored or metric_problems(args, eval_dataset, self.reward_funcs, self._method_metrics)
            problems += scored_data_problems(self.reward_funcs, train_dataset, eval_dataset, args.task_column)
            self._set_accumulation(args, problems)
            self._set_task_weights(args, problems)
        # Problems of the data don't keep the model from being checked, so that one message says everything.
        unfit = Problems(loading_problems(model, self._pipeline, args, quantization_config))
        unfit += model_problems(self._pipeline, args, peft_config)
        problems += launch_problems(transformer, args) + loader_problems(args)
        if args.student_init == MERGE and self._teacher_specs is None:
            problems.append(
                "student_init='merge' starts from the mean of the teachers' LoRAs, and there are no teachers. Name a LoRA, or "
                "say './merge' if a folder of that name is meant."
            )
        student_model: Any = None
        if not unfit:
            with unfit.collect():
                prompt_store = self._prompt_store(args)
                if args.offload_encoders:
                    self._offload = Offload(offloaded(self._pipeline), args.device)
                    self._undo.callback(self._offload.remove)
            for component in self._components():
                component.eval()  # the checks below encode prompts, which are kept: without dropout
                if all(component is not other for other in self._offload.modules):
                    component.to(args.device)  # the checks below run the pipeline
        if not unfit:
            with unfit.collect():
                self.velocity_field = VelocityField(
                    self._pipeline,
                    num_inference_steps=args.num_inference_steps,
                    height=args.height,
                    width=args.width,
                    max_sequence_length=args.max_sequence_length,
                    generation_kwargs=_dict(args.generation_kwargs),
                    prompt_store=prompt_store,
                )
        if not unfit:
            for scale in {args.guidance_scale, args.evaluation_guidance}:
                with problems.collect():
                    self.velocity_field.check_guidance(scale)
            with problems.collect():
                if (put_back := self._use_attention_backend(transformer, as_student=True)) is not None:
                    self._undo.callback(put_back)
            self._undo.callback(without_student(transformer))
            with unfit.collect():
                student_model = self._make_student(transformer, args, peft_config)
            if isinstance(student_model, PeftModel):
                unfit += layer_problems(student_model)
        if not unfit:
            self._setup(student_model, problems)
        if args.should_save:
            problems += folder_problems(args.output_dir)
        if args.push_to_hub:
            problems += self._push_problems(args, full_weights=peft_config is None)
        Problems([*unfit, *problems]).raise_under(f"{type(self).__name__} cannot start")
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every trained parameter takes part; the search costs time
        if args.ddp_broadcast_buffers is None:
            args.ddp_broadcast_buffers = False  # they are constants, and SD3's table of positions alone has 453 MB
        if args.torch_compile:
            compile_blocks(transformer, args.torch_compile_backend, args.torch_compile_mode)
        exempt_from_broadcast(student_model)

        super().__init__(
            model=student_model,
            args=args,
            data_collator=identity,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.n_gpu > 1:
            raise ValueError("Several GPUs in one process (DataParallel) are not supported: use `accelerate launch`.")
        if self.is_fsdp_enabled:
            leave_precision_alone(self.accelerator.state.fsdp_plugin)
        self._mixed_precision = self.accelerator.mixed_precision
        if self.is_deepspeed_enabled:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            leave_precision_to_the_model(config, student_model, self.accelerator.device)
            # Trainer has set it again: see the arguments.
            unset_hf_deepspeed_config()
        self.student = Student(student_model, self._pipeline, args.ema_decay, args.ema_update_interval)
        self.eval_field = self.velocity_field.with_steps(args.eval_num_inference_steps)
        self.add_callback(_StudentCallback(self))
        self._stop = StopRequest(self.accelerator, say=tables.print_line)
        self.add_callback(self._stop)
        use_public_trackers(self.callback_handler.callbacks)
        self._offload.rest()
        self._redirect = _ForwardRedirection()
        self._wrapped_and_own: tuple[nn.Module, nn.Module] | None = None
        self._micro_step = 0
        assert train_dataset is not None  # it has been checked
        self._prompts = train_dataset.select_columns(["prompt"])
        self._prompts_digest: dict[str, Any] | None = None
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._cost = UpdateCost(self._parts, self.accelerator.device)
        self._part = self._cost.part
        self.velocity_field.encoding = lambda: self._part("encoding")

    # Hooks of the trainers

    def _setup(self, model: nn.Module, problems: Problems) -> None:
        """Loads what the method needs beyond the student. Everything that is wrong goes into `problems`."""

    def _compare_tasks(self) -> None:
        """Says before the first step what the tasks have to do with each other. All processes call it."""

    def _card_fields(self) -> dict[str, Any]:
        """
        What the model card says of the method: `method`, `teachers`, `settings` and `no_walk` of [`CardFacts`]; all optional.
        """
        return {}

    def _frozen_parts(self) -> dict[str, list[Tensor]]:
        """Weights that the method has beside the student and the pipeline, by name."""
        return {}

    def _guidance_scales(self, task: str) -> set[float]:
        """The guidance scales at which a task's prompts are asked for in training."""
        return {self.args.guidance_scale}

    def _trained_scale(self) -> float:
        """The guidance scale of the student's forwards that have a backward."""
        return self.args.guidance_scale

    # Before the first step

    def _prompt_store(self, args: DiffusionConfig) -> PromptStore | None:
        if args.prompt_cache_dir is None:
            return None
        size = convert_file_size_to_int(args.prompt_cache_max_size)
        return PromptStore(args.prompt_cache_dir, encoder_fingerprint(self._pipeline), size)

    def _use_attention_backend(self, network: Any, as_student: bool) -> Callable[[], None] | None:
        """Sets what `attention_backend` says, or refuses it. Mixed precision is for the student's network alone."""
        if self.args.attention_backend is None:
            return None
        mixed = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        batch_size = max(self.args.per_device_train_batch_size, self.args.per_device_eval_batch_size)
        trial = partial(self.velocity_field.one_forward, network, batch_size)
        return use_attention_backend(network, self.args.attention_backend, trial, mixed if as_student else None)

    def _push_problems(self, args: DiffusionConfig, full_weights: bool) -> list[str]:
        # One process asks, and all of them stop or go on.
        found: list[list[str]] = [[]]
        if args.process_index == 0:
            found = [self._repository_problems(args, full_weights, args.hub_token)]
        if args.world_size > 1:
            broadcast_object_list(found)
        return found[0]

    def _repository_problems(self, args: DiffusionConfig, full_weights: bool, token: str | None) -> list[str]:
        name = repository_name(args.hub_model_id, args.output_dir)
        kind = type(self._pipeline.components.get("transformer")).__name__ if full_weights else None
        return repository_problems(name, public_name(self._pipeline.config.get("_name_or_path")), kind, token)

    def _components(self) -> Iterator[nn.Module]:
        return (component for component in self._pipeline.components.values() if isinstance(component, nn.Module))

    def _set_accumulation(self, args: DiffusionConfig, problems: list[str]) -> None:
        n = len(self.tasks)
        if args.gradient_accumulation_steps is None:
            args.gradient_accumulation_steps = n
        self._micro_batches = args.gradient_accumulation_steps // n  # of each task in a round
        if args.gradient_accumulation_steps % n:
            fitting = -(-args.gradient_accumulation_steps // n) * n
            problems.append(
                f"gradient_accumulation_steps={args.gradient_accumulation_steps} is not a multiple of the {n} tasks "
                f"({', '.join(self.tasks)}), which all have an equal part of an update. Use {fitting}, or leave it unset."
            )

    def _set_task_weights(self, args: DiffusionConfig, problems: list[str]) -> None:
        weights = _dict(args.task_weights) or {}
        self._task_weights = {task: float(weights.get(task, 1.0)) for task in self.tasks}
        unknown = [task for task in weights if task not in self.tasks]
        if unknown:
            problems.append(f"task_weights names tasks {unknown} without prompts; the data has {self.tasks}.")

    def _make_student(
        self, transformer: nn.Module, args: DiffusionConfig, peft_config: PeftConfig | str | None
    ) -> nn.Module:
        for component in self._components():
            component.requires_grad_(False)
            component.eval()
        model: nn.Module
        if peft_config is None:
            model = transformer.requires_grad_(True)
        elif args.student_init not in (None, MERGE):  # a merge needs the teachers, which are loaded later
            config, weights, files = read_lora(self._pipeline, parse_teacher(args.student_init))
            if isinstance(peft_config, LoraConfig) and (peft_config.r, peft_config.lora_alpha) != (
                config.r,
                config.lora_alpha,
            ):
                logger.warning(
                    f"The student goes on from {args.student_init}, a LoRA of rank {config.r} and alpha {config.lora_alpha}. The "
                    f"peft_config of rank {peft_config.r} and alpha {peft_config.lora_alpha} has no effect."
                )
            try:
                model = add_adapter(transformer, STUDENT_ADAPTER, config, weights, trainable=True)
            except TeacherError as error:
                raise TeacherError(f"{files.label}: {error}") from error
        else:
            config = peft_config if isinstance(peft_config, PeftConfig) else default_lora_config(transformer)
            config = copy.deepcopy(config)  # the caller's stays as it is
            config.base_model_name_or_path = None  # PEFT warns of another base than this one, which has no name to it
            config.task_type = None  # TRL's CAUSAL_LM would look for a language model's methods
            config.lora_dropout = 0.0  # the walk's forward is the training forward: it must be deterministic
            config.inference_mode = False  # that of a config which was read from a saved LoRA freezes it
            model = get_peft_model(transformer, config, adapter_name=STUDENT_ADAPTER)
        model.eval()
        # Names under which Trainer looks for what diffusers calls enable_gradient_checkpointing.
        model.activation_checkpointing_enable = lambda **_: transformer.enable_gradient_checkpointing()  # type: ignore
        return model

    # Trainer's hooks

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        # accelerate would compile the student alone, as a whole and as a wrapper. The blocks are compiled already, teachers' too.
        accelerator_args = super()._build_accelerator_args(**kwargs)
        return {name: value for name, value in accelerator_args.items() if name != "dynamo_plugin"}

    def _send_telemetry(self) -> None:
        """TRL's reads the config of a language model. Nothing is sent."""

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = self.train_dataset.column_names

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> TaskSampler:
        self._sampler = self._make_sampler()
        return self._sampler

    def _make_sampler(self) -> TaskSampler:
        # The order depends on the data seed alone, so every process has the same.
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return TaskSampler(
            [self._task_rows[task] for task in self.tasks],
            batch_size=self._train_batch_size * self.accelerator.num_processes,
            micro_batches=self._micro_batches,
            seed=seed,
            repeats=self._repeats,
            passes=self._passes,
        )

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed at its end, where Trainer takes one update more
            self.control.should_training_stop = True
            return
        # accelerate does not forward set_epoch through the wrappers that sharding and resuming put around a sampler.
        self._sampler.set_epoch(epoch)
        self._micro_step = 0  # an epoch, and what a resume leaves of it, begins with a whole round
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def _say_average(self, updates: int) -> None:
        """How old the weights are that are evaluated and saved, and a warning where that is too old for this run."""
        if not self.is_world_process_zero():
            return
        average = self.args.ema_decay, updates, self.args.ema_update_interval
        tables.print_line(average_line(*average))
        if (problem := lag_problem(*average)) is not None:
            logger.warning(problem)

    def _begin_costs(self) -> None:
        rate, device = 0.0, self.accelerator.device
        if device.type == "cuda":
            rate = matmul_rate(device, self.mixed_dtype or base_weight(self.student.model).dtype)
        self._cost.begin(rate, self._passes)

    @property
    def mixed_dtype(self) -> torch.dtype | None:
        """What mixed precision computes in, if it is on."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self._mixed_precision)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """
        Trains, or goes on with a run that was interrupted. One run at a time trains into an output folder.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Folder of a checkpoint, or `True` for the last complete one in `output_dir`.

        Returns:
            `TrainOutput`: the number of updates, the mean loss and what else Trainer measures.

        Raises:
            [`ValueError`]: if the checkpoint is damaged, or is of a run that this one is not.
        """
        with (
            one_run_at_a_time(self.args.output_dir, self.accelerator),
            lost_process_named(
                lambda: f"in update {self.state.global_step + 1}",
                lambda: checkpoint.resume_advice(self.args.output_dir),
            ),
            # PEFT casts what enters a float32 LoRA to float32, and autocast casts it back: whole activations, for nothing.
            disable_input_dtype_casting(self.model),
            self._stop.listening(),
        ):
            checkpoint.set_incomplete_aside(self.args.output_dir, self.accelerator)
            begun = checkpoint.begin(
                self.args.output_dir, resume_from_checkpoint, self.accelerator, self._check_resume, self._changes_since
            )
            self.run, self.changes = begun.run, begun.record
            if begun.folder is not None and self.accelerator.is_main_process:
                tables.print_resume(begun.folder.name, begun.update, [change.row() for change in begun.changes])
            return super().train(None if begun.folder is None else str(begun.folder), **kwargs)

    def prompts_digest(self) -> dict[str, Any]:
        """By task how many prompts are trained on, and a hash of them."""
        if self._prompts_digest is None:
            self._prompts_digest = prompts_of(self._prompts, self._task_rows)
        return self._prompts_digest

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of an optimizer step. Trainer asks for all of them at once: an update begins here."""
        self._cost.start()
        with self._part("data"):
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            with self._part("encoding"):
                self.velocity_field.encode_together(self._companies())
        if self._offload.modules:  # their prompts are encoded in one go, after which the encoders leave the device
            for i, rows in enumerate(batches):
                task, _ = self._micro_batch(i, rows)
                self.velocity_field.encode_prompts([row["prompt"] for row in rows], self._guidance_scales(task))
            with self._part("encoding"):
                self._offload.rest()
        return batches, num_items

    def _companies(self) -> list[list[str]]:
        """
        The prompts of the update's round that are encoded together: the same for any number of processes, and for any
        size of micro-batches.
        """
        a_round = self.state.global_step // self._sampler.passes
        companies = self._sampler.companies(a_round % self._sampler.rounds)
        return [list(dict.fromkeys(self._prompts[rows.tolist()]["prompt"])) for rows in companies]

    def _micro_batch(self, number: int, rows: list[dict[str, Any]]) -> tuple[str, list[int]]:
        """
        Task of a round's micro-batch, and its samples' positions among the task's samples of this round.

        Raises:
            [`RuntimeError`]: if its rows are of another task than the one whose turn it is, of several, or not as many as it
                has. A data loader that was replaced, or one that hands out rows in another order, would have them taught by
                another task's teacher.
        """
        task, size = self.tasks[number % len(self.tasks)], self._train_batch_size
        tasks = sorted({task_of(row, self.args.task_column) for row in rows})
        if tasks != [task] or len(rows) != size:
            raise RuntimeError(
                f"Micro-batch {number + 1} of update {self.state.global_step + 1} has {len(rows)} rows of {', '.join(tasks)}, where "
                f"{size} of {task!r} are due. Rounds of tasks need the trainer's own data loader and sampler, which hand out the "
                "rows in order: leave get_train_dataloader and accelerator_config as they are."
            )
        first = (number // len(self.tasks)) * self.accelerator.num_processes + self.accelerator.process_index
        return task, list(range(first * size, (first + 1) * size))

    def _end_micro_batch(self) -> None:
        self._micro_step = (self._micro_step + 1) % (self._micro_batches * len(self.tasks))
        if self._micro_step == 0:
            self._cost.clock.go_on_with("optimizer")

    def _task_share(self, task: str) -> float:
        """Factor of a micro-batch's mean loss, such that an update's losses add up to the weighted mean over tasks."""
        return self._task_weights[task] / sum(self._task_weights.values()) / self._micro_batches

    @contextmanager
    def _gradient_sync(self, model: nn.Module, last: bool) -> Iterator[None]:
        """
        Reduces gradients only in the round's last backward.

        `no_sync` alone is not enough: under DeepSpeed every backward with `sync_gradients` is an optimizer step, and
        FSDP2's `no_sync` turns the reduction on again when it ends.
        """
        state = self.accelerator.gradient_state
        if last or not state.sync_gradients:
            yield
            return
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(True)

    def _backward(self, loss: Tensor) -> None:
        # DeepSpeed would divide by the accumulation steps once more: a task's share is in the loss already.
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        with self._part("backward"):
            self.accelerator.backward(loss, **options)

    def _gather_finite(self, task: str, levels: dict[int, float] | None, values: Tensor) -> Tensor:
        """
        A micro-batch's figures of all processes.

        Args:
            task (`str`): its task.
            levels (`dict[int, float]`, *optional*): noise levels of its n trained steps by their numbers, for the message.
                Not given where the figures belong to no step.
            values (`Tensor` of shape `(k, n)`): k figures of every step, on this process.

        Returns:
            `Tensor` of shape `(processes, k, n)`, float64, on the CPU.

        Raises:
            [`FloatingPointError`]: on all processes, if a figure of one is not finite.
        """
        # One collective and one wait for the device a micro-batch, and all processes decide alike.
        everyone = self.accelerator.gather(values[None]).cpu().double()  # not every device knows float64
        bad = [i for i in range(everyone.shape[2]) if not everyone[:, :, i].isfinite().all()]
        if bad:
            where = "in"
            if levels is not None:
                step, level = list(levels.items())[bad[0]]
                where = f"at step {step} (noise level {level:.3f}) of"
            raise FloatingPointError(
                f"The loss of task {task!r} is not finite {where} update {self.state.global_step + 1}. Training stops before the optimizer's step; the last checkpoint is "
                "untouched. Try a smaller learning_rate, or dtype float32."
            )
        return everyone

    def _unwrapped(self, model: nn.Module) -> nn.Module:
        """The network in Trainer's wrapper. accelerate looks at every module to find it, which is too slow for every step."""
        if self._wrapped_and_own is None or self._wrapped_and_own[0] is not model:
            self._wrapped_and_own = model, self.accelerator.unwrap_model(model)
        return self._wrapped_and_own[1]

    @staticmethod
    def _in_eval_mode(model: nn.Module) -> None:
        """No dropout; checkpointing in diffusers depends on the grad mode alone."""
        if model.training:  # Trainer's mode. To set it takes a walk over all modules
            model.eval()

    def _student_velocity(
        self,
        model: nn.Module,
        x: Tensor,
        t: float | list[float],
        prompts: list[str],
        guidance_scale: float | None = None,
        field: VelocityField | None = None,
    ) -> Tensor:
        """The student's velocity with gradient. Under DDP all of a replay counts as one forward of the wrapper."""
        unwrapped = self._unwrapped(model)
        field = self.velocity_field if field is None else field
        inputs = (x, t, prompts, self.args.guidance_scale if guidance_scale is None else guidance_scale)
        with self._part("student"):
            if unwrapped is model:
                return field(*inputs, model)
            return self._redirect(model, unwrapped, field, *inputs, unwrapped)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Trainer's last call before the optimizer's step. The norm is the same on every process.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # Under fp16 an overflow is routine: the scaler skips the step and lowers its scale.
        if norm is not None and not self.args.fp16 and not math.isfinite(norm):
            raise FloatingPointError(
                f"The gradient of update {self.state.global_step + 1} is not finite (norm {float(norm)}). Training stops "
                "before the optimizer's step; the last checkpoint is untouched. Try dtype float32."
            )
        return norm

    def _warn_of_idle_weights(self) -> None:
        """Says which of the trained weights take no part: the forward passes them by, or an operation has no gradient."""
        if self.is_deepspeed_enabled or not self.is_world_process_zero():  # DeepSpeed keeps the gradients to itself
            return
        trained = self.student.named_parameters()
        idle = [name for name, parameter in trained.items() if parameter.grad is None]
        if idle:
            logger.warning(
                f"{len(idle)} of the {len(trained)} tensors that are trained got no gradient in the first update, such as {shown(idle[0])}, "
                "and stay as they are. Either the transformer does not use these layers, and target_modules of peft_config need "
                "not name them, or something in its forward passes no gradient, such as an attention backend."
            )

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # what was gathered since the last training log belongs to it, not to an evaluation between
            metrics = {name: applicable_mean(values) for name, values in self._metrics["train"].items()}
            logs |= {name: value for name, value in metrics.items() if not math.isnan(value)}
            samples = self._train_batch_size * self.accelerator.num_processes * self._micro_batches * len(self.tasks)
            logs |= self._cost.metrics(samples, bool(self.args.activation_checkpointing))
            self._metrics["train"].clear()
        super().log(logs, start_time)

    # Files

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves the student's averaged weights: see [`Student.save`].

        Raises:
            [`FloatingPointError`]: on all processes, if they are not finite.
        """
        self._refuse_what_is_not_finite()
        with self.student.ema_weights():
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                # Trainer's would gather the base and the teachers too, and save nothing under FSDP's SHARDED_STATE_DICT.
                self._save(output_dir, self.student.whole_weights(keep=self.args.should_save))
                if self.args.push_to_hub and not _internal_call:
                    self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
            else:
                super().save_model(output_dir, _internal_call)

    def _refuse_what_is_not_finite(self) -> None:
        """An optimizer's step that overflows shows in no loss of this update. All processes decide alike."""
        bad = not_finite(self.student.named_states())
        if self.optimizer is not None and not self.is_deepspeed_enabled:
            states = enumerate(self.optimizer.state.values())
            moments = (
                (f"optimizer {i} {k}", v) for i, state in states for k, v in state.items() if isinstance(v, Tensor)
            )
            bad += not_finite(moments)
        bad = gather_object(bad) if self.accelerator.num_processes > 1 else bad
        if bad:
            raise FloatingPointError(
                f"{len(bad)} trained tensors are not finite after update {self.state.global_step}, such as {bad[0]}. Nothing of "
                f"them is saved. Try a smaller learning_rate, or dtype float32. {checkpoint.resume_advice(self.args.output_dir)}"
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            self.student.save(folder, state_dict)
            write_json(Path(folder) / ARGUMENTS_FILE, public_arguments(self.args), sort_keys=True)
            self._save_method(folder)

    def _save_method(self, folder: str) -> None:
        """Writes what the method adds to the saved student."""

    def _save_state(self, folder: Path) -> None:
        """Writes into a checkpoint what training goes on from, besides Trainer's own files. All processes call it."""
        self.student.save_state(folder, self.args.should_save)

    def _load_state(self, folder: Path) -> None:
        """Restores what [`_save_state`] wrote."""
        self.student.load_state(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._refuse_what_is_not_finite()
        args, saves = self.args, self.args.should_save
        saved = args.output_dir, self.state.global_step, self.run, saves, self.accelerator, self._checkpoint_bytes
        with checkpoint.written(*saved) as folder:
            self.create_model_card()
            with checkpoint.older_ones_kept(args):
                super()._save_checkpoint(model, trial)
            self._save_state(folder)
            if saves:
                checkpoint.describe(folder, args, self.velocity_field.levels, self.prompts_digest(), self.changes)
        if saves:
            checkpoint.delete_older(args, self.state)
        if args.push_to_hub:
            self._push_checkpoint(folder)
        if self._stop.stopped:
            # Not the end of Trainer's: it may delete this checkpoint for a better one, and scripts go on to evaluate and push.
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            self._stop.leave(self.state.global_step, self.args.output_dir)

    def _checkpoint_bytes(self) -> int:
        return checkpoint.tensor_bytes(self.student.parameters(), self.student.is_lora, self.optimizer)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        # Under DeepSpeed Trainer has its engine load its own files, and leaves it at that.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.is_deepspeed_enabled and resume_from_checkpoint is not None:
            self._load_state(Path(resume_from_checkpoint))
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_state(Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            checkpoint.save_optimizer(self.optimizer, self.lr_scheduler, output_dir, keep=self.args.should_save)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint_folder)
            return
        settings = KeptSettings(self.optimizer, self.lr_scheduler)
        if self.is_fsdp_enabled:
            checkpoint.load_optimizer(self.optimizer, self.lr_scheduler, checkpoint_folder)
        else:
            super()._load_optimizer_and_scheduler(checkpoint_folder)
        settings.restore(self.optimizer, self.lr_scheduler)

    def _check_resume(self, folder: Path) -> list[str]:
        """What in a checkpoint does not fit this run, a sentence each."""
        return checkpoint.grid_problems(folder, self.velocity_field.levels)

    def _changes_since(self, folder: Path) -> list[Change]:
        model = self.student.model
        lora = model.peft_config[STUDENT_ADAPTER] if isinstance(model, PeftModel) else None
        return changes_since(folder, self.args, lora, self.prompts_digest())

    def _load_best_model(self) -> None:
        self.student.load_saved(self.state.best_model_checkpoint)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes the model card `README.md` into the output folder."""
        if self.is_world_process_zero():
            folder = self.args.output_dir or "."
            write_model_card(folder, self.card_facts(), model_name, dataset_name, tags)

    def card_facts(self) -> CardFacts:
        """What the model card says of this run. Its method is what the trainer's `_card_fields` says."""
        args, dataset = self.args, self.eval_dataset
        first = (dataset if isinstance(dataset, Dataset) else self.train_dataset)[0]["prompt"]
        # What the evaluation itself passes: families differ in the name of guidance, its offset and what turns it on.
        options = self.eval_field.call_options([first], args.evaluation_guidance)
        single = {name: value[0] if isinstance(value, list) else value for name, value in options.items()}
        return CardFacts(
            trainer_name=self._name,
            paper=self._paper,
            tags=self._tag_names,
            args=args,
            state=self.state,
            pipeline=self._pipeline,
            model=self.student.model,
            tasks=self.tasks,
            repository=self.hub_model_id or args.hub_model_id,
            call_options={**single, "num_inference_steps": args.eval_num_inference_steps},
            changes=self.changes,
            **self._card_fields(),
        )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository that is pushed to. Takes what [`~transformers.Trainer`]'s takes."""
        if self.is_world_process_zero():
            args = self.args
            self.hub_model_id = make_repository(
                repository_name(args.hub_model_id, args.output_dir),
                args.hub_token if token is None else token,
                args.hub_private_repo if private is None else private,
                args.hub_revision,
            )
            self.push_in_progress = None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Trainer calls it before the checkpoint is complete: [`_save_checkpoint`] pushes when it is."""

    def _push_checkpoint(self, folder: Path) -> None:
        args, state = self.args, self.state
        if not self.is_world_process_zero() or not hub.is_due(
            args.hub_strategy, self.push_in_progress, wait=args.hub_always_push
        ):
            return
        self.callback_handler.on_push_begin(args, state, self.control)
        by_epoch = args.save_strategy == SaveStrategy.EPOCH
        at = f"epoch {int(state.epoch or 0)}" if by_epoch else f"step {state.global_step}"
        self.push_in_progress = hub.push_checkpoint(
            folder,
            args.output_dir,
            self.hub_model_id,
            args.hub_strategy,
            f"Training in progress, {at}",
            token=args.hub_token,
            revision=args.hub_revision,
        )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Saves the student with its card and uploads what of the output folder `hub.files.PUSHED_FILES` names. Call it on all
        processes.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`)
            blocking (`bool`, *optional*, defaults to `True`): whether to return only when the upload is done.
            token (`str`, *optional*): with write permission, by default `hub_token` of the arguments.
            revision (`str`, *optional*): branch to commit to, by default `hub_revision` of the arguments.
            private (`bool`, *optional*): whether a repository that is made is private, by default `hub_private_repo`.
            kwargs: passed to [`create_model_card`].

        Returns:
            The [`~huggingface_hub.CommitInfo`], or with `blocking=False` a future of it; `None` on other processes.

        Raises:
            [`~hub.repository.PushError`]: if the upload fails; the student is saved by then.
        """
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        if self.is_world_process_zero():
            self._finish_current_push()  # it reads the files that are written next
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        folder, token = args.output_dir or ".", args.hub_token if token is None else token
        if self.hub_model_id is None:
            with hub.failure_explained(folder, repository_name(args.hub_model_id, folder)):
                problems = self._repository_problems(args, not self.student.is_lora, token)
                if problems:
                    raise PushError(" ".join(problems).rstrip("."))
                self.init_hf_repo(token, private)
            self.create_model_card(**kwargs)  # which names the repository
        return hub.push(
            folder, self.hub_model_id, commit_message, blocking, token=token, revision=revision or args.hub_revision
        )


def _dict(value: Any) -> dict[str, Any] | None:
    assert value is None or isinstance(value, dict)  # the config has parsed or refused strings
    return value
