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
Estimates the peak memory of a forward and backward from tensor shapes. No memory is allocated and no network runs.
"""

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map

from ..acceleration.quantization import base_weight, plain_tensors, quantized_layers, weight_kind
from ..pipelines.view import StandIn, exchanged_forward


T = TypeVar("T")
Velocity = Tensor | list[Tensor]  # of a batch: some families return a list with one tensor a sample


class MemoryRow(TypedDict):
    """A part of an estimate: its dtypes, its bytes, and how they were computed."""

    dtype: str
    bytes: int
    how: str


def bytes_of(tensor: Tensor) -> int:
    """The bytes of a tensor. A quantized tensor is the sum of its parts."""
    return sum(part.nbytes for part in plain_tensors(tensor))


class Live(TorchDispatchMode):
    """
    Counts the bytes of tensors that are created in its block and still alive: `now`, and the maximum so far, `peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Leaves out tensors that existed before. Otherwise their views would count as new tensors."""
        self._sizes |= {tensor.untyped_storage()._cdata: 0 for tensor in tensors}

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if not isinstance(tensor, Tensor) or is_traceable_wrapper_subclass(tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, storage._cdata)
        return output

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def optimizer_step_bytes(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> tuple[float, float]:
    """
    Measures an optimizer whose only parameter is `weight`. Returns the bytes of its state and the peak of a step's
    temporary bytes, both per byte of `weight`.
    """
    live = Live()
    for step in range(2):  # the first step creates the state
        weight.grad = torch.ones_like(weight)
        with live if step else nullcontext():
            optimizer.step()
    kept = sum(bytes_of(value) for value in tree_leaves(optimizer.state_dict()["state"]) if isinstance(value, Tensor))
    return kept / weight.nbytes, live.peak / weight.nbytes


# Functions with large outputs that autocast computes in float32 on CUDA, but not on the CPU.
_FLOAT32_ON_CUDA: tuple[tuple[object, str], ...] = (
    (nn.functional, "layer_norm"),
    (nn.functional, "group_norm"),
    (nn.functional, "softmax"),
    (torch, "softmax"),
    (Tensor, "softmax"),
)


@contextmanager
def _as_on_cuda() -> Iterator[None]:
    """
    Replaces functions so that autocast on the CPU uses float32 where it does on CUDA. A `TorchFunctionMode` would be
    off in `backward`, where checkpointing repeats forwards.
    """

    def of(function: Callable) -> Callable:
        @functools.wraps(function)
        def float32(*args: object, **kwargs: object) -> object:
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = tree_map(_float32, (args, kwargs))
            return function(*args, **kwargs)

        return float32

    with ExitStack() as stack:
        for owner, name in _FLOAT32_ON_CUDA:
            original = getattr(owner, name)
            if name in vars(owner):
                stack.callback(setattr, owner, name, original)
            else:  # Tensor inherits its softmax
                stack.callback(delattr, owner, name)
            setattr(owner, name, of(original))
        yield


def _float32(value: object) -> object:
    half = (torch.bfloat16, torch.float16)
    return value.float() if isinstance(value, Tensor) and value.dtype in half else value


class _Dequantizing(torch.autograd.Function):
    """
    A linear layer with frozen weights that are fully dequantized for each product. If `keeps` is true, the layer
    stores its inputs where gradient checkpointing can't free them, like bitsandbytes' 8-bit layers.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], bias: Tensor | None, keeps: bool) -> Tensor:
        ctx.shape, ctx.dtype = shape, x.dtype
        ctx.inputs = x if keeps else None
        return nn.functional.linear(x, x.new_empty(shape), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        return gradient.to(ctx.dtype) @ gradient.new_empty(ctx.shape, dtype=ctx.dtype), None, None, None


@contextmanager
def _kernels_in_shapes(layers: Sequence[nn.Linear]) -> Iterator[None]:
    """Replaces the kernels of quantized layers in its block by code that allocates and keeps the same memory."""

    def kernel(layer: Any) -> Callable[[Tensor], Tensor]:
        kind, shape = weight_kind(layer.weight), (layer.out_features, layer.in_features)

        def bitsandbytes(x: Tensor) -> Tensor:
            inner = x.to(layer.compute_dtype) if kind == "4bit" and layer.compute_dtype is not None else x
            return _Dequantizing.apply(inner, shape, layer.bias, kind == "8bit").to(x.dtype)

        def torchao(x: Tensor) -> Tensor:
            # PyTorch's own operations. The product keeps the dequantized weight for its backward.
            product = torch.mm(x.reshape(-1, shape[1]), x.new_empty(shape).t()) * x.new_empty(shape[0])
            product = product.reshape(*x.shape[:-1], shape[0])
            return (product if layer.bias is None else product + layer.bias).to(x.dtype)

        return torchao if kind == "torchao" else bitsandbytes

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(exchanged_forward(layer, kernel(layer)))
        yield


class _Step(nn.Module):
    """
    A forward of `model` for each call of the pipeline, and the backward of all. It is one module for
    `functional_call`, so that checkpointing repeats forwards in the backward with the same weights.
    """

    def __init__(self, model: nn.Module, base: nn.Module):
        super().__init__()
        self.model: nn.Module = model
        self.__dict__["base"] = base  # not registered: `functional_call` would restore shared weights twice, as shapes

    def forward(self, calls: Sequence[Mapping[str, object]], backward: bool, live: Live) -> tuple[int, list[Velocity]]:
        """Returns the bytes that the forwards have kept, and their velocities."""
        with live, torch.set_grad_enabled(backward):
            velocities = [StandIn(self.model, self.__dict__["base"])(**inputs)[0] for inputs in calls]
            kept = live.now
            if backward:
                torch.stack([v.square().mean() for v in tree_leaves(velocities)]).sum().backward()
        return kept, velocities


def step_bytes(
    model: nn.Module,
    base: nn.Module,
    calls: Sequence[Mapping[str, object]],
    *,
    device_type: str = "cuda",
    precision: torch.dtype | None = None,
    backward: bool = True,
    graphs: int = 1,
) -> int:
    """
    The peak bytes of a forward and backward of `model`, without weights, gradients and inputs.

    Args:
        model (`nn.Module`): the network, on any device (also `meta`). Its gradient checkpointing counts if it is on.
        base (`nn.Module`): the network without LoRAs: `model` itself, or the one inside the [`~peft.PeftModel`].
        calls (`list[dict]`): the inputs of each forward, on any device. Only their shapes count.
        device_type (`str`, *optional*, defaults to `"cuda"`): the kind of device to estimate for.
        precision (`torch.dtype`, *optional*): the dtype of mixed precision, if it is on.
        backward (`bool`, *optional*, defaults to `True`): if `False`, the forwards run without gradients.
        graphs (`int`, *optional*, defaults to 1): how many forwards of these calls there are before the first backward.
    """
    peak, kept, _ = pass_in_shapes(model, base, calls, device_type, precision, backward)
    return peak + (graphs - 1) * kept


def pass_in_shapes(
    model: nn.Module,
    base: nn.Module,
    calls: Sequence[Mapping[str, object]],
    device_type: str,
    precision: torch.dtype | None,
    backward: bool,
) -> tuple[int, int, list[Velocity]]:
    """
    Returns the bytes as [`step_bytes`] does for one graph, those that a graph keeps, and the velocities, which have shapes
    but no values.
    """
    shapes = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(value: T) -> T | Tensor:
        # Always on the CPU, whose fused attention stands for the GPU's: the GPU's kernels would need a GPU.
        if not isinstance(value, Tensor):
            return value
        with shapes:
            return torch.empty(value.shape, dtype=value.dtype, device="cpu").requires_grad_(value.requires_grad)

    step, live = _Step(model, base), Live()
    state = {name: fake(tensor) for name, tensor in [*step.named_parameters(), *step.named_buffers()]}
    quantized = list(quantized_layers(step))
    for name, layer in quantized:
        with shapes:  # as if not quantized, for code that reads the weight's dtype
            state[f"{name}.weight"] = torch.empty(layer.out_features, layer.in_features, dtype=base_weight(base).dtype)
    inputs = tree_map(fake, [dict(call) for call in calls])
    known = [*state.values(), *(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))]
    for tensor in state.values():
        if tensor.requires_grad and backward:
            with shapes:  # gradients exist from the first micro-batch on
                tensor.grad = torch.empty_like(tensor)
            known.append(tensor.grad)
    live.ignore(known)
    with ExitStack() as modes:
        modes.enter_context(shapes)
        modes.enter_context(_kernels_in_shapes([layer for _, layer in quantized]))
        if device_type == "cuda":
            modes.enter_context(_as_on_cuda())
        if precision is not None:
            modes.enter_context(torch.autocast("cpu", precision))
        kept, velocities = functional_call(step, state, (inputs, backward, live))
    return live.peak, kept, velocities
