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

"""Refusals of what a user gave, and how their problems are collected: one message lists everything that is wrong."""

from collections.abc import Iterator
from contextlib import contextmanager

from .guards.redaction import shown, visible


# In characters: longer than any line that the package itself writes.
_LONGEST_LINE = 2000


class Refusal(ValueError):
    """Raised for input that cannot be used. The message says what is wrong and what to do; nothing is broken."""


class Problems(list[str]):
    """A list of problems that prevent a start, one or two sentences each."""

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Adds the lines of a [`ValueError`] raised in its block, which it catches."""
        try:
            yield
        except ValueError as error:
            self += str(error).split("\n")

    def raise_under(self, header: str) -> None:
        """
        Raises one error that lists all problems, if there are any.

        Each problem is listed once. Control characters are made visible, and very long lines are cut.

        Args:
            header (`str`): the first line of the message, without a colon. Below it each problem is a bullet; problems
                that are bullets already are indented below the line before them.

        Raises:
            [`Refusal`]: if there is a problem.
        """
        if self:
            lines = "\n".join(f"- {_shown(problem)}" for problem in dict.fromkeys(self)).split("\n")
            nested = (line.replace("- ", "  ", 1) if line.startswith("- - ") else line for line in lines)
            raise Refusal("\n".join([f"{header}:", *nested]))


def _shown(problem: str) -> str:
    lines = (visible(line, keep="\t") for line in problem.split("\n"))
    return "\n".join(line if len(line) <= _LONGEST_LINE else shown(line, _LONGEST_LINE) for line in lines)
