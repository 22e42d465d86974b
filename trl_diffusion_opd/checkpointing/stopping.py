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

"""Stops training when a signal asks for it, after the current update is finished and a checkpoint is written."""

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


_ASKED = (
    b"\nStopping: first the update is finished and a checkpoint written. Ctrl-C again ends at once, without one.\n"
)


class StopRequest(TrainerCallback):
    """
    Ends training with a checkpoint on Ctrl-C (SIGINT) or on SIGTERM, which schedulers send.

    If any process gets the signal, all processes stop after the current update.

    Args:
        accelerator ([`~accelerate.Accelerator`])
        say: Prints the message at the end.

    Attributes:
        stopped (`bool`): whether training is ending, so that the next checkpoint is the last.
    """

    def __init__(self, accelerator: Accelerator, say: Callable[[str], None]):
        self.accelerator = accelerator
        self.say = say
        self.stopped = False
        self._number: int | None = None
        self._process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Context in which the two signals ask for a stop. It does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._number, self.stopped, self._process = None, False, os.getpid()
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data loader's worker: the update still needs it, so it ignores Ctrl-C
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        # A launcher passes Ctrl-C on as SIGTERM, which does not count as a second Ctrl-C.
        if number == signal.SIGINT and self._number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._number is None:
            self._number = number
            if self.accelerator.is_main_process:
                os.write(2, _ASKED)  # not print: the signal may have interrupted a print

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._look(control)
        if self.stopped:
            control.should_evaluate = False  # a scheduler kills the process after half a minute

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._look(control)

    def _look(self, control: TrainerControl) -> None:
        asked = self._number is not None
        if self.accelerator.num_processes > 1:  # all processes stop, or none
            if asked:
                self.accelerator.set_trigger()
            asked = self.accelerator.check_trigger()
        if asked:
            self.stopped = control.should_save = control.should_training_stop = True

    def leave(self, update: int, output_dir: str | None) -> NoReturn:
        """
        Ends the process after the checkpoint is written, and says how to go on.

        Raises:
            [`SystemExit`]: with a shell's exit status for a process that the signal ended.
        """
        number = signal.SIGTERM if self._number is None else self._number  # None: another process got the signal
        if self.accelerator.is_main_process:
            self.say(
                f"Stopped after update {update}, as asked ({signal.Signals(number).name}). checkpoint-{update} in "
                f"{output_dir} is complete. To go on:\n  {command_to_go_on()}\nor trainer.train(resume_from_checkpoint=True)."
            )
        raise SystemExit(128 + number)


def command_to_go_on() -> str:
    """Returns this process's command line, with the option to resume."""
    words = [word for word in sys.argv if not word.startswith("--resume_from_checkpoint=")]
    if "--resume_from_checkpoint" in words:
        at = words.index("--resume_from_checkpoint")
        words[at : at + 2] = []
    python = ["python"] if words[0].endswith(".py") else []  # the console script needs no "python"
    return shlex.join([*python, *words, "--resume_from_checkpoint", "True"])
