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
Finds out which layers a downloaded LoRA is for, and their ranks and scales, and replaces its config's patterns by the
names of these layers.

PEFT matches the patterns as regular expressions and allocates the ranks that the config asks for, so a bad config
could take all time or memory. Here the patterns are matched first, within a second, and ranks compared with the file's
shapes.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import regex
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .lora_keys import some
from .teacher_config import TeacherError


N = TypeVar("N", bound=float)  # a rank or an alpha

# The end of a matrix's key, after the name of its layer.
MATRIX = re.compile(r"\.lora_(embedding_)?([AB])(\.weight)?$")

# Time limit for all patterns of a config together, in seconds. Those of real files take milliseconds.
_LONGEST = 1.0
_LONGEST_PATTERN = 20_000  # characters of a pattern that is not just names: each takes 15 us to read
_MOST_PATTERNS = 10_000
# A pattern of names alone, with escaped dots, as [`LoraScales.config`] writes it.
_NAME = r"(?:[\w-]|\\[.-])+"
_NAMES = re.compile(rf"{_NAME}(\|{_NAME})*")
_ALL_LINEAR = "all-linear"  # PEFT's word for all linear layers


@dataclass(frozen=True)
class LoraScales:
    """
    Rank and alpha of a LoRA, layer by layer.

    Attributes:
        ranks (`dict[str, int]`): rank by the layer's name.
        alphas (`dict[str, float]`): alpha of the same layers.
        use_rslora (`bool`): whether alpha is divided by the square root of the rank instead of by the rank.
    """

    ranks: dict[str, int]
    alphas: dict[str, float]
    use_rslora: bool = False

    def scale(self, layer: str) -> float:
        """The factor of a layer's product `B A`."""
        rank = self.ranks[layer]
        return float(self.alphas[layer]) / (math.sqrt(rank) if self.use_rslora else rank)

    def times(self, factor: float) -> LoraScales:
        """The same LoRA at another strength."""
        if factor == 1:
            return self
        return replace(self, alphas={layer: factor * alpha for layer, alpha in self.alphas.items()})

    def config(self, network: nn.Module) -> LoraConfig:
        """
        Makes PEFT's config, which names each layer that the base has.

        Raises:
            TeacherError: If the base has none of the layers.
        """
        names = layer_names(network)
        ranks = {name: self.ranks[name] for name in names if name in self.ranks}
        alphas = {name: self.alphas[name] for name in ranks}
        if not ranks:
            raise TeacherError(
                f"made for another base: this one has none of its layers, such as {some([*self.ranks])}"
            )
        rank, alpha = _usual(ranks), _usual(alphas)
        # To PEFT, a name also means every layer whose name ends with it.
        is_exact = not any(name not in ranks and ranks.keys() & {*_ends(name)} for name in names)
        return LoraConfig(
            r=rank,
            lora_alpha=alpha,
            use_rslora=self.use_rslora,
            target_modules=sorted(ranks) if is_exact else "|".join(map(re.escape, sorted(ranks))),
            rank_pattern=_exact(ranks, rank),
            alpha_pattern=_exact(alphas, alpha),
        )


def _usual(values: Mapping[str, N]) -> N:
    return Counter(values.values()).most_common(1)[0][0]


def _exact(values: Mapping[str, N], usual: N) -> dict[str, N]:
    """PEFT's pattern for layers that differ from `usual`. One key a value, since PEFT tries all keys on all layers."""
    layers: dict[N, list[str]] = {}
    for layer, value in sorted(values.items()):
        if value != usual:
            layers.setdefault(value, []).append(re.escape(layer))
    # Without "^" a name would also mean every layer that ends with it.
    return {f"^{names[0]}" if len(names) == 1 else f"^({'|'.join(names)})": value for value, names in layers.items()}


def layer_names(network: nn.Module) -> list[str]:
    """The names of a network's modules. LoRAs on it do not change them: modules inside a LoRA's layer are left out."""
    names, inside = [], ("",)
    for name, module in network.named_modules():  # a module comes before its children
        if not name or (inside[0] and name.startswith(inside[0])):
            continue
        names.append(name)
        if isinstance(module, BaseTunerLayer):
            inside = (f"{name}.",)
    return names


def resolve(config: LoraConfig, tensors: Mapping[str, Tensor], network: nn.Module) -> LoraScales:
    """
    Finds the rank and alpha that a config gives each layer of a file.

    Args:
        config (`LoraConfig`): as [`~lora_options.read_options`] returns it.
        tensors (`dict[str, Tensor]`): the file's matrices, under `<layer>.lora_A.weight` and the like.
        network (`nn.Module`): the base, with or without LoRAs on it.

    Raises:
        TeacherError: If config and file differ in layers or ranks, or a pattern cannot be matched.
    """
    shapes = matrix_shapes(tensors)
    patterns = _Patterns()
    names = layer_names(network)
    there = {*names}
    asked = _asked(config, network, names, patterns)
    if missing := [name for name in names if name in asked and name not in shapes]:
        raise TeacherError(
            f"its config asks for {2 * len(missing)} tensors that the file lacks, such as {missing[0]}.lora_A.weight"
        )
    # [`~lora_adapter.add_adapter`] refuses layers that the base does not have.
    more = [key for name, sides in sorted(shapes.items()) if name in there - asked for key, _, _ in sides]
    if more:
        raise TeacherError(
            f"the file has {len(more)} tensors that its config or the base does not have, such as {more[0]}"
        )
    ranks = patterns.values(config.rank_pattern, config.r, shapes)
    for name, sides in shapes.items():
        for key, shape, axis in sides:
            if name in there and shape[axis] != ranks[name]:
                raise TeacherError(
                    f"its config gives another rank: {key} is {shape} in the file, and the config says rank "
                    f"{ranks[name]}"
                )
    return LoraScales(ranks, patterns.values(config.alpha_pattern, config.lora_alpha, shapes), config.use_rslora)


def matrix_shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[tuple[str, tuple[int, ...], int]]]:
    """The matrices of each layer: for each its key, its shape, and the axis of the rank."""
    shapes: dict[str, list[tuple[str, tuple[int, ...], int]]] = {}
    for key, value in tensors.items():
        found = MATRIX.search(key)
        if found is None or value.ndim < 2:
            raise TeacherError(f"{key}, of shape {tuple(value.shape)}, is no matrix of a LoRA")
        shapes.setdefault(key[: found.start()], []).append((key, tuple(value.shape), 0 if found[2] == "A" else 1))
    return shapes


def _asked(config: LoraConfig, network: nn.Module, names: list[str], patterns: _Patterns) -> set[str]:
    """The base's layers that a config asks for, by PEFT's rules (`check_target_module_exists`)."""
    targets, excluded = config.target_modules, config.exclude_modules
    if isinstance(targets, str):
        asked = _linear(network) if targets.lower() == _ALL_LINEAR else patterns.whole(targets, names)
    else:
        asked = _ending(names, targets)
        chosen = config.layers_to_transform
        if chosen is not None:
            chosen = {chosen} if isinstance(chosen, int) else {*chosen}
            # PEFT looks at the block's number, except for layers whose whole name is listed.
            asked = {name for name in asked if name in targets or _block(config.layers_pattern, name) in chosen}
    if excluded is None:
        return asked
    return asked - (patterns.whole(excluded, names) if isinstance(excluded, str) else _ending(names, excluded))


def _ending(names: list[str], ends: Iterable[str]) -> set[str]:
    given = {*ends}
    return {name for name in names if not given.isdisjoint(_ends(name))}


def _ends(name: str) -> list[str]:
    """A name, and the part of it behind each of its dots."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _linear(network: nn.Module) -> set[str]:
    layers = {name: network.get_submodule(name) for name in layer_names(network)}
    plain = {n: m.get_base_layer() if isinstance(m, BaseTunerLayer) else m for n, m in layers.items()}
    return {name for name, module in plain.items() if isinstance(module, nn.Linear)}


def _block(blocks: str | list[str] | None, name: str) -> int | None:
    """The number of the block that a layer is in, looking only at block lists of the given names, if any are given."""
    if not blocks:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        return int(found[1]) if found else None
    for block in [blocks] if isinstance(blocks, str) else blocks:
        if not re.fullmatch(r"[\w.]+", block):
            raise TeacherError(f"layers_pattern of its config, {_shown(block)}, is no name of a list of layers")
        if found := re.match(rf"(?:^|.*?\.){block}\.(\d+)\.", name):
            return int(found[1])
    return None


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else f"{pattern[:80]}…")


def _among(names: Iterable[str], pattern: str) -> set[str]:
    return {*names} & {*pattern.replace("\\", "").split("|")}


class _Patterns:
    """Matches untrusted regular expressions as PEFT does, with one time limit for all of them together."""

    def __init__(self) -> None:
        self._end = time.monotonic() + _LONGEST

    def whole(self, pattern: str, names: Iterable[str]) -> set[str]:
        """The names that the pattern matches as a whole."""
        if _NAMES.fullmatch(pattern):
            return _among(names, pattern)
        return self._matching(pattern, pattern, names)

    def values(self, patterns: Mapping[str, N], usual: N, names: Iterable[str]) -> dict[str, N]:
        """For each name, the value of the first pattern that matches its end, else `usual`."""
        if len(patterns) > _MOST_PATTERNS:
            raise TeacherError(f"its config has {len(patterns)} patterns, more than any network has layers")
        values = dict.fromkeys(names, usual)
        rest = {*values}
        for pattern, value in patterns.items():
            anchored = re.fullmatch(r"\^(\()?(.*)(?(1)\))", pattern)
            if anchored and _NAMES.fullmatch(anchored[2]) and (anchored[1] or "|" not in pattern):
                found = _among(rest, anchored[2])
            else:
                found = self._matching(pattern, rf"(.*\.)?({pattern})", rest)
            values |= dict.fromkeys(found, value)
            rest -= found
        return values

    def _matching(self, pattern: str, whole: str, names: Iterable[str]) -> set[str]:
        # Nested repeats can take forever and counts are unrolled; no layer's name needs either. `regex` also reads
        # counts and "[:" differently from `re`.
        if re.search(r"\)[*+]|\{|\[:", pattern) or len(pattern) > _LONGEST_PATTERN:
            raise TeacherError(
                f"the pattern {_shown(pattern)} of its config repeats a group, has a count or is very long. Such "
                "patterns are not matched. Name the layers instead."
            )
        try:
            self._left()
            re.compile(whole)  # PEFT uses `re`; `regex` would also accept patterns that `re` refuses
            compiled = regex.compile(whole)
            return {name for name in names if compiled.fullmatch(name, timeout=self._left())}
        except TimeoutError as error:
            raise TeacherError(
                f"the patterns of its config, such as {_shown(pattern)}, take more than {_LONGEST:g} s to match. Name "
                "the layers instead."
            ) from error
        except (re.error, regex.error) as error:
            raise TeacherError(
                f"the pattern {_shown(pattern)} of its config is no regular expression ({error})"
            ) from error

    def _left(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left
