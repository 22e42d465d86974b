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

"""Rounds to half precision in the same way on every processor, for tests of half precision."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


aten = torch.ops.aten
# Their results depend on the order of a sum or on how a function is approximated, and so on the processor. Everything
# else that a network computes (sums and products of two numbers, casts, copies) is rounded as IEEE 754 says,
# everywhere alike.
INEXACT = {
    *(aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.convolution_backward),
    *(aten.sum, aten.mean, aten.pow, aten.sqrt, aten.rsqrt, aten.exp, aten.sin, aten.cos, aten.tanh, aten.sigmoid),
    *(aten.gelu, aten.gelu_backward, aten.silu, aten.silu_backward, aten._softmax, aten._softmax_backward_data),
    *(aten.native_layer_norm, aten.native_layer_norm_backward),
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
}
# What a layer keeps for its backward pass is of no network's precision.
SAVING = {aten.native_layer_norm, aten._scaled_dot_product_flash_attention_for_cpu}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _wide(value: Any) -> Any:
    return value.double() if _is_float(value) else value


def _normal(shape: Any, generator: torch.Generator | None) -> Tensor:
    """Normal numbers in float64 from whole ones, which every processor draws alike."""
    whole = torch.randint(2**24, tuple(shape), generator=generator, dtype=torch.float64)
    return torch.special.ndtri((whole + 0.5) / 2**24)


class AlikeRounding(TorchDispatchMode):
    """
    Computes what depends on the processor in float64 and rounds the result to the precision it is asked for in.

    So a network in bfloat16 rounds after every layer as it always does, and the figures are the same to the last digit
    whatever kernels, vector units or number of threads a machine has. Normal random numbers are its own, since
    PyTorch's differ in their last bit from processor to processor.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        operation = func.overloadpacket
        if operation is aten.randn:
            return _normal(args[0], kwargs.get("generator")).to(kwargs.get("dtype") or torch.get_default_dtype())
        if operation is aten.normal_:
            tensor, mean, std = (*args, *(0.0, 1.0)[len(args) - 1 :])
            return tensor.copy_(mean + std * _normal(tensor.shape, kwargs.get("generator")))
        floats = [value.dtype for value in args if _is_float(value)]
        if operation not in INEXACT or not floats:
            return func(*args, **kwargs)
        dtype = kwargs.pop("dtype", None) or floats[0]
        results = func(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})
        if not isinstance(results, tuple):
            return results.to(dtype)
        rounded = 1 if operation in SAVING else len(results)
        return tuple(r.to(dtype) if _is_float(r) and i < rounded else r for i, r in enumerate(results))
