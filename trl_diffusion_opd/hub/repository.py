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
Checks the repository that a student is pushed to: may it be written to, and would the push overwrite something else?
Also creates it.
"""

import json
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import get_token, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.utils.hub import hf_api

from ..guards.files import JSON
from ..guards.redaction import last_part, shown
from .errors import ERRORS, http_reason, retried
from .files import ADAPTER_CONFIG_FILE, CONFIG_FILE, LORA_FILES


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")


class PushError(RuntimeError):
    """A student could not be uploaded. The message says where it is saved and how to upload it."""


class Asked(NamedTuple):
    """
    How messages name what the user has set.

    Attributes:
        switch (`str`): what asks for the push, before a problem that is no repository's.
        name (`str`): what stands before the name of the repository.
        token (`str`): where a token can be given.
    """

    switch: str
    name: str
    token: str


BY_CONFIG = Asked("push_to_hub=True: ", "hub_model_id=", "HF_TOKEN or hub_token")
BY_COMMAND = Asked("", "the repository ", "HF_TOKEN")


def repository_name(hub_model_id: str | None, output_dir: str | None) -> str:
    """The repository that a run pushes to: `hub_model_id` if given, else the name of the output folder."""
    return hub_model_id or last_part(output_dir or ".")


def repository_problems(
    name: str,
    base_name: str | None,
    transformer_class: str | None,
    token: str | None = None,
    asked: Asked = BY_CONFIG,
) -> list[str]:
    """
    Asks the Hub what would keep a student from being pushed: the token, the right to write, and what the repository already
    contains. Nothing is created or changed.

    Args:
        name (`str`): the repository. Without an owner it is one of your own.
        base_name (`str`, *optional*): the base's id or name, if known.
        transformer_class (`str`, *optional*): the student's class if all its weights are trained, `None` for a LoRA.
        token (`str`, *optional*): by default the one you are logged in with.
        asked ([`Asked`], *optional*, defaults to `BY_CONFIG`): how messages name what the user has set.

    Returns:
        `list[str]`: the problems, with what to do. Empty if the run can push.
    """
    token = token or get_token()
    if token is None:
        return [
            f"{asked.switch}there is no token: log in with `hf auth login`, or set {asked.token} to one with write "
            "permission (https://huggingface.co/settings/tokens)."
        ]
    try:
        return _repository_problems(name, token, base_name, transformer_class, asked)
    except HFValidationError as error:
        return [f"{asked.name}{name!r}: no repository can have that name. {error}"]
    except ERRORS as error:
        return [f"{asked.switch}{http_reason(error)}."]


def _repository_problems(
    name: str, token: str, base_name: str | None, transformer_class: str | None, asked: Asked
) -> list[str]:
    api = hf_api()
    account = retried(api.whoami, token)
    # Other kinds of tokens (OAuth, fine-grained) have no role. `auth_check` below asks whether they may write.
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        return [
            f"{asked.switch}your token may only read. Make one with write permission on "
            f"https://huggingface.co/settings/tokens and log in with it (`hf auth login`), or set {asked.token}."
        ]
    repo_id = name if "/" in name else f"{account['name']}/{name}"
    validate_repo_id(repo_id)
    owners = [account["name"], *(org["name"] for org in account.get("orgs", []))]
    if repo_id.split("/")[0] not in owners:
        return [
            f"{asked.name}{repo_id!r}: it belongs to {repo_id.split('/')[0]!r}, but your token belongs to "
            f"{account['name']!r}, who can push for {', '.join(owners)}. Choose one of them, or log in as the "
            "repository's owner."
        ]
    try:
        info = retried(api.model_info, repo_id, token=token)
    except GatedRepoError:
        return [f"{asked.name}{repo_id!r}: the repository is gated and your token has no access to it."]
    except RepositoryNotFoundError:
        for kind in ("dataset", "space"):
            if retried(api.repo_exists, repo_id, repo_type=kind, token=token):
                return [f"{asked.name}{repo_id!r} is a {kind} on the Hub, not a model. Choose another name."]
        return []
    try:
        retried(api.auth_check, repo_id, token=token, write=True)
    except HfHubHTTPError as error:
        # A private Hub may not know this check. A missing right then shows at the first push, and no checkpoint is
        # lost.
        if error.response.status_code in (401, 403):
            return [
                f"{asked.name}{repo_id!r}: your token is not allowed to write there "
                f"({error.response.status_code}). Give it write permission on https://huggingface.co/settings/tokens."
            ]
    names = {sibling.rfilename for sibling in info.siblings or []}
    recorded = info.card_data.get("base_model") if info.card_data else None
    found = _foreign_content(repo_id, token, names, recorded, base_name, transformer_class)
    return [f"{asked.name}{repo_id!r} holds {found}. Choose another name, or empty it."] if found else []


def _foreign_content(
    repo_id: str, token: str, names: set[str], recorded: object, base_name: str | None, transformer_class: str | None
) -> str | None:
    """Names what a repository already contains that this student would overwrite or mix with; `None` if nothing."""
    if "model_index.json" in names:
        return "a whole pipeline"
    if names.intersection(LORA_FILES):
        if transformer_class is not None:
            return "a LoRA, and this student is a whole transformer"
        if recorded is None and ADAPTER_CONFIG_FILE in names:
            recorded = _read_json(repo_id, token, ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
        if isinstance(recorded, str) and base_name is not None and not _same_base(recorded, base_name):
            return f"a LoRA for another base, '{shown(recorded)}' (this student's is {base_name!r})"
        return None
    if CONFIG_FILE in names:
        config = _read_json(repo_id, token, CONFIG_FILE)
        kind = config.get("_class_name") or (config.get("architectures") or [config.get("model_type")])[0]
        return (
            None
            if kind is not None and kind == transformer_class
            else f"another model ({shown(kind or 'of unknown class')})"
        )
    weights = sorted(name for name in names if "/" not in name and name.endswith(_WEIGHTS))
    return f"other weights ({', '.join(map(shown, weights[:3]))})" if weights else None


def _read_json(repo_id: str, token: str, name: str) -> dict[str, JSON]:
    path = retried(hf_hub_download, repo_id, name, token=token)
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _same_base(one: str, two: str) -> bool:
    # A local copy of a base has only the name of its folder.
    if "/" in one and "/" in two:
        return one == two
    return one.split("/")[-1] == two.split("/")[-1]


def make_repository(
    name: str, token: str | None = None, private: bool | None = None, revision: str | None = None
) -> str:
    """
    Creates a repository, and the branch `revision` in it, if they don't exist.

    Returns:
        `str`: the repository as `owner/name`.

    Raises:
        [`PushError`]: if it can't be created.
    """
    api = hf_api()
    try:
        repo_id = retried(api.create_repo, name, token=token, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            retried(api.create_branch, repo_id, branch=revision, token=token, exist_ok=True)
    except ERRORS as error:
        raise PushError(f"The repository {name!r} cannot be created: {http_reason(error)}.") from error
    return repo_id
