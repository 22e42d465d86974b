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

"""Gets the message with which options are refused, or a command ends."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from trl_diffusion_opd.scripts import refusals


def only_problem(config: Callable[..., object], **options: Any) -> str:
    """The one problem that a config reports about options."""
    with pytest.raises(ValueError) as error:
        config("out", **options)
    head, problem = str(error.value).splitlines()
    assert head == f"{config.__name__}:" and problem.startswith("- ")
    return problem


@contextmanager
def command_refuses(capsys: pytest.CaptureFixture[str], *messages: str) -> Iterator[None]:
    """Asserts that a command in its block ends with these words, among others, and without a traceback."""
    with pytest.raises(SystemExit) as done:
        yield
    printed = capsys.readouterr().err
    assert done.value.code == refusals.REFUSED
    assert all(message in printed for message in messages), printed
    assert "Traceback" not in printed and "usage" not in printed
