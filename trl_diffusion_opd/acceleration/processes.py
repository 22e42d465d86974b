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

"""What a process does when another one of the same run has failed or gone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object


def communication_failed(error: BaseException) -> bool:
    """Whether it was raised because processes could not talk to each other."""
    # NCCL's errors have a class. Gloo's are plain RuntimeErrors that begin with the place in its source.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


@contextmanager
def lost_process_named(where: Callable[[], str], advice: Callable[[], str]) -> Iterator[None]:
    """
    Within it a failed communication is raised as what it most often is: another process has gone.

    Args:
        where (`Callable`): where in the training this is, as in "in update 3".
        advice (`Callable`): what to do about it, a sentence.

    Raises:
        [`RuntimeError`]: in place of the error of the communication, which is its cause.
    """
    try:
        yield
    except RuntimeError as error:
        if not communication_failed(error):
            raise
        raise RuntimeError(
            f"Process {dist.get_rank()} of {dist.get_world_size()} lost another process {where()}: that one was killed, "
            "for example for want of memory, or stopped with an error of its own, which is in its own output. Training "
            f"stops. {advice()}"
        ) from error


@contextmanager
def failing_together() -> Iterator[None]:
    """
    Within it no process waits for another. What one of them raises there is raised by it, and an error that tells of it by all
    others, so that all go on, or none: whoever catches it does not wait for processes that are elsewhere.

    Raises:
        [`RuntimeError`]: if the block of another process has failed.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # raised again below
        failure = error
    if PartialState().num_processes > 1:
        told = gather_object([None if failure is None else f"{type(failure).__name__}: {failure}"])
        failed = [(rank, text) for rank, text in enumerate(told) if text is not None]
        if failed and failure is None:
            rank, text = failed[0]
            raise RuntimeError(f"Process {rank} of {len(told)} has failed, so the others stop as well. {text}")
    if failure is not None:
        raise failure
