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

"""Digests of everything that an image or a score depends on. A stored one is only reused if its digest is the same."""

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
    """A digest of a dataset's rows, all columns."""
    return Hasher.hash({name: list(values) for name, values in columns.items()})


def reward_digest(function: RewardFunc) -> str | None:
    """
    A digest of everything but image and row that a reward's scores depend on. `None` if there is none; stored scores
    are then not reused.

    A reward of this package provides it. For another function it covers the function and its module's source, since an
    importable function is hashed by its name alone.
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
    except (OSError, TypeError):  # no source: typed in at a prompt, or not written in Python
        return digest(content)
