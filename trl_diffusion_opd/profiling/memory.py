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

"""The peak memory of a forward and backward, from shapes alone: nothing is allocated and no network runs."""

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
Velocity = Tensor | list[Tensor]  # of a batch, which some families keep apart


class MemoryRow(TypedDict):
    """A part of an estimate: dtypes, bytes, and how they are known."""

    dtype: str
    bytes: int
    how: str


def bytes_of(tensor: Tensor) -> int:
    """Bytes that a tensor holds; of a quantised one, those of its parts."""
    return sum(part.nbytes for part in plain_tensors(tensor))


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it and still there: `now`, and the most so far, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Leaves tensors out that were there before: their views would be taken for new ones."""
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
    """What the optimizer keeps, and what it needs besides in a step: in bytes, for a byte of `weight`, its only one."""
    live = Live()
    for step in range(2):  # the first one makes the states
        weight.grad = torch.ones_like(weight)
        with live if step else nullcontext():
            optimizer.step()
    kept = sum(bytes_of(value) for value in tree_leaves(optimizer.state_dict()["state"]) if isinstance(value, Tensor))
    return kept / weight.nbytes, live.peak / weight.nbytes


# Autocast's list of what is computed in float32 is longer on CUDA than on the CPU; these have the large outputs.
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
    What autocast computes in float32 on CUDA is so within it.

    The functions are exchanged: a `TorchFunctionMode` is off while `backward` runs, in which checkpointing repeats forwards.
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
            else:  # a tensor's is inherited
                stack.callback(delattr, owner, name)
            setattr(owner, name, of(original))
        yield


def _float32(value: object) -> object:
    half = (torch.bfloat16, torch.float16)
    return value.float() if isinstance(value, Tensor) and value.dtype in half else value


class _Dequantizing(torch.autograd.Function):
    """
    A linear layer on frozen weights that are dequantised as a whole for each product with them. One that `keeps` its inputs does
    so where checkpointing cannot let go of them, as bitsandbytes' 8 bits do.
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
    """Within it quantised layers compute with shapes what their kernels do: in memory, what they make and what they keep."""

    def kernel(layer: Any) -> Callable[[Tensor], Tensor]:
        kind, shape = weight_kind(layer.weight), (layer.out_features, layer.in_features)

        def bitsandbytes(x: Tensor) -> Tensor:
            inner = x.to(layer.compute_dtype) if kind == "4bit" and layer.compute_dtype is not None else x
            return _Dequantizing.apply(inner, shape, layer.bias, kind == "8bit").to(x.dtype)

        def torchao(x: Tensor) -> Tensor:
            # Operations of PyTorch, of which the product keeps the dequantised weight for its backward.
            product = torch.mm(x.reshape(-1, shape[1]), x.new_empty(shape).t()) * x.new_empty(shape[0])
            product = product.reshape(*x.shape[:-1], shape[0])
            return (product if layer.bias is None else product + layer.bias).to(x.dtype)

        return torchao if kind == "torchao" else bitsandbytes

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(exchanged_forward(layer, kernel(layer)))
        yield


class _Step(nn.Module):
    """A forward of `model` for each call that the pipeline makes, and the backward of all: one module for `functional_call`,
    so that checkpointing, which repeats forwards within the backward, sees the same weights again."""

    def __init__(self, model: nn.Module, base: nn.Module):
        super().__init__()
        self.model: nn.Module = model
        self.__dict__["base"] = base  # not registered: its weights would be put back twice, the second time as shapes

    def forward(self, calls: Sequence[Mapping[str, object]], backward: bool, live: Live) -> list[Velocity]:
        with live, torch.set_grad_enabled(backward):
            velocities = [StandIn(self.model, self.__dict__["base"])(**inputs)[0] for inputs in calls]
            if backward:
                torch.stack([v.square().mean() for v in tree_leaves(velocities)]).sum().backward()
        return velocities


def step_bytes(
    model: nn.Module,
    base: nn.Module,
    calls: Sequence[Mapping[str, object]],
    *,
    device_type: str = "cuda",
    precision: torch.dtype | None = None,
    backward: bool = True,
) -> int:
    """
    The most bytes that a forward and backward of `model` hold at once, beside weights, gradients and inputs.

    Args:
        model (`nn.Module`): the network, on any device, `meta` too; with checkpointing if it is on.
        base (`nn.Module`): the network without LoRAs: `model` itself, or what is within the [`~peft.PeftModel`].
        calls (`list[dict]`): the inputs of each of the forwards, on any device: their shapes are what counts.
        device_type (`str`, *optional*, defaults to `"cuda"`): where it would run.
        precision (`torch.dtype`, *optional*): of mixed precision, if it is on.
        backward (`bool`, *optional*, defaults to `True`): without it, that of forwards without gradients.
    """
    return pass_in_shapes(model, base, calls, device_type, precision, backward)[0]


def pass_in_shapes(
    model: nn.Module,
    base: nn.Module,
    calls: Sequence[Mapping[str, object]],
    device_type: str,
    precision: torch.dtype | None,
    backward: bool,
) -> tuple[int, list[Velocity]]:
    """As [`step_bytes`], and the velocities, of which there are shapes alone."""
    shapes = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(value: T) -> T | Tensor:
        # On the CPU wherever it would run: its fused attention stands for the GPU's, whose kernels need one.
        if not isinstance(value, Tensor):
            return value
        with shapes:
            return torch.empty(value.shape, dtype=value.dtype, device="cpu").requires_grad_(value.requires_grad)

    step, live = _Step(model, base), Live()
    state = {name: fake(tensor) for name, tensor in [*step.named_parameters(), *step.named_buffers()]}
    quantized = list(quantized_layers(step))
    for name, layer in quantized:
        with shapes:  # as if they were not, for what looks at a weight
            state[f"{name}.weight"] = torch.empty(layer.out_features, layer.in_features, dtype=base_weight(base).dtype)
    inputs = tree_map(fake, [dict(call) for call in calls])
    known = [*state.values(), *(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))]
    for tensor in state.values():
        if tensor.requires_grad and backward:
            with shapes:  # gradients are there from the first micro-batch on
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
        velocities = functional_call(step, state, (inputs, backward, live))
    return live.peak, velocities
