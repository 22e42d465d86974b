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

"""Saves and loads the files of a run: the student, checkpoints, the model card. Pushes them to the Hub."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, TrainOutput
from transformers.utils.hub import PushInProgress

from ..acceleration.offload import Offload
from ..checkpointing import checkpoint
from ..checkpointing.results import set_report_aside
from ..checkpointing.resume import Change, KeptSettings, PromptsDigest, changes_since, counted, prompts_of
from ..checkpointing.stopping import StopRequest
from ..data.pictured_prompt import pictures_of
from ..data.tasks import task_rows
from ..guards.files import write_json
from ..guards.finite import not_finite
from ..guards.log_lines import without_lines
from ..guards.redaction import public_arguments
from ..hub import push as hub
from ..hub.files import ARGUMENTS_FILE, MANIFEST_FILE
from ..hub.repository import PushError, make_repository, repository_name
from ..models.student import STUDENT_ADAPTER, Student
from ..models.teacher_files import weights_in
from ..models.teachers import TeacherBank
from ..pipelines.pictures import PICTURES
from ..pipelines.velocity import VelocityField
from ..reporting import console as tables
from ..reporting.model_card import CardFacts, MethodFacts, write_model_card
from ..reporting.student_card import card_content, render_student_card
from ..rewards import RewardFunc, reward_name
from .base_config import DiffusionConfig
from .checks import hub_problems
from .image_evaluator import ImageEvaluator
from .rounds import Rounds
from .teaching import manifest_problems
from .training_pictures import TrainingPictures


if TYPE_CHECKING:  # its methods call Trainer's with super(): Trainer comes after it in a trainer's bases
    from trl.trainer.base_trainer import _BaseTrainer as _Behind
else:
    _Behind = object


class RunFiles(_Behind):
    """[`DiffusionTrainer`]'s methods for files and the Hub. They use the attributes declared here."""

    args: DiffusionConfig
    model: nn.Module
    train_dataset: Dataset
    eval_dataset: Dataset | dict[str, Dataset] | None
    optimizer: torch.optim.Optimizer
    lr_scheduler: LambdaLR
    run: str
    base_pipeline: DiffusionPipeline
    velocity_field: VelocityField
    bank: TeacherBank | None
    prompts: Dataset
    rounds: Rounds
    _prompts_digest: PromptsDigest | None = None
    _stop: StopRequest
    student: Student
    evaluator: ImageEvaluator
    tasks: list[str]
    reward_funcs: dict[str, list[RewardFunc]]
    changes: list[dict[str, object]]
    was_finished: bool
    hub_model_id: str | None  # type: ignore[assignment]  # Trainer's type is None
    push_in_progress: PushInProgress | None  # type: ignore[assignment]
    _card_fields: Callable[[], MethodFacts]
    _pictures: TrainingPictures
    _in_eval_mode: Callable[[nn.Module], None]
    offload: Offload

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves the student's averaged weights, as [`Student.save`] describes, and says how to load them. All processes
        must call it.

        Raises:
            [`FloatingPointError`]: on all processes, if weights are not finite.
        """
        self._refuse_what_is_not_finite()
        with self.student.ema_weights():
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                # Trainer's method would also gather the base and teachers, and saves nothing with SHARDED_STATE_DICT.
                self._save(output_dir, self.student.whole_weights(keep=self.args.should_save))
                if self.args.push_to_hub and not _internal_call:
                    self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
            else:
                super().save_model(output_dir, _internal_call)
        if not _internal_call:
            self.say_where(output_dir)

    def say_where(self, output_dir: str | None = None) -> None:
        """Prints where the student was saved, and the line that loads it."""
        if self.is_world_process_zero():
            folder = output_dir or self.args.output_dir
            tables.print_unwrapped(f"The student is in {folder}: {self.student.load_line(folder)}")

    def _refuse_what_is_not_finite(self) -> None:
        """
        Refuses to save weights or optimizer states that are not finite. An overflow in the optimizer's step does not
        show in the update's loss. All processes decide alike.
        """
        bad = self._not_finite()
        bad = gather_object(bad) if self.accelerator.num_processes > 1 else bad
        if bad:
            raise FloatingPointError(
                f"{len(bad)} trained tensors are not finite after update {self.state.global_step}, such as {bad[0]}. "
                "They are not saved. Try a smaller learning_rate, or dtype float32. "
                f"{checkpoint.resume_advice(self.args.output_dir)}"
            )

    def _not_finite(self) -> list[str]:
        """Names what training has made that is not finite, in the part that this process holds."""
        bad = not_finite(self.student.named_states())
        if self.optimizer is not None and not self.is_deepspeed_enabled:
            states = enumerate(self.optimizer.state.values())
            bad += not_finite(
                (f"optimizer {i} {k}", v) for i, state in states for k, v in state.items() if isinstance(v, Tensor)
            )
        return bad

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            self.student.save(folder, state_dict)
            write_json(Path(folder) / ARGUMENTS_FILE, public_arguments(self.args), sort_keys=True)
            if self.bank is not None:
                write_json(Path(folder) / MANIFEST_FILE, self.bank.manifest(), sort_keys=True)
            set_report_aside(Path(folder), weights_in(Path(folder)))

    def _save_state(self, folder: Path) -> None:
        """Writes the weights that training resumes from into a checkpoint. All processes must call it."""
        self.student.save_state(folder, self.args.should_save)

    def _load_state(self, folder: Path) -> None:
        """Loads what [`_save_state`] wrote."""
        self.student.load_state(folder)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        self._refuse_what_is_not_finite()
        self._show_without_evaluation()
        args, saves = self.args, self.args.should_save
        saved = args.output_dir, self.state.global_step, self.run, saves, self.accelerator, self._checkpoint_bytes
        with checkpoint.written(*saved) as folder:
            self._write_card(folder.name)
            with checkpoint.older_ones_kept(args):
                super()._save_checkpoint(model, trial)
            self._save_state(folder)
            if saves:
                checkpoint.describe(
                    folder,
                    args,
                    self.velocity_field.levels,
                    self.prompts_digest(),
                    self.evaluation_settings(),
                    self.changes,
                )
        if saves:
            checkpoint.delete_older(args, self.state)
        if args.push_to_hub:
            self._push_checkpoint(folder)
        if self._stop.stopped:
            # Ends the process here. Trainer's own end may delete this checkpoint for a better one, and scripts would
            # then evaluate and push.
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            self._stop.leave(self.state.global_step, self.args.output_dir)

    def _show_without_evaluation(self) -> None:
        """Logs the student's images at a save and at the end, if no evaluations log them. Not while stopping."""
        if self.args.eval_strategy == IntervalStrategy.NO and not self._stop.stopped:
            self._log_completions()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._show_without_evaluation()  # now, since the trackers end in Trainer's method
        return super()._finalize_training(*args, **kwargs)

    def _log_completions(self) -> None:
        """Logs the student's images. See [`TrainingPictures.log`]."""
        if not self.args.log_completions:
            return
        dataset = self.train_dataset if self.eval_dataset is None else self.eval_dataset
        if isinstance(dataset, Mapping):
            dataset = next(iter(dataset.values()))
        self._in_eval_mode(self.model)
        self._pictures.log(dataset, self.state, self.callback_handler.callbacks)
        self.offload.rest()

    def _checkpoint_bytes(self) -> int:
        return checkpoint.tensor_bytes(self.student.parameters(), self.student.is_lora, self.optimizer)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        # Under DeepSpeed, Trainer only has the engine load its own files.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.is_deepspeed_enabled and resume_from_checkpoint is not None:
            self._load_state(Path(resume_from_checkpoint))
        return prepared

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        # Transformers lists changed arguments; our table has them, with more.
        with without_lines("do not match the ones in the", "transformers.trainer_utils"):
            done = super()._init_training_state(max_steps, *args, **kwargs)
        # Of a resumed run, Trainer takes logging_steps, eval_steps and save_steps from the checkpoint, not from args.
        self.state.compute_steps(self.args, max_steps)
        return done

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
        """Lists what in a checkpoint does not fit this run, a sentence each."""
        manifest = {} if self.bank is None else self.bank.manifest()
        return checkpoint.grid_problems(folder, self.velocity_field.levels) + manifest_problems(folder, manifest)

    def _changes_since(self, folder: Path) -> list[Change]:
        model = self.student.model
        lora = model.peft_config[STUDENT_ADAPTER] if isinstance(model, PeftModel) else None
        return changes_since(folder, self.args, lora, self.prompts_digest(), self.evaluation_settings())

    def prompts_digest(self) -> PromptsDigest:
        """Returns the number of training prompts of each task, and a hash of them."""
        if self._prompts_digest is None:
            self._prompts_digest = prompts_of(self.prompts, self.rounds.rows)
        return self._prompts_digest

    def evaluation_settings(self) -> dict[str, object]:
        """What the scores of evaluations depend on, by name. JSON can hold it."""
        args, dataset = self.args, self.eval_dataset
        if dataset is None:
            return {}
        settings: dict[str, object] = {
            "num_eval_images": args.num_eval_images,
            "eval_num_inference_steps": args.eval_num_inference_steps,
            "guidance": args.evaluation_guidance,
        }
        for name, part in (dataset if isinstance(dataset, Mapping) else {"": dataset}).items():
            of_part = f" in {name}" if name else ""
            for task, digest in prompts_of(part, task_rows(part, args.task_column)).items():
                settings[f"prompts of {task}{of_part}"] = counted(digest)
                settings[f"rewards of {task}"] = ", ".join(map(reward_name, self.reward_funcs[task])) or None
        return settings

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self.student.load_saved(self.state.best_model_checkpoint)

    # Card and Hub

    # The signature is TRL's, which differs from Trainer's.
    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes the model card `README.md` into the output folder."""
        self._write_card(None, model_name, dataset_name, tags)

    def _write_card(
        self,
        checkpoint: str | None,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Writes the card of the student in the output folder, or of one in a checkpoint there."""
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir or ".")
        kept = card_content(folder) if self.was_finished else None
        if kept is not None and kept["settings"]["updates"] == str(self.state.global_step):
            # Nothing was trained, so this run's settings are not the student's.
            render_student_card(folder, kept | {"checkpoint": checkpoint}, self.hub_model_id)
        else:
            write_model_card(folder, self.card_facts(checkpoint), model_name, dataset_name, tags)

    def card_facts(self, checkpoint: str | None = None) -> CardFacts:
        """
        Collects this run's facts for the model card. The method's own come from `_card_fields`.

        Args:
            checkpoint (`str`, *optional*): the folder of the checkpoint that the card is of, if it is not of the
                output folder's student.
        """
        args, dataset = self.args, self.eval_dataset
        shown = dataset if isinstance(dataset, Dataset) else self.train_dataset
        readers = args.readers
        examples = {
            task: readers.texts(task, [shown[int(rows[0])]]).student[0]
            for task, rows in task_rows(shown, args.task_column).items()
        }
        first = next((prompt for prompt in examples.values() if pictures_of(prompt)), next(iter(examples.values())))
        # The evaluation's own options, since families differ in how guidance is named, scaled and turned on.
        options = self.evaluator.field.call_options([first], args.evaluation_guidance)
        single = {
            name: value[0] if isinstance(value, list) and name != PICTURES else value
            for name, value in options.items()
        }
        return CardFacts(
            trainer_name=self._name,
            paper=self._paper,
            tags=self._tag_names,
            args=args,
            state=self.state,
            pipeline=self.base_pipeline,
            model=self.student.model,
            tasks=self.tasks,
            repository=self.hub_model_id or args.hub_model_id,
            call_options={**single, "num_inference_steps": args.eval_num_inference_steps},
            examples={task: str(prompt) for task, prompt in examples.items()},
            templates=args.templates,
            changes=self.changes,
            checkpoint=checkpoint,
            **self._card_fields(),
        )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Creates the Hub repository. Takes the arguments of [`~transformers.Trainer`]'s method."""
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
        """Does nothing: Trainer calls it before the checkpoint is complete. [`_save_checkpoint`] pushes afterwards."""

    def _push_checkpoint(self, folder: Path) -> None:
        args, state = self.args, self.state
        if not self.is_world_process_zero() or not hub.is_due(
            args.hub_strategy, self.push_in_progress, wait=args.hub_always_push
        ):
            return
        self.callback_handler.on_push_begin(args, state, self.control)
        by_epoch = args.save_strategy == SaveStrategy.EPOCH
        at = f"epoch {int(state.epoch or 0)}" if by_epoch else f"step {state.global_step}"
        assert self.hub_model_id is not None  # `init_hf_repo` has made it
        set_report_aside(Path(args.output_dir), weights_in(folder))  # its student is copied there
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
        Saves the student with its card, and uploads those files of the output folder that `hub.files.PUSHED_FILES`
        names. Call it on all processes.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`): message of the commit.
            blocking (`bool`, *optional*, defaults to `True`): whether to wait until the upload is done.
            token (`str`, *optional*): token with write permission. By default, `hub_token` of the arguments.
            revision (`str`, *optional*): branch to commit to. By default, `hub_revision` of the arguments.
            private (`bool`, *optional*): whether a new repository is private. By default, `hub_private_repo`.
            kwargs: passed to [`create_model_card`].

        Returns:
            The [`~huggingface_hub.CommitInfo`], or with `blocking=False` a future of it. `None` on other processes.

        Raises:
            [`~hub.repository.PushError`]: if the upload fails. The student is then saved locally.
        """
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        if self.is_world_process_zero():
            self._finish_current_push()  # a running push reads the files that are overwritten next
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        folder, token = args.output_dir or ".", args.hub_token if token is None else token
        if self.hub_model_id is None:
            with hub.failure_explained(folder, repository_name(args.hub_model_id, folder)):
                problems = hub_problems(args, self.base_pipeline, not self.student.is_lora, token)
                if problems:
                    raise PushError(" ".join(problems).rstrip("."))
                self.init_hf_repo(token, private)
            self.create_model_card(**kwargs)  # again: now it can name the repository
        assert self.hub_model_id is not None
        branch = revision or args.hub_revision
        pushed = hub.push(folder, self.hub_model_id, commit_message, blocking, token=token, revision=branch)
        if blocking:
            tables.print_line(hub.pushed_line(self.hub_model_id, branch))
        return pushed
