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

"""Checks how much a LoRA changes its base: its update must be finite, and neither negligible nor overwhelming."""

import math
from collections.abc import Mapping

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..acceleration.quantization import base_weight, dequantized
from .lora_keys import some
from .lora_scales import LoraScales, layer_names, matrix_shapes
from .teacher_config import TeacherError


# The largest norm of a matrix: the product of two such matrices overflows neither float32 nor bfloat16.
_LARGEST = math.sqrt(torch.finfo(torch.float32).max)
# The smallest update, relative to its weight, that float32 can add: below this, adding it leaves the weight as it is.
# Above the inverse, nothing of the weight is left.
_RESOLUTION = torch.finfo(torch.float32).eps / 2


@torch.no_grad()
def check_update(scales: LoraScales, tensors: Mapping[str, Tensor], network: nn.Module) -> None:
    """
    Checks that a LoRA's updates `scale B A` are finite, and compares their size with the base's weights.

    Sizes are Frobenius norms in float64, of matrices rounded to the base's dtype. If no layer's update reaches 2^-24
    of its weight, the LoRA is in effect the base. If all updates together are more than 2^24 times all weights,
    nothing of the base is left.

    Args:
        scales (`LoraScales`): as [`~lora_scales.resolve`] returns it.
        tensors (`dict[str, Tensor]`): the matrices, under `<layer>.lora_A.weight` and the like, finite in the file's
            dtype.
        network (`nn.Module`): the base, with or without LoRAs on it.

    Raises:
        TeacherError: If an update is not finite, or too small or too large.
    """
    dtype = base_weight(network).dtype
    norms: dict[str, float] = {}
    there = {*layer_names(network)}
    for layer, sides in matrix_shapes(tensors).items():
        keys = [key for key, _, _ in sorted(sides, key=lambda side: side[2])]
        matrices = [tensors[key].to(dtype).flatten(1).double() for key in keys]
        for key, matrix in zip(keys, matrices, strict=True):
            if not float(torch.linalg.vector_norm(matrix)) < _LARGEST:
                raise TeacherError(f"{key} has a norm beyond {_LARGEST:.2g}, or is infinite in the base's {dtype}")
        # [`~lora_adapter.add_adapter`] refuses matrices that do not fit each other or the base.
        if layer in there and len(matrices) == 2 and matrices[0].shape[0] == matrices[1].shape[1]:
            norms[layer] = _product_norm(*matrices)
    updates = {layer: abs(scales.scale(layer)) * norm for layer, norm in norms.items()}
    # The product has to be finite before it is scaled, too.
    total = math.hypot(*(max(updates[layer], norms[layer]) for layer in norms))
    weights, is_base, is_beyond = 0.0, bool(updates), bool(updates)
    for layer in sorted(updates, key=lambda name: -updates[name]):
        weight = _weight_norm(network.get_submodule(layer))
        if weight is None:
            return
        weights = math.hypot(weights, weight)
        is_base = is_base and not updates[layer] > _RESOLUTION * weight
        is_beyond = is_beyond and not total * _RESOLUTION <= weights
        if not (is_base or is_beyond):  # usually after the first layer, which saves time on a large base
            return
    if is_base:
        raise TeacherError(
            "its updates (alpha times lora_B times lora_A) are less than 2^-24 of the base's weights in all of its "
            f"{len(updates)} layers, "
            f'so this teacher is the base model: alpha is {_alphas(scales)}. If the base is meant, say "base".'
        )
    if is_beyond:
        raise TeacherError(
            "its updates (alpha times lora_B times lora_A) are more than 2^24 times the base's weights, so nothing "
            f"of the base is left: alpha is {_alphas(scales)}."
        )


def _alphas(scales: LoraScales) -> str:
    return some([f"{alpha:g}" for alpha in sorted({float(alpha) for alpha in scales.alphas.values()})])


def _product_norm(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of `b @ a`, of shapes `(m, r)` and `(r, n)`, through the smaller of two intermediate matrices."""
    if len(a) ** 2 > len(b) * a.shape[1]:
        return float(torch.linalg.vector_norm(b @ a))
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def _weight_norm(layer: nn.Module) -> float | None:
    module = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    weight = dequantized(module) if isinstance(module, nn.Linear) else dict(module.named_parameters()).get("weight")
    return None if weight is None else float(torch.linalg.vector_norm(weight, dtype=torch.float32))
