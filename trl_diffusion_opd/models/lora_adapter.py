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

"""Adds a LoRA to a model after checking every tensor, and rescales its factors against each other."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..acceleration.quantization import base_weight
from ..acceleration.sharding import forget_gathered, own_part
from .adapter_switch import remove_adapters
from .boundary import strangers_files
from .lora_files import PEFT_PREFIX
from .lora_keys import some
from .teacher_config import TeacherError


def add_adapter(
    model: nn.Module,
    name: str,
    lora_config: LoraConfig,
    state_dict: Mapping[str, torch.Tensor],
    trainable: bool = False,
) -> PeftModel:
    """
    Adds a LoRA and its weights to a model. Refuses it if any tensor is missing, left over or of another shape.

    Args:
        model (`PeftModel` or a bare transformer, which is then wrapped in place):
            The base. The global random state does not change.
        name (`str`):
            Name of the new adapter.
        lora_config (`LoraConfig`), state_dict (`dict[str, torch.Tensor]`):
            As [`read_lora`] returns them.
        trainable (`bool`, *optional*, defaults to `False`):
            `False` keeps the adapter frozen in the dtype of the base, without dropout. `True` makes it trainable, in
            float32 if the base is in half precision.

    Returns:
        The `PeftModel`. PEFT leaves an arbitrary adapter active; [`Backbone`] corrects that.

    Raises:
        TeacherError: If the config's targets and the tensors differ, or a shape does not fit the base.
    """
    lora_config = copy.deepcopy(lora_config)
    lora_config.inference_mode = not trainable
    lora_config.base_model_name_or_path = None  # PEFT warns if it differs from the base's, which has none here
    if not trainable:
        lora_config.lora_dropout = 0.0
    peft_model: PeftModel
    # PEFT draws random matrices that are then overwritten; that must not shift other random numbers.
    with ExitStack() as undo, torch.random.fork_rng(devices=[]):
        undo.callback(_discard, model, name)
        with strangers_files(lambda said: f"PEFT cannot use its LoRA config ({said})"):
            try:
                if isinstance(model, PeftModel):
                    peft_model = model
                    peft_model.add_adapter(name, lora_config, autocast_adapter_dtype=trainable)
                else:
                    peft_model = get_peft_model(
                        model, lora_config, adapter_name=name, autocast_adapter_dtype=trainable
                    )
            except ValueError as error:
                raise TeacherError(f"made for another base: {error}") from error
        _check_shapes(peft_model, name, state_dict)
        undo.pop_all()
    set_peft_model_state_dict(peft_model, dict(state_dict), adapter_name=name)
    dtype = base_weight(peft_model).dtype
    for parameter in adapter_parameters(peft_model, name):
        parameter.requires_grad_(trainable)
        if not trainable:
            parameter.data = parameter.data.to(dtype)  # PEFT uses float32 if the base is stored as integers
    return peft_model


def _check_shapes(model: PeftModel, name: str, state_dict: Mapping[str, torch.Tensor]) -> None:
    # Without save_embedding_layers=False PEFT looks the base up on the Hub.
    expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    problems = []
    if missing := sorted(set(expected) - set(state_dict)):
        problems.append(
            f"its config asks for {len(missing)} tensors that the file lacks, such as {_short(missing[0])}"
        )
    if unexpected := sorted(set(state_dict) - set(expected)):
        problems.append(
            f"the file has {len(unexpected)} tensors that its config or the base does not have, such as "
            f"{_short(unexpected[0])}"
        )
    for key in sorted(set(expected) & set(state_dict)):
        theirs, ours = tuple(state_dict[key].shape), tuple(expected[key].shape)
        if theirs != ours:
            # The rank is axis 0 of lora_A and axis 1 of lora_B; all other axes are the base's.
            axis = 0 if ".lora_A" in key else 1
            same_base = theirs[:axis] + theirs[axis + 1 :] == ours[:axis] + ours[axis + 1 :]
            reason = "its config gives another rank" if same_base else "made for another base"
            problems.append(f"{reason}: {_short(key)} is {theirs} in the file and {ours} here")
            break
    if problems:
        raise TeacherError("; ".join(problems))


def _discard(model: nn.Module, name: str) -> None:
    """Removes an adapter that could not be added completely."""
    if not isinstance(model, PeftModel):
        remove_adapters(model)
        return
    if name in model.peft_config:
        model.delete_adapter(name)
    for layer in model.modules():  # after a failure PEFT may not list the adapter, though layers have it
        if isinstance(layer, BaseTunerLayer):
            layer.delete_adapter(name)


def _short(key: str) -> str:
    return some([key.removeprefix(PEFT_PREFIX)])


def adapter_parameters(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    return (parameter for key, parameter in model.named_parameters() if f".{name}." in key)


@contextmanager
def rescaled_factors(model: nn.Module, name: str) -> Iterator[None]:
    """
    Context in which the adapter's A is multiplied and its B divided by 1.1. Their product is the same except for
    rounding, so it shows how much rounding changes the result. Afterwards the weights are restored to the bit.
    """
    forget_gathered(model)
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and name in m.lora_A]
    factors = [(own_part(layer.lora_A[name].weight), own_part(layer.lora_B[name].weight)) for layer in layers]
    saved = [(a.clone(), b.clone()) for a, b in factors]
    for a, b in factors:
        a.data.mul_(1.1)
        b.data.div_(1.1)
    try:
        yield
    finally:
        for (a, b), (old_a, old_b) in zip(factors, saved, strict=True):
            a.data.copy_(old_a)
            b.data.copy_(old_b)
        forget_gathered(model)
