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

"""Keeps text encoders and VAE in host memory (RAM) while they are not used."""

from collections.abc import Iterable

import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import UserCpuOffloadHook
from diffusers import DiffusionPipeline
from torch import nn


_OFFLOADED = ("text_encoder", "vae")


class Offload:
    """
    Keeps modules in host memory until they are called. accelerate's hooks then move them to the device, where they
    stay until `rest` is called.

    Args:
        modules (`list[nn.Module]`): the modules, from [`offloaded`]. The list may be empty.
        device (`torch.device`): the device on which they run.
    """

    def __init__(self, modules: list[nn.Module], device: torch.device):
        self.modules: list[nn.Module] = []
        self.device = device
        self._hooks: list[UserCpuOffloadHook] = []
        self.add(modules)

    def add(self, modules: Iterable[nn.Module]) -> None:
        """Keeps more modules in host memory."""
        for module in modules:
            self.modules.append(module)
            self._hooks.append(cpu_offload_with_hook(module, self.device)[1])

    def rest(self) -> None:
        """Moves the modules back to host memory."""
        for hook in self._hooks:
            hook.offload()

    def remove(self) -> None:
        """Removes the hooks, so that the modules stay where they are."""
        for hook in self._hooks:
            hook.remove()


def offloaded(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """Returns the modules of a pipeline that are not needed while its transformer runs: text encoders and VAE."""
    return [
        component
        for name, component in pipeline.components.items()
        if name.startswith(_OFFLOADED) and isinstance(component, nn.Module)
    ]
