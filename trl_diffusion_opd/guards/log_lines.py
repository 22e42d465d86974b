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

"""Leaves out lines that other libraries log where they would mislead a user of this package."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_lines(text: str, *loggers: str) -> Iterator[None]:
    """
    Context in which loggers leave out the lines that contain a text.

    Args:
        text (`str`): the text.
        loggers (`str`): names of the loggers. A logger's own lines count, not those of loggers below it.
    """

    def is_other(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    filtered = [logging.getLogger(name) for name in loggers]
    for logger in filtered:
        logger.addFilter(is_other)
    try:
        yield
    finally:
        for logger in filtered:
            logger.removeFilter(is_other)
