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

"""What gives the caller's pipeline back as it was, if a trainer cannot start."""

from collections.abc import Callable, Iterable

from torch import nn

from ..acceleration.compilation import repeated_blocks
from ..models.adapter_switch import remove_adapters


def restorer(components: Iterable[nn.Module]) -> Callable[[], None]:
    """What sets modules' devices and modes, and which of their parameters are trained, to what they are now."""
    modules = list(components)
    devices = [(module, parameter.device) for module in modules for parameter in [*module.parameters()][:1]]
    modes = [(part, part.training) for module in modules for part in module.modules()]
    trained = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters()]

    def restore() -> None:
        for module, device in devices:
            if next(module.parameters()).device != device:
                module.to(device)
        for part, training in modes:
            part.training = training
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)

    return restore


def without_student(transformer: nn.Module) -> Callable[[], None]:
    """What takes the student, and all that was made of it, out of the pipeline's transformer."""

    def remove() -> None:
        remove_adapters(transformer)
        for block in repeated_blocks(transformer):
            vars(block).pop("_compiled_call_impl", None)
        vars(transformer).pop("activation_checkpointing_enable", None)

    return remove
