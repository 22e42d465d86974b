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
Reads the tensors of a LoRA's file layer by layer, where the names in it are the network's own or its original code's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .lora_keys import bare_name, by_layer, spellings
from .lora_scales import layer_names
from .original_names import OriginalNames, Sources
from .teacher_config import TeacherError


@dataclass(frozen=True)
class LayerUpdate:
    """
    The tensors that a file has for one layer of its own, which may be several of the network's.

    Attributes:
        name: the layer's name in the file.
        parts (`dict[str, Tensor]`): its tensors, by the names in `lora_keys.py`.
        sources: the network's layers that it became, and the pieces of its rows that each took.
        sizes: the number of rows of each piece, in the file's order.
    """

    name: str
    parts: dict[str, Tensor]
    sources: Sources
    sizes: tuple[int, ...]

    def cut(self, rows: Tensor) -> dict[str, Tensor]:
        """Cuts a tensor with the file's rows into those of the network's layers."""
        if len(self.sizes) == 1:
            return dict.fromkeys(self.sources, rows)
        if len(rows) != sum(self.sizes):
            raise TeacherError(
                f"made for another base: {self.name} has {len(rows)} rows in the file, and {sum(self.sizes)} here "
                f"(its layers are {', '.join(self.sources)})"
            )
        pieces = torch.split(rows, list(self.sizes))
        return {
            layer: pieces[taken[0][0]] if len(taken) == 1 else torch.cat([pieces[k] for k, _ in taken])
            for layer, taken in self.sources.items()
        }

    def join(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Puts weights of the network's layers together as the file has them: the inverse of [`~LayerUpdate.cut`]."""
        pieces: dict[int, Tensor] = {}
        for layer, taken in self.sources.items():
            parts = torch.split(weights[layer], [self.sizes[k] for k, _ in taken])
            pieces |= {k: part for (k, _), part in zip(taken, parts, strict=True)}
        return torch.cat([pieces[k] for k in sorted(pieces)])


def plain_layer(network: nn.Module, name: str) -> nn.Module:
    """A network's layer without the LoRAs on it."""
    module = network.get_submodule(name)
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def rows_of(layer: nn.Module) -> int | None:
    """Number of rows of a layer's weight, also of a quantized one; `None` for a layer that no LoRA can be on."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.out_channels if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else None


def read_layers(raw: Mapping[str, Tensor], network: nn.Module) -> tuple[list[LayerUpdate], list[str]]:
    """
    Finds the network's layers for the tensors of a file.

    Args:
        raw (`dict[str, Tensor]`): the tensors, all of keys that `split_key` knows.
        network (`nn.Module`): the base, with or without LoRAs on it.

    Returns:
        The file's layers, and the names in it that are none of the network's.

    Raises:
        TeacherError: If two names of the file are one layer of the network.
    """
    ours = {name: rows for name in layer_names(network) if (rows := rows_of(plain_layer(network, name))) is not None}
    underscored = {name.replace(".", "_"): name for name in ours}
    originals: OriginalNames | None = None
    updates, unknown = [], []
    for name, keys in by_layer(raw).items():
        bare, is_underscored = bare_name(name)
        own = underscored.get(bare) if is_underscored else next((n for n in spellings(bare) if n in ours), None)
        if own is None:
            originals = originals or OriginalNames(network)
        sources: Sources | None = {own: ((0, 1),)} if own is not None else None
        if originals is not None and own is None:
            sources = originals.find(bare, is_underscored)
        sizes = None if sources is None else _sizes(sources, ours)
        if sources is None or sizes is None:
            unknown.append(name)
            continue
        updates.append(LayerUpdate(name, {part: raw[key] for part, key in keys.items()}, sources, sizes))
    taken: dict[str, str] = {}
    for update in updates:
        for layer in update.sources:
            if layer in taken:
                raise TeacherError(
                    f"{_first_key(raw, taken[layer])} and {_first_key(raw, update.name)} are both for {layer}; one of "
                    "them would be dropped. Make two files of it."
                )
            taken[layer] = update.name
    return updates, unknown


def _first_key(raw: Mapping[str, Tensor], name: str) -> str:
    return next(iter(by_layer(raw)[name].values()))


def _sizes(sources: Sources, rows: Mapping[str, int]) -> tuple[int, ...] | None:
    """Rows of each piece of a file's layer; `None` if the network lacks a part of it."""
    if not sources.keys() <= rows.keys():
        return None
    sizes: dict[int, int] = {}
    for layer, taken in sources.items():
        sizes |= {k: rows[layer] // len(taken) for k, _ in taken}
    count = max(n for taken in sources.values() for _, n in taken)
    return tuple(sizes[k] for k in range(count)) if len(sizes) == count else None
