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

"""Weights that FSDP2 has split over the processes. Whatever is not split passes through."""

from collections.abc import Mapping
from typing import Any

from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


def gathered(tensor: Tensor) -> Tensor:
    """The full tensor, where it is. All processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """
    The full tensors, on the CPU, ready for a file. All processes must call it.

    Args:
        tensors (`Mapping[str, Tensor]`)
        keep (`bool`, *optional*, defaults to `True`): whether this process wants them. One that does not only takes part.
    """
    kept = {}
    for name, tensor in tensors.items():  # one by one: a device never holds more than one of them whole
        full = gathered(tensor.detach())
        if keep:
            kept[name] = full.to("cpu").contiguous()
    return kept


def split_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """This process's part of `tensor`, which all processes have as a whole, split as `reference` is."""
    if isinstance(reference, DTensor) and not isinstance(tensor, DTensor):
        tensor = tensor.to(reference.device)
        return distribute_tensor(tensor, reference.device_mesh, reference.placements, src_data_rank=None)
    return tensor


def whole_optimizer_state(optimizer: Optimizer, keep: bool = True) -> dict[str, Any]:
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


def load_whole_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """
    Restores what [`whole_optimizer_state`] returned, or a process's own `state_dict()`, split as the parameters are. Of the
    tensors in `state` nothing is kept.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def own(value: Any, parameter: Tensor) -> Any:
        if not isinstance(value, Tensor):
            return value
        return (split_like(value, parameter) if value.shape == parameter.shape else value).clone()

    of_parameters = {
        number: {name: own(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": of_parameters})


def is_split(model: nn.Module) -> bool:
    """Whether FSDP2 has split the model."""
    return isinstance(model, FSDPModule)


def leave_precision_alone(plugin: FullyShardedDataParallelPlugin) -> None:
    """
    Has FSDP2 split and gather the weights as they are. Call it before the model is split.

    Under mixed precision accelerate has it cast every input of the network, the timesteps as well, its output and the
    gradients to half precision. Here the network's stand-in decides what is computed in which precision.
    """
    plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)


def forget_gathered(model: nn.Module) -> None:
    """
    Call it before weights are read or changed other than by the optimizer, and not between a forward and its backward.

    After a forward without gradients FSDP2 leaves the root's weights gathered: they are whole tensors then, and a change of
    them is lost, while one of the parts behind them is not seen by the next forward.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
