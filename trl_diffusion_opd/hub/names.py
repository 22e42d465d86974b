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

"""
Checks names of repositories, and that a path or a revision of one cannot lead out of the repository's folder.
"""

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def repository_id_problem(name: str) -> str | None:
    """Says why `name` can't be the id of a repository with its owner, for a message. `None` if it can."""
    if name.count("/") != 1:
        return "it must have the form owner/name"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return str(error).split("\n")[0].rstrip(".")
    return None


def way_out(path: str) -> str | None:
    """
    Says which part of a path within a repository (or of a revision) could lead out of it, for a message. Returns
    `None` if the path is safe.

    In a downloaded snapshot, `a/../../b` would be some other file of this machine, recorded as a file of the
    repository.

    Args:
        path (`str`): parts separated by `/`.
    """
    for part in path.split("/"):
        if part in ("", ".", ".."):
            return f"{part!r} is no part of a path in a repository" if part else "it has an empty part"
        if "\\" in part:
            return "it has a backslash; parts have '/' between"
        if not part.isprintable():
            return "it has a control character"
    return None
