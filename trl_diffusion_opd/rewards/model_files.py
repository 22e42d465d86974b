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
Finds the files of reward models, locally or on the Hub at a pinned commit, and reads them without running code from
them.
"""

import fnmatch
import hashlib
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..guards.redaction import shown as quoted
from ..hub.errors import download


# The commits that other public projects pin too. Repositories that are not listed are read at their branch `main`.
PINNED_REVISIONS = {
    "google-bert/bert-base-uncased": "86b5e0934494bd15c9632b12f734a8a67f723594",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    "openai/clip-vit-large-patch14": "32bd64288804d66eefd0ccbe215aa642df71cc41",
    "xswu/HPSv2": "697403c78157020a1ae59d23f111aa58ced35b0a",
    "yuvalkirstain/PickScore_v1": "a4e4367c6dfa7288a00c550414478f865b875800",
    "zai-org/ImageReward": "5736be03b2652728fb87788c9797b0570450ab72",
}


@dataclass(frozen=True)
class ModelFiles:
    """
    The files of a model.

    Attributes:
        folder (`Path`): the local folder of the files.
        shown (`str`): name of reward and model for messages; never a path.
        identity (`str`): repository and commit, or the hash of a local folder's files.
    """

    folder: Path
    shown: str
    identity: str


def find_files(
    reward: str,
    model: str,
    revision: str | None,
    required: Sequence[tuple[str, ...]],
    optional: Sequence[str] = (),
) -> ModelFiles:
    """
    Finds the files of a model. Downloads them if needed, and no other files of the repository.

    Args:
        reward (`str`): name of the reward, for messages.
        model (`str`): a local folder, or else a Hub id.
        revision (`str`, *optional*): branch, tag or commit. Defaults to the pinned commit in [`PINNED_REVISIONS`],
            else to `main`.
        required (`list[tuple[str, ...]]`): patterns of file names. At least one of each tuple must exist.
        optional (`list[str]`, *optional*): patterns of files to use if they exist.

    Raises:
        [`ValueError`]: if the repository, the revision or a file does not exist, or the Hub cannot be reached.
    """
    folder = Path(model)
    patterns = [*(name for names in required for name in names), *optional]
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"Reward {reward!r}: a local folder has no revision ({revision!r} was asked for).")
        shown, where = f"Reward {reward!r}: {folder.resolve().name}", ""
    else:
        revision = revision or PINNED_REVISIONS.get(model)
        shown, where = f"Reward {reward!r}: {model}", f" at revision {revision or 'main'}"
        folder = download(shown, model, revision, patterns)
    missing = [" or ".join(names) for names in required if not _matching(folder, names)]
    if missing:
        pickles = " Pickled weights are not read." if any("safetensors" in names for names in missing) else ""
        raise ValueError(f"{shown}: there is no {', no '.join(missing)}{where}.{pickles}")
    if where:  # the folder of a snapshot is named by its commit
        return ModelFiles(folder, shown, f"{model}@{folder.name}")
    digest = hashlib.sha256()
    for path in _matching(folder, patterns):
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    return ModelFiles(folder, shown, f"sha256:{digest.hexdigest()}")


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    # If no file matches, the Hub client creates no folder.
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    return [path for path in files if any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)]


def sha256(path: Path) -> str:
    """The SHA-256 of a file, which the Hub shows for large files."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tensors(files: ModelFiles, name: str) -> dict[str, torch.Tensor]:
    """
    Reads the tensors of a `.safetensors` file, or of a file that `torch.save` wrote.

    The latter is a pickle, read with `weights_only=True`, which refuses everything but tensors and plain containers.
    Of `{"state_dict": ...}` the inner dict is used.

    Raises:
        [`ValueError`]: if the file is damaged, or holds anything but tensors by name.
    """
    path = files.folder / name
    content: object
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{files.shown}: {name} is not a file of tensors only, and code from a file is not run. If you trust it, "
            "save its tensors in safetensors format."
        ) from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{files.shown}: {name} cannot be read. It is damaged or incomplete: {quoted(error)}"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{files.shown}: {name} must hold tensors by name, but it holds something else.")
    return content


def check_loaded(
    files: ModelFiles, missing: Sequence[str], unexpected: Sequence[str], mismatched: Sequence[str]
) -> None:
    """
    Refuses weights that don't match the model exactly. Otherwise a partly random model would give plausible scores.

    Raises:
        [`ValueError`]: if one of the lists of names is not empty.
    """
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    found = [
        f"{len(names)} tensors are {kind} "
        f"({', '.join(map(quoted, sorted(names)[:3]))}{', …' if len(names) > 3 else ''})"
        for kind, names in kinds.items()
        if names
    ]
    if found:
        raise ValueError(f"{files.shown}: these are not the weights of this model: {'; '.join(found)}.")
