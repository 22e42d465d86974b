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
Finds and reads teachers of any base: LoRAs and whole transformers, of one network or of two experts.

LoRAs for Wan 2.2 are pairs: a file for each expert. They are read one by one, each against its own expert, and joined
to one LoRA of the module that holds both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from ..pipelines.denoiser import denoiser
from ..pipelines.experts import EXPERTS, HIGH_NOISE, LOW_NOISE, NOISE, Experts, alone, has_experts
from .folded_lora import FoldedLora
from .lora_files import PEFT_PREFIX, SwitchedLora, read_lora_files
from .lora_layouts import some
from .lora_names import LayerUpdate
from .lora_scales import LoraScales, resolve
from .teacher_config import TeacherConfig, TeacherError
from .teacher_files import TeacherFiles, find_files, names_in
from .whole_transformer import read_transformer


# How files of a pair say which half they are: "high_noise", "HighNoise", "low-noise", "x_low", and so on.
_MARK = re.compile(r"(high|low)(?=[-_ ]?noise)|(?<![a-z])(high|low)(?![a-z])", re.IGNORECASE)
_OTHER = {"high": "low", "low": "high"}
_NO_LORA = "base"
_REMEDY = (
    "Name both: TeacherConfig(..., weight_name='<high noise>.safetensors', "
    "low_noise_weight_name='<low noise>.safetensors'), or \"base\" for an expert without a LoRA."
)


def find_teacher(config: TeacherConfig, pipeline: DiffusionPipeline) -> TeacherFiles:
    """
    Finds a teacher's files for a base. See [`~teacher_files.find_files`]. Of a base with two experts, a pair's `other`
    is its second half.

    Raises:
        TeacherError: If there are no such files, if half of a pair is missing, or if its halves are exchanged.
    """
    if has_experts(pipeline):
        return _find_pair(config)
    if config.low_noise_weight_name is not None:
        raise TeacherError(
            f"{_label(config)}: low_noise_weight_name={config.low_noise_weight_name!r}, but this base has one "
            "transformer for all noise. Leave it out."
        )
    return find_files(config)


def find_for_any_base(config: TeacherConfig) -> TeacherFiles:
    """
    Finds a teacher's files before its base is loaded: those of one network, else a pair's.

    Raises:
        TeacherError: as [`find_teacher`], if they are neither.
    """
    if config.low_noise_weight_name is not None:
        return _find_pair(config)
    try:
        return find_files(config)
    except TeacherError:
        with suppress(TeacherError):
            return _find_pair(config)
        raise


def _label(config: TeacherConfig) -> str:
    name = config.model_name_or_path.rstrip("/").split("/")
    return "/".join(filter(None, (name[-1] if len(name) != 2 else "/".join(name), config.subfolder)))


def _find_pair(config: TeacherConfig) -> TeacherFiles:
    high, low = config.weight_name, config.low_noise_weight_name
    if low is None and (whole := _whole(config)) is not None:
        return whole
    label = _label(config)
    names = [name for name in names_in(config) if name.endswith(".safetensors")] if None in (high, low) else []
    if high is None and low is None:
        high, low = _pair_among(names, label)
    elif low is None or high is None:
        high, low = _with_counterpart(high, low, names, label)
    for name, wrong, option in ((high, LOW_NOISE, "weight_name"), (low, HIGH_NOISE, "low_noise_weight_name")):
        if name != _NO_LORA and noise_of(name) == wrong:
            raise TeacherError(f"{label}: {option}={name!r} is for {NOISE[wrong]} by its name. {_REMEDY}")
    halves: list[TeacherFiles] = []
    for expert, name in zip(EXPERTS, (high, low), strict=True):
        if name != _NO_LORA:
            revision = halves[0].revision if halves else config.revision
            found = find_files(_half(config, name, revision))
            halves.append(replace(found, expert=expert))
    return halves[0] if len(halves) == 1 else replace(halves[0], other=halves[1])


def _whole(config: TeacherConfig) -> TeacherFiles | None:
    """A teacher of both experts at once: a whole pipeline, or a LoRA of both in PEFT's layout. `None` if it is neither."""
    names = names_in(config)
    if config.weight_name is not None and "adapter_model" not in config.weight_name:
        return None
    if "model_index.json" in names:
        first, second = (find_files(config, component) for component in EXPERTS)
        return replace(first, expert=HIGH_NOISE, other=replace(second, expert=LOW_NOISE))
    return find_files(config) if CONFIG_NAME in names or "config.json" in names else None


def _half(config: TeacherConfig, name: str, revision: str | None) -> TeacherConfig:
    inner, _, file = name.rpartition("/")
    subfolder = "/".join(filter(None, ((config.subfolder or "").strip("/"), inner)))
    return replace(
        config, subfolder=subfolder or None, weight_name=file, low_noise_weight_name=None, revision=revision
    )


def noise_of(name: str) -> str | None:
    """The expert that a file's name, with its folder, says it is for; `None` if it does not say."""
    said = {mark[0].lower() for mark in _MARK.finditer(name)}
    if not said:
        first = name.split("/")[0]
        return first if "/" in name and first in EXPERTS else None
    return None if len(said) > 1 else HIGH_NOISE if said == {"high"} else LOW_NOISE


def _pair_among(names: list[str], label: str) -> tuple[str, str]:
    marked: dict[str | None, list[str]] = {expert: [n for n in names if noise_of(n) == expert] for expert in EXPERTS}
    if all(len(found) == 1 for found in marked.values()):
        return marked[HIGH_NOISE][0], marked[LOW_NOISE][0]
    if missing := [NOISE[expert] for expert in EXPERTS if not marked[expert]]:
        found = f"among its files ({some(names)}) none is" if names else "it has no .safetensors files that are"
        raise TeacherError(
            f"{label}: this base has two experts, one for high noise and one for low noise, and {found} for "
            f"{' or '.join(missing)} by its name. {_REMEDY}"
        )
    raise TeacherError(
        f"{label}: has several files for one expert ({some([n for found in marked.values() for n in found])}). {_REMEDY}"
    )


def _with_counterpart(high: str | None, low: str | None, names: list[str], label: str) -> tuple[str, str]:
    """Finds the other half of a pair by its name: "low" for "high", or the other way round."""
    given = high if high is not None else low
    assert given is not None
    if given != _NO_LORA and noise_of(given) == (LOW_NOISE if high is not None else HIGH_NOISE):
        option = "weight_name" if high is not None else "low_noise_weight_name"
        wrong = NOISE[LOW_NOISE if high is not None else HIGH_NOISE]
        raise TeacherError(f"{label}: {option}={given!r} is for {wrong} by its name. {_REMEDY}")
    other = _MARK.sub(lambda mark: _in_case(_OTHER[mark[0].lower()], mark[0]), given)
    if other == given or other not in names:
        missing = NOISE[LOW_NOISE if high is not None else HIGH_NOISE]
        looked = f" (there is no {other})" if other != given else ""
        raise TeacherError(
            f"{label}: {given} is half of a pair, and the half for {missing} is not named{looked}. {_REMEDY}"
        )
    return (given, other) if high is not None else (other, given)


def _in_case(word: str, like: str) -> str:
    return word.upper() if like.isupper() else word.capitalize() if like[0].isupper() else word


def _halves(files: TeacherFiles) -> Iterator[tuple[str, TeacherFiles]]:
    for half in (files, files.other):
        if half is not None:
            assert half.expert is not None
            yield half.expert, half


def read_lora(
    pipeline: DiffusionPipeline, config: TeacherConfig
) -> tuple[LoraConfig, dict[str, torch.Tensor], TeacherFiles]:
    """
    Reads a LoRA in the layout of any program that writes such files.

    Args:
        pipeline (`DiffusionPipeline`):
            The base.
        config ([`TeacherConfig`]):
            As `parse_teacher` returns it. Its `lora_scale` multiplies every alpha.

    Returns:
        The `LoraConfig`; the tensors on the CPU, in the file's own dtype, under PEFT's keys
        (`base_model.model.<module>.lora_A.weight`); and the [`~teacher_files.TeacherFiles`] they came from.

    Raises:
        TeacherError: If it is not a LoRA, is damaged, or holds what would be dropped (text encoders,
            `modules_to_save`, biases).
    """
    if config.model_name_or_path == "base":
        raise TeacherError('"base" is the base model, not a LoRA')
    files = find_teacher(config, pipeline)
    if files.kind == "full":
        raise TeacherError(f"{files.label}: a LoRA is needed here, and this is a whole transformer")
    read = read_found_lora(files, pipeline, config.lora_scale)
    if isinstance(read, FoldedLora):
        raise TeacherError(
            f"{files.label}: a LoRA is needed here, and this is a LoKr, LoHa or DoRA, which is more than two matrices "
            "of a small rank for each layer. It can be a teacher, but not a student's start."
        )
    return *read, files


def read_found_lora(
    files: TeacherFiles, pipeline: DiffusionPipeline, lora_scale: float = 1.0
) -> SwitchedLora | FoldedLora:
    """
    Does the work of [`read_lora`] once the files are found, also for files that are no LoRA as a whole. See
    [`~lora_files.read_lora_files`].
    """
    network = denoiser(pipeline)
    if not isinstance(network, Experts):
        return read_lora_files(files, pipeline, lora_scale)
    if files.expert is None:
        _check_both(files)
        return read_lora_files(files, pipeline, lora_scale)
    halves = {expert: read_lora_files(half, alone(pipeline, expert), lora_scale) for expert, half in _halves(files)}
    switched = {expert: read for expert, read in halves.items() if isinstance(read, SwitchedLora)}
    folded = {expert: read for expert, read in halves.items() if isinstance(read, FoldedLora)}
    if not switched:
        return FoldedLora([*_updates_of(folded)], lora_scale)
    if folded:
        raise TeacherError(
            f"{files.label}: one half of the pair is a LoRA and the other a LoKr, LoHa or DoRA, which is folded into a "
            "copy of the base. Give halves of one kind, or fold both yourself and give the folder of that pipeline."
        )
    tensors: dict[str, torch.Tensor] = {}
    found: dict[str, LoraScales] = {}
    for expert, lora in switched.items():
        plain = {key.removeprefix(PEFT_PREFIX): value for key, value in lora.weights.items()}
        found[expert] = resolve(lora.config, plain, network.of(expert))
        tensors |= {f"{PEFT_PREFIX}{expert}.{key}": value for key, value in plain.items()}
    return SwitchedLora(joined(found).config(network), tensors)


def _updates_of(folded: Mapping[str, FoldedLora]) -> Iterator[LayerUpdate]:
    """The updates of both experts, whose layers' names then begin with the expert's."""
    for expert, lora in folded.items():
        for update in lora.updates:
            sources = {f"{expert}.{layer}": taken for layer, taken in update.sources.items()}
            yield replace(update, name=f"{expert}.{update.name}", sources=sources)


def joined(found: dict[str, LoraScales]) -> LoraScales:
    """The ranks and alphas of both experts, whose layers' names then begin with the expert's."""
    ranks = {f"{expert}.{layer}": rank for expert, scales in found.items() for layer, rank in scales.ranks.items()}
    if len({scales.use_rslora for scales in found.values()}) == 1:
        alphas = {f"{expert}.{layer}": a for expert, scales in found.items() for layer, a in scales.alphas.items()}
        return LoraScales(ranks, alphas, next(iter(found.values())).use_rslora)
    # One half divides by the root of the rank: both are written as if they divided by the rank.
    alphas = {
        f"{expert}.{layer}": scales.scale(layer) * rank
        for expert, scales in found.items()
        for layer, rank in scales.ranks.items()
    }
    return LoraScales(ranks, alphas)


def _check_both(files: TeacherFiles) -> None:
    """Refuses a PEFT folder that is for one expert: it does not say for which."""
    path = files.folder / files.names[-1]
    try:
        with safe_open(path, "pt") as file:
            keys = [key.removeprefix(PEFT_PREFIX) for key in file.keys()]
    except SafetensorError as error:
        raise TeacherError(f"{files.label}: {path.name} is not a readable safetensors file ({error})") from error
    if not any(key.startswith(tuple(f"{expert}." for expert in EXPERTS)) for key in keys):
        raise TeacherError(
            f"{files.label}: this base has two experts, and {path.name} is a LoRA of one network. {_REMEDY}"
        )


def read_whole(files: TeacherFiles, base: nn.Module) -> nn.Module:
    """
    Reads a whole teacher: a transformer, or both experts of a pipeline. See [`~whole_transformer.read_transformer`].

    Raises:
        TeacherError: If it does not fit the base, or holds one of two experts.
    """
    if not isinstance(base, Experts):
        return read_transformer(files, base)
    if files.other is None:
        raise TeacherError(
            f"{files.label}: is one transformer, and this base has two experts. Give a pipeline's folder, with "
            "transformer and transformer_2."
        )
    return Experts(*(read_transformer(half, base.of(expert)) for expert, half in _halves(files)))
