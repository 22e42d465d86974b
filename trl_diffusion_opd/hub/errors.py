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

"""Explains the Hub's errors, repeats requests after temporary ones, and downloads files of repositories."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import httpx2
from huggingface_hub import model_info, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..guards.redaction import public_text
from ..guards.redaction import shown as quoted
from ..problems import Refusal
from .names import way_out


logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

# Errors that a library's call to the Hub can raise. diffusers wraps the Hub's errors in an OSError.
ERRORS = (HfHubHTTPError, httpx2.TransportError, HFValidationError, OSError)
_TRANSIENT = (429, 500, 502, 503, 504)
# Seconds before the second, third and fourth attempt, unless the Hub asks for another wait. Its rate limits count
# requests in windows of five minutes.
_WAITS = (1.0, 4.0, 16.0)
_LONGEST_WAIT = 300.0


def retried(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """
    Calls a function that uses the Hub, and repeats the call after a temporary error.

    huggingface_hub itself repeats file transfers and some other requests. It does not repeat the first request about a
    repository or a token, nor creating a repository, and repeats a commit only with xet. The function must be safe to
    repeat: `upload_folder` is, since it skips files that are on the Hub already.

    The call is tried four times if the error is a rate limit (429; waits as `Retry-After` asks, up to 5 minutes), a
    fault of the Hub (500, 502, 503, 504) or a broken connection. Other errors are raised at once.
    """
    for wait in _WAITS:
        try:
            return call(*args, **kwargs)
        except ERRORS as error:
            cause = _cause(error)
            if not _passes(cause):
                raise
            wait = _asked_wait(cause, wait)
            logger.warning(f"The Hub: {_first_line(cause)}. Trying again in {wait:g} s.")
            time.sleep(wait)
    return call(*args, **kwargs)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _cause(error: BaseException) -> BaseException:
    """The Hub's own error, found in the chain of errors that libraries raised from it."""
    own = (HfHubHTTPError, httpx2.TransportError, OfflineModeIsEnabled)
    return next((cause for cause in _chain(error) if isinstance(cause, own)), error)


def _passes(error: BaseException) -> bool:
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TRANSIENT
    return isinstance(error, httpx2.TransportError)


def _asked_wait(error: BaseException, default: float) -> float:
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return min(float(asked), _LONGEST_WAIT) if asked.isdecimal() else default


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The text is the server's. If a token has characters that a header can't hold, the text contains the token.
    return quoted(public_text(lines[0]), 300).rstrip(".") if lines else type(error).__name__


@contextmanager
def explained(
    shown: str, repo_id: str, revision: str | None = None, error_type: type[ValueError] = Refusal
) -> Iterator[None]:
    """
    Turns an error of the Hub in its block into one that says what to do. Other errors are raised unchanged.

    Args:
        shown (`str`): how the message names what the user asked for.
        repo_id (`str`), revision (`str`, *optional*): the repository, and the branch, tag or commit in it.
        error_type (`type`, *optional*, defaults to [`Refusal`]): the type of the error to raise.
    """
    try:
        yield
    except ERRORS as error:
        reason = _read_reason(error, repo_id, revision)
        if reason is None:
            raise
        raise error_type(f"{shown}: {reason}") from error


def _read_reason(error: BaseException, repo_id: str, revision: str | None) -> str | None:
    cause = _cause(error)
    if isinstance(cause, HFValidationError):
        return "neither an existing folder nor a valid repository id"
    if isinstance(cause, GatedRepoError):
        return (
            f"the repository is gated. Accept its terms on https://huggingface.co/{repo_id} and log in with "
            "`hf auth login`."
        )
    if isinstance(cause, RepositoryNotFoundError):
        return (
            "no such folder here and no such repository on the Hub. Check the spelling; for a private repository log "
            "in with `hf auth login`."
        )
    if isinstance(cause, RevisionNotFoundError):
        return f"the repository has no revision {revision!r}"
    if isinstance(cause, (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx2.TransportError)):
        return (
            "no such folder here, not in the local cache, and the Hub cannot be reached. Download it once with "
            f"`hf download {repo_id}` where there is a connection, unset HF_HUB_OFFLINE, or give a local folder."
        )
    if isinstance(cause, HfHubHTTPError) and not isinstance(cause, EntryNotFoundError):
        return f"{http_reason(cause)}."
    return None


def http_reason(error: BaseException) -> str:
    """Says what went wrong with a request to the Hub, in a sentence without a full stop."""
    cause = _cause(error)
    if isinstance(cause, httpx2.TransportError):
        return f"the connection to the Hub failed ({type(cause).__name__}: {_first_line(cause)})"
    if not isinstance(cause, HfHubHTTPError):
        return _first_line(cause)
    status = cause.response.status_code
    if isinstance(cause, RevisionNotFoundError):
        return f"the repository has no such branch ({status})"
    if isinstance(cause, RepositoryNotFoundError):
        return f"there is no such repository, or your token does not see it ({status})"
    if status == 401:
        return "the Hub does not know your token (401). Log in with `hf auth login`, or set a valid HF_TOKEN"
    if status == 403:
        return "your token is not allowed to do this (403). See https://huggingface.co/settings/tokens"
    if status == 429:
        return "the Hub takes no more requests from you for some minutes (429). Try again later"
    if status in _TRANSIENT:
        return f"the Hub itself has a fault ({status}). Try again later, or see https://status.huggingface.co"
    return f"the Hub refused ({_first_line(cause)})"


def download(
    shown: str,
    repo_id: str,
    revision: str | None,
    patterns: list[str],
    error_type: type[ValueError] = Refusal,
) -> Path:
    """
    Downloads the files of a repository that match the glob `patterns`. Other arguments are those of [`explained`].

    Returns:
        `Path`: the folder of the snapshot in the local cache. Its name is the commit.

    Raises:
        `error_type`: if the download fails. The message says what to do.
    """
    reason = None if revision is None else way_out(revision)
    if reason is not None:
        raise error_type(f"{shown}: the revision {revision!r} can't be one: {reason}.")
    with explained(shown, repo_id, revision, error_type):
        return Path(retried(snapshot_download, repo_id, revision=revision, allow_patterns=patterns))


def listing(
    shown: str,
    repo_id: str,
    revision: str | None,
    folder: Path,
    prefix: str,
    error_type: type[ValueError] = Refusal,
) -> list[str]:
    """
    Lists the files of a repository whose path starts with `prefix`, without the prefix. Without a connection it lists
    the files that are already in `folder`.

    Raises:
        `error_type`: if the Hub refuses. The message says what to do.
    """
    try:
        with explained(shown, repo_id, revision, error_type):
            files = retried(model_info, repo_id, revision=revision).siblings or []
        return [file.rfilename.removeprefix(prefix) for file in files if file.rfilename.startswith(prefix)]
    except error_type as error:
        if isinstance(_cause(error), (OfflineModeIsEnabled, httpx2.TransportError)):
            return [path.name for path in folder.glob("*")]
        raise
