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

"""Folds the updates of a file into a frozen copy of the base, where they are no LoRAs that can be switched."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..acceleration.quantization import is_quantized
from .adapter_switch import remove_adapters
from .lora_names import LayerUpdate
from .lycoris import change
from .teacher_config import TeacherError


# The smallest and largest change relative to its weights; the same limits as in `lora_update.py`.
_RESOLUTION = torch.finfo(torch.float32).eps / 2


@dataclass(frozen=True)
class FoldedLora:
    """
    What a file changes of its base, to be folded into a copy of it.

    Attributes:
        updates (`list[LayerUpdate]`): the file's layers.
        scale: by which all of their changes are multiplied.
    """

    updates: Sequence[LayerUpdate]
    scale: float


@torch.no_grad()
def folded_copy(base: nn.Module, lora: FoldedLora) -> nn.Module:
    """
    Returns a frozen copy of the base with `W + scale change(W)` for each weight `W` of the file.

    Sums are computed in float32 and rounded to the base's dtype once.

    Raises:
        TeacherError: If the base is quantized, shapes differ, or the changes are negligible or not finite.
    """
    if is_quantized(base):
        raise TeacherError(
            "is no LoRA that can be switched on a shared base (LoKr, LoHa of a high rank, or DoRA), and cannot be "
            "folded into a copy of a quantized base. Load the base without quantization, or fold it yourself and use "
            "the full transformer."
        )
    network = copy.deepcopy(base)
    remove_adapters(network)
    changed, total, weights = False, 0.0, 0.0
    for update in lora.updates:
        layers = {name: network.get_submodule(name) for name in update.sources}
        old = {name: _weight(layer) for name, layer in layers.items()}
        try:
            whole = change(update.parts, update.join(old) if len(update.sizes) > 1 else next(iter(old.values())))
        except (ValueError, RuntimeError) as error:
            raise TeacherError(f"made for another base: {update.name}: {error}") from error
        for name, rows in update.cut(lora.scale * whole).items():
            size, norm = float(rows.norm()), float(old[name].float().norm())
            total, weights = total + size, weights + norm
            changed = changed or size > _RESOLUTION * norm
            old[name].copy_((old[name].float() + rows).to(old[name].dtype))
            if not torch.isfinite(old[name]).all():
                raise TeacherError(f"{name} is not finite in {old[name].dtype} with its change")
    if not changed:
        raise TeacherError('changes no weight, so this teacher is the base model. If the base is meant, say "base".')
    if not total * _RESOLUTION <= weights:
        raise TeacherError("its changes are more than 2^24 times the base's weights, so nothing of the base is left")
    return network.requires_grad_(False).eval()


def _weight(layer: nn.Module) -> nn.Parameter:
    return dict(layer.named_parameters(recurse=False))["weight"]
