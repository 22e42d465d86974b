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
"""The one place where whatever a stranger's files make the libraries raise becomes an error about that teacher."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..guards.redaction import shown
from .teacher_config import TeacherError


# Of what a library said: some repeat a whole file.
_LONGEST = 500


@contextmanager
def strangers_files(explain: Callable[[str], str]) -> Iterator[None]:
    """
    Within it a stranger's files are read.

    Args:
        explain: Makes the message from the error's type and text, which come as one string.

    Raises:
        TeacherError: In place of every other error, which is its cause.
    """
    try:
        yield
    except TeacherError:
        raise
    except Exception as error:  # no list of what a library raises on what it was not written for is complete
        said = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise TeacherError(explain(shown(said, _LONGEST))) from error
