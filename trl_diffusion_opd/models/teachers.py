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

"""Loads the frozen teachers (LoRAs on the shared base, the base itself, or whole transformers) and runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..pipelines.velocity import VelocityField
from ..problems import Problems
from .backbone import BASE, Backbone
from .boundary import strangers_files
from .expert_teachers import find_teacher, read_found_lora, read_lora, read_whole
from .folded_lora import FoldedLora, folded_copy
from .lora_adapter import add_adapter, rescaled_factors
from .teacher_config import TeacherConfig, TeacherError, TeacherSpec, local_folder, normalize_teachers, parse_teacher


# PEFT's name, in `adapter_names`, for a row without an adapter.
_NO_ADAPTER = "__base__"

__all__ = [
    "Role",
    "Teacher",
    "TeacherBank",
    "TeacherConfig",
    "TeacherError",
    "TeacherSpec",
    "add_adapter",
    "normalize_teachers",
    "parse_teacher",
    "read_lora",
    "rescaled_factors",
]


class TeacherEntry(TypedDict):
    """A teacher as a manifest records it."""

    source: str
    subfolder: str | None
    revision: str | None
    sha256: str | None
    kind: str
    rank: int | None
    guidance_scale: float
    weight: float
    lora_scale: float


class TeacherRow(TypedDict):
    """A role in the table at the start."""

    task: str
    teacher: str
    kind: str
    rank: int | None
    lora_scale: float
    guidance_scale: float
    weight: float
    revision: str | None
    sha256: str | None


Kind = Literal["base", "lora", "folded", "full"]
Manifest = dict[str, list[TeacherEntry]]  # by task


@dataclass(frozen=True)
class Teacher:
    """
    A loaded teacher.

    Attributes:
        name: Its role in the [`Backbone`]: `"teacher_0"`, ... or `"base"`.
        kind: `"base"`, `"lora"`, `"folded"` (what a file changes, folded into a copy of the base) or `"full"`.
        source: Hub id, or the name of the local folder but never its path; `"base"` for the base.
        revision: Commit on the Hub; `None` for a local teacher.
        sha256: Hash over its files; `None` for the base.
        rank: Rank of most layers of a LoRA; `None` for other teachers.
    """

    name: str
    kind: Kind
    source: str
    revision: str | None = None
    sha256: str | None = None
    rank: int | None = None

    @property
    def is_apart(self) -> bool:
        """Whether it is a network of its own, beside the base."""
        return self.kind in ("folded", "full")


THE_BASE = Teacher(BASE, "base", source="base")


@dataclass(frozen=True)
class Role:
    """
    A teacher's part in one task's target. Several roles can share one loaded teacher.

    Attributes:
        teacher: The loaded teacher.
        config: The user's [`TeacherConfig`].
        guidance_scale: Classifier-free guidance scale that the teacher is run with.
        weight: Share in the task's target; the weights of a task sum to 1.
    """

    teacher: Teacher
    config: TeacherConfig
    guidance_scale: float
    weight: float

    @property
    def label(self) -> str:
        """The teacher's source and folder, for tables and messages."""
        return "/".join(filter(None, (self.teacher.source, self.config.subfolder)))


class TeacherBank:
    """
    Loads all teachers onto a backbone and computes their velocities.

    Args:
        backbone ([`Backbone`]):
            The base, with the student's adapter if there is one.
        pipeline (`DiffusionPipeline`):
            The base's pipeline. Its class converts diffusers' LoRA layouts.
        teachers (`dict[str, list[TeacherConfig]]`):
            Teachers of each task, as [`normalize_teachers`] returns them.
        default_guidance_scale (`float`):
            Guidance scale of teachers that name none.
        manifest (`dict`, *optional*):
            A checkpoint's [`~TeacherBank.manifest`]. Hub teachers are then loaded at its commits, and a teacher with
            another hash is refused.
        batched (`bool`, *optional*, defaults to `False`):
            Whether a task's teachers are computed in one forward, on one copy of the batch for each. This holds for
            LoRAs and the base with the same guidance scale.

    Attributes:
        teachers (`dict[str, list[Role]]`): each task's teachers, as roles.
        batched (`bool`), backbone ([`Backbone`]): as given.

    Raises:
        ValueError: If any teacher cannot be used. One message lists all of them.
    """

    def __init__(
        self,
        backbone: Backbone,
        pipeline: DiffusionPipeline,
        teachers: Mapping[str, list[TeacherConfig]],
        default_guidance_scale: float,
        manifest: Manifest | None = None,
        batched: bool = False,
    ) -> None:
        self.backbone = backbone
        self.batched = batched
        self.teachers: dict[str, list[Role]] = {}

        loaded: dict[tuple[str, ...], Teacher] = {}
        problems = Problems(_compare_with_manifest(teachers, manifest))
        for task, configs in teachers.items():
            self.teachers[task] = []
            for index, config in enumerate(configs):
                recorded = None if problems or manifest is None else manifest[task][index]
                try:
                    teacher = self._load(_pin(config, recorded), pipeline, loaded)
                    _check_recorded(teacher, config, recorded)
                except TeacherError as error:
                    problems.append(f"task {task!r}: {error}")
                    continue
                scale = default_guidance_scale if config.guidance_scale is None else config.guidance_scale
                self.teachers[task].append(Role(teacher, config, scale, config.weight))
        problems.raise_under("The teachers cannot be used")

    def _load(
        self, config: TeacherConfig, pipeline: DiffusionPipeline, loaded: dict[tuple[str, ...], Teacher]
    ) -> Teacher:
        if config.model_name_or_path == "base":
            return THE_BASE
        files = find_teacher(config, pipeline)
        halves = (files,) if files.other is None else (files, files.other)
        key = tuple(str(part) for half in halves for part in (half.expert, half.folder.resolve(), *half.names))
        key += (str(config.lora_scale),)
        if key in loaded:
            return loaded[key]

        name, rank = f"teacher_{len(loaded)}", None
        kind: Kind = "lora"
        base = self.backbone.base
        assert base is not None
        if files.kind == "full":
            if config.lora_scale != 1:
                raise TeacherError(
                    f"{files.label}: is a whole transformer and takes no lora_scale ({config.lora_scale})"
                )
            self.backbone.add_network(name, read_whole(files, base))
            kind = "full"
        else:
            lora = read_found_lora(files, pipeline, config.lora_scale)
            try:
                if isinstance(lora, FoldedLora):
                    self.backbone.add_network(name, folded_copy(base, lora))
                    kind = "folded"
                else:
                    self.backbone.add_adapter(name, *lora)
                    rank = lora.config.r
            except TeacherError as error:
                raise TeacherError(f"{files.label}: {error}") from error
        with strangers_files(lambda said: f"{files.label}: cannot read {files.shown} ({said})"):
            sha256 = files.sha256()
        loaded[key] = Teacher(name, kind, files.source, files.revision, sha256, rank)
        return loaded[key]

    def use(self, role: Role | None) -> AbstractContextManager[nn.Module]:
        """Context that yields the module of a role (the base for `None`). See [`Backbone.use`]."""
        return self.backbone.use(BASE if role is None else role.teacher.name)

    def mean_velocity(
        self, field: VelocityField, roles: Sequence[Role], x: Tensor, t: float, prompts: list[str]
    ) -> Tensor:
        """
        Computes the weighted mean velocity of teachers at `x` of shape `(B, ...)`, each with its own guidance scale.
        Call it under `torch.no_grad()`.
        """
        mean = torch.zeros_like(x)
        for group in self.forwards(roles):
            for role, velocity in zip(group, self._velocities(field, group, x, t, prompts), strict=True):
                mean += role.weight * velocity
        return mean

    def forwards(self, roles: Sequence[Role]) -> list[list[Role]]:
        """Groups the roles by forward: one role each, or if `batched` all on one network with one guidance scale."""
        if not self.batched:
            return [[role] for role in roles]
        groups: dict[tuple[float, str | None], dict[str, Role]] = {}
        for role in roles:
            name = role.teacher.name
            group = groups.setdefault((role.guidance_scale, name if role.teacher.is_apart else None), {})
            weight = group[name].weight if name in group else 0.0  # a teacher that a task names twice
            group[name] = replace(role, weight=weight + role.weight)
        return [[*group.values()] for group in groups.values()]

    def _velocities(
        self, field: VelocityField, group: Sequence[Role], x: Tensor, t: float, prompts: list[str]
    ) -> Sequence[Tensor]:
        """Computes each role's velocity at `x` of shape `(B, ...)` in one forward, with a copy of `x` for each."""
        n, scale = len(group), group[0].guidance_scale
        if n == 1:
            with self.use(group[0]) as network:
                return [field(x, t, prompts, scale, network)]
        teachers = [role.teacher for role in group]
        names = [_NO_ADAPTER if teacher.kind == "base" else teacher.name for teacher in teachers for _ in prompts]
        with self.backbone.mixed(next(teacher.name for teacher in teachers if teacher.kind == "lora")) as network:
            copies = x.repeat(n, *(1 for _ in x.shape[1:]))
            return field(copies, t, prompts * n, scale, network, names).chunk(n)

    @torch.no_grad()
    def check_batched(self, field: VelocityField) -> None:
        """
        Tries the shared forwards on one sample.

        Raises:
            [`ValueError`]: if teachers cannot share a forward, with the reason for each task.
        """
        problems = []
        for task, roles in self.teachers.items():
            for group in self.forwards(roles):
                if len(group) == 1:
                    continue
                try:
                    field.check_rows(group[0].guidance_scale)
                    x = field.initial_latents([""], [torch.Generator().manual_seed(0)])
                    self._velocities(field, group, x, float(field.levels[0]), [""])
                except ValueError as error:
                    problems.append(
                        f"batch_teachers=True: the {len(group)} teachers of task {task!r} cannot share a forward ("
                        f"{' '.join(str(error).split()).rstrip('.')}). Leave it out: each teacher then has its own."
                    )
        if problems:
            raise ValueError("\n".join(problems))

    def manifest(self) -> Manifest:
        """Describes the teachers for a checkpoint: by task a list of entries, ready for JSON, without local paths."""
        return {
            task: [
                {
                    "source": role.teacher.source,
                    "subfolder": role.config.subfolder,
                    "revision": role.teacher.revision,
                    "sha256": role.teacher.sha256,
                    "kind": role.teacher.kind,
                    "rank": role.teacher.rank,
                    "guidance_scale": role.guidance_scale,
                    "weight": role.weight,
                    "lora_scale": role.config.lora_scale,
                }
                for role in roles
            ]
            for task, roles in self.teachers.items()
        }

    def summary(self) -> list[TeacherRow]:
        """Rows of the table of teachers at the start, one a role."""
        return [
            {
                "task": task,
                "teacher": "/".join(filter(None, (role.label, role.config.weight_name))),
                "kind": role.teacher.kind,
                "rank": role.teacher.rank,
                "lora_scale": role.config.lora_scale,
                "guidance_scale": role.guidance_scale,
                "weight": role.weight,
                "revision": role.teacher.revision and role.teacher.revision[:8],
                "sha256": role.teacher.sha256 and role.teacher.sha256[:8],
            }
            for task, roles in self.teachers.items()
            for role in roles
        ]


def _compare_with_manifest(teachers: Mapping[str, list[TeacherConfig]], manifest: Manifest | None) -> list[str]:
    if manifest is None:
        return []
    ours, theirs = ({task: len(entries) for task, entries in roles.items()} for roles in (teachers, manifest))
    if ours == theirs:
        return []
    return [f"the checkpoint was trained with teachers (number by task) {theirs}, but is resumed with {ours}"]


def _pin(config: TeacherConfig, recorded: TeacherEntry | None) -> TeacherConfig:
    """Sets the commit that the checkpoint recorded, if the config names the same repository."""
    if recorded is None or recorded["revision"] is None or local_folder(config) is not None:
        return config
    same = recorded["source"] == config.model_name_or_path and recorded["subfolder"] == config.subfolder
    return replace(config, revision=recorded["revision"]) if same else config


def _check_recorded(teacher: Teacher, config: TeacherConfig, recorded: TeacherEntry | None) -> None:
    # The hash decides, not the name: a teacher may have moved, or come from the Hub where it was a folder before.
    if recorded is not None and recorded["sha256"] != teacher.sha256:
        raise TeacherError(
            f"{teacher.source}: not the teacher that the checkpoint was trained with, which was "
            f"{recorded['source']} with sha256 {recorded['sha256']}; this one has {teacher.sha256}. Give that one, or "
            "start a new run."
        )
    if recorded is not None and recorded["lora_scale"] != config.lora_scale:
        raise TeacherError(
            f"{teacher.source}: its lora_scale is {config.lora_scale:g}, but the checkpoint was trained with "
            f"{recorded['lora_scale']:g}. Give that one, or start a new run."
        )


def model_identity(roles: Sequence[Role]) -> list[list[str | float | None]]:
    """Identifies a model among others on the same base, by files, guidance and weight of each of its networks."""
    return [
        [role.teacher.kind, role.teacher.sha256, role.config.lora_scale, role.guidance_scale, role.weight]
        for role in roles
    ]
