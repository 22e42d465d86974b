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

"""What of a run goes to the Hub, and how."""

import glob
import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress, hf_api

from .errors import ERRORS, http_reason, retried
from .files import PUSHED_FILES, STUDENT_FILES
from .repository import PushError


logger = logging.getLogger(__name__)


def push_folder(
    folder: str | Path,
    repo_id: str,
    commit_message: str = "Upload student",
    token: str | None = None,
    revision: str | None = None,
) -> CommitInfo:
    """
    Uploads what [`PUSHED_FILES`] names of an output folder to a model repository that exists.

    Args:
        folder (`str` or `Path`), repo_id (`str`)
        commit_message (`str`, *optional*, defaults to `"Upload student"`)
        token (`str`, *optional*): with write permission, by default the one you are logged in with.
        revision (`str`, *optional*): branch to commit to.
    """
    folder = Path(folder)
    names = [path.relative_to(folder).as_posix() for path in matching_files(folder, PUSHED_FILES)]
    return retried(
        hf_api().upload_folder,
        repo_id=repo_id,
        folder_path=folder,
        # By name: in the Hub's patterns a star also matches slashes, and "*.png" whatever lies in a subfolder.
        allow_patterns=[glob.escape(name) for name in names],
        commit_message=commit_message,
        token=token,
        revision=revision,
    )


def push(folder: str, repo_id: str, commit_message: str | None, blocking: bool, **options: Any) -> Any:
    """
    Uploads a student that is saved, with its card and reports.

    Args:
        folder (`str`): the output folder.
        repo_id (`str`), commit_message (`str`, *optional*)
        blocking (`bool`): whether to return only when the upload is done.
        options: `token` and `revision` of [`push_folder`].

    Returns:
        The [`~huggingface_hub.CommitInfo`], or with `blocking=False` a future of it.

    Raises:
        [`PushError`]: if the upload fails.
    """
    parts = (folder, repo_id, commit_message or "End of training")
    with failure_explained(folder, repo_id):
        if blocking:
            return push_folder(*parts, **options)
    job = hf_api().run_as_future(push_folder, *parts, **options)
    job.add_done_callback(lambda job: _report_failure(job, lambda error: _failure(folder, repo_id, error)))
    return job


@contextmanager
def failure_explained(folder: str, repo_id: str) -> Iterator[None]:
    """
    Says of what fails within it where the student lies, and how to push it later.

    Raises:
        [`PushError`]
    """
    try:
        yield
    except (*ERRORS, PushError, ValueError) as error:
        raise PushError(_failure(folder, repo_id, error)) from error


def _failure(folder: str, repo_id: str, error: BaseException) -> str:
    return (
        f"The student could not be pushed to {repo_id!r}: {http_reason(error)}. Nothing is lost, it is saved in {folder!r} "
        "with its card. Push it with trainer.push_to_hub(), or later with "
        f"`trl-diffusion-opd push {folder} {repo_id}`."
    )


def is_due(strategy: str, in_progress: PushInProgress | None, wait: bool) -> bool:
    """
    Whether a checkpoint is to be pushed: not with `"end"`, and not while the upload before it is under way.

    Args:
        strategy (`str`): `hub_strategy`.
        in_progress ([`~transformers.utils.PushInProgress`], *optional*): what [`push_checkpoint`] returned last.
        wait (`bool`): whether to wait for its end instead, as with `hub_always_push`.
    """
    if strategy == HubStrategy.END:
        return False
    if in_progress is not None and not in_progress.is_done():
        if not wait:
            return False
        in_progress.wait_until_done()  # it reads the files that are written next
    return True


def push_checkpoint(
    folder: Path, output_dir: str, repo_id: str, strategy: str, message: str, **options: Any
) -> PushInProgress:
    """
    Uploads the student of a checkpoint in the background. A failure is a warning: training goes on.

    Args:
        folder (`Path`): the checkpoint.
        output_dir (`str`), repo_id (`str`)
        strategy (`str`): `"every_save"` uploads the student. `"checkpoint"` adds the whole checkpoint, with its optimizer
            state, as `last-checkpoint`, and `"all_checkpoints"` under its own name.
        message (`str`): of the commit.
        options: `token` and `revision`, as in [`push_folder`].
    """
    # A copy, because saving again would gather sharded weights from all processes.
    for path in matching_files(folder, STUDENT_FILES):
        shutil.copy(path, Path(output_dir) / path.name)
    run = hf_api().run_as_future  # one after another
    jobs = [run(push_folder, output_dir, repo_id, message, **options)]
    if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name
        options |= {"repo_id": repo_id, "folder_path": folder, "path_in_repo": name}
        jobs.append(run(retried, hf_api().upload_folder, commit_message=f"{message}, checkpoint", **options))
    what = f"{repo_id!r} ({message[0].lower()}{message[1:]})"
    for job in jobs:
        job.add_done_callback(
            lambda job: _report_failure(
                job,
                lambda error: (
                    f"The push to {what} failed: {http_reason(error)}. Training goes on and its checkpoints are intact; the "
                    "next push brings everything."
                ),
            )
        )
    return PushInProgress(jobs)


def _report_failure(job: "Future[Any]", message: Callable[[BaseException], str]) -> None:
    # Nobody asks these futures for their result: without this a student would silently not be there.
    error = None if job.cancelled() else job.exception()
    if error is not None:
        logger.warning(message(error))


def matching_files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
