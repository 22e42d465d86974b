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
diffusers' attention backends, chosen for a transformer and tried before it trains.

`set_attention_backend` tells a transformer's attention processors what to hand to diffusers' dispatcher. Those that call
PyTorch themselves it passes over in silence, a kernel finds out about devices, dtypes and masks when it is called, and some have
no gradient. So one forward is run in which the backend's function is watched.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention, MochiAttention
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ..pipelines.velocity import VelocityField
from ..pipelines.view import base_weight


logger = logging.getLogger(__name__)

# Of different length: where a family pads a batch, its attention has a mask, which some backends don't take.
_PROMPTS = ["a", "a b c"]


def use_attention_backend(
    field: VelocityField, network: ModelMixin, name: str, batch_size: int, mixed_dtype: torch.dtype | None = None
) -> Callable[[], None]:
    """
    Sets a transformer's attention backend, and runs one forward with it to see that it works.

    The choice is kept in the transformer's attention processors, which copies of it take along; nothing else of the process
    is changed.

    Args:
        field ([`VelocityField`]): of the pipeline that runs the transformer.
        network ([`~diffusers.ModelMixin`]): the transformer.
        name (`str`): a name that diffusers knows, such as `"flash"`.
        batch_size (`int`): prompts at a time; with several, those of the trial have different lengths.
        mixed_dtype (`torch.dtype`, *optional*): of mixed precision, if the transformer will run in it.

    Returns:
        `Callable`: sets what was set before.

    Raises:
        [`ValueError`]: if the name is unknown, the backend cannot run here or passes no gradient, or the transformer's
            attention does not go through diffusers' dispatcher. Then nothing is changed.
    """
    names = [backend.value for backend in AttentionBackendName]
    if name not in names:
        raise ValueError(f"attention_backend={name!r}: it is one of {', '.join(sorted(names))}.")
    kept = [(processor, processor._attention_backend) for processor in _choosing_processors(network)]

    def put_back() -> None:
        for processor, backend in kept:
            processor._attention_backend = backend

    default = _AttentionBackendRegistry.get_active_backend()[0]
    try:
        network.set_attention_backend(name)
    except (RuntimeError, ValueError, OSError) as error:  # a missing package, or a kernel that cannot be downloaded
        raise ValueError(f"attention_backend={name!r}: {_line(error)}") from error
    finally:
        _AttentionBackendRegistry.set_active_backend(default)  # diffusers sets it for every model of the process
    watch = _Watch()
    try:
        _forward(field, network, AttentionBackendName(name), batch_size, mixed_dtype, watch)
    except (RuntimeError, ValueError) as error:
        put_back()
        weight = base_weight(network)
        raise ValueError(
            f"attention_backend={name!r} does not work for {type(network).__name__} on {weight.device.type} in "
            f"{str(mixed_dtype or weight.dtype).removeprefix('torch.')}: {_line(error)}"
        ) from error
    silent = ", ".join(sorted(watch.called - watch.dispatched)) or "no processors of diffusers"
    problem = None
    if not watch.dispatched:
        problem = (
            f"would do nothing: the attention of {type(network).__name__} ({silent}) does not go through diffusers' "
            "dispatcher. Leave it unset."
        )
    elif not watch.has_gradient:
        problem = "passes no gradient, so nothing could be trained with it. Choose another, such as 'native'."
    if problem is not None:
        put_back()
        raise ValueError(f"attention_backend={name!r} {problem}")
    if watch.called - watch.dispatched:
        logger.warning(
            f"attention_backend={name!r} is used by {', '.join(sorted(watch.dispatched))} of {type(network).__name__}, and "
            f"not by {silent}."
        )
    return put_back


class _Watch:
    """
    What is seen of a forward.

    Attributes:
        called (`set[str]`): processors that ran.
        dispatched (`set[str]`): those of them that called the backend.
        has_gradient (`bool`): whether the backend's result depends on query, key and value for autograd.
    """

    def __init__(self) -> None:
        self.called: set[str] = set()
        self.dispatched: set[str] = set()
        self.has_gradient = False


def _choosing_processors(network: nn.Module) -> list[Any]:
    processors = [module.processor for module in _attention_modules(network)]
    return [processor for processor in processors if "_attention_backend" in dir(processor)]


def _attention_modules(network: nn.Module) -> list[Any]:
    return [m for m in network.modules() if isinstance(m, (Attention, MochiAttention, AttentionModuleMixin))]


def _forward(
    field: VelocityField,
    network: ModelMixin,
    backend: AttentionBackendName,
    batch_size: int,
    mixed_dtype: torch.dtype | None,
    watch: _Watch,
) -> None:
    prompts = _PROMPTS[: max(1, batch_size)]
    x = field.initial_latents(prompts, [torch.Generator().manual_seed(i) for i in range(len(prompts))])
    mixed = nullcontext() if mixed_dtype is None else torch.autocast(x.device.type, mixed_dtype)
    with torch.no_grad(), mixed, _watched(network, backend, watch):
        field(x, float(field.levels[0]), prompts, 1.0, network)


@contextmanager
def _watched(network: nn.Module, backend: AttentionBackendName, watch: _Watch) -> Iterator[None]:
    run = _AttentionBackendRegistry._backends[backend]
    running: list[str] = []

    def enter(module: Any, inputs: Any) -> None:
        running.append(type(module.processor).__name__)
        watch.called.add(running[-1])

    def leave(module: Any, inputs: Any, output: Any) -> None:
        running.pop()

    def watched(**inputs: Any) -> Any:
        if not watch.dispatched:
            watch.has_gradient = _has_gradient(run, inputs)
        watch.dispatched.add(running[-1] if running else "attention without a processor")
        return run(**inputs)

    hooks = [module.register_forward_pre_hook(enter) for module in _attention_modules(network)]
    hooks += [module.register_forward_hook(leave, always_call=True) for module in _attention_modules(network)]
    _AttentionBackendRegistry._backends[backend] = watched
    try:
        yield
    finally:
        _AttentionBackendRegistry._backends[backend] = run
        for hook in hooks:
            hook.remove()


@torch.enable_grad()
def _has_gradient(run: Callable[..., Any], inputs: dict[str, Any]) -> bool:
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("query", "key", "value")}
    output = run(**{**inputs, **leaves})
    output = output if isinstance(output, Tensor) else output[0]
    if not output.requires_grad:
        return False
    gradients = torch.autograd.grad(output.float().square().sum(), [*leaves.values()], allow_unused=True)
    return all(gradient is not None for gradient in gradients)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
