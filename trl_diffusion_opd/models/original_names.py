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
Finds the layers of a network that a weight of the model's original code became, and which rows of it each took.

Diffusers has a converter of whole checkpoints for most models. It is run here on symbols in place of tensors, so it
tells which original weight, and which part of its rows, each weight of the network comes from: query, key and value
of a fused `qkv`, exchanged halves of a modulation, renamed blocks.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import nn

from .lora_scales import layer_names


# Lists of blocks by their name in diffusers: what the originals call them. Some converters count them first.
_BLOCKS = {
    "transformer_blocks": ("joint_blocks", "double_blocks", "blocks"),
    "single_transformer_blocks": ("single_blocks", "single_layers"),
    "joint_transformer_blocks": ("double_layers",),
    "distilled_guidance_layer.layers": ("distilled_guidance_layer.layers",),
}
# A UNet's layers inside a block, and outside of blocks.
_LDM_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_LDM_OUTSIDE = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0",
}  # fmt: skip
_LDM = "model.diffusion_model."
# Between a name's words stands a dot or an underscore. More undecided places than this have no real name.
_MOST_UNDECIDED = 6
# Spellings that are tried for all names of a file together. Each takes some 50 us; real files need a few hundred.
_MOST_TRIES = 10_000


@dataclass(frozen=True)
class Rows:
    """
    Stands for a weight in a converter: rows of original weights.

    Attributes:
        pieces: the original weight's name, and that these rows are its k-th piece of n, for each piece in order.
    """

    pieces: tuple[tuple[str, int, int], ...]
    shape = (1, 1)  # converters read it, but nothing that they do with it matters here

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (kwargs or {}).get("dim", 0) == 0:
            if func is torch.cat:
                return cls(tuple(itertools.chain.from_iterable(part.pieces for part in args[0])))
            if func is torch.chunk:
                return args[0].chunk(args[1])
            if func is torch.split:
                return args[0].chunk(len(args[1]))
        raise NotImplementedError(f"{func} of rows")

    def chunk(self, n: int, dim: int = 0) -> list[Rows]:
        """As `Tensor.chunk`. The pieces may differ in size: the network's layers tell."""
        ((name, k, m),) = self.pieces
        if dim != 0 or m != 1:
            raise NotImplementedError("a piece of a piece")
        return [Rows(((name, i, n),)) for i in range(n)]


class _Asked(dict[str, Rows]):
    """A checkpoint that has every weight that it is asked for, and lists those that it knows of."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__((name, Rows(((name, 0, 1),))) for name in names)

    def __missing__(self, name: str) -> Rows:
        return Rows(((name, 0, 1),))

    def pop(self, name: str, *default: object) -> Rows:
        return super().pop(name, self[name])


Sources = dict[str, tuple[tuple[int, int], ...]]  # by layer: its rows are the k-th pieces of n, in this order


class OriginalNames:
    """
    The original names of a network's layers.

    Args:
        network (`nn.Module`): the network, with or without LoRAs on it.
    """

    def __init__(self, network: nn.Module) -> None:
        self._layers = {*layer_names(network)}
        self._network = network
        kinds = [name for name in SINGLE_FILE_LOADABLE_CLASSES if isinstance(network, getattr(diffusers, name))]
        entry = SINGLE_FILE_LOADABLE_CLASSES[kinds[0]] if kinds else {}
        self._converter: Callable | None = entry.get("checkpoint_mapping_fn")
        self._found: dict[str, Sources] = {}
        if kinds == ["UNet2DConditionModel"]:
            known = {name: _LDM + ldm for name, ldm in _ldm_names(self._layers)}
            self._found = self._convert([f"{name}.{part}" for name in known.values() for part in ("weight", "bias")])
        elif self._converter is not None:
            self._found = self._convert(self._seeds())
        self._dotted = {name.replace(".", "_"): name for name in self._found}
        self._patterns: dict[str, str] = {}
        self._tries = 0

    def known(self) -> list[str]:
        """The original names that need no file: those that diffusers' converter asks for, or a UNet's."""
        return list(self._found)

    def find(self, name: str, is_underscored: bool) -> Sources | None:
        """
        The layers that an original layer became, with their pieces of its rows; `None` if there is none of that name.

        Args:
            name (`str`): the original layer's name, without `.weight`.
            is_underscored (`bool`): whether the name has underscores for its dots.
        """
        dotted = self._dotted.get(name, name) if is_underscored else name
        if dotted not in self._found and self._converter is not None:
            for candidate in self._candidates(name) if is_underscored else [name]:
                self._tries += 1
                if self._tries > _MOST_TRIES:
                    break
                if found := self._convert([f"{candidate}.weight"]):
                    self._found |= found
                    if is_underscored:
                        dotted = candidate
                        self._patterns[_pattern(name)] = candidate
                    break
        return self._found.get(dotted)

    def _seeds(self) -> Iterator[str]:
        """Names that tell a converter the number of blocks, and what parts they have."""
        for ours, theirs in _BLOCKS.items():
            numbers = {
                name.removeprefix(f"{ours}.").split(".")[0] for name in self._layers if name.startswith(f"{ours}.")
            }
            for block, number in itertools.product(theirs, sorted(numbers, key=int)):
                second = ".attn2" if f"{ours}.{number}.attn2" in self._layers else ""
                yield f"{block}.{number}{second}.seed"
        if any("guidance_embedder" in name for name in self._layers):
            yield "guidance_in.seed"

    def _convert(self, names: Iterable[str]) -> dict[str, Sources]:
        assert self._converter is not None
        config = self._network.config if isinstance(self._network, ConfigMixin) else {}
        try:
            converted = self._converter(_Asked(names), config=config)
        except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError):
            return {}  # not a name of this model, as converters say it, or no weight of a layer
        found: dict[str, Sources] = {}
        for key, rows in converted.items():
            layer = key.removesuffix(".weight")
            if layer == key or layer not in self._layers or not isinstance(rows, Rows):
                continue
            originals = {name for name, _, _ in rows.pieces}
            if len(originals) == 1 and (original := originals.pop()).endswith(".weight"):
                original = original.removesuffix(".weight").removeprefix(_LDM)
                found.setdefault(original, {})[layer] = tuple((k, n) for _, k, n in rows.pieces)
        return found

    def _candidates(self, name: str) -> Iterator[str]:
        """The names with dots that an underscored name may mean. A number stands alone between dots."""
        known = self._patterns.get(_pattern(name))
        if known is not None:
            numbers = iter(re.findall(r"(?<=_)\d+(?=_|$)", name))
            yield re.sub(r"(?<=\.)\d+(?=\.|$)", lambda _: next(numbers), known)
            return
        words = re.sub(r"_(\d+)(?=_|$)", r".\1", name)
        words = re.sub(r"(\.\d+)_", r"\1.", words)
        undecided = words.count("_")
        if undecided <= _MOST_UNDECIDED:
            parts = words.split("_")
            for marks in itertools.product(("_", "."), repeat=undecided):
                yield parts[0] + "".join(mark + part for mark, part in zip(marks, parts[1:], strict=True))


def _pattern(name: str) -> str:
    """The name with the same number everywhere: a name's dots do not depend on its numbers."""
    return re.sub(r"(?<=_)\d+(?=_|$)", "0", name)


def _ldm_names(layers: Iterable[str]) -> Iterator[tuple[str, str]]:
    """A UNet's layers, and their names in Stable Diffusion's own code."""
    layers = {*layers}
    resnets = {
        (found[1], int(found[2])) for name in layers if (found := re.match(r"down_blocks\.(0)\.resnets\.(\d+)", name))
    }
    # Stable Diffusion numbers resnets of all blocks through, each with the attention after it.
    in_block = len(resnets) + 1
    for name in layers:
        if name in _LDM_OUTSIDE:
            yield name, _LDM_OUTSIDE[name]
            continue
        parts = re.fullmatch(r"(down|mid|up)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.?(.*)", name)
        if parts is None:
            continue
        side, block, kind, number, rest = parts[1], int(parts[2] or 0), parts[3], int(parts[4]), parts[5]
        if kind == "resnets":
            if rest not in _LDM_RESNET:
                continue
            rest = _LDM_RESNET[rest]
        if side == "mid":
            yield name, f"middle_block.{1 if kind == 'attentions' else 2 * number}.{rest}"
        elif kind == "downsamplers":
            yield name, f"input_blocks.{in_block * (block + 1)}.0.op"
        elif kind == "upsamplers":
            place = 2 if f"up_blocks.{block}.attentions.0" in layers else 1
            yield name, f"output_blocks.{in_block * (block + 1) - 1}.{place}.{rest}"
        else:
            first = in_block * block + number + (1 if side == "down" else 0)
            yield name, f"{'input' if side == 'down' else 'output'}_blocks.{first}.{int(kind == 'attentions')}.{rest}"
