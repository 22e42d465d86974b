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

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The full tensors, on the CPU, ready for a file. All processes must call it."""
    full = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return {name: t.detach().to("cpu").contiguous() for name, t in full.items()}


def split_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """This process's part of `tensor`, which all processes have as a whole, split as `reference` is."""
    if isinstance(reference, DTensor) and not isinstance(tensor, DTensor):
        tensor = tensor.to(reference.device)
        return distribute_tensor(tensor, reference.device_mesh, reference.placements, src_data_rank=None)
    return tensor


def forget_gathered(model: nn.Module) -> None:
    """
    Call it before weights are read or changed other than by the optimizer, and not between a forward and its backward.

    After a forward without gradients FSDP2 leaves the root's weights gathered: they are whole tensors then, and a change of
    them is lost, while one of the parts behind them is not seen by the next forward.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
