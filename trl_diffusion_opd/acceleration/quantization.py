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
Reads and checks bases whose weights are quantized by bitsandbytes or torchao, and says what can be trained on them.
"""

import copy
import logging
from collections.abc import Callable, Iterator
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
)  # the configs with which a base may be loaded

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Maximum relative error of the gradient that a layer passes to its input. Beyond it the gradient is wrong.
_GRADIENT_ERROR = 0.05


def weight_kind(weight: Tensor) -> Kind | None:
    """How a weight is quantized: by bitsandbytes in 4 or 8 bits, or by torchao; `None` if it is not quantized."""
    if type(weight).__module__.startswith("torchao."):
        return "torchao"
    kind = get_bnb_param_type(weight)
    # bitsandbytes' 8-bit layers may keep their weights in half precision (llm_int8_has_fp16_weight).
    return None if not kind or (kind == "8bit" and weight.dtype != torch.int8) else kind


def quantized_layers(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """
    Yields name and layer of the linear layers with quantized weights. Both libraries quantize only linear layers.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and weight_kind(module.weight) is not None:
            yield name, module


def is_quantized(network: nn.Module) -> bool:
    """Whether any weight of the network is quantized."""
    return next(quantized_layers(network), None) is not None


@torch.no_grad()
def dequantized(layer: nn.Linear) -> Tensor:
    """The weight of a linear layer, quantized or not, as floating point numbers: `(out_features, in_features)`."""
    weight: Any = layer.weight
    kind = weight_kind(weight)
    if kind is None:
        return weight
    if kind == "torchao":
        return weight.dequantize()
    return dequantize_bnb_weight(weight, state=weight.quant_state if kind == "4bit" else layer.state)


def base_weight(network: nn.Module) -> nn.Parameter:
    """
    A weight that shows the network's dtype and device: that of the first linear layer or convolution that is in no LoRA
    and not quantized, else the first other one. Tables and norms may be kept in float32 beside a bfloat16 network, as
    in Wan.
    """
    layers = (weight for module, weight in _plain_weights(network) if isinstance(module, _LAYERS))
    first = next(layers, None)
    return next(weight for _, weight in _plain_weights(network)) if first is None else first


def _plain_weights(network: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    for name, module in network.named_modules():
        # A quantized layer's weights may be stored in any dtype, and its bias is cast to that of its inputs.
        if "lora_" in name or (isinstance(module, nn.Linear) and weight_kind(module.weight) is not None):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                yield module, parameter


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yields the tensor itself, or the plain tensors that make up a torchao tensor."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor.detach()
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(tensor, name))


def scales(network: nn.Module) -> list[Tensor]:
    """The scales and tables of bitsandbytes' weights, which are neither parameters nor buffers of the network."""
    found: dict[int, Tensor] = {}
    layer: Any
    for _, layer in quantized_layers(network):
        weight, kind = layer.weight, weight_kind(layer.weight)
        if kind == "4bit":
            state = weight.quant_state
            states = [state] if state.state2 is None else [state, state.state2]
            tensors = [t for one in states for t in vars(one).values() if isinstance(t, Tensor)]
        elif kind == "8bit":  # the weight holds them until the first forward, then the layer
            tensors = [t for t in (weight.SCB, layer.state.SCB) if t is not None]
        else:
            tensors = []
        found |= {t.untyped_storage()._cdata: t for t in tensors}
    return list(found.values())


def described(network: nn.Module) -> str:
    """How a network's weights are quantized, as text for messages; empty if they are not."""
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


def pipeline_config(config: QuantizationConfig, network: str | Callable[[], str]) -> PipelineQuantizationConfig | None:
    """
    Converts a config to what `DiffusionPipeline.from_pretrained` takes. A pipeline's config is returned unchanged;
    diffusers' config of one model is applied to the component `network`, whose name is asked for only then.

    Raises:
        [`ValueError`]: if it is neither. The message says what to write instead.
    """
    if config is None or isinstance(config, PipelineQuantizationConfig):
        return config
    if isinstance(config, QuantizationConfigMixin):
        return PipelineQuantizationConfig(quant_mapping={network if isinstance(network, str) else network(): config})
    name = f"{type(config).__module__.partition('.')[0]}.{type(config).__name__}"
    raise ValueError(
        f"quantization_config is a {name}. Give diffusers' config of the denoiser, such as "
        "diffusers.BitsAndBytesConfig(load_in_4bit=True, ...) or diffusers.TorchAoConfig(Int8WeightOnlyConfig()), or "
        "a diffusers.PipelineQuantizationConfig(quant_mapping={'transformer': ..., ...}) ('unet' in Stable Diffusion), "
        "which takes transformers' configs for text encoders."
    )


@contextmanager
def failures_named(name: str, config: PipelineQuantizationConfig | None) -> Iterator[None]:
    """
    Explains why the base `name` can't be loaded with `config` in its block.

    Raises:
        [`ValueError`]: if the quantizer can't run here. The message says which one can.
    """
    try:
        yield
    except (AssertionError, ImportError, RuntimeError) as error:
        if config is None:
            raise
        raise ValueError(
            f"The base {name!r} cannot be quantized: {shown(error, 500)} (diffusers needs a GPU to quantize by "
            "bitsandbytes; torchao's Int8WeightOnlyConfig works on a CPU too.)"
        ) from error


def named_components(config: PipelineQuantizationConfig) -> list[str]:
    """The names of the components that a config quantizes; empty if it names none."""
    return list(config.quant_mapping or config.components_to_quantize or ())


def prepare(network: nn.Module) -> None:
    """
    Prepares a network that bitsandbytes has quantized for training in eval mode.

    On CPUs with AVX512-BF16, its 4-bit layers would rearrange their weights in the first forward without gradients,
    for example a teacher's. From then on they would pass no gradient and refuse some shapes.
    """
    for _, layer in quantized_layers(network):
        kind = weight_kind(layer.weight)
        if kind == "4bit":
            layer.__dict__["support_avx512bf16_for_cpu"] = False
        elif kind == "8bit":
            logging.getLogger("bitsandbytes.autograd._functions").addFilter(_ONCE)


def exempt_from_broadcast(model: nn.Module) -> None:
    """
    Lets DDP wrap a model with torchao's weights. DDP would send the first process's weights to the others as views,
    which torchao's tensors don't support. It isn't needed, since all processes have loaded the same weights.
    """
    names = [f"{name}.weight" for name, layer in quantized_layers(model) if weight_kind(layer.weight) == "torchao"]
    if names:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


class _Once(logging.Filter):
    """Logs bitsandbytes' message that it computes in float16 once, not at each forward of each 8-bit layer."""

    said = False

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.getMessage().startswith("MatMul8bitLt: inputs will be cast"):
            return True
        said, self.said = self.said, True
        return not said


_ONCE = _Once()


# What is refused


def quantization_problems(transformer: nn.Module, full_weights: bool) -> list[str]:
    """Why nothing can be trained on a transformer because of how it is quantized; empty if it can."""
    method = transformer.__dict__.get("quantization_method")
    if method is not None and method not in ("bitsandbytes", "torchao"):
        return [
            f"The base's transformer is quantized by {method.value}. A LoRA can only be trained on one that is "
            "quantized by bitsandbytes or torchao."
        ]
    first: dict[type, tuple[str, nn.Linear]] = {}
    for name, layer in quantized_layers(transformer):
        first.setdefault(type(layer.weight), (name, layer))
    if not first:
        return []
    if full_weights:
        return [
            f"peft_config=None trains all weights, and the base's are quantized ({described(transformer)}). Train a "
            "LoRA (peft_config='default' or a LoraConfig), or load the base without quantization."
        ]
    if any(_is_rearranged(layer) for _, layer in quantized_layers(transformer)):
        return [
            "bitsandbytes has rearranged the base's 4-bit weights for inference on this CPU, so they pass no gradient "
            "any more. Load the pipeline again, and give it to the trainer before you generate images with it."
        ]
    quantizer = transformer.__dict__.get("hf_quantizer")
    if quantizer is not None and not quantizer.is_trainable:
        how = type(quantizer.quantization_config.quant_type).__name__  # torchao's: bitsandbytes' are all trainable
        return [
            f"diffusers cannot train on a base that is quantized by torchao's {how}. Use bitsandbytes, or torchao's "
            "Int8WeightOnlyConfig or Float8WeightOnlyConfig."
        ]
    return [
        f"The base is quantized ({described(layer)}), and its layer {name} passes no gradient or a wrong one. "
        "Quantize by bitsandbytes, or only the weights by torchao's Int8WeightOnlyConfig or Float8WeightOnlyConfig."
        for name, layer in first.values()
        if not _passes_gradient(layer)
    ]


def _is_rearranged(layer: nn.Linear) -> bool:
    # bitsandbytes (0.50.2) cannot undo it: its own function leaves the scales transposed, and in bfloat16.
    weight: Any = layer.weight
    return weight_kind(weight) == "4bit" and bool(vars(weight.quant_state).get("packing_format_for_cpu"))


@torch.enable_grad()
def _passes_gradient(layer: nn.Linear) -> bool:
    weight = dequantized(layer).float()
    generator = torch.Generator().manual_seed(0)
    # Two axes before the features, as in a transformer.
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
