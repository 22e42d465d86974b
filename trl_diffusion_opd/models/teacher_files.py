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

"""Finds the files of a teacher, locally or on the Hub, and downloads no more than needed."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils import CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_WEIGHTS_NAME

from ..guards.files import JSON
from ..guards.redaction import shown
from ..hub.errors import download, listing
from ..pipelines.denoiser import DENOISERS, denoiser_name_in
from ..pipelines.single_file import is_whole
from .boundary import strangers_files
from .lora_keys import some
from .teacher_config import TeacherConfig, TeacherError, local_folder


# In bytes. Configs of real models have kilobytes, and the indices of the largest models a few megabytes.
_LONGEST_JSON = 16 * 2**20
# Limits for a file's tensors. The largest networks have a few thousand, with names of up to a hundred characters.
_MOST_TENSORS, _LONGEST_KEY = 10_000, 500


@dataclass(frozen=True)
class TeacherFiles:
    """
    The files of a teacher, and where they came from.

    Attributes:
        kind: `"peft"` and `"diffusers"` are LoRAs, `"full"` is a whole denoiser, or a single file with one.
        folder: Local folder that holds the files.
        names: The files that define the teacher, relative to `folder`.
        source: Hub id, or the name of the local folder but never its path.
        subfolder: As given by the user.
        revision: Commit on the Hub; `None` for a local folder.
        expert: Of a base with two experts, the one that these files are for; `None` if they are for all of the base.
        other: The files for the other expert; `None` if there are none.
        in_pipeline: Whether the teacher is a whole pipeline, and these are its transformer's files.
    """

    kind: Literal["peft", "diffusers", "full"]
    folder: Path
    names: tuple[str, ...]
    source: str
    subfolder: str | None
    revision: str | None
    expert: str | None = None
    other: TeacherFiles | None = None
    in_pipeline: bool = False

    @property
    def label(self) -> str:
        """The teacher's name in messages."""
        # The file is named only if it does not have diffusers' usual name.
        name = self.names[0] if len(self.names) == 1 and self.names[0] != LORA_WEIGHT_NAME_SAFE else None
        return "/".join(filter(None, (self.source, self.subfolder, name)))

    @property
    def shown(self) -> str:
        """The files' names in messages."""
        return " and ".join(self.names) if len(self.names) < 3 else "its files"

    def sha256(self) -> str:
        """
        SHA-256 over the teacher's files. A single file gives its own hash, which the Hub shows too. Several files give
        the hash of the listing that `sha256sum` prints; the config is included, since it holds a LoRA's alpha. Files
        for one expert give the hash of a listing of the experts.
        """
        if self.expert is not None:
            halves = [half for half in (self, self.other) if half is not None]
            digests = [f"{replace(half, expert=None, other=None).sha256()}  {half.expert}\n" for half in halves]
            return hashlib.sha256("".join(digests).encode()).hexdigest()
        digests = []
        for name in self.names:
            with open(self.folder / name, "rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        if len(digests) == 1:
            return digests[0]
        listing = "".join(f"{digest}  {name}\n" for digest, name in zip(digests, self.names, strict=True))
        return hashlib.sha256(listing.encode()).hexdigest()

    def weights_sha256(self) -> str:
        """As [`sha256`], but over the weights alone: a push writes the base's id into the config beside them."""
        other = None if self.other is None else _weights_of(self.other)
        return replace(_weights_of(self), other=other).sha256()


def _weights_of(files: TeacherFiles) -> TeacherFiles:
    return replace(files, names=tuple(name for name in files.names if name.endswith(".safetensors")))


def find_files(config: TeacherConfig, component: str | None = None) -> TeacherFiles:
    """
    Resolves a parsed teacher (not `"base"`) to local files. Downloads only the files that are needed.

    Args:
        config ([`TeacherConfig`]): the teacher.
        component (`str`, *optional*): the network that is meant, if it is a whole pipeline. By default the one that denoises.

    Raises:
        TeacherError: If the folder, repository, revision or files do not exist, cannot be reached or read, or are
            pickles.
    """
    local = local_folder(config)
    shown = _shown(config) if local is None else local.resolve().name
    with strangers_files(lambda said: f"{shown}: its files cannot be read ({said})"):
        files = _find(config, component)
        for name in files.names:  # safetensors reports a file without read permission as missing
            with open(files.folder / name, "rb"):
                pass
        # A file that is named by itself may be either; its names tell.
        if files.kind == "diffusers" and is_whole(files.folder / files.names[0]):
            return replace(files, kind="full")
        return files


def weights_in(folder: Path) -> str | None:
    """Returns the SHA-256 of the weights that a folder on this machine holds; `None` if it holds none to load."""
    with suppress(TeacherError):
        return find_files(TeacherConfig(str(folder.resolve()))).weights_sha256()
    return None


def _find(config: TeacherConfig, component: str | None) -> TeacherFiles:
    prefix = f"{config.subfolder.strip('/')}/" if config.subfolder else ""
    local = local_folder(config)
    if local is not None:
        source, revision, folder = local.resolve().name, None, local / prefix
        if config.revision is not None:
            raise TeacherError(f"{source}: a local folder has no revision ({config.revision!r} was asked for)")
        if not folder.is_dir():
            raise TeacherError(f"{source}: there is no folder {config.subfolder!r} in it")
    else:
        source = config.model_name_or_path
        # Configs first: they tell which of a repository's weights, often very large, are needed.
        indices = [CONFIG_NAME, "model_index.json", "config.json", SAFE_WEIGHTS_INDEX_NAME]
        parts = DENOISERS if component is None else (component,)
        configs = indices + [f"{part}/{name}" for part in parts for name in ("config.json", SAFE_WEIGHTS_INDEX_NAME)]
        snapshot = _download(config, config.revision, [prefix + name for name in configs])
        revision, folder = snapshot.name, snapshot / prefix
    label = f"{source}/{config.subfolder}" if config.subfolder else source

    kind: Literal["peft", "diffusers", "full"] = "diffusers"
    in_pipeline = False
    names: tuple[str, ...]
    # If weight_name is the usual weights file of a PEFT folder or a transformer, the config beside it counts too.
    if (folder / CONFIG_NAME).is_file() and config.weight_name in (None, PEFT_WEIGHTS_NAME):
        kind, names = "peft", (CONFIG_NAME, PEFT_WEIGHTS_NAME)
    elif any((folder / name).is_file() for name in ("model_index.json", "config.json")) and config.weight_name in (
        None,
        SAFETENSORS_WEIGHTS_NAME,
    ):
        in_pipeline = (folder / "model_index.json").is_file()
        if in_pipeline:
            part = component or denoiser_name_in(read_json(folder / "model_index.json", label))
            prefix, folder = f"{prefix}{part}/", folder / part
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        weights = _shards(index, label) if index.is_file() else [SAFETENSORS_WEIGHTS_NAME]
        kind, names = "full", ("config.json", *weights)
    elif config.weight_name is not None:
        names = (config.weight_name,)
    else:
        names = (_lora_file(config, revision, folder, prefix, label),)

    if local is None and not all((folder / name).is_file() for name in names):
        _download(config, revision, [prefix + name for name in names])
    if missing := [name for name in names if not (folder / name).is_file()]:
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise TeacherError(
                f"{label}: holds {', '.join(pickles)} but no {', '.join(missing)}. Pickled weights are not read; "
                'convert them where you trust them: safetensors.torch.save_file(torch.load("'
                f'{pickles[0]}", weights_only=True), "{missing[0]}")'
            )
        inside = sorted(path.parent.name for path in folder.glob("*/*.safetensors"))
        named = f" Name one of its folders ({some(list(dict.fromkeys(inside)))})." if inside else ""
        raise TeacherError(
            f"{label}: has no {', '.join(missing)}.{named} A teacher is a PEFT folder ({CONFIG_NAME}, {PEFT_WEIGHTS_NAME}), "
            f"a LoRA's file ({LORA_WEIGHT_NAME_SAFE}, the folder's only file, or one at the end of the path), a "
            "whole denoiser (config.json) or a pipeline (model_index.json), all with .safetensors weights. Check the subfolder and "
            "the revision."
        )
    return TeacherFiles(kind, folder, names, source, config.subfolder, revision, in_pipeline=in_pipeline)


def names_in(config: TeacherConfig) -> list[str]:
    """
    Names of the files in a teacher's folder and its subfolders, without downloading them.

    Raises:
        TeacherError: If the repository or revision does not exist or cannot be reached.
    """
    prefix, local = f"{config.subfolder.strip('/')}/" if config.subfolder else "", local_folder(config)
    if local is not None:
        folder = local / prefix
        return sorted(str(path.relative_to(folder)) for path in (*folder.glob("*"), *folder.glob("*/*")))
    snapshot = _download(config, config.revision, [prefix + CONFIG_NAME])
    names = listing(
        _shown(config), config.model_name_or_path, config.revision, snapshot / prefix, prefix, TeacherError
    )
    return sorted(name for name in names if name.count("/") < 2)


def _shards(index: Path, label: str) -> list[str]:
    shards = read_json(index, label).get("weight_map")
    if not (isinstance(shards, dict) and shards and all(isinstance(name, str) for name in shards.values())):
        raise TeacherError(f"{label}: {index.name} has no weight_map, which says in which file each weight is")
    names = sorted(set(shards.values()))
    # Only files beside the index, and no wildcards, which would download other files too.
    if foreign := [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)]:
        raise TeacherError(f"{label}: {index.name} names {some(foreign)}; a .safetensors file beside it is needed")
    return names


def _lora_file(config: TeacherConfig, revision: str | None, folder: Path, prefix: str, label: str) -> str:
    """The name of the LoRA's file in a folder: diffusers' usual name, else the only `.safetensors` file there."""
    is_local = local_folder(config) is not None
    if not is_local:
        _download(config, revision, [prefix + LORA_WEIGHT_NAME_SAFE])
    if (folder / LORA_WEIGHT_NAME_SAFE).is_file():
        return LORA_WEIGHT_NAME_SAFE
    if is_local:
        there = [path.name for path in folder.glob("*.safetensors")]
    else:
        there = listing(_shown(config), config.model_name_or_path, revision, folder, prefix, TeacherError)
    names = sorted(name for name in there if name.endswith(".safetensors") and "/" not in name)
    if len(names) > 1:
        raise TeacherError(
            f"{label}: has several files ({some(names)}). Name one at the end of the path, such as {label}/{names[0]}."
        )
    return names[0] if names else LORA_WEIGHT_NAME_SAFE


def _shown(config: TeacherConfig) -> str:
    return f"{config.model_name_or_path}@{config.revision}" if config.revision else config.model_name_or_path


def _download(config: TeacherConfig, revision: str | None, names: list[str]) -> Path:
    return download(_shown(config), config.model_name_or_path, revision, names, TeacherError)


def check_keys(keys: list[str], what: str) -> None:
    """
    Refuses files with more or longer keys than any network has, before the keys are processed. `what` is the file's
    name in messages.

    Raises:
        TeacherError: If there are too many keys, or one is too long.
    """
    if len(keys) > _MOST_TENSORS:
        raise TeacherError(f"{what} has {len(keys)} tensors, more than any network")
    longest = max(keys, key=len, default="")
    if len(longest) > _LONGEST_KEY:
        raise TeacherError(f"{what} has a tensor with a name of {len(longest)} characters: {shown(longest, 80)}")


def read_json(path: Path, label: str) -> dict[str, JSON]:
    """
    Reads the JSON object in a file.

    Raises:
        TeacherError: If the file is no JSON object, or is longer than any config.
    """
    with open(path, "rb") as file:
        text = file.read(_LONGEST_JSON + 1)
    return parse_json(text, f"{label}: {path.name}")


def parse_json(text: str | bytes, what: str) -> dict[str, JSON]:
    """Parses a JSON object from a text. `what` is its name in messages. Raises as [`read_json`]."""
    if len(text) > _LONGEST_JSON:
        raise TeacherError(f"{what} has more than {_LONGEST_JSON // 2**20} MB, which no config has")
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise TeacherError(f"{what} is not valid JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise TeacherError(f"{what} is a JSON {type(parsed).__name__}; an object is needed")
    return parsed
