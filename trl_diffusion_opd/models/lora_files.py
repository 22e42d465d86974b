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

"""Reads a LoRA's files: its matrices, their layers, ranks and scales. Anything that would be dropped is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..pipelines.denoiser import denoiser, denoiser_name
from .boundary import strangers_files
from .folded_lora import FoldedLora
from .lora_keys import DIFFERENCE_KEY, LYCORIS_KEY, TEXT_ENCODER, by_layer, some, split_key
from .lora_layouts import convert, layout_of
from .lora_names import LayerUpdate
from .lora_options import read_options
from .lora_scales import MATRIX, LoraScales, matrix_shapes, resolve
from .lora_update import check_update
from .teacher_config import TeacherError
from .teacher_files import TeacherFiles, check_keys, parse_json, read_json


# How the keys of a PeftModel begin. This package uses such keys throughout; files may have the prefix or not.
PEFT_PREFIX = "base_model.model."


class SwitchedLora(NamedTuple):
    """
    A LoRA that PEFT switches on the base.

    Attributes:
        config: its `LoraConfig`.
        weights: its tensors on the CPU, in the file's own dtype, under PEFT's keys
            (`base_model.model.<module>.lora_A.weight`).
    """

    config: LoraConfig
    weights: dict[str, Tensor]


def read_lora_files(
    files: TeacherFiles, pipeline: DiffusionPipeline, lora_scale: float = 1.0
) -> SwitchedLora | FoldedLora:
    """
    Reads a LoRA of one network, in the layout of any program that writes such files.

    Args:
        files ([`~teacher_files.TeacherFiles`]): where it is.
        pipeline (`DiffusionPipeline`): the base.
        lora_scale (`float`, *optional*, defaults to 1.0): multiplies every alpha.

    Returns:
        [`SwitchedLora`], or [`~folded_lora.FoldedLora`] for a LoKr, a LoHa of a high rank, or a DoRA.

    Raises:
        TeacherError: as [`~expert_teachers.read_lora`], but not for what is no LoRA as a whole.
    """
    network: nn.Module = denoiser(pipeline)
    with strangers_files(lambda said: f"{files.label}: cannot read {files.shown} ({said})"):
        raw, metadata = _load(files)
        read = _read_peft if files.kind == "peft" else _read_diffusers
        config, tensors, alphas, updates = read(files, raw, metadata, pipeline)
        try:
            if updates:
                return _folded(files, config, updates, network, lora_scale)
            _check_tensors(files, tensors)
            scales = infer_scales(tensors, alphas) if config is None else resolve(config, tensors, network)
            scales = scales.times(lora_scale)
            check_update(scales, tensors, network)
            ours = scales.config(network)
        except TeacherError as error:
            if str(error).startswith(files.label):
                raise
            raise TeacherError(f"{files.label}: {error}") from error
        return SwitchedLora(ours, {PEFT_PREFIX + key: value for key, value in tensors.items()})


def _folded(
    files: TeacherFiles, config: LoraConfig | None, updates: list[LayerUpdate], network: nn.Module, lora_scale: float
) -> FoldedLora:
    """The updates, with the alphas that a config beside them gives."""
    every = {f"{update.name} ({part})": value for update in updates for part, value in update.parts.items()}
    if bad := [key for key, value in every.items() if not torch.isfinite(value).all()]:
        raise TeacherError(f"{files.names[-1]} holds NaN or infinite values in {some(bad)}")
    if config is None:
        return FoldedLora(updates, lora_scale)
    sides = {"lora_A": "down", "lora_B": "up"}
    # Only PEFT and diffusers write a config: they name each layer of the network.
    pairs = {
        f"{layer}.{side}.weight": update.parts[part]
        for update in updates
        for layer in update.sources
        for side, part in sides.items()
    }
    scales = resolve(config, pairs, network)
    scaled = []
    for update in updates:
        (layer,) = update.sources
        alpha = torch.tensor(scales.scale(layer) * scales.ranks[layer], dtype=torch.float64)
        magnitude = update.parts["magnitude"].flatten()  # PEFT has lengths of rows
        scaled.append(replace(update, parts={**update.parts, "alpha": alpha, "magnitude": magnitude}))
    return FoldedLora(scaled, lora_scale)


class _Lora(NamedTuple):
    """
    The content of a LoRA's files: its matrices, and its options or the alphas among its tensors; or in place of the
    matrices what is to be folded.
    """

    config: LoraConfig | None
    tensors: dict[str, torch.Tensor]
    alphas: dict[str, float]
    updates: list[LayerUpdate]


def _load(files: TeacherFiles) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads the tensors of a LoRA's file, in a dtype that can be computed with, and its metadata."""
    label = files.label
    path = files.folder / files.names[-1]
    try:
        with safe_open(path, "pt") as file:
            keys, metadata = list(file.keys()), file.metadata() or {}
            check_keys(keys, f"{label}: {path.name}")
            if not any(split_key(key) or LYCORIS_KEY.search(key) or "lora" in key for key in keys):
                raise TeacherError(
                    f"{label}: {path.name} is no LoRA: none of its {len(keys)} tensors is a LoRA's (they are "
                    f"{some(keys)}). "
                    "A whole transformer is a folder that save_pretrained() makes, or a single file with its layers."
                )
        raw = load_file(path, device="cpu")
    except SafetensorError as error:
        raise TeacherError(f"{label}: {path.name} is not a readable safetensors file ({error})") from error
    if encoders := [key for key in raw if TEXT_ENCODER.search(key)]:
        raise TeacherError(
            f"{label}: {path.name} also adapts text encoders ({some(encoders)}), which would be dropped: only the "
            "network that denoises is distilled. Use a teacher that was trained with frozen text encoders."
        )
    # No layer computes with 8-bit floats. bfloat16 holds all of their values.
    raw = {k: v.bfloat16() if v.is_floating_point() and v.itemsize == 1 else v for k, v in raw.items()}
    # ComfyUI's extraction writes differences of zeros for norms. They change nothing.
    raw = {key: value for key, value in raw.items() if not DIFFERENCE_KEY.search(key) or value.any()}
    if other := [key for key in raw if split_key(key) is None]:
        what = "LyCORIS's (of a kind such as OFT)" if any(map(LYCORIS_KEY.search, other)) else "no LoRA matrices"
        raise TeacherError(
            f"{label}: {path.name} holds tensors that are {what} and would be dropped: {some(other)}. Merge the whole "
            "file into its base with a program that knows it, and use the full transformer as the teacher."
        )
    whole = [key for key, value in raw.items() if not (value.is_floating_point() or key.endswith(".alpha"))]
    if whole:
        raise TeacherError(
            f"{label}: {path.name} holds {raw[whole[0]].dtype} in {some(whole)}. Save it in a floating-point dtype."
        )
    return raw, metadata


def _read_peft(
    files: TeacherFiles, raw: dict[str, torch.Tensor], metadata: dict[str, str], pipeline: DiffusionPipeline
) -> _Lora:
    label = files.label
    stored = read_json(files.folder / CONFIG_NAME, label)
    config = read_options(stored, label)
    tensors = {key.removeprefix(PEFT_PREFIX): value for key, value in raw.items()}
    if len(tensors) < len(raw):
        twice = [key for key in raw if PEFT_PREFIX + key in raw]
        raise TeacherError(f"{label}: {some(twice)} is in it twice, with and without {PEFT_PREFIX!r} before it.")
    _check_dora(bool(stored.get("use_dora")), tensors, label)
    if stored.get("use_dora"):
        return _Lora(config, {}, {}, convert(tensors, pipeline, label).updates)
    if layout_of(tensors) is None:
        return _Lora(config, tensors, {}, [])
    # Some trainers (diffusion-pipe) save PEFT's config beside ComfyUI's keys. Programs that read such a file use its
    # keys and ignore the config.
    converted, alphas, updates = convert(tensors, pipeline, label)
    if (
        alphas
        or updates
        or config.use_rslora
        or config.alpha_pattern
        or config.rank_pattern
        or config.lora_alpha != config.r
    ):
        raise TeacherError(
            f"{label}: its {CONFIG_NAME} is PEFT's, with lora_alpha={config.lora_alpha} and r={config.r}, but its "
            f"keys are not PEFT's. It is unclear whether they are meant to be scaled. Save it with PEFT or diffusers."
        )
    return _Lora(None, converted, {}, [])


def _read_diffusers(
    files: TeacherFiles, raw: dict[str, torch.Tensor], metadata: dict[str, str], pipeline: DiffusionPipeline
) -> _Lora:
    label, name = files.label, files.names[-1]
    converted, alphas, updates = convert(raw, pipeline, label)
    stored = parse_json(metadata.get(LORA_ADAPTER_METADATA_KEY) or "{}", f"{label}: the metadata of {name}")
    prefix = f"{denoiser_name(pipeline)}."
    if any(key.startswith(prefix) for key in stored):
        # The metadata may also hold the options of text encoders.
        stored = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    has_alpha = any(key.endswith(".alpha") for key in raw)
    if not stored:
        if not has_alpha and layout_of(raw) == layout_of([PEFT_PREFIX]) and _are_own(raw, pipeline):
            raise TeacherError(
                f"{label}: its keys, such as {min(raw)}, are in the layout of PEFT. Its alpha is in its "
                f"{CONFIG_NAME}: put that beside it."
            )
        return _Lora(None, converted, alphas, updates)
    if has_alpha:
        raise TeacherError(f"{label}: has alpha both in its metadata and as tensors; which one counts is unclear")
    if "r" not in stored:
        raise TeacherError(f"{label}: the metadata of {name} is not of a LoRA: it has {some([*stored])}, but no r.")
    _check_dora(bool(stored.get("use_dora")), raw, label)
    return _Lora(read_options(stored, label), converted, {}, updates)


def _are_own(raw: dict[str, Tensor], pipeline: DiffusionPipeline) -> bool:
    """Whether all names in a file of PEFT's are the network's own."""
    ours = {name for name, _ in denoiser(pipeline).named_modules()}
    return all(name.removeprefix(PEFT_PREFIX) in ours for name in by_layer(raw))


def _check_dora(is_said: bool, tensors: dict[str, Tensor], label: str) -> None:
    """Refuses options that say something else about DoRA than the tensors."""
    magnitudes = [key for key in tensors if (split := split_key(key)) is not None and split[1] == "magnitude"]
    if is_said != bool(magnitudes):
        has = some(magnitudes) if magnitudes else "no lora_magnitude_vector"
        raise TeacherError(f"{label}: its LoRA config has use_dora={is_said}, and the file has {has}.")


def _check_tensors(files: TeacherFiles, tensors: dict[str, torch.Tensor]) -> None:
    label, name = files.label, files.names[-1]
    if other := [key for key in tensors if not MATRIX.search(key)]:
        raise TeacherError(
            f"{label}: {name} holds tensors that are no LoRA matrices ({some(other)}) and would be dropped. Load "
            "it with the library it was made with and save it with PEFT or diffusers."
        )
    if bad := [key for key, value in tensors.items() if not torch.isfinite(value).all()]:
        raise TeacherError(f"{label}: {name} holds NaN or infinite values in {some(bad)}")
    for side in "AB":
        matrices = [
            value for key, value in tensors.items() if f".lora_{side}" in key or f".lora_embedding_{side}" in key
        ]
        if not matrices:
            raise TeacherError(f"{label}: holds no lora_{side} (its keys are like {some(list(tensors))})")
        # If either side is zero, every product is zero, and the teacher would silently be the base.
        if not any(value.any() for value in matrices):
            raise TeacherError(
                f"{label}: every lora_{side} of {name} is zero, so this teacher is the base model. Was it saved "
                'before training? If the base is meant, say "base".'
            )


def infer_scales(tensors: dict[str, torch.Tensor], alphas: dict[str, float]) -> LoraScales:
    """
    Takes each layer's rank from the shapes, and alpha from `alphas`, else the rank (scale 1). diffusers reads such
    files the same way.
    """
    shapes = matrix_shapes(tensors)
    ranks = {layer: shape[axis] for layer, sides in shapes.items() for _, shape, axis in sides if axis == 1}
    for layer, sides in shapes.items():
        for key, shape, axis in sides:
            if layer not in ranks or shape[axis] != ranks[layer]:
                raise TeacherError(f"{key}, of shape {shape}, has no lora_B of its rank")
    return LoraScales(ranks, {layer: alphas.get(layer, float(rank)) for layer, rank in ranks.items()})
