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

"""Refusals that are collected, so that one message says everything that is wrong."""

from collections.abc import Iterator
from contextlib import contextmanager

from .guards.redaction import shown, visible


# Of a problem's line in a message: long enough for whatever a message says by itself.
_LONGEST_LINE = 2000


class Problems(list[str]):
    """What keeps something from beginning, a sentence or two each."""

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Adds the lines of a [`ValueError`] raised within it."""
        try:
            yield
        except ValueError as error:
            self += str(error).split("\n")

    def raise_under(self, header: str) -> None:
        """
        Does nothing if there are no problems. Each is told once; a stranger's text in it acts on no terminal, and no line is
        without end.

        Args:
            header (`str`): the first line of the message, without its colon. A bullet a problem follows; those that are bullets
                already stand below the line that heads them.

        Raises:
            [`ValueError`]: with all of them.
        """
        if self:
            lines = "\n".join(f"- {_shown(problem)}" for problem in dict.fromkeys(self)).split("\n")
            nested = (line.replace("- ", "  ", 1) if line.startswith("- - ") else line for line in lines)
            raise ValueError("\n".join([f"{header}:", *nested]))


def _shown(problem: str) -> str:
    lines = (visible(line, keep="\t") for line in problem.split("\n"))
    return "\n".join(line if len(line) <= _LONGEST_LINE else shown(line, _LONGEST_LINE) for line in lines)
