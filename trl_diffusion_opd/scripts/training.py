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

"""Shared steps of the training commands: train, save the student with its curves, write its card, push."""

import logging
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.trainer_utils import IntervalStrategy

from ..guards.extras import extra
from ..hub.files import CURVES_PICTURE, DRY_RUN_FOLDER


if TYPE_CHECKING:
    from ..trainer import (
        DiffusionConfig,
        DiffusionDMDTrainer,
        DiffusionOPDTrainer,
        DiffusionRLConfig,
        DiffusionRLTrainer,
        DiffusionTrainer,
    )
    from .arguments import TeacherScriptArguments


logger = logging.getLogger(__name__)


class _Lines(logging.Formatter):
    """The package's own messages are for users: they come without the name of a module."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        own = record.name.split(".")[0] == "trl_diffusion_opd"
        return f"{record.levelname}{'' if own else f' {record.name}'}: {record.message}"


def show_warnings() -> None:
    """Prints the package's log messages on the console."""
    shown = logging.StreamHandler()
    shown.setFormatter(_Lines())
    logging.basicConfig(handlers=[shown])


def only_show(trainer: "DiffusionDMDTrainer | DiffusionOPDTrainer | DiffusionRLTrainer") -> None:
    """Makes the dry run of a trainer, and says at its end that it was one."""
    trainer.dry_run()
    if trainer.is_world_process_zero():
        pictures = Path(trainer.args.output_dir) / DRY_RUN_FOLDER
        where = f" Its pictures are in {pictures}." if pictures.is_dir() else ""
        print(f"Dry run: nothing was trained.{where}")
    trainer.end()


def warn_of_idle_rewards(args: "DiffusionConfig", rewards: Mapping[str, object], has_test_prompts: bool) -> None:
    """Warns, on one process, of rewards that a run that does not train on them will never call."""
    is_evaluated = args.eval_strategy != IntervalStrategy.NO or args.eval_on_start
    if rewards and not is_evaluated and not args.log_completions and not has_test_prompts and args.process_index == 0:
        logger.warning(
            "--reward_funcs are given, but no images are scored: they are not part of the loss, and there are neither "
            "evaluations (--eval_prompts with --eval_strategy) nor a report."
        )


def train(trainer: "DiffusionTrainer") -> None:
    """Trains, and saves the student with a picture of its training curves."""
    from ..reporting.plots import plot_curves

    args = trainer.args
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    # Without a push of Trainer's: `publish` pushes once, with curves, report and card.
    trainer.save_model(args.output_dir, _internal_call=True)
    trainer.say_where(args.output_dir)
    if trainer.is_world_process_zero():
        with extra(f"The picture {CURVES_PICTURE}"):
            plot_curves(trainer.state.log_history, Path(args.output_dir) / CURVES_PICTURE)


@contextmanager
def student_is_safe(trainer: "DiffusionTrainer") -> Iterator[None]:
    """
    Context for what comes after the training. Ctrl-C in it says that the student is saved, and how to finish.

    Raises:
        [`SystemExit`]: at Ctrl-C, with a shell's exit status for it.
    """
    try:
        yield
    except KeyboardInterrupt:
        from ..checkpointing.checkpoint import last_complete
        from ..checkpointing.stopping import command_to_go_on

        folder = trainer.args.output_dir
        if trainer.is_world_process_zero():
            again = (
                "`trl-diffusion-opd evaluate` makes the report from it."
                if last_complete(folder) is None
                else f"The same command makes the rest, without training again:\n  {command_to_go_on()}"
            )
            print(f"\nStopped, as asked, after the training. The student is safe in {folder}. {again}")
        raise SystemExit(128 + signal.SIGINT) from None


def publish(trainer: "DiffusionTrainer") -> None:
    """Writes the model card, pushes if `push_to_hub` is set, and ends the trackers."""
    with extra("The model card"):
        trainer.create_model_card()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()  # its last line is the link
    trainer.end()


def train_by_reward(
    trainer_class: "type[DiffusionRLTrainer]",
    script_args: "TeacherScriptArguments",
    training_args: "DiffusionRLConfig",
) -> None:
    """Runs a command that trains a teacher by reward."""
    show_warnings()
    if script_args.dry_run:
        training_args.push_to_hub = False  # or the trainer would make the repository
    trainer = trainer_class(**script_args.for_trainer(training_args))
    if script_args.dry_run:
        only_show(trainer)
        return
    train(trainer)
    publish(trainer)
