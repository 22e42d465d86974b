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

"""Guards a run's output folder: it is writable, only one run writes to it at a time, and runs are told apart."""

import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from ..guards.files import write_file
from ..hub.files import LOCK_FILE, PAGE_FILE
from ..problems import Refusal
from .seal import run_of


_ASIDE = "earlier-run"


def folder_problems(output_dir: str | None) -> list[str]:
    """Refuses an output folder that cannot be written to, before anything is trained."""
    folder = Path(output_dir or ".").absolute()
    # A start that fails for another reason must leave no folder, so the nearest existing parent is tried.
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return []
    except OSError as error:
        return [f"output_dir={str(output_dir)!r} cannot be written to ({error.strerror}). Choose another folder."]


@contextmanager
def one_run_at_a_time(output_dir: str | None, accelerator: Accelerator) -> Iterator[None]:
    """
    Context in which no other run can train into the folder. The system releases the lock when the process ends, even
    if it is killed.

    Raises:
        [`Refusal`]: on all processes, if another run is training into the folder.
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
        raise Refusal(
            f"Another run is training into {output_dir}. The two would delete each other's checkpoints. Wait until it "
            "ends, or choose another output_dir."
        )
    try:
        yield
    finally:
        lock.release()


def name_of_run(resumed: Path | None, accelerator: Accelerator) -> str:
    """Returns the name of the run that `resumed` belongs to, or a new random name. It is the same on all processes."""
    name = [None if resumed is None else run_of(resumed)]
    if name[0] is None:
        name = [uuid.uuid4().hex]
    if accelerator.num_processes > 1:
        broadcast_object_list(name)
    assert name[0] is not None
    return name[0]


def set_aside(paths: Sequence[Path], output_dir: Path) -> Path | None:
    """
    Moves files and folders of other runs into a new folder beside them. One process alone must call it.

    Args:
        paths (`list[Path]`), output_dir (`Path`): what to move, and the run's folder, which holds it.

    Returns:
        `Path`: the new folder; `None` if there was nothing to move.
    """
    if not paths:
        return None
    numbered = (output_dir / f"{_ASIDE}-{number}" for number in count(1))
    aside = next(folder for folder in numbered if not folder.exists())
    aside.mkdir()
    for path in paths:
        moved = aside / path.relative_to(output_dir)
        moved.parent.mkdir(exist_ok=True)
        path.rename(moved)
    page = aside / PAGE_FILE
    if page.exists():  # its images stay where they are: the next evaluation reuses them
        write_file(page, page.read_text(encoding="utf-8").replace('"images/', '"../images/'))
    return aside
