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

"""Calls reward functions: checks what they return, and lets them work while the next images are generated."""

import asyncio
import inspect
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from PIL.Image import Image

from .base import RewardFunc, reward_name


# Batches of images that wait to be scored: more would only fill the memory.
_MAX_PENDING = 2


def score(
    functions: Sequence[RewardFunc],
    rows: Sequence[Mapping[str, Any]],
    images: Sequence[Image],
    trainer_state: Any = None,
) -> dict[str, list[float | None]]:
    """
    Scores images, one function after another.

    Args:
        functions (`list` of reward functions), rows (`list[dict]`): rows of the dataset, one an image.
        images (`list[PIL.Image.Image]`)
        trainer_state ([`~transformers.TrainerState`], *optional*)

    Returns:
        `dict[str, list[float | None]]`: a value an image for each function, by name.

    Raises:
        [`ValueError`]: if a function returns another number of values than it was given images, or what is no number.
    """
    return {reward_name(function): _call(function, rows, images, trainer_state) for function in functions}


class Scorer:
    """
    Scores batches of images while the caller generates the next ones.

    Each function has a thread of its own, in which it sees the batches in order: one that waits for a server does not hold
    up one that computes. What a function raises is raised by the next call of `submit` or `results`.

    ```python
    with Scorer(functions) as scorer:
        for rows in batches:
            scorer.submit(rows, generate(rows))
        scores = scorer.results()
    ```

    Args:
        functions (`list` of reward functions)
        trainer_state ([`~transformers.TrainerState`], *optional*): passed to the functions.

    Attributes:
        seconds (`dict[str, float]`): the time that each function took, by name.
    """

    def __init__(self, functions: Sequence[RewardFunc], trainer_state: Any = None):
        self.functions = {reward_name(function): function for function in functions}
        self.seconds = dict.fromkeys(self.functions, 0.0)
        self._trainer_state = trainer_state
        self._scores: dict[str, list[float | None]] = {name: [] for name in self.functions}
        self._pending: deque[dict[str, Future[list[float | None]]]] = deque()
        self._threads = {name: ThreadPoolExecutor(1, thread_name_prefix=f"reward-{name}") for name in self.functions}

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for thread in self._threads.values():
            thread.shutdown(cancel_futures=True)

    def submit(self, rows: Sequence[Mapping[str, Any]], images: Sequence[Image]) -> None:
        """Gives a batch to the functions, and waits while too many batches are under way."""
        while len(self._pending) >= _MAX_PENDING:
            self._collect()
        self._pending.append(
            {
                name: self._threads[name].submit(self._timed, name, function, list(rows), list(images))
                for name, function in self.functions.items()
            }
        )

    def results(self) -> dict[str, list[float | None]]:
        """The scores of all batches so far, in the order in which they were submitted, by the name of the function."""
        while self._pending:
            self._collect()
        return self._scores

    def _collect(self) -> None:
        for name, future in self._pending.popleft().items():
            self._scores[name] += future.result()

    def _timed(
        self, name: str, function: RewardFunc, rows: Sequence[Mapping[str, Any]], images: Sequence[Image]
    ) -> list[float | None]:
        start = time.perf_counter()
        values = _call(function, rows, images, self._trainer_state)
        self.seconds[name] += time.perf_counter() - start
        return values


def _call(
    function: RewardFunc, rows: Sequence[Mapping[str, Any]], images: Sequence[Image], trainer_state: Any
) -> list[float | None]:
    if not images:  # more processes than images
        return []
    values = function(
        prompts=[row["prompt"] for row in rows],
        images=list(images),
        completions=list(images),
        trainer_state=trainer_state,
        **{name: [row[name] for row in rows] for name in rows[0] if name != "prompt"},
    )
    if inspect.isawaitable(values):
        values = asyncio.run(_wait_for(values))
    name = reward_name(function)
    if len(values) != len(images):
        raise ValueError(
            f"Reward function {name!r} returned {len(values)} values for {len(images)} images. It must return one an "
            "image, None where it does not apply."
        )
    return [_number(name, value, row["prompt"]) for value, row in zip(values, rows, strict=True)]


def _number(name: str, value: Any, prompt: str) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"Reward function {name!r} returned {value!r} for the prompt {prompt!r}. It must return a finite number, or "
            "None where it does not apply."
        )
    return number


async def _wait_for(awaitable: Any) -> Any:
    return await awaitable
