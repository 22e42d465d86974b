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

"""Lets a run go on when one of its extras (a picture, a report) fails."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from .redaction import shown


logger = logging.getLogger(__name__)


@contextmanager
def extra(what: str, advice: str = "") -> Iterator[None]:
    """
    Turns any error in its block into a logged warning with the traceback.

    A failed picture must not end a run that has trained for hours. Don't use it around a block in which processes wait
    for one another, unless the error is the same on all of them.

    Args:
        what (`str`): what the block makes, for the message.
        advice (`str`, *optional*): how to make it later, also for the message.
    """
    try:
        yield
    except Exception as error:
        logger.warning(
            f"{what} could not be made, and the run goes on without it: {type(error).__name__}: {shown(error, 500)}"
            + (f"\n{advice}" if advice else ""),
            exc_info=True,
        )
