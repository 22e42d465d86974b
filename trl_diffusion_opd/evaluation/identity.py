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

"""What an image and a score depend on, as digests: stored ones of another digest are not used again."""

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pickle import PicklingError

from datasets.fingerprint import Hasher

from ..rewards import Reward, RewardFunc


def digest(*parts: object) -> str:
    """A short digest of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def rows_digest(columns: Mapping[str, Sequence[object]]) -> str:
    """Of the rows of a dataset, all columns."""
    return Hasher.hash({name: list(values) for name, values in columns.items()})


def reward_digest(function: RewardFunc) -> str | None:
    """
    What a reward's scores depend on besides image and row; `None` if it can't be told, and it must score again.

    A reward of this package says it itself. Of another function it is its content and the source of its module, since a
    function that can be imported is hashed by its name alone.
    """
    if isinstance(function, Reward):
        return function.fingerprint
    try:
        content = Hasher.hash(function)
    except (PicklingError, TypeError, AttributeError):
        return None
    module = inspect.getmodule(function if inspect.isroutine(function) else type(function))
    try:
        return digest(content, inspect.getsource(module) if module is not None else None)
    except (OSError, TypeError):  # typed in, or not written in Python
        return digest(content)
