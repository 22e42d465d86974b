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
Sets one of diffusers' attention backends on a transformer, and tries it before training.

`set_attention_backend` of diffusers sets the backend on attention processors that use diffusers' dispatcher. It
silently skips processors that call PyTorch themselves. A kernel checks devices, dtypes and masks only when it is
called, and some kernels have no gradient. The trial therefore runs one forward, and one backward of a single attention
layer.
"""

import inspect
import logging
from collections.abc import Callable
from contextlib import nullcontext

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention, MochiAttention
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .quantization import base_weight


logger = logging.getLogger(__name__)

_CHOICE = "_attention_backend"  # diffusers' attribute of processors that use its dispatcher


def use_attention_backend(
    network: ModelMixin, name: str, trial: Callable[[], object], mixed_dtype: torch.dtype | None = None
) -> Callable[[], None]:
    """
    Sets a transformer's attention backend and runs one forward to check that it works.

    Only the transformer's attention processors are changed. Copies of the transformer keep the choice.

    Args:
        network ([`~diffusers.ModelMixin`]): the transformer.
        name (`str`): a name that diffusers knows, such as `"flash"`.
        trial (`Callable`): runs one forward of the transformer.
        mixed_dtype (`torch.dtype`, *optional*): the dtype of mixed precision, if the transformer will run in it.

    Returns:
        `Callable`: restores the previous backends.

    Raises:
        [`ValueError`]: if the name is unknown, the backend cannot run here or passes no gradient, or the transformer's
            attention does not use diffusers' dispatcher. Nothing is changed then.
    """
    names = [backend.value for backend in AttentionBackendName]
    if name not in names:
        raise ValueError(f"attention_backend={name!r}: it must be one of {', '.join(sorted(names))}.")
    attentions = [m for m in network.modules() if isinstance(m, Attention | MochiAttention | AttentionModuleMixin)]
    choosing = [module for module in attentions if _CHOICE in dir(module.processor)]
    silent = _processors([module for module in attentions if module not in choosing])
    if not choosing:
        raise ValueError(
            f"attention_backend={name!r} would do nothing: the attention of {type(network).__name__} "
            f"({silent or 'no processors of diffusers'}) does not use diffusers' dispatcher. Leave it unset."
        )
    kept = [(module.processor, getattr(module.processor, _CHOICE)) for module in choosing]

    def put_back() -> None:
        for processor, backend in kept:
            setattr(processor, _CHOICE, backend)

    default = _AttentionBackendRegistry.get_active_backend()[0]
    try:
        network.set_attention_backend(name)
    except (RuntimeError, ValueError, OSError) as error:  # a missing package, or a kernel that cannot be downloaded
        raise ValueError(f"attention_backend={name!r}: {_line(error)}") from error
    finally:
        _AttentionBackendRegistry.set_active_backend(default)  # diffusers has set it for all models of the process
    weight = base_weight(network)
    try:
        has_gradient = _tried(choosing[0], trial, weight.device.type, mixed_dtype)
    except (RuntimeError, ValueError) as error:
        put_back()
        raise ValueError(
            f"attention_backend={name!r} does not work for {type(network).__name__} on {weight.device.type} in "
            f"{str(mixed_dtype or weight.dtype).removeprefix('torch.')}: {_line(error)}"
        ) from error
    if not has_gradient:
        put_back()
        raise ValueError(
            f"attention_backend={name!r} passes no gradient, so nothing could be trained with it. Choose another, "
            "such as 'native'."
        )
    if silent:
        logger.warning(
            f"attention_backend={name!r} is used by {_processors(choosing)} of {type(network).__name__}, and not by "
            f"{silent}."
        )
    return put_back


def _processors(attentions: list[nn.Module]) -> str:
    return ", ".join(sorted({type(module.processor).__name__ for module in attentions}))


def _tried(
    attention: nn.Module, trial: Callable[[], object], device_type: str, mixed_dtype: torch.dtype | None
) -> bool:
    """Runs the trial. Returns whether the output of `attention` in it passes a gradient to its input."""
    gradients: list[Tensor | None] = []

    def watch(module: nn.Module, args: tuple, kwargs: dict[str, object], output: object) -> None:
        if not gradients:
            gradients.append(_gradient(module, args, kwargs))

    hook = attention.register_forward_hook(watch, with_kwargs=True)
    try:
        with torch.no_grad(), nullcontext() if mixed_dtype is None else torch.autocast(device_type, mixed_dtype):
            trial()
    finally:
        hook.remove()
    return gradients[0] is not None


@torch.enable_grad()
def _gradient(attention: nn.Module, args: tuple, kwargs: dict[str, object]) -> Tensor | None:
    inputs = inspect.signature(attention.forward).bind(*args, **kwargs)
    name, x = next(iter(inputs.arguments.items()))
    inputs.arguments[name] = x.detach().requires_grad_()
    output = attention.forward(*inputs.args, **inputs.kwargs)
    output = output if isinstance(output, Tensor) else output[0]
    if not output.requires_grad:
        return None
    return torch.autograd.grad(output.float().square().sum(), inputs.arguments[name], allow_unused=True)[0]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
