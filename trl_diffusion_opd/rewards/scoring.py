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
import contextvars
import inspect
import logging
import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from PIL.Image import Image

from ..guards.redaction import shown
from .base import Reward, RewardFunc, Row, parameters_of, reward_name


if TYPE_CHECKING:
    from transformers import TrainerState


logger = logging.getLogger(__name__)

OnTimeout = Literal["raise", "none"]

# Batches of images that wait to be scored: more would only fill the memory.
_MAX_PENDING = 2

Scores = dict[str, list[float | None]]
T = TypeVar("T")


@dataclass
class RewardLog:
    """
    What reward functions log beside their scores, by `log_metric` and `log_extra`, as in TRL's trainers.

    Attributes:
        metrics (`dict[str, list[float]]`): the values of each metric, one a call.
        extra (`dict[str, list]`): columns, with a value an image.
    """

    metrics: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    extra: dict[str, list[object]] = field(default_factory=lambda: defaultdict(list))

    def log_metric(self, name: str, value: float) -> None:
        self.metrics[name].append(float(value))

    def log_extra(self, column: str, values: list[object]) -> None:
        self.extra[column].extend(values)


# Where the functions that are called in this context log to.
_LOG: contextvars.ContextVar[RewardLog | None] = contextvars.ContextVar("reward_log", default=None)


def score(
    functions: Sequence[RewardFunc],
    rows: Sequence[Row],
    images: Sequence[Image],
    trainer_state: "TrainerState | None" = None,
) -> Scores:
    """
    Scores images, one function after another, without gradients.

    Args:
        functions (`list` of reward functions), rows (`list[dict]`): rows of the dataset, one an image.
        images (`list[PIL.Image.Image]`)
        trainer_state ([`~transformers.TrainerState`], *optional*)

    Returns:
        `dict[str, list[float | None]]`: a value an image for each function, by name. The parts of a [`CombinedReward`]
        follow it, as `name/part`.

    Raises:
        [`ValueError`]: if a function returns another number of values than it was given images, or what is no number,
            or if two functions have one name.
    """
    scores: Scores = {}
    for function in _by_name(functions).values():
        scores |= call_reward(function, rows, images, trainer_state)
    return scores


class Scorer:
    """
    Scores batches of images while the caller generates the next ones.

    Each function has a thread of its own, in which it sees the batches in order: one that waits for a server does not hold
    up one that computes. The threads have the caller's context variables and current device, and gradients are off, so
    the scores are those of [`score`].

    What a function raises is raised by the next call of `submit` or `results` that meets it, and by every one after that.
    Leaving the `with` block waits for the calls that are running, up to `timeout` seconds, and drops those that wait.

    A call that hangs cannot be ended. Its thread is left behind, which does not keep the program from exiting, and the function
    is not called again by this scorer.

    ```python
    with Scorer(functions) as scorer:
        for rows in batches:
            scorer.submit(rows, generate(rows))
        scores = scorer.results()
    ```

    Args:
        functions (`list` of reward functions)
        trainer_state ([`~transformers.TrainerState`], *optional*): passed to the functions.
        timeout (`float`, *optional*): seconds that the caller waits for one call of a function; without it, for ever.
        on_timeout (`str`, *optional*, defaults to `"raise"`): what follows then: `"raise"` an error, or log a warning and give
            `"none"` as the scores of these images and of all that the function has yet to score.
        task (`str`, *optional*): whose images these are, for the message.
        call (*optional*): what calls a function in its thread, with it, rows, images and what `submit` was given as their
            `batch`, and returns its scores; [`call_reward`] if not given.

    Attributes:
        seconds (`dict[str, float]`): the time that each function took, by name.
        log ([`RewardLog`]): what the functions logged beside their scores.
        waited (`float`): the seconds that the caller waited for scores. What is missing of the sum of `seconds` was spent
            while it generated.

    Raises:
        [`ValueError`]: if two functions have one name.
        [`TimeoutError`]: by `submit` and `results`, if a call took too long.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunc],
        trainer_state: "TrainerState | None" = None,
        timeout: float | None = None,
        on_timeout: OnTimeout = "raise",
        task: str | None = None,
        call: Callable[[RewardFunc, Sequence[Row], Sequence[Image], Any], Scores] | None = None,
    ):
        self.functions = _by_name(functions)
        self.timeout = timeout
        self.on_timeout = on_timeout
        self.task = task
        self.seconds = dict.fromkeys(self.functions, 0.0)
        self.waited = 0.0
        self.log = RewardLog()
        self._trainer_state = trainer_state
        self._call = call
        self._scores: Scores = {name: [] for function in functions for name in score_names(function)}
        self._pending: deque[tuple[int, dict[str, Future[Scores]]]] = deque()
        self._threads = {name: _Thread(f"reward-{name}") for name in self.functions}
        self._hung: set[str] = set()

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for _, futures in self._pending:
            for future in futures.values():
                future.cancel()
        # All are told before one is waited for.
        for thread in self._threads.values():
            thread.stop()
        for name, thread in self._threads.items():
            if name not in self._hung:
                thread.join(self.timeout)

    def submit(self, rows: Sequence[Row], images: Sequence[Image], batch: object = None) -> None:
        """Gives a batch to the functions, and waits while too many batches are under way."""
        while len(self._pending) >= _MAX_PENDING:
            self._collect()
        futures = {
            name: self._threads[name].submit(
                partial(contextvars.copy_context().run, self._timed, name, list(rows), list(images), batch)
            )
            for name in self.functions
            if name not in self._hung
        }
        self._pending.append((len(images), futures))

    def results(self) -> Scores:
        """The scores of all batches so far, in the order in which they were submitted, by the name of the function."""
        while self._pending:
            self._collect()
        return self._scores

    def _collect(self) -> None:
        # The batch stays where it is if it failed: whoever goes on after an error meets it again, and not scores that
        # lack a batch.
        size, futures = self._pending[0]
        start = time.perf_counter()
        scores = [self._result(name, futures.get(name), function, size) for name, function in self.functions.items()]
        self.waited += time.perf_counter() - start
        self._pending.popleft()
        for of_function in scores:
            for name, values in of_function.items():
                self._scores[name] += values

    def _result(self, name: str, future: "Future[Scores] | None", function: RewardFunc, size: int) -> Scores:
        if future is not None and name not in self._hung:
            try:
                return future.result(self.timeout)
            except TimeoutError:
                if future.done():  # the function's own error, or its scores at the last moment
                    return future.result()
                self._hung.add(name)
                of_task = "" if self.task is None else f" of task {self.task!r}"
                message = (
                    f"Reward {name!r} has given no scores for {size} images{of_task} in {self.timeout:g} seconds "
                    "(reward_timeout)."
                )
                if self.on_timeout == "raise":
                    raise self._too_long(message) from None
                logger.warning(
                    "%s These images, and those after them in this evaluation, have no score of it.", message
                )
        elif self.on_timeout == "raise":
            raise self._too_long(f"Reward {name!r} hangs.")
        return {of_part: [None] * size for of_part in score_names(function)}

    @staticmethod
    def _too_long(message: str) -> TimeoutError:
        return TimeoutError(f"{message} Look at what it waits for, or give it longer.")

    def _timed(self, name: str, rows: Sequence[Row], images: Sequence[Image], batch: object) -> Scores:
        start = time.perf_counter()
        _LOG.set(self.log)  # in a context of this call
        try:
            if self._call is not None:
                return self._call(self.functions[name], rows, images, batch)
            return call_reward(self.functions[name], rows, images, self._trainer_state)
        finally:
            self.seconds[name] += time.perf_counter() - start


@torch.no_grad()  # of the thread that it runs in
def call_reward(
    function: RewardFunc, rows: Sequence[Row], images: Sequence[Image], trainer_state: "TrainerState | None" = None
) -> Scores:
    """
    Calls one reward function by keyword and checks what it returns.

    Args:
        function: sync or async. rows, images, trainer_state: as in [`score`].

    Returns:
        `dict[str, list[float | None]]`: its values by its name, and those of its parts.
    """
    if not images:  # more processes than images
        return {name: [] for name in score_names(function)}
    given: dict[str, Any] = {
        "prompts": [row["prompt"] for row in rows],
        "images": list(images),
        "completions": list(images),
        "trainer_state": trainer_state,
        **{name: [row[name] for row in rows] for name in rows[0] if name != "prompt"},
    }
    values: Any = (
        function.named_scores(**given) if isinstance(function, Reward) else function(**_taken(function, given))
    )
    if inspect.isawaitable(values):
        values = _wait_for(values)
    named = values if isinstance(function, Reward) else {reward_name(function): values}
    return {name: _checked(name, of_name, rows) for name, of_name in named.items()}


def _taken(function: RewardFunc, given: Mapping[str, object]) -> dict[str, object]:
    """What a function is called with: all that it has a parameter for, and the rest where it takes any columns."""
    parameters = parameters_of(function)
    if parameters is None:
        return dict(given)
    log = _LOG.get() or RewardLog()
    # Only where they are asked for by name: what else comes as `**columns` has a value an image.
    asked = {
        name: value
        for name, value in (("log_metric", log.log_metric), ("log_extra", log.log_extra))
        if name in parameters
    }
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return {**given, **asked}
    return {name: value for name, value in given.items() if name in parameters} | asked


def timeout_problems(timeout: float | None) -> list[str]:
    """What is wrong with seconds as `reward_timeout`."""
    if timeout is None or 0 < timeout <= threading.TIMEOUT_MAX:
        return []
    return [f"reward_timeout={timeout}: it must be a positive number of seconds, or unset."]


def _by_name(functions: Sequence[RewardFunc]) -> dict[str, RewardFunc]:
    named = {reward_name(function): function for function in functions}
    if len(named) < len(functions):
        names = [reward_name(function) for function in functions]
        raise ValueError(f"Two reward functions of {names} have one name; their scores would be one. Rename one.")
    return named


def score_names(function: RewardFunc) -> tuple[str, ...]:
    """Names of a function's scores: its own, and those of its parts."""
    return function.score_names if isinstance(function, Reward) else (reward_name(function),)


def _checked(name: str, values: Any, rows: Sequence[Row]) -> list[float | None]:
    try:
        values = list(values)
    except TypeError:
        raise ValueError(
            f"Reward function {name!r} returned {values!r:.100}. It must return a list with a value an image."
        ) from None
    if len(values) != len(rows):
        raise ValueError(
            f"Reward function {name!r} returned {len(values)} values for {len(rows)} images. It must return one an "
            "image, None where it does not apply."
        )
    return [_number(name, value, row["prompt"]) for value, row in zip(values, rows, strict=True)]


def _number(name: str, value: Any, prompt: str) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"Reward function {name!r} returned {value!r:.100} for the prompt '{shown(prompt)}'. It must return a finite "
            "number, or None where it does not apply."
        )
    return number


def _wait_for(awaitable: Awaitable[T]) -> T:
    async def result() -> T:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(result())
    # A notebook has a loop in this thread, and a second one needs another thread.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(contextvars.copy_context().run, torch.no_grad()(asyncio.run), result()).result()


class _Thread:
    """
    One thread that makes calls in order.

    Not a `ThreadPoolExecutor`, since the interpreter waits for the threads of those when it exits.
    """

    def __init__(self, name: str):
        self._calls: SimpleQueue[tuple[Future[Scores], Callable[[], Scores]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=_device(), name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], Scores]) -> "Future[Scores]":
        future: Future[Scores] = Future()
        self._calls.put((future, call))
        return future

    def stop(self) -> None:
        """Has the thread end after what was submitted and not cancelled."""
        self._calls.put(None)

    def join(self, timeout: float | None) -> None:
        self._thread.join(timeout)

    def _work(self, device: int | None) -> None:
        _use_device(device)
        while (submitted := self._calls.get()) is not None:
            future, call = submitted
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # whatever it is, the caller raises it
                future.set_exception(error)


def _device() -> tuple[int | None]:
    """Index of the caller's device: a new thread would start with the first one, whichever process it is in."""
    return (torch.accelerator.current_device_index() if torch.accelerator.is_available() else None,)


def _use_device(index: int | None) -> None:
    if index is not None:
        torch.accelerator.set_device_index(index)
