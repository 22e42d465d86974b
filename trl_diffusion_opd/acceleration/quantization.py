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

"""Bases whose weights are quantised by bitsandbytes or by torchao: what may be trained on them, and what they hold."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from diffusers import PipelineQuantizationConfig
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..guards.redaction import shown


Kind = Literal["4bit", "8bit", "torchao"]
QuantizationConfig: TypeAlias = (
    PipelineQuantizationConfig | QuantizationConfigMixin | None
)  # what a base may be loaded with

# Beyond it, the gradient that a layer passes on is another one than that of its weights.
_GRADIENT_ERROR = 0.05


def weight_kind(weight: Tensor) -> Kind | None:
    """By whom a weight is quantised: bitsandbytes in 4 or 8 bits, or torchao; `None` if it is not."""
    if type(weight).__module__.startswith("torchao."):
        return "torchao"
    kind = get_bnb_param_type(weight)
    # bitsandbytes' 8-bit layers may keep their weights in half precision (llm_int8_has_fp16_weight).
    return None if not kind or (kind == "8bit" and weight.dtype != torch.int8) else kind


def quantized_layers(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers whose weights are quantised, by name: nothing else is, by either library."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and weight_kind(module.weight) is not None:
            yield name, module


def is_quantized(network: nn.Module) -> bool:
    """Whether any weight of it is."""
    return next(quantized_layers(network), None) is not None


@torch.no_grad()
def dequantized(layer: nn.Linear) -> Tensor:
    """The weight that a linear layer, quantised or not, stands for: `(out_features, in_features)`, a floating dtype."""
    weight: Any = layer.weight
    kind = weight_kind(weight)
    if kind is None:
        return weight
    if kind == "torchao":
        return weight.dequantize()
    return dequantize_bnb_weight(weight, state=weight.quant_state if kind == "4bit" else layer.state)


def base_weight(network: nn.Module) -> nn.Parameter:
    """A weight of the network itself, of none of its LoRAs and no quantised layer, which says the dtype and the device."""
    return next(
        parameter
        for name, module in network.named_modules()
        # A quantised layer's weights may be stored in any dtype, and its bias is cast to that of its inputs.
        if "lora_" not in name and not (isinstance(module, nn.Linear) and weight_kind(module.weight) is not None)
        for parameter in module.parameters(recurse=False)
        if parameter.is_floating_point()
    )


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor, or those that one of torchao's consists of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor.detach()
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(tensor, name))


def scales(network: nn.Module) -> list[Tensor]:
    """What bitsandbytes keeps of its weights beside them: scales and tables, which are neither parameters nor buffers."""
    found: dict[int, Tensor] = {}
    layer: Any
    for _, layer in quantized_layers(network):
        weight, kind = layer.weight, weight_kind(layer.weight)
        if kind == "4bit":
            state = weight.quant_state
            states = [state] if state.state2 is None else [state, state.state2]
            tensors = [t for one in states for t in vars(one).values() if isinstance(t, Tensor)]
        elif kind == "8bit":  # with the weight until the first forward, with the layer from then on
            tensors = [t for t in (weight.SCB, layer.state.SCB) if t is not None]
        else:
            tensors = []
        found |= {t.untyped_storage()._cdata: t for t in tensors}
    return list(found.values())


def described(network: nn.Module) -> str:
    """How a network's weights are quantised, for people; empty if they are not."""
    names = {
        "8bit": lambda weight: "8 bits",
        "4bit": lambda weight: weight.quant_type,
        "torchao": lambda w: type(w).__name__,
    }
    ways: dict[str, None] = {}
    for _, layer in quantized_layers(network):
        kind = weight_kind(layer.weight)
        assert kind is not None
        ways[f"{names[kind](layer.weight)} by {'torchao' if kind == 'torchao' else 'bitsandbytes'}"] = None
    return ", ".join(ways)


# Loading


def pipeline_config(config: QuantizationConfig) -> PipelineQuantizationConfig | None:
    """
    What `DiffusionPipeline.from_pretrained` takes: a config for several components as it is, one of diffusers' for a model as
    that of the transformer.

    Raises:
        [`ValueError`]: if it is neither, with what to write instead.
    """
    if config is None or isinstance(config, PipelineQuantizationConfig):
        return config
    if isinstance(config, QuantizationConfigMixin):
        return PipelineQuantizationConfig(quant_mapping={"transformer": config})
    name = f"{type(config).__module__.partition('.')[0]}.{type(config).__name__}"
    raise ValueError(
        f"quantization_config is a {name}. Give diffusers' config of the transformer, such as "
        "diffusers.BitsAndBytesConfig(load_in_4bit=True, ...) or diffusers.TorchAoConfig(Int8WeightOnlyConfig()), or a "
        "diffusers.PipelineQuantizationConfig(quant_mapping={'transformer': ..., ...}), in which those of text encoders are "
        "transformers' configs."
    )


@contextmanager
def failures_named(name: str, config: PipelineQuantizationConfig | None) -> Iterator[None]:
    """
    Within it the base `name` is loaded with `config`.

    Raises:
        [`ValueError`]: in place of what quantisers raise where they can't run, with what can.
    """
    try:
        yield
    except (AssertionError, ImportError, RuntimeError) as error:
        if config is None:
            raise
        raise ValueError(
            f"The base {name!r} cannot be quantised: {shown(error, 500)} (By bitsandbytes diffusers quantises on a GPU only; torchao's "
            "Int8WeightOnlyConfig works on a CPU too.)"
        ) from error


def named_components(config: PipelineQuantizationConfig) -> list[str]:
    """The components that a config names, if it names any."""
    return list(config.quant_mapping or config.components_to_quantize or ())


def prepare(network: nn.Module) -> None:
    """
    Makes a network whose weights bitsandbytes has quantised fit to be trained on in eval mode.

    On CPUs with AVX512-BF16 its 4-bit layers would rearrange their weights in the first forward without gradients, such as a
    teacher's. What they compute from then on passes no gradient, and some shapes they refuse.
    """
    for _, layer in quantized_layers(network):
        kind = weight_kind(layer.weight)
        if kind == "4bit":
            layer.__dict__["support_avx512bf16_for_cpu"] = False
        elif kind == "8bit":
            logging.getLogger("bitsandbytes.autograd._functions").addFilter(_ONCE)


def exempt_from_broadcast(model: nn.Module) -> None:
    """
    Lets DDP wrap a model with torchao's weights: it sends the first process's weights to the others, as views, which these
    do not have. All processes have read the same.
    """
    names = [f"{name}.weight" for name, layer in quantized_layers(model) if weight_kind(layer.weight) == "torchao"]
    if names:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


class _Once(logging.Filter):
    """Lets a message through once: bitsandbytes says at each forward of each 8-bit layer that it computes in float16."""

    said = False

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.getMessage().startswith("MatMul8bitLt: inputs will be cast"):
            return True
        said, self.said = self.said, True
        return not said


_ONCE = _Once()


# What is refused


def quantization_problems(transformer: nn.Module, full_weights: bool) -> list[str]:
    """What keeps a LoRA from being trained on a transformer, because of how it is quantised; nothing if it isn't."""
    method = transformer.__dict__.get("quantization_method")
    if method is not None and method not in ("bitsandbytes", "torchao"):
        return [
            f"The base's transformer is quantised by {method.value}; a LoRA can be trained here on one that is quantised by "
            "bitsandbytes or torchao."
        ]
    first: dict[type, tuple[str, nn.Linear]] = {}
    for name, layer in quantized_layers(transformer):
        first.setdefault(type(layer.weight), (name, layer))
    if not first:
        return []
    if full_weights:
        return [
            f"peft_config=None trains all weights, and the base's are quantised ({described(transformer)}). Train a "
            "LoRA (peft_config='default' or a LoraConfig), or load the base without quantisation."
        ]
    if any(_is_rearranged(layer) for _, layer in quantized_layers(transformer)):
        return [
            "bitsandbytes has rearranged the base's 4-bit weights to draw with them on this CPU, and they pass no gradient any "
            "more. Load the pipeline again, and give it to the trainer before it draws."
        ]
    quantizer = transformer.__dict__.get("hf_quantizer")
    if quantizer is not None and not quantizer.is_trainable:
        how = type(quantizer.quantization_config.quant_type).__name__  # torchao's: bitsandbytes' are all trainable
        return [
            f"Nothing can be trained on a base that is quantised by torchao's {how}, says diffusers. Use bitsandbytes, or "
            "torchao's Int8WeightOnlyConfig or Float8WeightOnlyConfig."
        ]
    return [
        f"The base is quantised ({described(layer)}) such that {name} passes no gradient, or a wrong one, to what is before "
        "it. Quantise by bitsandbytes, or weights alone by torchao's Int8WeightOnlyConfig or Float8WeightOnlyConfig."
        for name, layer in first.values()
        if not _passes_gradient(layer)
    ]


def _is_rearranged(layer: nn.Linear) -> bool:
    # bitsandbytes' own way back (0.50.2) leaves scales transposed, and in bfloat16.
    weight: Any = layer.weight
    return weight_kind(weight) == "4bit" and bool(vars(weight.quant_state).get("packing_format_for_cpu"))


@torch.enable_grad()
def _passes_gradient(layer: nn.Linear) -> bool:
    weight = dequantized(layer).float()
    generator = torch.Generator().manual_seed(0)
    # Of two axes before the features, as in a transformer.
    gradient, x = (torch.randn(1, 16, size, generator=generator).to(weight.device) for size in weight.shape)
    x = x.to(layer.weight.dtype if layer.weight.is_floating_point() else torch.float32).requires_grad_()
    # bitsandbytes' layers take on the dtype of their first inputs, and cast their bias to it.
    probe = copy.copy(layer)
    probe.__dict__["_parameters"] = {**dict(layer.named_parameters(recurse=False)), "bias": None}
    output = probe(x)
    if not output.requires_grad:
        return False
    (passed,) = torch.autograd.grad(output, x, gradient.to(output.dtype))
    expected = gradient @ weight
    return bool((passed.float() - expected).norm() <= _GRADIENT_ERROR * expected.norm())
