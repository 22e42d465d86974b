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

"""Reads a whole transformer as a teacher. Anything that does not fit the base exactly is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from ..acceleration.quantization import base_weight, plain_tensors, weight_kind
from ..guards.files import JSON
from .boundary import strangers_files
from .lora_keys import some
from .single_file import read_single_file
from .teacher_config import TeacherError
from .teacher_files import TeacherFiles, check_keys, read_json


_QUANTIZATION = "quantization_config"
_METHODS = ("bitsandbytes", "torchao")
# The largest norm of its weights relative to the base's; the same limit as in `lora_update.py`.
_BEYOND = 2.0**24


def read_transformer(files: TeacherFiles, base: ModelMixin) -> nn.Module:
    """
    Loads a whole transformer, frozen, in the dtype of the base and on its device: from a folder of diffusers, or from a
    single file.

    Raises:
        TeacherError: If its class or config differs from the base's, or if a weight is missing, left over, of another
            shape or type, or not finite.
    """
    with strangers_files(lambda said: f"{files.label}: cannot read {files.shown} ({said})"):
        is_folder = files.names[0] == "config.json"
        model = _load_transformer(files, base) if is_folder else read_single_file(files, base)
        _check_values(files.label, model, base)
        return model.to(base.device).requires_grad_(False).eval()


def has_architecture_of(base: ModelMixin, files: TeacherFiles) -> bool:
    """Whether a whole transformer is of the base's class and config, as its own config says."""
    try:
        _empty(read_json(files.folder / "config.json", files.label), base, files.label)
    except TeacherError:
        return False
    return True


def _empty(stored: Mapping[str, JSON], base: ModelMixin, label: str) -> nn.Module:
    """Makes the network of a config, without weights, and refuses another architecture than the base's."""
    cls = type(base)
    if stored.get("_class_name") != cls.__name__:
        raise TeacherError(
            f"{label}: its config.json is of class {str(stored.get('_class_name'))[:80]!r}, but the base's "
            f"denoiser is a {cls.__name__!r}. A full teacher needs the class of the base."
        )
    ours = json.loads(base.to_json_string())
    # Compared before a model of its sizes is built. Fields that it lacks get the class's defaults, as in old configs.
    _compare({key: value for key, value in stored.items() if value is not None and key in ours}, ours, label)
    with torch.device("meta"):
        empty = cls.from_config(dict(stored))
    theirs = json.loads(empty.to_json_string())
    _compare({key: theirs.get(key) for key in {*ours, *theirs}}, ours, label)
    return empty


def _load_transformer(files: TeacherFiles, base: ModelMixin) -> nn.Module:
    label = files.label
    stored = read_json(files.folder / "config.json", label)
    empty = _empty(stored, base, label)
    quantized = stored.get(_QUANTIZATION)
    if quantized is not None and not (isinstance(quantized, dict) and quantized.get("quant_method") in _METHODS):
        raise TeacherError(
            f"{label}: is quantized by {_short(quantized)}; only bitsandbytes and torchao are supported"
        )
    if quantized is None:
        _check_headers(files, empty.state_dict())
    try:
        model, info = type(base).from_pretrained(
            files.folder, dtype=base_weight(base).dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise TeacherError(f"{label}: its weights do not load ({error})") from error
    if wrong := {key: sorted(map(str, value)) for key, value in info.items() if value}:
        raise TeacherError(
            f"{label}: its weights do not fit its config: { {key: value[:3] for key, value in wrong.items()} }"
        )
    return model


def _check_values(label: str, model: nn.Module, base: ModelMixin) -> None:
    # Buffers too: SD3's table of positions is one, and it is saved in the file.
    if bad := [key for key, value in [*model.named_parameters(), *model.named_buffers()] if not _is_finite(value)]:
        raise TeacherError(f"{label}: holds NaN or infinite values in {some(bad)}")
    size = _norm(model)
    if not size:
        raise TeacherError(f"{label}: all of its weights are zero")
    if size > _BEYOND and size > _BEYOND * _norm(base):
        raise TeacherError(
            f"{label}: its weights are more than 2^24 times those of the base, so its outputs are not finite"
        )


def _compare(theirs: Mapping[str, JSON], ours: Mapping[str, JSON], label: str) -> None:
    # The base may be quantized while the teacher is not: they are the same network.
    names = sorted(key for key in theirs if not key.startswith("_") and key != _QUANTIZATION)
    if differing := [key for key in names if ours.get(key) != theirs[key]]:
        shown = ", ".join(f"{key} {_short(theirs[key])} (base {_short(ours.get(key))})" for key in differing[:8])
        raise TeacherError(f"{label}: made for another base: {shown}")


def _short(value: object) -> str:
    return repr(value)[:80]


def _check_headers(files: TeacherFiles, expected: Mapping[str, torch.Tensor]) -> None:
    """
    Checks that each weight is in one file, the one that the index names, and is a float where the base's is. Loading
    would cast anything.
    """
    held: dict[str, str] = {}
    for name in files.names[1:]:
        try:
            with safe_open(files.folder / name, "pt") as file:
                keys = list(file.keys())
                check_keys(keys, f"{files.label}: {name}")
                kinds = {key: file.get_slice(key).get_dtype() for key in keys}
        except SafetensorError as error:
            raise TeacherError(f"{files.label}: {name} is not a readable safetensors file ({error})") from error
        if twice := [key for key in keys if key in held]:
            raise TeacherError(
                f"{files.label}: {some(twice)} is in {held[twice[0]]} and in {name}; it is unclear which one counts"
            )
        held |= dict.fromkeys(keys, name)
        floats = [key for key in keys if key in expected and expected[key].is_floating_point()]
        if other := [key for key in floats if not kinds[key].startswith(("F", "BF"))]:
            raise TeacherError(
                f"{files.label}: {name} holds {kinds[other[0]]} in {some(other)}. Save it in a floating-point dtype."
            )
    index = files.folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        said = read_json(index, files.label)["weight_map"]
        if wrong := sorted(key for key in {*said, *held} if said.get(key) != held.get(key)):
            raise TeacherError(
                f"{files.label}: {index.name} does not fit the files: it does not say where {some(wrong)} is"
            )


def _norm(network: nn.Module) -> float:
    """Norm of a network's own weights, leaving out LoRAs and quantized weights."""
    own = [p for name, p in network.named_parameters() if "lora_" not in name]
    weights = [weight for weight in own if weight.is_floating_point() and weight_kind(weight) is None]
    return math.hypot(*(float(torch.linalg.vector_norm(w.detach(), dtype=torch.float32)) for w in weights))


def _is_finite(weight: torch.Tensor) -> bool:
    return all(bool(torch.isfinite(part.float()).all()) for part in plain_tensors(weight))
