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

"""[`TeacherConfig`], and the short forms in which a user may name a teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..guards.files import JSON
from ..guards.redaction import shown
from ..hub.names import way_out
from ..problems import Problems, Refusal


if TYPE_CHECKING:  # it imports diffusers, and commands show --help without
    from ..acceleration.quantization import QuantizationConfig

# The name of a teacher that is the student itself. A folder of this name is "./student".
STUDENT_ITSELF = "student"

# The fields that say where in a repository or folder a teacher is.
_PLACES = ("subfolder", "revision", "weight_name", "low_noise_weight_name")


class TeacherError(Refusal):
    """Raised for a teacher that cannot be used. The message says why and what to do."""


@dataclass(frozen=True)
class TeacherConfig:
    """
    One frozen teacher of a task.

    Args:
        model_name_or_path (`str`):
            `"base"` (the base model itself), `"student"` (the student itself, which then needs the column
            `teacher_prompt`), a local folder or `.safetensors` file, or a Hub id in the form
            `owner/repo[/sub/folder][/file.safetensors][@revision]`. A local path that exists wins over a Hub id.
        subfolder (`str`, *optional*):
            Folder inside the repository or local folder that holds the teacher.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        weight_name (`str`, *optional*):
            Name of the LoRA's file (`.safetensors`). Needed if its folder has several. Of a base with two experts, it
            is the file for high noise.
        low_noise_weight_name (`str`, *optional*):
            Of a base with two experts (Wan 2.2), the file of the LoRA for low noise, in the same folder or a subfolder
            of it. Needed if the two files cannot be told apart by "high" and "low" in their names. For an expert
            without a LoRA, one of the two names is `"base"`.
        guidance_scale (`float`, *optional*):
            Classifier-free guidance scale, 0 or larger, that this teacher is run with. `None` takes the trainer's
            `teacher_guidance_scale`.
        weight (`float`, *optional*, defaults to `1.0`):
            Share of this teacher in the target of a task that has several. The target is the weighted mean of their
            velocities; a task's weights are normalised to sum to 1.
        lora_scale (`float`, *optional*, defaults to `1.0`):
            Strength of a LoRA: what it changes of each weight is multiplied by this. Below 0 the change is subtracted.
        base (`str`, *optional*):
            The pipeline on which a LoRA (or transformer) was trained, if that is not the student's: a folder, or a Hub
            id in the form `owner/repo[@revision]`. Such a teacher runs through that pipeline, with its text encoders.
            With the name `"base"` the teacher is that pipeline itself.
        generation_kwargs (`dict`, *optional*):
            Arguments of the call of the teacher's own pipeline. By default the student's, if both are of one class.
            For a teacher with a pipeline of its own, as are the next two.
        offload (`bool`, *optional*, defaults to `False`):
            Whether the network and text encoders of its own pipeline wait in host memory (RAM) while they are not
            used. That is slow: the network is moved for every step.
        quantization_config (*optional*):
            How its own pipeline is quantized, as for the trainers.

    Raises:
        ValueError: If a number is out of range, the name is empty, or the subfolder, revision or file name is invalid.
    """

    model_name_or_path: str
    subfolder: str | None = None
    revision: str | None = None
    weight_name: str | None = None
    guidance_scale: float | None = None
    weight: float = 1.0
    low_noise_weight_name: str | None = None
    lora_scale: float = 1.0
    base: str | None = None
    generation_kwargs: Mapping[str, JSON] | None = None
    offload: bool = False
    quantization_config: QuantizationConfig = None

    def __post_init__(self) -> None:
        name = shown(self.model_name_or_path)
        if not self.model_name_or_path.strip():
            raise Refusal('A teacher has an empty name. Give "base", a folder, or owner/repo[/sub/folder][@revision].')
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise Refusal(
                f"The weight of teacher {name!r} is {self.weight}; it must be positive. Leave the teacher out instead "
                "of giving it no weight."
            )
        if not (math.isfinite(self.lora_scale) and self.lora_scale != 0):
            raise Refusal(
                f"lora_scale of teacher {name!r} is {self.lora_scale}; it must be a finite number other than 0, with "
                'which the teacher would be the base. If the base is meant, say "base".'
            )
        if self.guidance_scale is not None and not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise Refusal(
                f"guidance_scale of teacher {name!r} is {self.guidance_scale}; it must be a number of at least 0 "
                "(1 is no guidance), or None for the trainer's own."
            )
        is_pair = self.low_noise_weight_name is not None
        for option in ("weight_name", "low_noise_weight_name"):
            value = getattr(self, option)
            if value is None or value.endswith(".safetensors") or (is_pair and value == "base"):
                continue
            raise Refusal(
                f"{option} of teacher {name!r} is {value!r}; only .safetensors files are read. "
                "Convert the file with safetensors.torch.save_file first."
            )
        if is_pair and self.low_noise_weight_name == self.weight_name:
            raise Refusal(
                f"Teacher {name!r} has {self.weight_name!r} for both experts. Name the two halves of a pair, or say "
                '"base" for model_name_or_path if the base itself is meant.'
            )
        for option in ("subfolder", "weight_name", "low_noise_weight_name", "revision"):
            value = getattr(self, option)
            reason = None if value is None else way_out(value.removesuffix("/"))
            if reason is not None:
                raise Refusal(f"{option} of teacher {name!r} is '{shown(value)}': {reason}.")
        if self.base is not None:
            split_base(self.base, name)


def split_base(base: str, teacher: str) -> tuple[str, str | None]:
    """
    Splits the base of a teacher into a folder or Hub id, and its revision.

    Args:
        base (`str`), teacher (`str`): the base, and the teacher's name in messages.

    Raises:
        ValueError: If it is neither an existing folder nor of the form `owner/repo[@revision]`.
    """
    path = _path(base) if base.strip() else None
    if path is not None and path.is_dir():
        return str(path), None
    name, at, revision = base.partition("@")
    parts = name.split("/")
    is_id = len(parts) == 2 and "" not in parts and parts[0] not in (".", "..", "~") and bool(revision) == bool(at)
    reason = way_out(base) if is_id else "it is neither an existing folder nor of the form owner/repo[@revision]"
    if reason is not None:
        raise Refusal(f"base of teacher {teacher!r} is '{shown(base)}': {reason}. Name the LoRA's own whole pipeline.")
    return name, revision or None


def local_folder(config: TeacherConfig) -> Path | None:
    """The local folder that a teacher's name means, or `None` if there is none, so that it must be on the Hub."""
    path = _path(config.model_name_or_path)
    return path if path is not None and path.is_dir() else None


def _path(name: str) -> Path | None:
    """The local file or folder of that name, or `None`."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (PermissionError, RuntimeError) as error:  # RuntimeError: "~user" of an unknown user
        raise TeacherError(
            f"Teacher '{shown(name)}' cannot be looked for ({type(error).__name__}: {error})"
        ) from error
    except OSError:  # the name is too long for a file system
        return None


def parse_teacher(spec: str | TeacherConfig) -> TeacherConfig:
    """
    Parses a teacher's short form: `"base"`, an existing folder or `.safetensors` file, or
    `owner/repo[/sub/folder][/file.safetensors][@revision]`.

    Args:
        spec (`str` or [`TeacherConfig`]):
            A short form, or a config whose `model_name_or_path` may itself be a short form.

    Returns:
        [`TeacherConfig`] whose `model_name_or_path` is `"base"`, an existing folder or `owner/repo`.

    Raises:
        ValueError: If the string has none of these forms, or its file or revision contradicts the config's.
    """
    config = TeacherConfig(spec) if isinstance(spec, str) else spec
    name = config.model_name_or_path
    if name == "base":
        given = [key for key in _PLACES if getattr(config, key) is not None]
        if given:
            raise Refusal(f'Teacher "base" is the base model itself and takes no {", ".join(given)}.')
        if config.lora_scale != 1:
            raise Refusal(f'Teacher "base" is the base model itself and takes no lora_scale ({config.lora_scale}).')
        return config
    if local_folder(config) is not None:
        return config
    file = _path(name)
    if file is not None and file.is_file():
        given = [key for key in ("subfolder", "revision", "weight_name") if getattr(config, key) is not None]
        if file.suffix != ".safetensors":
            raise Refusal(
                f"Teacher '{shown(name)}' is a file of another kind than .safetensors; pickles (.bin, .pt, .ckpt) are "
                "not read. Convert it with safetensors.torch.save_file first."
            )
        if given:
            raise Refusal(f"Teacher '{shown(name)}' is a file and takes no {', '.join(given)}.")
        return replace(config, model_name_or_path=str(file.parent), weight_name=file.name)

    path, at, revision = name.partition("@")
    parts = path.split("/")
    weight_name = parts.pop() if parts[-1].endswith(".safetensors") else None
    called = f"'{shown(name)}'"
    if len(parts) < 2 or "" in parts or parts[0] in (".", "..", "~") or (at and not revision):
        raise Refusal(
            f"Teacher {called} is neither an existing folder nor of the form "
            "owner/repo[/sub/folder][/file.safetensors]"
            '[@revision], nor an existing .safetensors file. Check the path, or say "base" for the base model.'
        )
    for part in (path, *([revision] if at else [])):
        reason = way_out(part)
        if reason is not None:
            raise Refusal(f"Teacher {called} is no local file, and on the Hub {reason}.")
    if weight_name and config.weight_name not in (None, weight_name):
        raise Refusal(f"Teacher {called} names a file, but weight_name is {config.weight_name!r}: give only one.")
    if revision and config.revision not in (None, revision):
        raise Refusal(f"Teacher {called} names {revision!r}, but revision is {config.revision!r}: give only one.")
    subfolder = "/".join([*parts[2:], *([config.subfolder.strip("/")] if config.subfolder else [])])
    return replace(
        config,
        model_name_or_path="/".join(parts[:2]),
        subfolder=subfolder or None,
        revision=revision or config.revision,
        weight_name=weight_name or config.weight_name,
    )


TeacherSpec = str | TeacherConfig | Sequence[str | TeacherConfig]


def is_itself(config: TeacherConfig) -> bool:
    """Whether a teacher is the student itself."""
    return config.model_name_or_path == STUDENT_ITSELF


def at_the_start(config: TeacherConfig) -> TeacherConfig:
    """The base in place of the student itself, which began as the base."""
    return replace(config, model_name_or_path="base") if is_itself(config) else config


def _checked_itself(config: TeacherConfig) -> TeacherConfig:
    fresh = TeacherConfig(STUDENT_ITSELF)
    own = ("guidance_scale", "weight", "model_name_or_path")
    given = [
        one.name for one in fields(config) if one.name not in own and vars(config)[one.name] != vars(fresh)[one.name]
    ]
    if given:
        raise Refusal(
            f'Teacher "{STUDENT_ITSELF}" is the student itself and takes no {", ".join(given)}. A folder of that name '
            f'is "./{STUDENT_ITSELF}".'
        )
    return config


def normalize_teachers(
    teachers: TeacherSpec | Mapping[str, TeacherSpec], tasks: Sequence[str], with_student: bool = True
) -> dict[str, list[TeacherConfig]]:
    """
    Assigns teachers to every task, with weights that sum to 1.

    Args:
        teachers (`str`, [`TeacherConfig`], a list of them, or a `dict` from task to any of these):
            The teachers. Without a dict, the same ones serve every task.
        tasks (`Sequence[str]`):
            The tasks that occur in the data.
        with_student (`bool`, *optional*, defaults to `True`):
            Whether `"student"` is the student itself. Otherwise it is a folder of that name.

    Returns:
        `dict[str, list[TeacherConfig]]` in the order of `tasks`.

    Raises:
        ValueError: If a task has no teacher, a teacher's task has no prompts, a list is empty, or a teacher cannot be
            parsed. One message lists all problems.
    """
    problems: list[str] = []
    if isinstance(teachers, Mapping):
        by_task = dict(teachers)
        if missing := [task for task in tasks if task not in by_task]:
            problems.append(
                f"no teacher for task {', '.join(map(repr, missing))}; teachers are given for {[*by_task]}"
            )
        if idle := [task for task in by_task if task not in tasks]:
            problems.append(f"no prompts for task {', '.join(map(repr, idle))}; the data has {[*tasks]}")
    else:
        by_task = dict.fromkeys(tasks, teachers)

    normalized: dict[str, list[TeacherConfig]] = {}
    for task in tasks:
        if task not in by_task:
            continue
        given = by_task[task]
        entries = [given] if isinstance(given, str | TeacherConfig) else [*given]
        configs = []
        for entry in entries:
            try:
                config = TeacherConfig(entry) if isinstance(entry, str) else entry
                itself = with_student and is_itself(config)
                configs.append(_checked_itself(config) if itself else parse_teacher(config))
            except ValueError as error:
                problems.append(f"task {task!r}: {error}")
        if not entries:
            problems.append(f"the list of teachers of task {task!r} is empty")
        total = math.fsum(config.weight for config in configs)
        normalized[task] = [replace(config, weight=config.weight / total) for config in configs]
    Problems(problems).raise_under("The teachers do not fit")
    return normalized
