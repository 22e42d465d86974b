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

"""Checks a downloaded LoRA's options (`LoraConfig` fields): types, finite numbers, nothing beyond its matrices."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Callable
from dataclasses import fields

from peft import LoraConfig
from transformers.utils import logging

from ..guards.files import JSON
from ..guards.redaction import shown
from .lora_keys import some
from .teacher_config import TeacherError


logger = logging.get_logger(__name__)

# Which layers have a LoRA, and of which rank and strength. Only these options are used.
_MEANT = (
    "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern",
)  # fmt: skip

# These neither change what the adapter computes nor add parts beyond lora_A and lora_B. Any other field that differs
# from its default is refused: parts of the adapter would be dropped, or its base changed.
_WITHOUT_EFFECT = {
    "fan_in_fan_out", "lora_dropout", "init_lora_weights", "inference_mode", "task_type", "peft_type", "auto_mapping",
    "base_model_name_or_path", "revision", "peft_version", "megatron_core", "loftq_config", "qalora_group_size",
    "use_dora",  # its tensors say so too, and are read
}  # fmt: skip

# Initialisations that move part of the base's weights into the adapter, which is then wrong on every other base.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _is_int(value: object) -> bool:
    return type(value) is int  # True is an int to isinstance


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _are_names(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _are_layers(value: object) -> bool:
    return _is_int(value) or (isinstance(value, list) and all(map(_is_int, value)))


def _is_pattern(of: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(of, value.values()))


_TYPES: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (_is_int, "an integer"),
    "lora_alpha": (_is_number, "a number"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "target_modules": (_are_names, "a list of names, or a pattern"),
    "exclude_modules": (_are_names, "a list of names, or a pattern"),
    "layers_to_transform": (_are_layers, "an integer, or a list of integers"),
    "layers_pattern": (_are_names, "a name, or a list of names"),
    "rank_pattern": (_is_pattern(_is_int), "a table of names and integers"),
    "alpha_pattern": (_is_pattern(_is_number), "a table of names and numbers"),
}


def read_options(stored: dict[str, JSON], label: str) -> LoraConfig:
    """
    Checks the options stored with a LoRA and makes a `LoraConfig` of them.

    Args:
        stored (`dict`): Fields of PEFT's `LoraConfig`, as read from JSON.
        label (`str`): the teacher's name in messages.

    Returns:
        A `LoraConfig` with the options for layers, ranks and alphas alone. Its patterns are untrusted: match them with
        [`~lora_scales.resolve`].

    Raises:
        TeacherError: If an option is of a wrong type or not finite, or adds parts beyond `lora_A` and `lora_B`.
    """
    peft_type = stored.get("peft_type", "LORA")
    if peft_type != "LORA":
        raise TeacherError(f"{label}: is a PEFT adapter of type {shown(peft_type, 40)}; only LORA is supported")
    known = {field.name for field in fields(LoraConfig)}
    if unknown := sorted(set(stored) - known):
        # PEFT does the same with fields of its other versions. Tensors that such fields add are refused by key.
        logger.warning(
            f"{label}: the installed PEFT does not know the LoRA options {some(unknown)}; they are ignored."
        )
    _refuse_what_goes_beyond(stored, known, label)
    # For names, an empty list, dict or string means None, and None means "not given". Numbers and tables must be
    # there.
    can_be_empty = {*_MEANT} - {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}
    given = {
        key: stored[key]
        for key in _MEANT
        if key in stored and not (key in can_be_empty and stored[key] in (None, [], {}, ""))
    }
    for key, value in given.items():
        is_right, what = _TYPES[key]
        if not is_right(value):
            raise TeacherError(f"{label}: its LoRA config has {key}={_shown(value)}; {what} is needed.")
    if "target_modules" not in given:
        raise TeacherError(f"{label}: its LoRA config has no target_modules, which say which layers it is for.")
    _check_alphas(given, label)
    _check_layers(given, label)
    return LoraConfig(**given)


def _refuse_what_goes_beyond(stored: dict[str, JSON], known: set[str], label: str) -> None:
    defaults = LoraConfig().to_dict()
    changed = [
        key
        for key in sorted(known & set(stored) - _WITHOUT_EFFECT - set(_MEANT))
        if (stored[key] or None) != (defaults.get(key) or None)
    ]
    if changed:
        shown = ", ".join(f"{key}={_shown(stored[key])}" for key in changed)
        raise TeacherError(
            f"{label}: its LoRA config has {shown}, which adds more than lora_A and lora_B and would be dropped. "
            "Merge the adapter into its base and use the full transformer as the teacher."
        )
    init = str(stored.get("init_lora_weights")).lower()
    if init.startswith(_BASE_CHANGING_INITS):
        raise TeacherError(
            f"{label}: was initialised with {init!r}, which changes the base's own weights, so it does not fit a base "
            "that several teachers share. Convert it with PEFT: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)."
        )


def _check_alphas(given: dict[str, JSON], label: str) -> None:
    alphas = [*given.get("alpha_pattern", {}).values(), *([given["lora_alpha"]] if "lora_alpha" in given else [])]
    for alpha in alphas:
        if alpha == 0:
            raise TeacherError(f"{label}: its LoRA config has an alpha of 0, with which those layers are the base's.")
        if not abs(alpha) <= sys.float_info.max:  # NaN is not either
            raise TeacherError(
                f"{label}: its LoRA config has an alpha of {_shown(alpha)}; it must be a finite number."
            )


def _check_layers(given: dict[str, JSON], label: str) -> None:
    if isinstance(given.get("target_modules"), str) and "layers_to_transform" in given:
        raise TeacherError(
            f"{label}: its LoRA config has layers_to_transform beside a pattern as target_modules; PEFT takes one of "
            "them."
        )
    if "layers_pattern" in given and "layers_to_transform" not in given:
        raise TeacherError(
            f"{label}: its LoRA config has layers_pattern, but no layers_to_transform to say which layers."
        )


def _shown(value: object) -> str:
    return reprlib.repr(value)  # in which nothing is longer than a line
