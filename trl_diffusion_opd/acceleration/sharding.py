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
Gathers, splits and saves weights that FSDP2 or DeepSpeed's ZeRO-3 has sharded over the processes. Tensors that are not
sharded are returned unchanged.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin, convert_outputs_to_fp32
from torch import Size, Tensor, autocast, bfloat16, device, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import pad
from torch.optim import Optimizer
from torch.optim.optimizer import StateDict

from ..guards.files import JSON


_Zero3 = Any  # a parameter with ZeRO-3's additional attributes

# Numbers in a message of `mean_gradients`, at least: thousands of small ones would take longer.
_MESSAGE = 2**24


def in_zero3(tensor: Tensor) -> bool:
    """Whether a tensor is a weight that ZeRO-3 has split. DeepSpeed need not be installed."""
    return "ds_tensor" in tensor.__dict__


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor is a sharded weight: each process holds only a part of it."""
    return isinstance(tensor, DTensor) or in_zero3(tensor)


def own_part(tensor: Tensor) -> Tensor:
    """
    This process's part of a weight, to read or change in place. Call [`forget_gathered`] before you change it.

    With ZeRO-3 it is flat, and padded with zeros if the weight can't be divided equally.
    """
    zero3: _Zero3 = tensor
    return zero3.ds_tensor.data if in_zero3(tensor) else tensor.detach()


def whole_shape(tensor: Tensor) -> Size:
    """The shape of the full tensor."""
    zero3: _Zero3 = tensor
    return zero3.ds_shape if in_zero3(tensor) else tensor.shape


def gathered(tensor: Tensor) -> Tensor:
    """The full tensor, detached, on its device. All processes must call this."""
    if in_zero3(tensor):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """
    Copies the full tensors to the CPU, ready to be saved. All processes must call this.

    Args:
        tensors (`Mapping[str, Tensor]`): names and tensors.
        keep (`bool`, *optional*, defaults to `True`): whether this process needs the copies. With `False` it only
            takes part in gathering, and the result is empty.
    """
    kept = {}
    for name, tensor in tensors.items():  # one by one, so that a device holds at most one full tensor
        full = gathered(tensor)
        if keep:
            # With ZeRO-2 they are views into one long tensor, which safetensors refuses to save.
            kept[name] = full.to("cpu", copy=True).contiguous()
    return kept


def split_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """This process's part of a full `tensor`, split in the same way as the weight `reference`."""
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
    The optimizer's `state_dict()` with full tensors, as if one process held the whole model. All processes must call
    this; those without `keep` get no tensors.
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
    Restores the state that [`whole_optimizer_state`] returned, or a process's own `state_dict()`, and splits it like
    the parameters. The tensors in `state` are copied.
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
    Keeps FSDP2 from changing dtypes. Call it before the model is split.

    With mixed precision, accelerate makes FSDP2 cast all inputs of the network (even timesteps), its output and the
    gradients to half precision. In this package the wrapper that calls the network decides the precision of each
    computation.
    """
    plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)


def leave_precision_to_the_model(config: dict[str, JSON], model: nn.Module, device: device) -> None:
    """
    Keeps DeepSpeed from changing dtypes. Call it before DeepSpeed's engine is created.

    With mixed precision, DeepSpeed would round all weights (also a LoRA's) to half precision and sum gradients in it.
    Instead the forward runs under autocast, as accelerate does it on one process.

    Args:
        config (`dict`): DeepSpeed's settings, changed in place.
        model (`nn.Module`): the student. Its forward is replaced.
        device (`torch.device`): the device on which it is trained.
    """
    if config.get("bf16", {}).get("enabled"):
        config["bf16"]["enabled"] = False
        model.forward = convert_outputs_to_fp32(autocast(device.type, bfloat16)(model.forward))


def forget_gathered(model: nn.Module) -> None:
    """
    Frees gathered copies of weights. Call it before anything but the optimizer reads or changes weights, and never
    between a forward and its backward.

    After a forward without gradients, FSDP2 keeps the full tensors of the root's weights. A change to a full tensor
    would be lost, and the next forward would not see a change to a part. ZeRO-3 keeps small weights in the same way.
    """
    for parameter in model.parameters():
        if in_zero3(parameter):
            zero3: _Zero3 = parameter
            zero3.partition()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def mean_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """
    Replaces each gradient by its mean over the processes. For weights that no wrapper looks after, unlike DDP's; the
    gradients of weights that FSDP2 has split are means already.

    Args:
        parameters (`Sequence[nn.Parameter]`): the same on every process, each with a gradient.
    """
    gradients = [p.grad for p in parameters if p.grad is not None and not is_part(p)]
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    while gradients:
        sizes = torch.tensor([gradient.numel() for gradient in gradients]).cumsum(0)
        count = int((sizes < _MESSAGE).sum()) + 1
        together, gradients = gradients[:count], gradients[count:]
        flat = torch.cat([gradient.flatten() for gradient in together])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, mean in zip(together, flat.split([one.numel() for one in together]), strict=True):
            gradient.copy_(mean.view_as(gradient))
