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
Converts the layout of a LoRA's file with the pipeline's own loader, and refuses tensors that it would drop.

It is used for layouts whose names are neither the network's own nor its original code's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from torch import Tensor

from ..pipelines.denoiser import denoiser, denoiser_name
from .boundary import strangers_files
from .lora_keys import some, split_key
from .teacher_config import TeacherError


class _Traced(torch.Tensor):
    """A tensor that remembers the file keys that its values come from. Tensors computed from it do too."""

    sources: frozenset[str] = frozenset()

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict[str, object] | None = None
    ) -> object:
        if func is torch.Tensor.item:  # a plain number could not remember; a float64 tensor computes the same
            func = torch.Tensor.double
        result = super().__torch_function__(func, types, args, kwargs)
        sources = _sources([args, [*(kwargs or {}).values()]])
        for tensor in _traced(result):
            tensor.sources = sources
        return result


def _traced(value: object) -> Iterator[_Traced]:
    if isinstance(value, _Traced):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _traced(part)


def _sources(value: object) -> frozenset[str]:
    return frozenset[str]().union(*(tensor.sources for tensor in _traced(value)))


def convert_with_loader(
    raw: Mapping[str, Tensor], pipeline: DiffusionPipeline, label: str, describe: Callable[[str], str]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """
    Renames a LoRA's tensors to the network's own names, as the pipeline's loader does.

    Args:
        raw (`dict[str, Tensor]`): the tensors of the file.
        pipeline (`DiffusionPipeline`): the base.
        label (`str`): the teacher's name in messages.
        describe: makes the message about a layout that the loader cannot convert, from what it said.

    Returns:
        The tensors (`<module>.lora_A.weight`), and alpha by module.

    Raises:
        TeacherError: If the loader cannot convert the layout, or would drop a tensor of the file.
    """
    tensors: dict[str, _Traced] = {}
    for key, value in raw.items():
        tensors[key] = value.as_subclass(_Traced)
        tensors[key].sources = frozenset([key])
    alphas = _take_alphas(tensors, label)
    used = {key for key in raw if key not in tensors}
    loader, prefix = type(pipeline), f"{denoiser_name(pipeline)}."
    # Loaders of UNets know no layout whose names are neither the network's nor Stable Diffusion's.
    if issubclass(loader, LoraBaseMixin) and prefix == "transformer.":
        # Converters raise all kinds of errors on layouts that they were not written for.
        with strangers_files(lambda said: f"{label}: {describe(f' ({said})')}"):
            tensors = loader.lora_state_dict(tensors)
    if any(key.startswith(prefix) for key in tensors):
        # FLUX.1's converter omits the prefix of layers outside the blocks.
        ours = {name for name, _ in denoiser(pipeline).named_modules()}
        outside = [key for key in tensors if not key.startswith(prefix)]
        if foreign := [key for key in outside if _module(key) not in ours]:
            raise TeacherError(
                f"{label}: holds weights outside the {prefix[:-1]} ({some(foreign)}), which would be dropped"
            )
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    if not all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors):
        raise TeacherError(f"{label}: {describe('')}")
    if lost := [module for module in alphas if f"{module}.lora_A.weight" not in tensors]:
        raise TeacherError(f"{label}: alpha of {some(lost)} belongs to no lora_A. Save it again with diffusers.")
    used |= _sources([*tensors.values()])
    if dropped := [key for key in raw if key not in used and not _changes_nothing(key, raw)]:
        raise TeacherError(
            f"{label}: {some(dropped)} would be dropped: {loader.__name__} has no place for it in a LoRA of its "
            f"{prefix[:-1]}. Merge the whole file into its base with a program that knows it, and use the full "
            f"{prefix[:-1]} as the teacher."
        )
    return {key: value.as_subclass(Tensor) for key, value in tensors.items()}, alphas


def _module(key: str) -> str:
    split = split_key(key)
    return key if split is None else split[0]


def _take_alphas(tensors: dict[str, _Traced], label: str) -> dict[str, float]:
    """
    Removes the alphas of diffusers' own layout from `tensors` and returns them by module: some of its loaders drop
    them. The alphas of other layouts stay, since the loaders fold them into the matrices.
    """
    alphas = {}
    for key in [key for key in tensors if key.endswith(".alpha")]:
        value = tensors[key].as_subclass(Tensor).item()
        module = key.removesuffix(".alpha")
        if not key.startswith("diffusion_model.") and f"{module}.lora_A.weight" in tensors:
            alphas[module.removeprefix("transformer.")] = value
            del tensors[key]
        elif value < 0:  # diffusers' loaders would loop forever
            raise TeacherError(f"{label}: {key} is {value}; a negative alpha cannot be converted.")
    return alphas


def _changes_nothing(key: str, raw: Mapping[str, Tensor]) -> bool:
    """Whether a dropped tensor has no effect: its layer's product is zero, or it is an alpha equal to the rank."""
    module = _module(key)
    for a, b in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
        down, up = raw.get(f"{module}.{a}.weight"), raw.get(f"{module}.{b}.weight")
        if down is not None and up is not None:
            is_neutral = key == f"{module}.alpha" and raw[key].item() == down.shape[0]
            return is_neutral or not (down.any() and up.any())
    return False
