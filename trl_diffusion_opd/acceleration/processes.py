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

"""Turns a failure of one process into an error on all of them, with a message that says what happened."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object

from ..problems import Refusal


def world_problems() -> list[str]:
    """Says if a launcher has started more processes than know of each other, so that each would work alone."""
    launched = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if launched == 1 or PartialState().num_processes > 1:
        return []
    return [
        f"{launched} processes were launched, but they do not know of each other: each would work alone, and all would "
        "write into one folder. On CPUs add --use_cpu true (in Python, use_cpu=True)."
    ]


def communication_failed(error: BaseException) -> bool:
    """Whether an error was raised because processes could not communicate."""
    # NCCL's errors have a class. Gloo's are plain RuntimeErrors that name a file of its source.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


@contextmanager
def lost_process_named(where: Callable[[], str], advice: Callable[[], str]) -> Iterator[None]:
    """
    Explains a failed communication in its block: most often another process has died.

    Args:
        where (`Callable`): returns where in the training this is, such as "in update 3".
        advice (`Callable`): returns a sentence that says what to do.

    Raises:
        [`RuntimeError`]: if communication fails. The original error is its cause.
    """
    try:
        yield
    except RuntimeError as error:
        if not communication_failed(error):
            raise
        raise RuntimeError(
            f"Process {dist.get_rank()} of {dist.get_world_size()} lost another process {where()}: that one was "
            "killed, for example because it ran out of memory, or it stopped with an error, which is in its own "
            f"output. Training stops. {advice()}"
        ) from error


@contextmanager
def failing_together() -> Iterator[None]:
    """
    Makes all processes fail if its block fails on one of them, so that none waits for processes that have stopped.

    The process whose block fails raises its own error; all others raise an error that quotes it. Processes must not
    wait for one another inside the block.

    Raises:
        [`RuntimeError`]: if the block of another process has failed; a [`Refusal`] if that one has refused its input.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # raised again below
        failure = error
    if PartialState().num_processes > 1:
        told = gather_object(
            [None if failure is None else (f"{type(failure).__name__}: {failure}", isinstance(failure, Refusal))]
        )
        failed = [(rank, said) for rank, said in enumerate(told) if said is not None]
        if failed and failure is None:
            rank, (text, is_refusal) = failed[0]
            kind = Refusal if is_refusal else RuntimeError
            raise kind(f"Process {rank} of {len(told)} has failed, so the others stop as well. {text}")
    if failure is not None:
        raise failure
