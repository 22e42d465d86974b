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
"""The frozen teachers: adapters beside the student's on one base, the base itself, or whole transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from peft import PeftModel
from torch import Tensor, nn

from ..acceleration.compilation import compile_blocks
from ..guards.redaction import listed
from ..pipelines.velocity import VelocityField
from .adapter_switch import AdapterSwitch
from .boundary import strangers_files
from .lora_adapter import adapter_parameters, add_adapter, rescaled_factors
from .lora_files import read_lora, read_lora_files
from .teacher_config import TeacherConfig, TeacherError, local_folder, normalize_teachers, parse_teacher
from .teacher_files import find_files
from .whole_transformer import read_transformer


# PEFT's name for a row without an adapter.
_NO_ADAPTER = "__base__"

__all__ = [
    "Teacher",
    "TeacherBank",
    "TeacherConfig",
    "TeacherError",
    "add_adapter",
    "normalize_teachers",
    "parse_teacher",
    "read_lora",
    "rescaled_factors",
]


@dataclass(frozen=True)
class Teacher:
    """
    A loaded teacher in its role for one task.

    Attributes:
        name: Adapter name (`"teacher_0"`, ...) or `"base"`. Roles with the same source share it, and the weights.
        config: What the user asked for.
        guidance_scale: Classifier-free guidance scale to evaluate it at.
        weight: Share in the task's target; the weights of a task sum to 1.
        kind: `"base"`, `"lora"` or `"full"`.
        source: Hub id or name of the local folder, never a path; `"base"` for the base.
        revision: Commit on the Hub, if it is from there.
        sha256: Hash over its files; `None` for the base.
        rank: Rank of a LoRA (of most of its layers).
        module: The frozen transformer of a `"full"` teacher.
    """

    name: str
    config: TeacherConfig
    guidance_scale: float
    weight: float
    kind: Literal["base", "lora", "full"]
    source: str
    revision: str | None = None
    sha256: str | None = None
    rank: int | None = None
    module: nn.Module | None = None


class TeacherBank:
    """
    Loads all teachers and switches between them and the student without copies.

    Args:
        backbone (`PeftModel` or `ModelMixin`):
            The `PeftModel` that holds the student's adapter. For full fine-tuning a frozen copy of the base, which
            LoRA teachers then wrap in place.
        pipeline (`DiffusionPipeline`):
            The base; its class converts diffusers' LoRA layouts.
        teachers (`dict[str, list[TeacherConfig]]`):
            As [`normalize_teachers`] returns it.
        default_guidance_scale (`float`):
            Guidance scale of teachers that name none.
        student_adapter (`str`, *optional*, defaults to `"default"`):
            The adapter that is active outside of [`~TeacherBank.use`]; `None` without one (full fine-tuning).
        batched (`bool`, *optional*, defaults to `False`):
            Whether the teachers of a task that are LoRAs, or the base, at the same guidance scale share a forward, with as
            many copies of the batch as there are teachers.
        manifest (`dict`, *optional*):
            A checkpoint's [`~TeacherBank.manifest`]. Hub teachers are loaded at the commits in it, and a teacher with
            another hash is refused.

    Attributes:
        teachers (`dict[str, list[Teacher]]`): The loaded teachers by task.
        batched (`bool`): As given.
        backbone (`nn.Module`): The model that `use` yields for LoRAs and the base.
        switch (`AdapterSwitch`): Which of its adapters is active.

    Raises:
        ValueError: If any teacher cannot be used. One message lists all of them.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pipeline: DiffusionPipeline,
        teachers: Mapping[str, list[TeacherConfig]],
        default_guidance_scale: float,
        student_adapter: str | None = "default",
        manifest: Mapping[str, Any] | None = None,
        batched: bool = False,
    ) -> None:
        self.backbone = backbone
        self.batched = batched
        self.teachers: dict[str, list[Teacher]] = {}
        self._has_student = student_adapter is not None

        loaded: dict[tuple[str, ...], Teacher] = {}
        problems = _compare_with_manifest(teachers, manifest)
        for task, configs in teachers.items():
            self.teachers[task] = []
            for index, config in enumerate(configs):
                recorded = None if problems or manifest is None else manifest[task][index]
                try:
                    teacher = self._load(_pin(config, recorded), pipeline, loaded)
                    _check_recorded(teacher, recorded)
                except TeacherError as error:
                    problems.append(f"task {task!r}: {error}")
                    continue
                scale = config.guidance_scale
                role = replace(
                    teacher,
                    config=config,
                    guidance_scale=default_guidance_scale if scale is None else scale,
                    weight=config.weight,
                )
                self.teachers[task].append(role)

        self.switch = AdapterSwitch(self.backbone, student_adapter)
        if student_adapter is None:
            self.backbone.requires_grad_(False).eval()  # PEFT's wrapper came in training mode
        if problems:
            raise ValueError(f"The teachers cannot be used:\n{listed(problems)}")

    def _load(
        self, config: TeacherConfig, pipeline: DiffusionPipeline, loaded: dict[tuple[str, ...], Teacher]
    ) -> Teacher:
        if config.model_name_or_path == "base":
            return Teacher("base", config, 0.0, 1.0, "base", source="base")
        files = find_files(config)
        key = (str(files.folder.resolve()), *files.names)
        if key in loaded:
            return loaded[key]

        name = f"teacher_{len(loaded)}"
        rank: int | None = None
        module: nn.Module | None = None
        if files.kind == "full":
            base = self.backbone.get_base_model() if isinstance(self.backbone, PeftModel) else self.backbone
            assert isinstance(base, ModelMixin)
            module = read_transformer(files, base)
        else:
            lora_config, state_dict = read_lora_files(files, pipeline)
            rank = lora_config.r
            try:
                self.backbone = add_adapter(self.backbone, name, lora_config, state_dict)
            except TeacherError as error:
                raise TeacherError(f"{files.label}: {error}") from error
        with strangers_files(lambda said: f"{files.label}: cannot read {files.shown} ({said})"):
            sha256 = files.sha256()
        loaded[key] = Teacher(
            name=name,
            config=config,
            guidance_scale=0.0,
            weight=1.0,
            kind="lora" if module is None else "full",
            source=files.source,
            revision=files.revision,
            sha256=sha256,
            rank=rank,
            module=module,
        )
        return loaded[key]

    @contextmanager
    def use(self, teacher: Teacher | None) -> Iterator[nn.Module]:
        """
        Yields the module that computes a teacher's velocity; `None` is the base.

        Call it under `torch.no_grad()`. On exit, also by an exception, what was active before is active again: the
        student. No parameter's `requires_grad` changes.
        """
        if teacher is not None and teacher.module is not None:
            yield teacher.module
            return
        with self.switch.use(None if teacher is None or teacher.kind == "base" else teacher.name):
            yield self.backbone

    def mean_velocity(
        self, field: VelocityField, teachers: Sequence[Teacher], x: Tensor, t: float, prompts: list[str]
    ) -> Tensor:
        """
        Weighted mean velocity of teachers, each at its own guidance, at `x` of shape `(B, ...)`. Call it under
        `torch.no_grad()`.
        """
        mean = torch.zeros_like(x)
        for group in self.forwards(teachers):
            for teacher, velocity in zip(group, self._velocities(field, group, x, t, prompts), strict=True):
                mean += teacher.weight * velocity
        return mean

    def forwards(self, teachers: Sequence[Teacher]) -> list[list[Teacher]]:
        """The teachers by the forward that computes them: one each, or several on one backbone at one guidance scale."""
        if not self.batched:
            return [[teacher] for teacher in teachers]
        groups: dict[tuple[float, str | None], dict[str, Teacher]] = {}
        for teacher in teachers:
            alone = teacher.name if teacher.kind == "full" else None
            group = groups.setdefault((teacher.guidance_scale, alone), {})
            weight = group[teacher.name].weight if teacher.name in group else 0.0  # one that is named twice
            group[teacher.name] = replace(teacher, weight=weight + teacher.weight)
        return [[*group.values()] for group in groups.values()]

    def _velocities(
        self, field: VelocityField, group: Sequence[Teacher], x: Tensor, t: float, prompts: list[str]
    ) -> Sequence[Tensor]:
        """Velocity of each teacher of a forward, at `x` of shape `(B, ...)`, from as many copies of it as there are teachers."""
        n, scale = len(group), group[0].guidance_scale
        if n == 1:
            with self.use(group[0]) as transformer:
                return [field(x, t, prompts, scale, transformer)]
        names = [_NO_ADAPTER if teacher.kind == "base" else teacher.name for teacher in group for _ in prompts]
        with self.switch.mixed(next(teacher.name for teacher in group if teacher.kind == "lora")):
            copies = x.repeat(n, *(1 for _ in x.shape[1:]))
            return field(copies, t, prompts * n, scale, self.backbone, names).chunk(n)

    @torch.no_grad()
    def check_batched(self, field: VelocityField) -> None:
        """
        Computes one sample's velocities of all teachers that share a forward.

        Raises:
            [`ValueError`]: if they cannot share it, with the reason for each task.
        """
        problems = []
        for task, teachers in self.teachers.items():
            for group in self.forwards(teachers):
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

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter that belongs to a teacher alone, each once; without a student's adapter also the base's."""
        if not self._has_student:
            yield from self.backbone.parameters()
        for teacher in self._distinct():
            if teacher.module is not None:
                yield from teacher.module.parameters()
            elif teacher.kind == "lora" and self._has_student:
                yield from adapter_parameters(self.backbone, teacher.name)

    def networks(self) -> Iterator[ModelMixin]:
        """The transformers that are not the student's: full teachers, and without a student's adapter the base."""
        if not self._has_student:
            yield self.backbone.get_base_model() if isinstance(self.backbone, PeftModel) else self.backbone
        yield from (teacher.module for teacher in self._distinct() if teacher.module is not None)

    def to(self, device: torch.device | str) -> TeacherBank:
        """Moves what the trainer does not: full teachers, and without a student's adapter the base with the LoRAs."""
        if not self._has_student:
            self.backbone.to(device)
        for teacher in self._distinct():
            if teacher.module is not None:
                teacher.module.to(device)
        return self

    def compile(self, backend: str | None = None, mode: str | None = None) -> TeacherBank:
        """Compiles what belongs to teachers alone ([`~compilation.compile_blocks`]), so that switching does not compile again."""
        self.switch.share_name()
        if not self._has_student:
            compile_blocks(self.backbone, backend, mode)
        for teacher in self._distinct():
            if teacher.module is not None:
                compile_blocks(teacher.module, backend, mode)
        return self

    def _distinct(self) -> list[Teacher]:
        return [*{teacher.name: teacher for roles in self.teachers.values() for teacher in roles}.values()]

    def manifest(self) -> dict[str, list[dict[str, Any]]]:
        """What a checkpoint records of the teachers: task to a list of entries, ready for JSON, without local paths."""
        return {
            task: [
                {
                    "source": teacher.source,
                    "subfolder": teacher.config.subfolder,
                    "revision": teacher.revision,
                    "sha256": teacher.sha256,
                    "kind": teacher.kind,
                    "rank": teacher.rank,
                    "guidance_scale": teacher.guidance_scale,
                    "weight": teacher.weight,
                }
                for teacher in roles
            ]
            for task, roles in self.teachers.items()
        }

    def summary(self) -> list[dict[str, Any]]:
        """One row a task and teacher, for the table at the start."""
        return [
            {
                "task": task,
                "teacher": "/".join(
                    filter(None, (teacher.source, teacher.config.subfolder, teacher.config.weight_name))
                ),
                "kind": teacher.kind,
                "rank": teacher.rank,
                "guidance_scale": teacher.guidance_scale,
                "weight": teacher.weight,
                "revision": teacher.revision and teacher.revision[:8],
                "sha256": teacher.sha256 and teacher.sha256[:8],
            }
            for task, roles in self.teachers.items()
            for teacher in roles
        ]


def _compare_with_manifest(
    teachers: Mapping[str, list[TeacherConfig]], manifest: Mapping[str, Any] | None
) -> list[str]:
    if manifest is None:
        return []
    ours, theirs = ({task: len(entries) for task, entries in roles.items()} for roles in (teachers, manifest))
    if ours == theirs:
        return []
    return [f"the checkpoint was trained with teachers (number by task) {theirs} and is resumed with {ours}"]


def _pin(config: TeacherConfig, recorded: Mapping[str, Any] | None) -> TeacherConfig:
    """The commit that the checkpoint recorded, where the same repository is named again."""
    if recorded is None or recorded["revision"] is None or local_folder(config) is not None:
        return config
    same = recorded["source"] == config.model_name_or_path and recorded["subfolder"] == config.subfolder
    return replace(config, revision=recorded["revision"]) if same else config


def _check_recorded(teacher: Teacher, recorded: Mapping[str, Any] | None) -> None:
    # The hash decides, not the name: a teacher may have moved, or come from the Hub where it was a folder before.
    if recorded is not None and recorded["sha256"] != teacher.sha256:
        raise TeacherError(
            f"{teacher.source}: not the teacher that the checkpoint was trained with, which was {recorded['source']} with "
            f"sha256 {recorded['sha256']}; this one has {teacher.sha256}. Give that one, or start a new run."
        )


def model_identity(roles: Sequence[Teacher]) -> list[list[Any]]:
    """What tells a model from others on the same base: files, guidance and weight of each of its networks."""
    return [[role.kind, role.sha256, role.guidance_scale, role.weight] for role in roles]
