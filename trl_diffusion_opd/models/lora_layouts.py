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

"""Converts the key layouts of LoRA files: names of layers, fused and renamed layers, alphas. Nothing is dropped."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..pipelines.denoiser import denoiser
from .diffusers_layouts import convert_with_loader
from .lora_keys import PREFIX, by_layer, some
from .lora_names import LayerUpdate, plain_layer, read_layers
from .lycoris import as_lora, kind_of
from .teacher_config import TeacherError


# Layouts by the pattern of their keys, and their names in messages.
_LAYOUTS = {
    r"^(lora_unet|lora_transformer|lycoris)_": "kohya's trainers (underscores for the dots of names)",
    r"\.lora_[AB]\.\w+\.weight$": "DiffSynth-Studio (an adapter's name behind lora_A and lora_B)",
    r"^(model\.)?diffusion_model\.": 'ComfyUI ("diffusion_model." before each name)',
    r"\.lora_(down|up)\.": "kohya's trainers (lora_down and lora_up for lora_A and lora_B)",
    r"lora(_linear_layer|\d)?\.(down|up)\.": "an old diffusers (lora.down and lora.up for lora_A and lora_B)",
    r"^base_model\.model\.": "PEFT",
}


class Converted(NamedTuple):
    """
    A file's tensors under the network's own names.

    Attributes:
        tensors: the matrices, `<layer>.lora_A.weight` and `<layer>.lora_B.weight`.
        alphas: alpha by layer, where the file has one.
        updates: in place of both, the layers of a file that is not a LoRA as a whole.
    """

    tensors: dict[str, Tensor]
    alphas: dict[str, float]
    updates: list[LayerUpdate]


def convert(raw: Mapping[str, Tensor], pipeline: DiffusionPipeline, label: str) -> Converted:
    """
    Renames a LoRA's tensors to the network's own names, from the layout of any program that writes such files.

    Names of layers may be the network's own or those of the model's original code, with any prefix, with dots or
    underscores. Other layouts are left to the pipeline's own loader.

    Args:
        raw (`dict[str, Tensor]`): the tensors of the file.
        pipeline (`DiffusionPipeline`): the base.
        label (`str`): the teacher's name in messages.

    Raises:
        TeacherError: If half of a layer's tensors is missing, the layout cannot be converted, or a tensor would be
            dropped.
    """
    raw = _without_slip(raw)
    _refuse_mixture(raw, label)
    _check_alphas(raw, label)
    _check_complete(raw, label)
    network: nn.Module = denoiser(pipeline)
    try:
        updates, unknown = read_layers(raw, network)
        if updates:
            _refuse_unknown(raw, unknown, network)
            return _converted(updates, network)
    except TeacherError as error:
        raise TeacherError(f"{label}: {error}") from error
    return Converted(*convert_with_loader(raw, pipeline, label, lambda said: _describe(raw, pipeline, said)), [])


def _refuse_unknown(raw: Mapping[str, Tensor], unknown: list[str], network: nn.Module) -> None:
    """Refuses names of layers that the base does not have, beside those of layers that it has."""
    layers = by_layer(raw)
    sides = [(name, [raw[key] for part, key in layers[name].items() if part in ("down", "up")]) for name in unknown]
    # A product with a matrix of zeros changes nothing.
    if lost := [name for name, matrices in sides if not matrices or all(matrix.any() for matrix in matrices)]:
        keys = [min(layers[name].values(), key=lambda key: key.endswith(".alpha")) for name in lost]
        raise TeacherError(
            f"{some(keys)} would be dropped: a {type(network).__name__} like this base has no such layer. The file is "
            "for a base of another size or kind, or holds more than one network."
        )


def _converted(updates: list[LayerUpdate], network: nn.Module) -> Converted:
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for update in updates:
        lora = as_lora(update.parts)
        if lora is None:
            return Converted({}, {}, updates)
        down, up, alpha = lora
        for layer, rows in update.cut(up).items():
            module = plain_layer(network, layer)
            tensors[f"{layer}.lora_A.weight"] = _fitted(down, module)
            tensors[f"{layer}.lora_B.weight"] = _fitted(rows, module)
            if "alpha" in update.parts or "down" not in update.parts:
                alphas[layer] = alpha
    return Converted(tensors, alphas, [])


def _fitted(matrix: Tensor, layer: nn.Module) -> Tensor:
    """A matrix with as many axes as its layer: a convolution of one pixel is the same as a linear layer."""
    axes = 2 if isinstance(layer, nn.Linear) else 2 + len(layer.kernel_size)  # type: ignore[arg-type]
    if matrix.ndim > axes and matrix[0, 0].numel() == 1:
        return matrix.flatten(1)
    return matrix.reshape(*matrix.shape, *[1] * (axes - matrix.ndim)) if matrix.ndim == 2 < axes else matrix


def _check_alphas(raw: Mapping[str, Tensor], label: str) -> None:
    for key, value in raw.items():
        if not key.endswith(".alpha"):
            continue
        is_number = value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool
        if not is_number or not torch.isfinite(value).all() or not value.any():
            raise TeacherError(
                f"{label}: {key} is {value.tolist()}; alpha must be one finite number, and not 0, which would make "
                "the teacher the base."
            )


def _check_complete(raw: Mapping[str, Tensor], label: str) -> None:
    """Refuses a layer that has a part of the tensors of a LoRA, LoHa or LoKr, or some of several of them."""
    for name, keys in by_layer(raw).items():
        parts = {part: raw[key] for part, key in keys.items()}
        if kind_of(parts) is not None:
            continue
        own = {part: key for part, key in keys.items() if part not in ("alpha", "magnitude")}
        if own.keys() in ({"down"}, {"up"}):
            ((has, key),) = own.items()
            sides = (("down", "up"), ("lora_A", "lora_B"), ("lora_a", "lora_b"))
            end = key.removeprefix(name)
            for one, other in sides if has == "down" else ((up, down) for down, up in sides):
                end = end.replace(one, other)
            lacks = name + end
            raise TeacherError(
                f"{label}: half of a pair is missing: it has {some([key])} and no {some([lacks])}, and would be "
                "dropped. Download it again, or save it again with the program that trained it."
            )
        raise TeacherError(
            f"{label}: {some([*keys.values()])} would be dropped: these are not all tensors of a LoRA, LoHa or LoKr, "
            f"or are of several of them. Download the file again, or leave {some([name])} out of it."
        )


def _without_slip(raw: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """
    Takes PEFT's prefix out of keys that have it behind the transformer's. They come from `save_lora_weights`, given a
    PeftModel's own keys.
    """
    slip = "transformer.base_model.model."
    if not all(key.startswith(slip) for key in raw):
        return raw
    return {f"transformer.{key.removeprefix(slip)}": value for key, value in raw.items()}


def _refuse_mixture(keys: Iterable[str], label: str) -> None:
    """Refuses files with several prefixes. Converters cut one prefix from all keys, or drop keys that lack it."""
    prefixes = {key: (PREFIX.match(key) or [""])[0] for key in keys}
    most = Counter(prefixes.values()).most_common(1)[0][0]
    if most not in ("transformer.", "unet.") and (
        others := [key for key, prefix in prefixes.items() if prefix != most]
    ):
        example = next(key for key, prefix in prefixes.items() if prefix == most)
        raise TeacherError(
            f"{label}: is a mixture of layouts, {some(others)} beside {example} and the like; one of them would be "
            "dropped. Make two files of it, or convert it to the layout of diffusers."
        )


def layout_of(keys: Iterable[str]) -> str | None:
    """The key in `_LAYOUTS` of the layout that the keys have; `None` if they are plain (`<module>.lora_A.weight`)."""
    keys = list(keys)
    return next((mark for mark in _LAYOUTS if any(re.search(mark, key) for key in keys)), None)


def _describe(raw: Mapping[str, Tensor], pipeline: DiffusionPipeline, said: str = "") -> str:
    """Says which layout a file has that names no layer of the base."""
    mark = layout_of(raw)
    layout = "another trainer" if mark is None else _LAYOUTS[mark]
    example = min(raw, key=lambda key: (key.endswith(".alpha"), key))
    return (
        f"its keys, such as {example}, are in the layout of {layout}, which {type(pipeline).__name__} cannot "
        f"convert{said}, and name no layer of a {type(denoiser(pipeline)).__name__}: it is for another base, or uses "
        "its trainer's own names. Convert it to the layout of diffusers with the tools of its trainer."
    )
