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

"""Ends a command that refuses its input: with the message, without a traceback and without a list of all options."""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from ..problems import Refusal


# The exit status of a command that refuses its input, as argparse has it. An error that nobody foresaw gives 1.
REFUSED = 2
# In seconds: longer than a launcher takes to notice that a process has ended.
_HEAD_START = 10.0


class RefusingParser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, as those of [`~parser.CommandParser`] are."""

    def error(self, message: str) -> NoReturn:
        """Raises a [`Refusal`]."""
        raise Refusal(f"{self.prog}: {message}. `{self.prog} --help` shows the options.")


@contextmanager
def refusals_told() -> Iterator[None]:
    """
    Context in which a [`Refusal`] ends the program with its message alone. Any other error keeps its traceback.

    Of the processes that a launcher has started on a machine, one prints the message.

    Raises:
        [`SystemExit`]: for a [`Refusal`], with the exit status [`REFUSED`].
    """
    try:
        yield
    except Refusal as error:
        if int(os.environ.get("LOCAL_RANK", "0")) > 0:
            # Processes mostly refuse the same. When the first one has said it, the launcher ends this one.
            time.sleep(_HEAD_START)
        print(error, file=sys.stderr)
        sys.exit(REFUSED)
