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

"""What a checkpoint records of its teachers, and how a resumed run's teachers are compared with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypedDict

from .teacher_config import TeacherConfig, TeacherError, local_folder, split_base


class BaseEntry(TypedDict):
    """A teacher's own base as a manifest records it."""

    source: str
    revision: str | None
    sha256: str


class TeacherEntry(TypedDict):
    """A teacher as a manifest records it. Its `base` is `None` if that is the student's."""

    source: str
    subfolder: str | None
    revision: str | None
    sha256: str | None
    kind: str
    rank: int | None
    guidance_scale: float
    weight: float
    lora_scale: float
    base: BaseEntry | None


Manifest = dict[str, list[TeacherEntry]]  # by task


def count_problems(teachers: Mapping[str, list[TeacherConfig]], manifest: Manifest | None) -> list[str]:
    """Says if a run has other tasks, or another number of teachers, than the checkpoint that it goes on from."""
    if manifest is None:
        return []
    ours, theirs = ({task: len(entries) for task, entries in roles.items()} for roles in (teachers, manifest))
    if ours == theirs:
        return []
    return [f"the checkpoint was trained with teachers (number by task) {theirs}, but is resumed with {ours}"]


def pinned(config: TeacherConfig, recorded: TeacherEntry | None) -> TeacherConfig:
    """Sets the commits that the checkpoint recorded, if the config names the same repositories."""
    if recorded is None:
        return config
    if recorded["kind"] != "pipeline" or config.model_name_or_path != "base":
        base = recorded["base"]
    else:  # the teacher is a base itself
        base = {"source": recorded["source"], "revision": recorded["revision"], "sha256": recorded["sha256"] or ""}
    if config.base is not None and base is not None and base["revision"] is not None:
        name, _ = split_base(config.base, config.model_name_or_path)
        if name == base["source"]:
            config = replace(config, base=f"{name}@{base['revision']}")
    if recorded["revision"] is None or config.model_name_or_path == "base" or local_folder(config) is not None:
        return config
    same = recorded["source"] == config.model_name_or_path and recorded["subfolder"] == config.subfolder
    return replace(config, revision=recorded["revision"]) if same else config


def check_recorded(
    source: str, sha256: str | None, base: BaseEntry | None, lora_scale: float, recorded: TeacherEntry | None
) -> None:
    """
    Refuses a teacher that is not the recorded one. The hash decides, not the name: a teacher may have moved, or come
    from the Hub where it was a folder before.

    Args:
        source (`str`), sha256 (`str`, *optional*), base ([`BaseEntry`], *optional*), lora_scale (`float`): as in the
            teacher's entry.
        recorded ([`TeacherEntry`], *optional*): the entry in a checkpoint, if the run is resumed from one.

    Raises:
        TeacherError: If the hash of the teacher or of its base is another one, or its strength.
    """
    if recorded is None:
        return
    if identity(recorded["sha256"], recorded["source"]) != identity(sha256, source):
        raise TeacherError(
            f"{source}: not the teacher that the checkpoint was trained with, which was {recorded['source']} with "
            f"sha256 {recorded['sha256']}; this one has {sha256}. Give that one, or start a new run."
        )
    if recorded["lora_scale"] != lora_scale:
        raise TeacherError(
            f"{source}: its lora_scale is {lora_scale:g}, but the checkpoint was trained with "
            f"{recorded['lora_scale']:g}. Give that one, or start a new run."
        )
    if base_hash(recorded["base"]) != base_hash(base):
        raise TeacherError(
            f"{source}: its base is not the one that the checkpoint was trained with, which was "
            f"{_told(recorded['base'])}; this one is {_told(base)}. Give that one, or start a new run."
        )


def identity(sha256: str | None, source: str) -> str:
    """What tells a teacher from others: its hash, or the names of the base and of the student, which have none."""
    return source if sha256 is None else sha256


def base_hash(base: BaseEntry | None) -> str | None:
    """The hash of a teacher's own base; `None` if its base is the student's."""
    return None if base is None else base["sha256"]


def _told(base: BaseEntry | None) -> str:
    return "the student's" if base is None else f"{base['source']} with sha256 {base['sha256']}"
