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

"""Calls reward functions, checks what they return, and lets them run while the next images are generated."""

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

from ..guards.redaction import shown
from .base import Generated, Reward, RewardFunc, Row, parameters_of, reward_name


if TYPE_CHECKING:
    from transformers import TrainerState


logger = logging.getLogger(__name__)

OnTimeout = Literal["raise", "none"]

# Maximum number of batches that wait to be scored. More would only fill the memory.
_MAX_PENDING = 2

Scores = dict[str, list[float | None]]
T = TypeVar("T")


@dataclass
class RewardLog:
    """
    Values that reward functions log beside their scores, with `log_metric` and `log_extra` as in TRL's trainers.

    Attributes:
        metrics (`dict[str, list[float]]`): the values of each metric, one for each call.
        extra (`dict[str, list]`): additional columns, with one value for each image.
    """

    metrics: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    extra: dict[str, list[object]] = field(default_factory=lambda: defaultdict(list))

    def log_metric(self, name: str, value: float) -> None:
        self.metrics[name].append(float(value))

    def log_extra(self, column: str, values: list[object]) -> None:
        self.extra[column].extend(values)


# The log of the functions that are called in this context.
_LOG: contextvars.ContextVar[RewardLog | None] = contextvars.ContextVar("reward_log", default=None)


def score(
    functions: Sequence[RewardFunc],
    rows: Sequence[Row],
    images: Sequence[Generated],
    trainer_state: "TrainerState | None" = None,
) -> Scores:
    """
    Scores images, one function after another, without gradients.

    Args:
        functions (`list` of reward functions): the functions to call.
        rows (`list[dict]`): the dataset's row of each image.
        images (`list[PIL.Image.Image]`): the images. A video is a list of its frames.
        trainer_state ([`~transformers.TrainerState`], *optional*): passed to the functions.

    Returns:
        `dict[str, list[float | None]]`: the scores of each function by its name, one an image. The components of a
        [`CombinedReward`] follow it as `name/component`.

    Raises:
        [`ValueError`]: if a function returns a wrong number of values or a value that is not a number, or if two
            functions have the same name.
    """
    scores: Scores = {}
    for function in _by_name(functions).values():
        scores |= call_reward(function, rows, images, trainer_state)
    return scores


class RewardTimeout(TimeoutError):
    """Raised if a call of a reward function takes longer than `reward_timeout`."""


class Scorer:
    """
    Scores batches of images while the caller generates the next ones.

    Each function runs in its own thread and gets the batches in order, so a function that waits for a server does not
    delay another one. The threads have the caller's context variables and current device, and gradients are off, so
    the scores equal those of [`score`].

    An error of a function is raised by the next call of `submit` or `results` that collects its batch, and by every
    later call. Leaving the `with` block waits up to `timeout` seconds for running calls and drops waiting ones.

    A call that hangs cannot be stopped. Its thread is left behind (it does not keep the program from exiting), and
    this scorer does not call the function again.

    ```python
    with Scorer(functions) as scorer:
        for rows in batches:
            scorer.submit(rows, generate(rows))
        scores = scorer.results()
    ```

    Args:
        functions (`list` of reward functions): the functions to call.
        trainer_state ([`~transformers.TrainerState`], *optional*): passed to the functions.
        timeout (`float`, *optional*): maximum seconds that the caller waits for one call of a function. By default
            there is no limit.
        on_timeout (`str`, *optional*, defaults to `"raise"`): what happens then: `"raise"` an error, or log a warning
            and give no score (`"none"`) to these images and to all that the function has not scored yet.
        task (`str`, *optional*): the images' task, for messages.
        call (*optional*): calls a function in its thread and returns its scores. It gets the function, rows, images,
            and the `batch` that `submit` was given. Defaults to [`call_reward`].

    Attributes:
        seconds (`dict[str, float]`): seconds that each function has taken, by name.
        log ([`RewardLog`]): values that the functions logged beside their scores.
        waited (`float`): seconds that the caller has waited for scores. The rest of the sum of `seconds` passed while
            it generated images.

    Raises:
        [`ValueError`]: if two functions have the same name.
        [`RewardTimeout`]: by `submit` and `results`, if a call takes too long.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunc],
        trainer_state: "TrainerState | None" = None,
        timeout: float | None = None,
        on_timeout: OnTimeout = "raise",
        task: str | None = None,
        call: Callable[[RewardFunc, Sequence[Row], Sequence[Any], Any], Scores] | None = None,
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
        # First tell all threads to stop, then wait for them.
        for thread in self._threads.values():
            thread.stop()
        for name, thread in self._threads.items():
            if name not in self._hung:
                thread.join(self.timeout)

    def submit(self, rows: Sequence[Row], images: Sequence[Generated], batch: object = None) -> None:
        """Gives a batch to the functions. First waits while too many batches are being scored."""
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
        """The scores of all batches so far, by name of the function, in the order in which batches were submitted."""
        while self._pending:
            self._collect()
        return self._scores

    def _collect(self) -> None:
        # A failed batch stays in the queue: a caller that goes on after the error gets it again, and never scores that
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
                logger.warning("%s These images, and later ones in this evaluation, get no score from it.", message)
        elif self.on_timeout == "raise":
            raise self._too_long(f"Reward {name!r} hangs.")
        return {of_part: [None] * size for of_part in score_names(function)}

    @staticmethod
    def _too_long(message: str) -> RewardTimeout:
        return RewardTimeout(f"{message} Find out what it waits for, or give it more time.")

    def _timed(self, name: str, rows: Sequence[Row], images: Sequence[Generated], batch: object) -> Scores:
        start = time.perf_counter()
        _LOG.set(self.log)  # only in the context of this call
        try:
            if self._call is not None:
                return self._call(self.functions[name], rows, images, batch)
            return call_reward(self.functions[name], rows, images, self._trainer_state)
        finally:
            self.seconds[name] += time.perf_counter() - start


@torch.no_grad()  # here, since each thread has its own gradient mode
def call_reward(
    function: RewardFunc, rows: Sequence[Row], images: Sequence[Generated], trainer_state: "TrainerState | None" = None
) -> Scores:
    """
    Calls one reward function by keyword and checks what it returns.

    Args:
        function (reward function): sync or async.
        rows, images, trainer_state: as in [`score`].

    Returns:
        `dict[str, list[float | None]]`: its scores by its name, and those of its components.
    """
    if not images:  # more processes than images
        return {name: [] for name in score_names(function)}
    # Not those of the first row alone: a row of pictures may follow one that has no such column.
    names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
    given: dict[str, Any] = {
        "prompts": [row["prompt"] for row in rows],
        "images": list(images),
        "completions": list(images),
        "trainer_state": trainer_state,
        **{name: [row.get(name) for row in rows] for name in names},
    }
    values: Any = (
        function.named_scores(**given) if isinstance(function, Reward) else function(**_taken(function, given))
    )
    if inspect.isawaitable(values):
        values = _wait_for(values)
    named = values if isinstance(function, Reward) else {reward_name(function): values}
    return {name: _checked(name, of_name, rows) for name, of_name in named.items()}


def rows_of(prompts: Sequence[str], columns: Mapping[str, Sequence[object]]) -> list[Row]:
    """The rows behind the keyword arguments of a reward function, for rewards that call others."""
    return [
        {"prompt": prompt, **{name: values[i] for name, values in columns.items()}} for i, prompt in enumerate(prompts)
    ]


def _taken(function: RewardFunc, given: Mapping[str, object]) -> dict[str, object]:
    """The arguments for a function: those that it has a parameter for, or all if it takes any columns."""
    parameters = parameters_of(function)
    if parameters is None:
        return dict(given)
    log = _LOG.get() or RewardLog()
    # Only for parameters of these names, since everything in `**columns` has one value an image.
    asked = {
        name: value
        for name, value in (("log_metric", log.log_metric), ("log_extra", log.log_extra))
        if name in parameters
    }
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return {**given, **asked}
    return {name: value for name, value in given.items() if name in parameters} | asked


def timeout_problems(timeout: float | None) -> list[str]:
    """Says why a value can't be `reward_timeout`; empty if it can."""
    if timeout is None or 0 < timeout <= threading.TIMEOUT_MAX:
        return []
    return [f"reward_timeout={timeout}: it must be a positive number of seconds, or unset."]


def _by_name(functions: Sequence[RewardFunc]) -> dict[str, RewardFunc]:
    named = {reward_name(function): function for function in functions}
    if len(named) < len(functions):
        names = [reward_name(function) for function in functions]
        raise ValueError(f"Two of the reward functions {names} have the same name. Rename one.")
    return named


def score_names(function: RewardFunc) -> tuple[str, ...]:
    """Names of a function's scores: its own, and those of its components."""
    return function.score_names if isinstance(function, Reward) else (reward_name(function),)


def _checked(name: str, values: Any, rows: Sequence[Row]) -> list[float | None]:
    try:
        values = list(values)
    except TypeError:
        raise ValueError(
            f"Reward function {name!r} returned {values!r:.100}. It must return a list with one value for each image."
        ) from None
    if len(values) != len(rows):
        raise ValueError(
            f"Reward function {name!r} returned {len(values)} values for {len(rows)} images. It must return one value "
            "for each image, None where it does not apply."
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
            f"Reward function {name!r} returned {value!r:.100} for the prompt '{shown(prompt)}'. It must return a "
            "finite number, or None where it does not apply."
        )
    return number


def _wait_for(awaitable: Awaitable[T]) -> T:
    async def result() -> T:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(result())
    # In a notebook this thread already runs a loop, and a second loop needs another thread.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(contextvars.copy_context().run, torch.no_grad()(asyncio.run), result()).result()


class _Thread:
    """
    A thread that runs calls in order.

    A `ThreadPoolExecutor` is not used, since the interpreter waits for its threads when it exits.
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
        """Lets the thread end after the submitted calls that are not cancelled."""
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
            except BaseException as error:  # raised again by the caller, whatever it is
                future.set_exception(error)


def _device() -> tuple[int | None]:
    """Index of the caller's device. Without it, a new thread would use the first device in every process."""
    return (torch.accelerator.current_device_index() if torch.accelerator.is_available() else None,)


def _use_device(index: int | None) -> None:
    if index is not None:
        torch.accelerator.set_device_index(index)
