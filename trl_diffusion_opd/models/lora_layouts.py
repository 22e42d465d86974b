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

"""Converts the key layouts of LoRA files with the pipeline's own loader, and refuses tensors that it would drop."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from torch import Tensor, nn

from ..guards.redaction import shown
from ..pipelines.denoiser import denoiser
from .boundary import strangers_files
from .teacher_config import TeacherError


# The end of a key, after the module's name, in any layout: one of the two matrices, or alpha.
_MATRIX = r"(lora_(embedding_)?[AB](\.(?!bias)\w+)?|lora_(down|up)|(\w+_)?lora(_linear_layer|\d)?\.(down|up))"
LORA_KEY = re.compile(rf"\.({_MATRIX}(\.weight)?|alpha)$")
# Keys of other adapters, and of differences of whole weights or biases that some programs save beside a LoRA.
LYCORIS_KEY = re.compile(r"\.(lokr|hada|oft|boft)_\w+$|\.(glora|[ab][12])\.weight$")
DIFFERENCE_KEY = re.compile(r"\.diff(_[bm])?$")
# The start of a key, before the module's name.
_PREFIX = re.compile(r"^((base_model\.model|diffusion_model|transformer)\.|(lora_unet|lora_transformer|lycoris)_)")
# Layouts that some of diffusers' loaders read and others don't: the pattern of their keys, and their name.
_LAYOUTS = {
    r"^(lora_unet|lora_transformer|lycoris)_": "kohya's trainers (underscores for the dots of names)",
    r"\.lora_[AB]\.\w+\.weight$": "DiffSynth-Studio (an adapter's name behind lora_A and lora_B)",
    r"^diffusion_model\.": 'ComfyUI ("diffusion_model." before each name)',
    r"\.lora_(down|up)\.": "kohya's trainers (lora_down and lora_up for lora_A and lora_B)",
    r"lora(_linear_layer|\d)?\.(down|up)\.": "an old diffusers (lora.down and lora.up for lora_A and lora_B)",
    r"^base_model\.model\.": "PEFT",
}


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


def convert(
    raw: Mapping[str, Tensor], pipeline: DiffusionPipeline, label: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """
    Renames a LoRA's tensors to the transformer's own names, from any layout that the pipeline's loader converts.

    Args:
        raw (`dict[str, Tensor]`): the tensors of the file.
        pipeline (`DiffusionPipeline`): the base.
        label (`str`): the teacher's name in messages.

    Returns:
        The tensors (`<module>.lora_A.weight`), and alpha by module.

    Raises:
        TeacherError: If the loader cannot convert the layout, or would drop a tensor of the file.
    """
    raw = _without_slip(raw)
    _refuse_mixture(raw, label)
    tensors: dict[str, _Traced] = {}
    for key, value in raw.items():
        tensors[key] = value.as_subclass(_Traced)
        tensors[key].sources = frozenset([key])
    alphas = _take_alphas(tensors, label)
    used = {key for key in raw if key not in tensors}
    loader = type(pipeline)
    if issubclass(loader, LoraBaseMixin):
        # Converters raise all kinds of errors on layouts that they were not written for.
        with strangers_files(lambda said: f"{label}: {_describe(raw, pipeline, f' ({said})')}"):
            tensors = loader.lora_state_dict(tensors)
    if any(key.startswith("transformer.") for key in tensors):
        # FLUX.1's converter omits the prefix of layers outside the blocks.
        ours = {name for name, _ in denoiser(pipeline).named_modules()}
        outside = [key for key in tensors if not key.startswith("transformer.")]
        if foreign := [key for key in outside if LORA_KEY.sub("", key) not in ours]:
            raise TeacherError(
                f"{label}: holds weights outside the transformer ({some(foreign)}), which would be dropped"
            )
        tensors = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    if layout_of(tensors) is not None:
        raise TeacherError(f"{label}: {_describe(raw, pipeline)}")
    if lost := [module for module in alphas if f"{module}.lora_A.weight" not in tensors]:
        raise TeacherError(f"{label}: alpha of {some(lost)} belongs to no lora_A. Save it again with diffusers.")
    used |= _sources([*tensors.values()])
    if dropped := [key for key in raw if key not in used and not _changes_nothing(key, raw)]:
        raise TeacherError(
            f"{label}: {some(dropped)} would be dropped: {loader.__name__} has no place for it in a LoRA of its "
            "transformer. Merge the whole file into its base with a program that knows it, and use the full "
            "transformer as the teacher."
        )
    return {key: value.as_subclass(Tensor) for key, value in tensors.items()}, alphas


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
    prefixes = {key: (_PREFIX.match(key) or [""])[0] for key in keys}
    most = Counter(prefixes.values()).most_common(1)[0][0]
    if most != "transformer." and (others := [key for key, prefix in prefixes.items() if prefix != most]):
        example = next(key for key, prefix in prefixes.items() if prefix == most)
        raise TeacherError(
            f"{label}: is a mixture of layouts, {some(others)} beside {example} and the like; one of them would be "
            "dropped. Make two files of it, or convert it to the layout of diffusers."
        )


def _take_alphas(tensors: dict[str, _Traced], label: str) -> dict[str, float]:
    """
    Removes the alphas of diffusers' own layout from `tensors` and returns them by module: some of its loaders drop
    them. The alphas of other layouts stay, since the loaders fold them into the matrices.
    """
    alphas = {}
    for key in [key for key in tensors if key.endswith(".alpha")]:
        value = tensors[key].as_subclass(Tensor)
        is_number = value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool
        if not is_number or not torch.isfinite(value).all() or not value.any():
            raise TeacherError(
                f"{label}: {key} is {value.tolist()}; alpha must be one finite number, and not 0, which would make "
                "the teacher the base."
            )
        module = key.removesuffix(".alpha")
        if not key.startswith("diffusion_model.") and f"{module}.lora_A.weight" in tensors:
            alphas[module.removeprefix("transformer.")] = value.item()
            del tensors[key]
        elif value.item() < 0:  # diffusers' loaders would loop forever
            raise TeacherError(f"{label}: {key} is {value.item()}; a negative alpha cannot be converted.")
    return alphas


def _changes_nothing(key: str, raw: Mapping[str, Tensor]) -> bool:
    """Whether a dropped tensor has no effect: its layer's product is zero, or it is an alpha equal to the rank."""
    module = LORA_KEY.sub("", key)
    for a, b in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
        down, up = raw.get(f"{module}.{a}.weight"), raw.get(f"{module}.{b}.weight")
        if down is not None and up is not None:
            is_neutral = key == f"{module}.alpha" and raw[key].item() == down.shape[0]
            return is_neutral or not (down.any() and up.any())
    return False


def layout_of(keys: Iterable[str]) -> str | None:
    """The key in `_LAYOUTS` of the layout that the keys have; `None` if they are plain (`<module>.lora_A.weight`)."""
    keys = list(keys)
    return next((mark for mark in _LAYOUTS if any(re.search(mark, key) for key in keys)), None)


def _describe(keys: Iterable[str], pipeline: DiffusionPipeline, said: str = "") -> str:
    """Says which layout an unreadable file has, whether it names this base's layers, and what to do."""
    keys = sorted(keys)
    transformer: nn.Module = denoiser(pipeline)
    ours = {name.replace(".", "_"): name for name, _ in transformer.named_modules() if name}
    found = {key: ours.get(_PREFIX.sub("", LORA_KEY.sub("", key)).replace(".", "_")) for key in keys}
    named = {key: name for key, name in found.items() if name is not None}
    mark = layout_of(keys)
    layout = "another trainer" if mark is None else _LAYOUTS[mark]
    example = next((key for key in named or keys if not key.endswith(".alpha")), keys[0])
    start = f"its keys, such as {example}, are in the layout of {layout}, which {type(pipeline).__name__} cannot convert{said}"
    if layout == "PEFT":
        return f"{start}. Its alpha is in its adapter_config.json: put that beside it."
    if not named:
        return (
            f"{start}, and name no layer of a {type(transformer).__name__}: it is for another base, or uses its "
            "trainer's own names. Convert it to the layout of diffusers with the tools of its trainer."
        )
    side = "B" if re.search(r"(B|up)(\.\w+)?\.weight$", example) else "A"
    return f"{start}. Rename its keys: {example} to transformer.{named[example]}.lora_{side}.weight, and so on."


def some(names: list[str]) -> str:
    """Joins names for a message. Long lists and long names are cut short."""
    return ", ".join(shown(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
