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

"""Turns any error that a downloaded file causes in a library into an error that names the teacher."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..guards.redaction import shown
from .teacher_config import TeacherError


# The longest quote of a library's message, in characters: some repeat a whole file.
_LONGEST = 500


@contextmanager
def strangers_files(explain: Callable[[str], str]) -> Iterator[None]:
    """
    Context in which files are read that someone else wrote.

    Args:
        explain: Makes the message from the error's type and text, given as one string.

    Raises:
        TeacherError: In place of any other error, which becomes its cause.
    """
    try:
        yield
    except TeacherError:
        raise
    except Exception as error:  # libraries raise all kinds of errors on broken files; no list of them is complete
        said = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise TeacherError(explain(shown(said, _LONGEST))) from error
