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

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from .own_pipeline import OwnPipeline, OwnPipelines, check_idle, fits, pipeline_of
from .teacher_config import (
    STUDENT_ITSELF,
    TeacherConfig,
    TeacherError,
    TeacherSpec,
    is_itself,
    normalize_teachers,
    parse_teacher,
    split_base,
)
from .teacher_manifest import BaseEntry, Manifest, check_recorded, count_problems, pinned


# PEFT's name, in `adapter_names`, for a row without an adapter.
_NO_ADAPTER = "__base__"

__all__ = [
    "Manifest",
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


Kind = Literal["base", "student", "lora", "folded", "full", "pipeline"]


@dataclass(frozen=True)
class Teacher:
    """
    A loaded teacher.

    Attributes:
        name: Its role in the [`Backbone`]: `"teacher_0"`, ..., `"base"`, or that of the student itself.
        kind: `"base"`, `"student"` (the student itself), `"lora"`, `"folded"` (what a file changes, folded into a copy
            of the base), `"full"` or `"pipeline"` (the network of a pipeline of its own).
        source: Hub id, or the name of the local folder but never its path; `"base"` or `"student"` for these.
        revision: Commit on the Hub; `None` for a local teacher.
        sha256: Hash over its files; `None` for the base and the student.
        rank: Rank of most layers of a LoRA; `None` for other teachers.
        own: The pipeline that it runs through; `None` for the student's.
    """

    name: str
    kind: Kind
    source: str
    revision: str | None = None
    sha256: str | None = None
    rank: int | None = None
    own: OwnPipeline | None = None

    @property
    def is_apart(self) -> bool:
        """Whether it is a network of its own, beside the base."""
        return self.kind in ("folded", "full")

    @property
    def base_entry(self) -> BaseEntry | None:
        """How a manifest records its own base; `None` if its base is the student's, or if it is a base itself."""
        if self.own is None or self.kind == "pipeline":
            return None
        return {"source": self.own.source, "revision": self.own.revision, "sha256": self.own.sha256}


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
        field: The velocity of the teacher's own pipeline; `None` if it runs through the student's.
    """

    teacher: Teacher
    config: TeacherConfig
    guidance_scale: float
    weight: float
    field: VelocityField | None = None

    @property
    def label(self) -> str:
        """The teacher's source and folder, for tables and messages."""
        return "/".join(filter(None, (self.teacher.source, self.config.subfolder)))

    @property
    def shown(self) -> str:
        """The label with the file's name, and the base if that is the teacher's own."""
        name = "/".join(filter(None, (self.label, self.config.weight_name)))
        base = self.teacher.base_entry
        return name if base is None else f"{name} on {base['source']}"


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
        itself (`str`, *optional*):
            The backbone's role that computes the teacher `"student"`. Without it, that teacher is refused.
        own ([`OwnPipelines`], *optional*):
            Loads the pipelines of teachers that do not run on the student's network. Without it they are refused.

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
        own: OwnPipelines | None = None,
        itself: str | None = None,
    ) -> None:
        self.backbone = backbone
        self._itself = itself
        self.batched = batched
        self._own = own
        self.teachers: dict[str, list[Role]] = {}

        loaded: dict[tuple[str, ...], Teacher] = {}
        problems = Problems(count_problems(teachers, manifest))
        for task, configs in teachers.items():
            self.teachers[task] = []
            for index, config in enumerate(configs):
                recorded = None if problems or manifest is None else manifest[task][index]
                scale = default_guidance_scale if config.guidance_scale is None else config.guidance_scale
                try:
                    teacher = self._load(pinned(config, recorded), pipeline, loaded)
                    check_recorded(teacher.source, teacher.sha256, teacher.base_entry, config.lora_scale, recorded)
                    field = None if teacher.own is None or own is None else own.field_of(teacher.own, config)
                    if field is None:
                        check_idle(config)
                except TeacherError as error:
                    problems.append(f"task {task!r}: {error}")
                    continue
                self.teachers[task].append(Role(teacher, config, scale, config.weight, field))
        problems.raise_under("The teachers cannot be used")

    def _load(
        self, config: TeacherConfig, pipeline: DiffusionPipeline, loaded: dict[tuple[str, ...], Teacher]
    ) -> Teacher:
        if is_itself(config):
            if self._itself is None:
                raise TeacherError(f"{STUDENT_ITSELF}: there is no student in training that could teach itself")
            return Teacher(self._itself, "student", source=STUDENT_ITSELF)
        own = self._own_base(config, pipeline)
        if config.model_name_or_path == "base":
            return THE_BASE if own is None else _whole(own, loaded)
        files = find_teacher(config, pipeline if own is None else own.pipeline)
        if own is None and files.in_pipeline:
            assert self.backbone.base is not None
            if not fits(files, self.backbone.base):
                own = self._pipelines(files.label).load(*pipeline_of(files), config)
                return _whole(own, loaded)
        halves = (files,) if files.other is None else (files, files.other)
        key = tuple(str(part) for half in halves for part in (half.expert, half.folder.resolve(), *half.names))
        key += (str(config.lora_scale), "" if own is None else str(id(own)))
        if key in loaded:
            return loaded[key]

        name, rank = f"teacher_{len(loaded)}", None
        kind: Kind = "lora"
        backbone = self.backbone if own is None else own.backbone
        base = backbone.base
        assert base is not None
        if files.kind == "full":
            if config.lora_scale != 1:
                raise TeacherError(
                    f"{files.label}: is a whole transformer and takes no lora_scale ({config.lora_scale})"
                )
            backbone.add_network(name, read_whole(files, base))
            kind = "full"
        else:
            lora = read_found_lora(files, pipeline if own is None else own.pipeline, config.lora_scale)
            try:
                if isinstance(lora, FoldedLora):
                    backbone.add_network(name, folded_copy(base, lora))
                    kind = "folded"
                else:
                    backbone.add_adapter(name, *lora)
                    rank = lora.config.r
            except TeacherError as error:
                raise TeacherError(f"{files.label}: {error}") from error
        with strangers_files(lambda said: f"{files.label}: cannot read {files.shown} ({said})"):
            sha256 = files.sha256()
        loaded[key] = Teacher(name, kind, files.source, files.revision, sha256, rank, own)
        return loaded[key]

    def _own_base(self, config: TeacherConfig, pipeline: DiffusionPipeline) -> OwnPipeline | None:
        """The own pipeline that a teacher's config names; `None` if it names none, or the student's."""
        if config.base is None or config.base == pipeline.config.get("_name_or_path"):
            return None
        name, revision = split_base(config.base, config.model_name_or_path)
        return self._pipelines(config.model_name_or_path).load(name, revision, config)

    def _pipelines(self, label: str) -> OwnPipelines:
        if self._own is None:
            raise TeacherError(
                f"{label}: is of another base than the student. It can teach by its velocities, but its weights do "
                "not fit the student's."
            )
        return self._own

    def rest(self) -> None:
        """Moves text encoders of offloaded teachers back to host memory."""
        if self._own is not None:
            self._own.offload.rest()

    @property
    def has_student(self) -> bool:
        """Whether the student itself is one of the teachers."""
        return any(role.teacher.kind == "student" for roles in self.teachers.values() for role in roles)

    def own_pipelines(self) -> list[OwnPipeline]:
        """The pipelines of teachers that do not run through the student's, each once."""
        owned = (role.teacher.own for roles in self.teachers.values() for role in roles)
        return [*dict.fromkeys(own for own in owned if own is not None)]

    def own_fields(self) -> list[VelocityField]:
        """The velocities of those pipelines, each once."""
        return [field for own in self.own_pipelines() for field in own.fields]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The frozen parameters of all networks, of own pipelines too."""
        yield from self.backbone.parameters()
        for own in self.own_pipelines():
            yield from own.backbone.parameters()

    def encode_prompts(self, roles: Iterable[Role], prompts: list[str]) -> None:
        """Encodes the prompts of a batch in advance, for those teachers that run through their own pipelines."""
        for role in roles:
            if role.field is not None:
                role.field.encode_prompts(prompts, [role.guidance_scale])

    def use(self, role: Role | None) -> AbstractContextManager[nn.Module]:
        """
        Context that yields the module of a role (the base for `None`). See [`Backbone.use`]. It computes with the
        pipeline of [`~TeacherBank.velocity`].
        """
        teacher = THE_BASE if role is None else role.teacher
        if teacher.own is None:
            return self.backbone.use(teacher.name)
        return teacher.own.use(BASE if teacher.kind == "pipeline" else teacher.name)

    def velocity(
        self,
        field: VelocityField,
        role: Role,
        x: Tensor,
        t: float | Sequence[float],
        prompts: list[str],
        branches: bool = False,
    ) -> Tensor:
        """
        Computes a teacher's velocity at `x` of shape `(B, ...)` and level `t` (one, or one a sample), with its own
        guidance scale and through its own pipeline, if it has one, else through `field`. Call it under `torch.no_grad()`.
        With `branches`, and one level, it is that of [`VelocityField.branches`], of shape `(3, B, ...)`.
        """
        own = role.field or field
        velocity: Callable[..., Tensor] = own.branches if branches else own
        with self.use(role) as network:
            return velocity(x, t, prompts, role.guidance_scale, network)

    def mean_velocity(
        self,
        field: VelocityField,
        roles: Sequence[Role],
        x: Tensor,
        t: float | Sequence[float],
        prompts: list[str],
        branches: bool = False,
    ) -> Tensor:
        """
        Computes the weighted mean velocity of teachers at `x` of shape `(B, ...)`, each with its own guidance scale.
        Call it under `torch.no_grad()`. `branches` is as in [`velocity`].
        """
        mean = x.new_zeros((3, *x.shape) if branches else x.shape)
        for group in self.forwards(roles):
            of_group = self._velocities(field, group, x, t, prompts, branches)
            for role, velocity in zip(group, of_group, strict=True):
                mean += role.weight * velocity
        return mean

    def forwards(self, roles: Sequence[Role]) -> list[list[Role]]:
        """Groups the roles by forward: one role each, or if `batched` all on one network with one guidance scale."""
        if not self.batched:
            return [[role] for role in roles]
        groups: dict[tuple[float, VelocityField | None, str | None], dict[str, Role]] = {}
        for role in roles:
            name = role.teacher.name
            alone = role.teacher.is_apart or role.teacher.kind == "student" or role.field is not None
            group = groups.setdefault((role.guidance_scale, role.field, name if alone else None), {})
            weight = group[name].weight if name in group else 0.0  # a teacher that a task names twice
            group[name] = replace(role, weight=weight + role.weight)
        return [[*group.values()] for group in groups.values()]

    def _velocities(
        self,
        field: VelocityField,
        group: Sequence[Role],
        x: Tensor,
        t: float | Sequence[float],
        prompts: list[str],
        branches: bool = False,
    ) -> Sequence[Tensor]:
        """Computes each role's velocity at `x` of shape `(B, ...)` in one forward, with a copy of `x` for each."""
        n, scale = len(group), group[0].guidance_scale
        if n == 1:
            return [self.velocity(field, group[0], x, t, prompts, branches)]
        teachers = [role.teacher for role in group]
        names = [_NO_ADAPTER if teacher.kind == "base" else teacher.name for teacher in teachers for _ in prompts]
        with self.backbone.mixed(next(teacher.name for teacher in teachers if teacher.kind == "lora")) as network:
            copies = x.repeat(n, *(1 for _ in x.shape[1:]))
            levels = [*t] * n if isinstance(t, Sequence) else t
            velocity: Callable[..., Tensor] = field.branches if branches else field
            return velocity(copies, levels, prompts * n, scale, network, names).chunk(n, dim=-x.ndim)

    def check_guidance(self, field: VelocityField) -> None:
        """
        Refuses guidance scales that a teacher's pipeline would silently ignore. See [`VelocityField.check_guidance`].

        Raises:
            [`ValueError`]: if there is one. One message lists all.
        """
        problems = Problems()
        for scale in sorted(
            {role.guidance_scale for roles in self.teachers.values() for role in roles if not role.field}
        ):
            with problems.collect():
                field.check_guidance(scale)
        for task, roles in self.teachers.items():
            for role in roles:
                if role.field is not None:
                    try:
                        with self.use(role):
                            role.field.check_guidance(role.guidance_scale)
                    except ValueError as error:
                        problems.append(f"task {task!r}: {role.label}: {error}")
        if problems:
            raise ValueError("\n".join(dict.fromkeys(problems)))

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
                    "base": role.teacher.base_entry,
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
                "teacher": role.shown,
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


def _whole(own: OwnPipeline, loaded: dict[tuple[str, ...], Teacher]) -> Teacher:
    """The teacher that is an own pipeline itself."""
    new = Teacher(f"teacher_{len(loaded)}", "pipeline", own.source, own.revision, own.sha256, own=own)
    return loaded.setdefault(("pipeline", str(id(own))), new)
