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

"""The end of a training that a signal asks for: the update is finished and a checkpoint is written first."""

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
    b"\nStopping: the update is finished and a checkpoint is written. Ctrl-C once more ends at once, without one.\n"
)


class StopRequest(TrainerCallback):
    """
    Ctrl-C (SIGINT) and SIGTERM, which schedulers send, as a wish to stop: the training of all processes ends after the update
    in which one of them was asked, with a checkpoint.

    Args:
        accelerator ([`~accelerate.Accelerator`])
        say: shows a line, at the end.

    Attributes:
        stopped (`bool`): whether the checkpoint that is written is the last.
    """

    def __init__(self, accelerator: Accelerator, say: Callable[[str], None]):
        self.accelerator = accelerator
        self.say = say
        self.stopped = False
        self._number: int | None = None
        self._process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it signals are wishes. In a thread other than the main one, which gets no signals, it does nothing."""
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
        if os.getpid() != self._process:  # a worker of a data loader, which the update still needs, until it is ended
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        # A launcher passes a Ctrl-C on as SIGTERM, which is no second one.
        if number == signal.SIGINT and self._number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._number is None:
            self._number = number
            if self.accelerator.is_main_process:
                os.write(2, _ASKED)  # not print: the signal may have come while something was printed

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._look(control)
        if self.stopped:
            control.should_evaluate = False  # a scheduler waits half a minute, and then kills

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._look(control)

    def _look(self, control: TrainerControl) -> None:
        asked = self._number is not None
        if self.accelerator.num_processes > 1:  # all of them, or none
            if asked:
                self.accelerator.set_trigger()
            asked = self.accelerator.check_trigger()
        if asked:
            self.stopped = control.should_save = control.should_training_stop = True

    def leave(self, update: int, output_dir: str | None) -> NoReturn:
        """
        Ends the process when the checkpoint is there, and says how to go on.

        Raises:
            [`SystemExit`]: with the status that a shell gives a process which the signal ended.
        """
        number = signal.SIGTERM if self._number is None else self._number  # another process was asked
        if self.accelerator.is_main_process:
            self.say(
                f"Stopped after update {update}, as asked ({signal.Signals(number).name}). checkpoint-{update} in {output_dir} is "
                f"complete. To go on:\n  {command_to_go_on()}\nor trainer.train(resume_from_checkpoint=True)."
            )
        raise SystemExit(128 + number)


def command_to_go_on() -> str:
    """The command of this process, such that it resumes."""
    words = [word for word in sys.argv if not word.startswith("--resume_from_checkpoint=")]
    if "--resume_from_checkpoint" in words:
        at = words.index("--resume_from_checkpoint")
        words[at : at + 2] = []
    python = ["python"] if words[0].endswith(".py") else []  # the console script goes by its name
    return shlex.join([*python, *words, "--resume_from_checkpoint", "True"])
