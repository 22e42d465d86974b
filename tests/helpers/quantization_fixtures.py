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
The tiny pipeline, quantized, and its float32 reference, whose weights are dequantized without the package's code.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, StableDiffusion3Pipeline, TorchAoConfig
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer
from helpers.tiny_sd3 import make_pipeline, make_transformer
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig


# Quantiles of a normal distribution, of the QLoRA paper (appendix E).
NF4 = (
    (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635)
    + (-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725)
    + (0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
)
KINDS = ("nf4", "nf4 nested", "int8", "torchao int8", "torchao float8")
# Their inputs have 16 features here, and bitsandbytes' kernel for CPUs is wrong for rows shorter than a block, which
# is 64.
NARROW = ["context_embedder", "time_text_embed"]


def make_base() -> StableDiffusion3Pipeline:
    """The tiny pipeline with a transformer of width 64."""
    pipeline = make_pipeline()
    pipeline.transformer = make_transformer(num_attention_heads=4, attention_head_dim=16, caption_projection_dim=64)
    return pipeline


def config(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A config of diffusers for the transformer."""
    if kind.startswith("nf4"):
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=kind == "nf4 nested",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(NARROW),
        )
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return TorchAoConfig({"torchao int8": Int8WeightOnlyConfig, "torchao float8": Float8WeightOnlyConfig}[kind]())


def without_gpu(monkeypatch: Any) -> None:
    """diffusers asks for a GPU before it quantizes by bitsandbytes, whose layers run on a CPU as well."""
    for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})


def load(folder: str | Path, kind: str, dtype: torch.dtype = torch.float32) -> StableDiffusion3Pipeline:
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": config(kind, dtype)})
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, dtype=dtype, quantization_config=mapping)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def weight(layer: nn.Linear, kind: str) -> torch.Tensor:
    """The float32 weight that a quantized layer stands for."""
    stored: Any = layer.weight
    if kind.startswith("nf4"):
        state, packed = stored.quant_state, stored.data.flatten()
        numbers = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
        scale = state.absmax
        if kind == "nf4 nested":
            scale = state.state2.code[scale.long()] * state.state2.absmax.repeat_interleave(256)[: len(scale)]
            scale = scale + state.offset
        values = torch.tensor(NF4)[numbers].view(-1, 64) * scale.unsqueeze(1)
        return values.reshape(layer.out_features, layer.in_features)
    if kind == "int8":
        scale = layer.state.SCB if stored.SCB is None else stored.SCB
        return stored.data.float() * scale.unsqueeze(1) / 127
    return stored.qdata.float() * stored.scale.float()


class Int8Inputs(nn.Linear):
    """LLM.int8: each row of the inputs in 8 bits, with the gradient of the layer without that."""

    # bitsandbytes has it for 1 / 127²; the gradient's is exact.
    FACTOR = 6.200124e-05 * 127**2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = x.detach().half().float()
        assert half.abs().max() < 6, "beyond it bitsandbytes computes a column in float16"
        scale = half.abs().amax(-1, keepdim=True)
        rounded = (half * (127 / scale).nan_to_num(posinf=0)).round() * scale / 127
        value = nn.functional.linear(rounded, self.weight * self.FACTOR, self.bias)
        output = nn.functional.linear(x, self.weight, self.bias)
        return output + (value - output).detach()


@torch.no_grad()
def dequantized(quantized: nn.Module, kind: str, into: nn.Module) -> nn.Module:
    """
    `into`, a float32 network of the same layers, with the weights of `quantized`, and its rounding of inputs if any.
    """
    layers = dict(into.named_modules())
    for name, layer in quantized.named_modules():
        if isinstance(layer, nn.Linear) and type(layer.weight) is not nn.Parameter:
            layers[name].weight.copy_(weight(layer, kind))
            if kind == "int8":
                layers[name].__class__ = Int8Inputs
    return into
