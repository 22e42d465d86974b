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

"""Weights that FSDP2 or DeepSpeed's ZeRO-3 has split over the processes. Whatever is not split passes through."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin, convert_outputs_to_fp32
from torch import Size, Tensor, autocast, bfloat16, device, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import pad
from torch.optim import Optimizer
from torch.optim.optimizer import StateDict

from ..guards.files import JSON


_Zero3 = Any  # a parameter with the attributes that ZeRO-3 gives it


def in_zero3(tensor: Tensor) -> bool:
    """Whether it is a weight that ZeRO-3 has split. It is asked where DeepSpeed need not be installed."""
    return "ds_tensor" in tensor.__dict__


def is_part(tensor: Tensor) -> bool:
    """Whether it is a weight of which each process has a part."""
    return isinstance(tensor, DTensor) or in_zero3(tensor)


def own_part(tensor: Tensor) -> Tensor:
    """
    What this process has of a weight, to be read or changed in place. Call [`forget_gathered`] before it is changed.

    ZeRO-3's is flat, with zeros behind it where the processes don't divide it.
    """
    zero3: _Zero3 = tensor
    return zero3.ds_tensor.data if in_zero3(tensor) else tensor.detach()


def whole_shape(tensor: Tensor) -> Size:
    """The shape of the full tensor."""
    zero3: _Zero3 = tensor
    return zero3.ds_shape if in_zero3(tensor) else tensor.shape


def gathered(tensor: Tensor) -> Tensor:
    """The full tensor, detached, where it is. All processes must call it."""
    if in_zero3(tensor):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """
    Copies of the full tensors, on the CPU, ready for a file. All processes must call it.

    Args:
        tensors (`Mapping[str, Tensor]`)
        keep (`bool`, *optional*, defaults to `True`): whether this process wants them. One that does not only takes part.
    """
    kept = {}
    for name, tensor in tensors.items():  # one by one: a device never holds more than one of them whole
        full = gathered(tensor)
        if keep:
            # Under ZeRO-2 they are views into one long tensor, which a file refuses.
            kept[name] = full.to("cpu", copy=True).contiguous()
    return kept


def split_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """This process's part of `tensor`, which all processes have as a whole, split as the weight `reference` is."""
    zero3: _Zero3 = reference
    if in_zero3(reference) and tensor.shape == zero3.ds_shape:
        size, rank = zero3.ds_tensor.numel(), dist.get_rank(zero3.ds_process_group)
        own = tensor.detach().to(zero3.ds_tensor.device).flatten()[rank * size :][:size]
        return pad(own, (0, size - own.numel()))
    if isinstance(reference, DTensor) and not isinstance(tensor, DTensor):
        tensor = tensor.to(reference.device)
        return distribute_tensor(tensor, reference.device_mesh, reference.placements, src_data_rank=None)
    return tensor


def whole_optimizer_state(optimizer: Optimizer, keep: bool = True) -> StateDict:
    """
    What `optimizer.state_dict()` is on one process that has the whole model: parameters by their numbers. All processes
    must call it; those without `keep` get no tensors.
    """
    state = optimizer.state_dict()
    of_parameters = {
        number: {
            name: whole({name: value}, keep).get(name) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": of_parameters}


def load_whole_optimizer_state(optimizer: Optimizer, state: StateDict) -> None:
    """
    Restores what [`whole_optimizer_state`] returned, or a process's own `state_dict()`, split as the parameters are. Of the
    tensors in `state` nothing is kept.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def own(value: object, parameter: Tensor) -> object:
        if not isinstance(value, Tensor):
            return value
        return (split_like(value, parameter) if value.shape == parameter.shape else value).clone()

    of_parameters = {
        number: {name: own(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": of_parameters})


def is_split(model: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO-3 has split the model."""
    return isinstance(model, FSDPModule) or any(in_zero3(parameter) for parameter in model.parameters())


def leave_precision_alone(plugin: FullyShardedDataParallelPlugin) -> None:
    """
    Has FSDP2 split and gather the weights as they are. Call it before the model is split.

    Under mixed precision accelerate has it cast every input of the network, the timesteps as well, its output and the
    gradients to half precision. Here the network's stand-in decides what is computed in which precision.
    """
    plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)


def leave_precision_to_the_model(config: dict[str, JSON], model: nn.Module, device: device) -> None:
    """
    The same of DeepSpeed. Call it before its engine is made.

    Under mixed precision it would round all weights to half precision, those of a LoRA as well, and sum gradients in it. Here
    the forward is as accelerate has it on one process.

    Args:
        config (`dict`): DeepSpeed's settings, which are changed.
        model (`nn.Module`): the student, whose forward is changed.
        device (`torch.device`): where it is trained.
    """
    if config.get("bf16", {}).get("enabled"):
        config["bf16"]["enabled"] = False
        model.forward = convert_outputs_to_fp32(autocast(device.type, bfloat16)(model.forward))


def forget_gathered(model: nn.Module) -> None:
    """
    Call it before weights are read or changed other than by the optimizer, and not between a forward and its backward.

    After a forward without gradients FSDP2 leaves the root's weights gathered: they are whole tensors then, and a change of
    them is lost, while one of the parts behind them is not seen by the next forward. ZeRO-3 does so with small weights.
    """
    for parameter in model.parameters():
        if in_zero3(parameter):
            zero3: _Zero3 = parameter
            zero3.partition()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
