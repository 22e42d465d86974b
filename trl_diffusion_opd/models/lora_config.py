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
Checks that a student's LoRA consists of `lora_A` and `lora_B` alone.

The teachers share the student's base, so a LoRA must not change it and must switch off completely, and
`pipe.load_lora_weights` must read all of it back. PEFT's other options change the base, train weights shared with the
teachers, or are lost in the saved file.
"""

import copy
import re
from dataclasses import fields

from peft import LoraConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key

from ..pipelines.experts import EXPERTS, NOISE, Experts
from .student import STUDENT_ADAPTER


# Fields that may differ from their defaults. All others, also those of newer PEFT versions, are refused.
_SUPPORTED = {
    # Which layers have a LoRA, and of which rank and strength.
    "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "use_rslora", "init_lora_weights",
    # The trainer sets these itself.
    "lora_dropout", "task_type", "inference_mode",
    # Where a config is from.
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version",
    # For layers that are stored transposed. No transformer here has one, and PEFT resets the option.
    "fan_in_fan_out",
}  # fmt: skip

# Initialisations that set lora_A and lora_B alone. Others move a part of the base's weights into the LoRA (PiSSA,
# OLoRA, CorDA, LoftQ, LoRA-GA), freeze one of the two (MiCA), or need data that a trainer does not have (EVA).
_INITS = (True, False, "gaussian", "orthogonal")

_INSTEAD = {
    "bias": "The base's biases are the teachers' too.",
    "modules_to_save": "Name these layers in target_modules, which gives them a LoRA.",
    "use_dora": "A larger r comes closest.",
    "lora_bias": "A larger r comes closest.",
    "target_parameters": "Name layers in target_modules.",
}


def config_problems(config: LoraConfig) -> list[str]:
    """Lists what in a student's `peft_config` would not survive training, saving, and loading in diffusers."""
    if config.peft_type != PeftType.LORA:
        return [f"peft_config is a {type(config).__name__}; the student can be a LoRA or full weights."]
    problems = []
    plain = type(config)()
    for name in [field.name for field in fields(config)]:
        value = getattr(config, name)
        # An empty list, dict or string says the same as None.
        if name in _SUPPORTED or (value or None) == (getattr(plain, name) or None):
            continue
        problems.append(
            f"peft_config: {name}={value!r} goes beyond lora_A and lora_B: it would change what base and teachers "
            f"compute, or be lost when the student is saved. Leave it out. {_INSTEAD.get(name, '')}".rstrip()
        )
    init = config.init_lora_weights
    if (init.lower() if isinstance(init, str) else init) not in _INITS:
        problems.append(
            f"peft_config: init_lora_weights={init!r} changes the base's own weights, which all teachers share, or "
            'needs data that the trainer does not have. Use True, "gaussian" or "orthogonal".'
        )
    return problems


def for_experts(config: LoraConfig) -> LoraConfig:
    """
    Makes a config for one transformer one for both experts, whose layers' names begin with `transformer.` and
    `transformer_2.`. Only patterns of whole names need it.
    """
    config = copy.deepcopy(config)
    start = rf"(?:(?:{'|'.join(EXPERTS)})\.)?"
    for field in ("target_modules", "exclude_modules"):
        pattern = getattr(config, field)
        if isinstance(pattern, str) and pattern.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
            setattr(config, field, f"{start}(?:{pattern})")
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field) or {}
        setattr(config, field, {re.sub(r"^\^", f"^{start}", key): value for key, value in patterns.items()})
    return config


def layer_problems(model: PeftModel) -> list[str]:
    """Lists what would differ between a student's LoRA on its layers and the file it is saved in."""
    problems = _pattern_problems(model)
    network = model.get_base_model()
    for name, expert in network.each() if isinstance(network, Experts) else ():
        if not any(parameter.requires_grad for parameter in expert.parameters()):
            problems.append(
                f"The student has no LoRA on {name}, which denoises {NOISE[name]}: nothing could be trained at these "
                "levels. Name layers of both experts in target_modules, and start from a pair in student_init."
            )
    weights = get_peft_model_state_dict(model, adapter_name=STUDENT_ADAPTER, save_embedding_layers=False)
    saved = {f"{name.removesuffix('.weight')}.{STUDENT_ADAPTER}.weight" for name in weights}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    different = sorted(saved ^ trained)
    if different:
        problems.append(
            f"peft_config: {different[0]!r} and {len(different) - 1} more tensors are either trained and not saved, "
            "or saved and not trained. Name only layers in target_modules that are nn.Linear or nn.Conv2d."
        )
    return problems


def _pattern_problems(model: PeftModel) -> list[str]:
    # The first pattern that matches a layer counts, and saving sorts them.
    network = model.get_base_model()
    layers = [name for name, module in network.named_modules() if isinstance(module, LoraLayer)]
    problems = []
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(model.peft_config[STUDENT_ADAPTER], field)
        for layer in layers:
            ours, theirs = get_pattern_key(list(pattern), layer), get_pattern_key(sorted(pattern), layer)
            if pattern.get(ours) != pattern.get(theirs):
                problems.append(
                    f"peft_config: {field} has two patterns for {layer}, {ours!r} and {theirs!r}. The first one "
                    "counts, but the order is lost when the student is saved. Let only one pattern match each layer."
                )
                break
    return problems
