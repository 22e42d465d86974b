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
Loads the pipelines of teachers that do not run on the student's network: of another size, or on another checkpoint.

Such a teacher has its own network, text encoders and schedule. It is asked at the student's latents and at the
student's noise levels, so both pipelines must mean the same images by the same latents. Nothing else has to agree.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch import Tensor, nn

from ..acceleration.offload import Offload, offloaded
from ..acceleration.quantization import base_weight, is_quantized
from ..guards.files import JSON
from ..hub.errors import explained, retried
from ..pipelines.base_state import carries_lora, denoiser_problems, placement_problems
from ..pipelines.calls import call_parameters
from ..pipelines.denoiser import denoiser, denoiser_name
from ..pipelines.experts import EXPERTS, LOW_NOISE, Experts, has_experts, networks_of
from ..pipelines.fingerprints import config_of
from ..pipelines.loading import load_pipeline
from ..pipelines.prompt_store import PromptStore
from ..pipelines.velocity import VelocityField
from .backbone import Backbone
from .boundary import strangers_files
from .lora_layouts import some
from .teacher_config import TeacherConfig, TeacherError
from .teacher_files import TeacherFiles, read_json
from .whole_transformer import has_architecture_of


# The largest difference of the images that two pipelines decode from the same latents, relative to their contrast.
# Rounding to half precision makes less than 0.02, another autoencoder more than 1.
_OTHER_IMAGES = 0.25
# How far a noise level may lie outside of those that a network was trained on.
_LEVEL = 1e-3
# Files that define a component. Files of other precisions (model.fp16.safetensors) and indices are left out.
_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.safetensors")
_TEXTS = (".json", ".txt", ".model")

PromptStoreOf = Callable[[DiffusionPipeline], PromptStore | None]


class OwnPipeline:
    """
    A frozen pipeline with the teachers that run on its network.

    Attributes:
        pipeline ([`~diffusers.DiffusionPipeline`]), backbone ([`Backbone`]): the pipeline, and its network with LoRAs.
        source (`str`): Hub id, or the name of the local folder but never its path.
        revision (`str`, *optional*): commit on the Hub; `None` for a local folder.
        sha256 (`str`): hash over the files of all its components.
        line (`str`): says in what it differs from the student's pipeline.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, source: str, revision: str | None, sha256: str, away: torch.device | None
    ):
        self.pipeline = pipeline
        self.backbone = Backbone(denoiser(pipeline))
        self.source, self.revision, self.sha256 = source, revision, sha256
        self.line = ""
        self._away = away  # if the network waits in host memory: the device on which it runs
        self._fields: dict[str, VelocityField] = {}

    @contextmanager
    def use(self, role: str) -> Iterator[nn.Module]:
        """Yields the network that computes as a role of [`Backbone.use`], on the device."""
        if self._away is not None:
            self.backbone.to(self._away)
        try:
            with self.backbone.use(role) as network:
                yield network
        finally:
            if self._away is not None:
                self.backbone.to("cpu")

    def field(self, options: Mapping[str, Any], store: PromptStoreOf) -> VelocityField:
        """The pipeline's velocity with these arguments of [`VelocityField`]. Equal ones give the same object."""
        key = repr(sorted(options.items()))
        if key not in self._fields:
            self._fields[key] = VelocityField(self.pipeline, prompt_store=store(self.pipeline), **options)
        return self._fields[key]

    @property
    def fields(self) -> list[VelocityField]:
        return [*self._fields.values()]

    def modules(self) -> dict[str, nn.Module]:
        """The pipeline's networks, by name. Some may be the student's pipeline's."""
        return {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}


@dataclass
class OwnPipelines:
    """
    Loads teachers' own pipelines, each once, and checks that they fit the student's.

    Args:
        student ([`~diffusers.DiffusionPipeline`]): the student's pipeline.
        velocity_field ([`VelocityField`]): its velocity.
        max_sequence_length (`int`, *optional*), generation_kwargs (`dict`, *optional*): as it was made with.
        offload ([`Offload`]): gets the teachers' text encoders that wait in host memory.
        offload_encoders (`bool`): whether all of them wait there.
        store (`Callable`, *optional*): makes the prompt store of a pipeline; `None` if there is none.
    """

    student: DiffusionPipeline
    velocity_field: VelocityField
    max_sequence_length: int | None
    generation_kwargs: Mapping[str, Any] | None
    offload: Offload
    offload_encoders: bool = False
    store: PromptStoreOf = lambda pipeline: None
    _loaded: dict[str, OwnPipeline] = field(default_factory=dict, init=False)
    _reference: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    def load(self, name: str, revision: str | None, config: TeacherConfig) -> OwnPipeline:
        """
        Loads a pipeline, unless it is loaded already, and checks it.

        Args:
            name (`str`), revision (`str`, *optional*): a local folder, or a Hub id and branch, tag or commit.
            config ([`TeacherConfig`]): says how it is quantized, and whether it is offloaded.

        Raises:
            TeacherError: If it cannot be loaded, is damaged, or its latents mean other images than the student's.
        """
        folder, commit = _found(name, revision)
        key = f"{folder.resolve()} {config.offload} {config.quantization_config}"
        if key not in self._loaded:
            source = folder.resolve().name if commit is None else name
            dtype = str(base_weight(denoiser(self.student)).dtype).removeprefix("torch.")
            with strangers_files(lambda said: f"{source}: its files cannot be read ({said})"):
                try:
                    pipeline = load_pipeline(str(folder), dtype, None, config.quantization_config)
                except ValueError as error:
                    raise TeacherError(f"{source}: {error}") from error
                _check_whole(pipeline, folder, source)
                sha256 = _sha256(folder, source)
            away = self.offload.device if config.offload else None
            own = OwnPipeline(pipeline, source, commit, sha256, away)
            self._place(own, config)
            own.line = self._checked(own, config)
            self._free_autoencoder(own)
            self._loaded[key] = own
        return self._loaded[key]

    def field_of(self, own: OwnPipeline, config: TeacherConfig) -> VelocityField:
        """
        The velocity of a teacher's own pipeline, on images of the student's size.

        Raises:
            TeacherError: If an option does not fit the pipeline.
        """
        given = config.generation_kwargs
        if given is None and type(own.pipeline) is type(self.student):
            given = self.generation_kwargs
        options = dict(given or {})
        takes_length = "max_sequence_length" in call_parameters(own.pipeline)
        length = options.pop("max_sequence_length", self.max_sequence_length if takes_length else None)
        *_, height, width = self._decoded()[1].shape
        try:
            return own.field(
                {
                    "num_inference_steps": self.velocity_field.num_inference_steps,
                    "height": height,
                    "width": width,
                    "max_sequence_length": length,
                    "generation_kwargs": options,
                },
                self.store,
            )
        except ValueError as error:
            raise TeacherError(f"{own.source}: {error}") from error

    def _place(self, own: OwnPipeline, config: TeacherConfig) -> None:
        """Moves the networks to their devices. What equals the student's is replaced by the student's, and freed."""
        ours = self.student.components
        for module in own.modules().values():
            module.requires_grad_(False).eval()
        for module in offloaded(own.pipeline):
            (name,) = (name for name, part in own.modules().items() if part is module)
            if isinstance(ours.get(name), nn.Module) and _is_equal(module, ours[name]):
                own.pipeline.register_modules(**{name: ours[name]})
        shared = {id(module) for module in ours.values()}
        resting = [module for module in offloaded(own.pipeline) if id(module) not in shared]
        stays = config.offload or self.offload_encoders
        if stays:
            self.offload.add(resting)
        networks = networks_of(denoiser(own.pipeline)).values()
        apart = {id(module) for module in (*networks, *(resting if stays else ()))} | shared
        for module in own.modules().values():
            if id(module) not in apart:
                module.to(self.offload.device)
        if not config.offload:
            own.backbone.to(self.offload.device)

    def _checked(self, own: OwnPipeline, config: TeacherConfig) -> str:
        """Refuses a pipeline with other latents than the student's. Returns the line that says what else differs."""
        x, image = self._decoded()
        theirs = self.field_of(own, config)
        with torch.no_grad():
            start = theirs.initial_latents([""], [torch.Generator().manual_seed(0)])
            if start.shape != x.shape:
                raise TeacherError(
                    f"{own.source}: its latents are {tuple(start.shape)} for an image of {image.shape[-2]} x "
                    f"{image.shape[-1]} pixels, and the student's are {tuple(x.shape)}. A teacher's latents must have "
                    "the student's channels, size and layout: choose a teacher with the student's autoencoder."
                )
            other = _picture(theirs, x)
        if other.shape != image.shape:
            gap = math.inf
        else:
            gap = float((other - image).square().mean().sqrt() / image.std().clamp(min=1e-6))
        if gap > _OTHER_IMAGES:
            raise TeacherError(
                f"{own.source}: it decodes other images from the same latents than the student's pipeline (they are "
                f"{gap:.2f} apart, relative to their contrast; {_OTHER_IMAGES} is the limit). Choose a teacher with "
                "the student's autoencoder, or with one that has the same latents."
            )
        levels, (lowest, highest) = self.velocity_field.levels, theirs.trained_levels
        first, last = float(levels[0]), float(levels[-2])
        if first > highest + _LEVEL or last < lowest - _LEVEL:
            raise TeacherError(
                f"{own.source}: it was trained on noise levels from {lowest:.3f} to {highest:.3f}, and the student's walk "
                f"goes from {first:.3f} to {last:.3f}. Choose a teacher of the student's kind (one that predicts noise "
                "for another, flow matching for flow matching)."
            )
        return self._difference(own, theirs)

    def _free_autoencoder(self, own: OwnPipeline) -> None:
        """Moves the autoencoder, if it is not the student's, to host memory: it is not used again."""
        vae = own.modules().get("vae")
        self.offload.rest()
        if vae is not None and vae is not self.student.components.get("vae"):
            vae.to("cpu")

    def _decoded(self) -> tuple[Tensor, Tensor]:
        """Some latents of the student's pipeline, and the image that it decodes from them: `(1, 3, H, W)` in [0, 1]."""
        if self._reference is None:
            x = self.velocity_field.initial_latents([""], [torch.Generator().manual_seed(0)])
            self._reference = x, _picture(self.velocity_field, x)
            self.offload.rest()
        return self._reference

    def _difference(self, own: OwnPipeline, theirs: VelocityField) -> str:
        ours, parts = self.student, []
        sizes = [sum(p.numel() for p in denoiser(one).parameters()) for one in (own.pipeline, ours)]
        parts.append(f"a network of {_millions(sizes[0])} parameters (the student's has {_millions(sizes[1])})")
        encoders = [name for name in own.modules() if name.startswith("text_encoder")]
        shared = [name for name in encoders if own.modules()[name] is ours.components.get(name)]
        mine = [name for name in encoders if name not in shared]
        if mine:
            parts.append(f"its own {', '.join(mine)}")
        if shared:
            parts.append(f"the student's {', '.join(shared)}")
        shifts = [one.scheduler.config.get("shift") for one in (own.pipeline, ours)]
        if shifts[0] != shifts[1]:
            parts.append(f"shift {shifts[0]} (the student's is {shifts[1]}; both are asked at the student's levels)")
        kind = type(own.pipeline).__name__
        return f"The teacher {own.source} runs through its own pipeline, a {kind} with {'; '.join(parts)}."


def _picture(one: VelocityField, x: Tensor) -> Tensor:
    image = one.decode(x, [""], "pt")
    assert isinstance(image, Tensor)
    return image.float().cpu().flatten(0, -4)


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _found(name: str, revision: str | None) -> tuple[Path, str | None]:
    """The folder of a pipeline, downloaded if it is on the Hub, and its commit there."""
    if Path(name).is_dir():
        folder, commit = Path(name), None
    else:
        shown = f"{name}@{revision}" if revision else name
        try:
            with explained(shown, name, revision, TeacherError):
                found = retried(DiffusionPipeline.download, name, revision=revision, use_safetensors=True)
        except OSError as error:
            raise TeacherError(f"{shown}: is no pipeline of diffusers that can be loaded ({error})") from error
        folder = Path(found)
        commit = folder.name
    if not (folder / "model_index.json").is_file():
        raise TeacherError(
            f"{name if commit else folder.resolve().name}: has no model_index.json. A teacher's base is a whole "
            "pipeline, as pipe.save_pretrained(folder) writes it."
        )
    return folder, commit


def _check_whole(pipeline: DiffusionPipeline, folder: Path, source: str) -> None:
    """Refuses a pipeline whose network has missing or left-over weights, or that carries adapters or hooks."""
    if not isinstance(denoiser(pipeline), nn.Module):
        raise TeacherError(f"{source}: {type(pipeline).__name__} has no network that denoises")
    problems: list[str] = []
    for name in EXPERTS if has_experts(pipeline) else (denoiser_name(pipeline),):
        network = pipeline.components[name]
        if not is_quantized(network):
            _check_weights(network, folder / name, source)
        problems += denoiser_problems(network, name)
    problems += placement_problems(pipeline)
    if carries_lora(pipeline):
        problems.append("It carries a LoRA. Save it without, and name the LoRA as the teacher.")
    if problems:
        raise TeacherError("\n".join(f"{source}: {problem}" for problem in problems))


def _check_weights(network: nn.Module, folder: Path, source: str) -> None:
    held: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        if _WEIGHTS.fullmatch(path.name):
            with safe_open(path, "pt") as file:
                held.update(file.keys())
    expected = network.state_dict()
    if wrong := sorted(held ^ expected.keys()):
        raise TeacherError(f"{source}: its network's weights do not fit its config: {some(wrong)}")
    if bad := [name for name, value in expected.items() if not value.isfinite().all()]:
        raise TeacherError(f"{source}: holds NaN or infinite values in {some(bad)}")


def _sha256(folder: Path, source: str) -> str:
    """Hash of the listing that `sha256sum` prints for the files of the pipeline's components."""
    index: dict[str, JSON] = read_json(folder / "model_index.json", source)
    lines = []
    for name in sorted(key for key in index if not key.startswith("_") and (folder / key).is_dir()):
        for path in sorted((folder / name).iterdir()):
            is_text = path.suffix in _TEXTS and ".index." not in path.name
            if is_text or _WEIGHTS.fullmatch(path.name):
                with open(path, "rb") as file:
                    lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}/{path.name}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _is_equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks are of one class and config, and have the same weights."""
    settings = [json.dumps(config_of(network), default=str) for network in (one, other)]
    if type(one) is not type(other) or settings[0] != settings[1]:
        return False
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(
        a[name].shape == b[name].shape
        and a[name].dtype == b[name].dtype
        and torch.equal(a[name], b[name].to(a[name].device))
        for name in a
    )


def fits(files: TeacherFiles, base: nn.Module) -> bool:
    """Whether the network in a pipeline's files is of the base's architecture, so that it can take the base's place."""
    index = read_json(files.folder.parent / "model_index.json", files.label)
    second = index.get(LOW_NOISE)
    has_two = isinstance(second, list) and second[0] is not None
    if has_two != isinstance(base, Experts):
        return False
    halves = [half for half in (files, files.other) if half is not None]
    networks = [base.of(half.expert) if isinstance(base, Experts) and half.expert else base for half in halves]
    return all(has_architecture_of(network, half) for network, half in zip(networks, halves, strict=True))


def pipeline_of(files: TeacherFiles) -> tuple[str, str | None]:
    """The name and revision of the pipeline that a network's files lie in."""
    if files.revision is None:
        return str(files.folder.parent), None
    if files.subfolder is not None:
        raise TeacherError(
            f"{files.label}: is a pipeline of another architecture than the student's, in a folder of a repository, "
            f"from which diffusers loads none. Download it, hf download {files.source} --include "
            f"'{files.subfolder}/*' --local-dir teacher, and name the local folder."
        )
    return files.source, files.revision


def check_idle(config: TeacherConfig) -> None:
    """Refuses options of an own pipeline for a teacher that runs through the student's."""
    names = ("generation_kwargs", "offload", "quantization_config")
    if given := [name for name in names if vars(config)[name]]:
        raise TeacherError(
            f"{config.model_name_or_path}: {', '.join(given)} is for a teacher with a pipeline of its own, and this one "
            "runs through the student's. Leave it out, or name the teacher's base."
        )
