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

"""A run and its output folder: one run writes in it at a time, and it goes on from its own checkpoints alone."""

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from ..hub.files import LOCK_FILE
from .seal import run_of


_ASIDE = "earlier-run"


def folder_problems(output_dir: str | None) -> list[str]:
    """Whether files can be written where a run is to save, asked before it has trained anything."""
    folder = Path(output_dir or ".").absolute()
    # A start that fails for another reason leaves no folder: the one that this one will be made in is asked.
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return []
    except OSError as error:
        return [f"output_dir={str(output_dir)!r} cannot be written to ({error.strerror}). Choose another folder."]


@contextmanager
def one_run_at_a_time(output_dir: str | None, accelerator: Accelerator) -> Iterator[None]:
    """
    Within it no other run trains into the folder. The system lets go of the lock when the process ends, however it ends.

    Raises:
        [`RuntimeError`]: on all processes, if another run does already.
    """
    lock = FileLock(os.path.join(output_dir or ".", LOCK_FILE))
    held = [True]
    if accelerator.is_main_process:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            held = [False]
    if accelerator.num_processes > 1:
        broadcast_object_list(held)
    if not held[0]:
        raise RuntimeError(
            f"Another run is training into {output_dir} and would delete this one's checkpoints, and this one its. Wait for its "
            "end, or choose another output_dir."
        )
    try:
        yield
    finally:
        lock.release()


def name_of_run(resumed: Path | None, accelerator: Accelerator) -> str:
    """The run that goes on from a checkpoint, or a new one. The same on all processes."""
    name = [None if resumed is None else run_of(resumed)]
    if name[0] is None:
        name = [uuid.uuid4().hex]
    if accelerator.num_processes > 1:
        broadcast_object_list(name)
    assert name[0] is not None
    return name[0]


def set_aside(checkpoints: list[Path], accelerator: Accelerator) -> Path | None:
    """
    Moves checkpoints that the run which begins has nothing to do with into a folder beside them. All processes call it.

    Returns:
        `Path`: the folder, on the main process; `None` if there was nothing to move.
    """
    aside: Path | None = None
    if accelerator.is_main_process and checkpoints:
        parent = checkpoints[0].parent
        numbered = (parent / f"{_ASIDE}-{number}" for number in count(1))
        aside = next(folder for folder in numbered if not folder.exists())
        aside.mkdir()
        for folder in checkpoints:
            folder.rename(aside / folder.name)
    accelerator.wait_for_everyone()
    return aside
