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

"""Uploads students and checkpoints to the Hub: only files on the list of [`PUSHED_FILES`]."""

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

from ..guards.files import read_json
from ..guards.log_lines import without_lines
from .errors import ERRORS, http_reason, retried
from .files import ADAPTER_CONFIG_FILE, CONFIG_FILE, LORA_FILES, PUSHED_FILES, STUDENT_FILES
from .repository import BY_COMMAND, PushError, repository_problems


logger = logging.getLogger(__name__)


def push_problems(folder: Path, repo_id: str, base_id: str | None = None, token: str | None = None) -> list[str]:
    """
    Asks the Hub what would keep the student in a folder from being pushed, as [`repository_problems`] does for a run.
    What the student is, its folder says.

    Args:
        folder (`Path`), repo_id (`str`): the output folder, and the repository. Without an owner it is one of your own.
        base_id (`str`, *optional*): the base's Hub id, if the folder's `adapter_config.json` does not say it.
        token (`str`, *optional*): a token with write permission. Defaults to the one you are logged in with.

    Returns:
        `list[str]`: the problems, with what to do. Empty if the student can be pushed.
    """
    is_lora = any((folder / name).exists() for name in LORA_FILES)
    config = read_json(folder / (ADAPTER_CONFIG_FILE if is_lora else CONFIG_FILE)) or {}
    base = base_id or config.get("base_model_name_or_path")
    return repository_problems(repo_id, base, None if is_lora else config.get("_class_name"), token, BY_COMMAND)


def push_folder(
    folder: str | Path,
    repo_id: str,
    commit_message: str = "Upload student",
    token: str | None = None,
    revision: str | None = None,
) -> CommitInfo:
    """
    Uploads the files of an output folder that [`PUSHED_FILES`] lists to an existing model repository.

    Args:
        folder (`str` or `Path`), repo_id (`str`): the output folder, and the repository (`owner/name`).
        commit_message (`str`, *optional*, defaults to `"Upload student"`)
        token (`str`, *optional*): a token with write permission. Defaults to the one you are logged in with.
        revision (`str`, *optional*): the branch to commit to.
    """
    folder = Path(folder)
    names = [path.relative_to(folder).as_posix() for path in matching_files(folder, PUSHED_FILES)]
    # After a second push users take its notice that nothing has changed for a failure.
    with without_lines("No files have been modified", "huggingface_hub.hf_api"):
        return retried(
            hf_api().upload_folder,
            repo_id=repo_id,
            folder_path=folder,
            # By exact name: in the Hub's patterns a star also matches slashes, so "*.png" would match in every
            # subfolder.
            allow_patterns=[glob.escape(name) for name in names],
            commit_message=commit_message,
            token=token,
            revision=revision,
        )


def pushed_line(repo_id: str, revision: str | None = None) -> str:
    """The last line of a push: where the student is."""
    return f"Pushed: {hf_api().endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")


def push(
    folder: str, repo_id: str, commit_message: str | None, blocking: bool, **options: Any
) -> CommitInfo | Future[CommitInfo]:
    """
    Uploads a saved student with its card and reports.

    Args:
        folder (`str`), repo_id (`str`): the output folder, and the repository (`owner/name`).
        commit_message (`str`, *optional*): defaults to `"End of training"`.
        blocking (`bool`): whether to return only when the upload is done.
        options: `token` and `revision` of [`push_folder`].

    Returns:
        The [`~huggingface_hub.CommitInfo`], or a future of it if `blocking=False`.

    Raises:
        [`PushError`]: if the upload fails, or if the repository holds something that it would overwrite.
    """
    parts = (folder, repo_id, commit_message or "End of training")
    with failure_explained(folder, repo_id):
        if blocking:
            return _push_checked(*parts, **options)
    job = hf_api().run_as_future(_push_checked, *parts, **options)
    job.add_done_callback(lambda job: _report_failure(job, lambda error: _failure(folder, repo_id, error)))
    return job


def _push_checked(folder: str, repo_id: str, message: str, token: str | None = None, **options: Any) -> CommitInfo:
    problems = push_problems(Path(folder), repo_id, token=token)
    if problems:
        raise PushError(" ".join(problems).rstrip("."))
    return push_folder(folder, repo_id, message, token=token, **options)


@contextmanager
def failure_explained(folder: str, repo_id: str) -> Iterator[None]:
    """
    Turns a failed push in its block into an error that says where the student is saved and how to push it later.

    Raises:
        [`PushError`]: if the block fails.
    """
    try:
        yield
    except (*ERRORS, PushError, ValueError) as error:
        raise PushError(_failure(folder, repo_id, error)) from error


def _failure(folder: str, repo_id: str, error: BaseException) -> str:
    return (
        f"The student could not be pushed to {repo_id!r}: {http_reason(error)}. Nothing is lost: it is saved in "
        f"{folder!r} with its card. Push it with trainer.push_to_hub(), or later with "
        f"`trl-diffusion-opd push {folder} {repo_id}`."
    )


def is_due(strategy: str, in_progress: PushInProgress | None, wait: bool) -> bool:
    """
    Whether to push a checkpoint now: not with the strategy `"end"`, and not while the previous upload is running.

    Args:
        strategy (`str`): the value of `hub_strategy`.
        in_progress ([`~transformers.utils.PushInProgress`], *optional*): the last return value of [`push_checkpoint`].
        wait (`bool`): whether to wait for the previous upload and then push, as with `hub_always_push`.
    """
    if strategy == HubStrategy.END:
        return False
    if in_progress is not None and not in_progress.is_done():
        if not wait:
            return False
        in_progress.wait_until_done()  # it reads files that will be overwritten
    return True


def push_checkpoint(
    folder: Path, output_dir: str, repo_id: str, strategy: str, message: str, **options: Any
) -> PushInProgress:
    """
    Uploads the student of a checkpoint in the background. If that fails, a warning is logged and training goes on.

    Args:
        folder (`Path`): the checkpoint.
        output_dir (`str`), repo_id (`str`): the output folder, and the repository to push it to.
        strategy (`str`): `"every_save"` uploads the student. `"checkpoint"` also uploads the whole checkpoint, with
            its optimizer state, as `last-checkpoint`; `"all_checkpoints"` does so under the checkpoint's own name.
        message (`str`): the message of the commit.
        options: `token` and `revision`, as in [`push_folder`].
    """
    # Copied, since saving again would have to gather sharded weights from all processes.
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
                    f"The push to {what} failed: {http_reason(error)}. Training goes on and its checkpoints are "
                    "intact; the next push brings everything."
                ),
            )
        )
    return PushInProgress(jobs)  # type: ignore[arg-type]  # transformers itself passes a list


def _report_failure(job: "Future[CommitInfo]", message: Callable[[BaseException], str]) -> None:
    # Nobody reads these futures' results, so without this warning a missing student would go unnoticed.
    error = None if job.cancelled() else job.exception()
    if error is not None:
        logger.warning(message(error))


def matching_files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
