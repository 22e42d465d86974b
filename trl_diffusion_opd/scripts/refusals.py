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

"""
Ends a command that refuses its input, or whose run cannot go on for a reason that is known: with the message, and
without a traceback and without a list of all options.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from ..problems import Refusal
from .values import PACKAGE


# The exit status of a command that refuses its input, as argparse has it. A run that ends by an error gives 1.
REFUSED, FAILED = 2, 1
# In seconds: longer than a launcher takes to notice that a process has ended.
_HEAD_START = 30.0


class RefusingParser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, as those of [`~parser.CommandParser`] are."""

    def error(self, message: str) -> NoReturn:
        """Raises a [`Refusal`]."""
        raise Refusal(f"{self.prog}: {message}. `{self.prog} --help` shows the options.")


@contextmanager
def refusals_told() -> Iterator[None]:
    """
    Context in which a [`Refusal`] ends the program with its message alone. So do the errors that a run itself raises
    for figures that are not finite, and those of reward functions, which are told with the places in the function. Any
    other error keeps its traceback.

    Of the processes that a launcher has started on a machine, one prints the message.

    Raises:
        [`SystemExit`]: with the exit status [`REFUSED`] for a [`Refusal`], and [`FAILED`] for the others.
    """
    try:
        yield
    except Refusal as error:
        _end(str(error), REFUSED)
    except Exception as error:  # rewards raise what they like
        message = _known_end(error)
        if message is None:
            raise
        _end(message, FAILED)


def _end(message: str, status: int) -> NoReturn:
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        # Processes mostly end for the same reason. When the first one has said it, the launcher ends this one.
        time.sleep(_HEAD_START)
    print(message, file=sys.stderr)
    sys.exit(status)


def _known_end(error: Exception) -> str | None:
    """What to tell of an error that is no fault of the package; `None` for one that may be."""
    # Slow to import, and needed only now.
    from ..rewards.scoring import RewardTimeout
    from ..rewards.server_calls import RemoteRewardError
    from ..rewards.trial import is_of_reward, own_frames

    text = "\n".join([str(error), *vars(error).get("__notes__", [])])
    if is_of_reward(error):
        frames = own_frames(error)
        if not frames or isinstance(error, RewardTimeout | RemoteRewardError):
            return text
        said = "".join(traceback.format_exception_only(error)).rstrip()
        return f"A reward function has failed:\n{''.join(traceback.format_list(frames))}{said}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, FloatingPointError) and PACKAGE in Path(last.filename).parents:
        return text
    return None
