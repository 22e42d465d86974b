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

"""What the Hub's errors mean to whoever asked for a repository, in one place for teachers, rewards and bases."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


@contextmanager
def explained(
    shown: str, repo_id: str, revision: str | None = None, error_type: type[ValueError] = ValueError
) -> Iterator[None]:
    """
    Turns an error of the Hub into one that says what to do.

    Args:
        shown (`str`): what the user asked for, as the message is to name it.
        repo_id (`str`), revision (`str`, *optional*): where it was looked for.
        error_type (`type`, *optional*, defaults to `ValueError`): the error that is raised.
    """
    try:
        yield
    except GatedRepoError as error:
        raise error_type(
            f"{shown}: the repository is gated. Accept its terms on https://huggingface.co/{repo_id} and log in with "
            "`hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise error_type(
            f"{shown}: no such folder here and no such repository on the Hub. Check the spelling; for a private "
            "repository log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise error_type(f"{shown}: the repository has no revision {revision!r}") from error
    except HFValidationError as error:
        raise error_type(f"{shown}: neither an existing folder nor a valid repository id") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise error_type(
            f"{shown}: not in the local cache, and the Hub cannot be reached. Download it once with "
            f"`hf download {repo_id}` where there is a connection, unset HF_HUB_OFFLINE, or give a local folder."
        ) from error
    except HfHubHTTPError as error:
        raise error_type(f"{shown}: the Hub refused ({error}). Try again, or give a local folder.") from error
