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

"""A base pipeline for work without a trainer: loading it, and lending its transformer for LoRAs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .base_state import transformer_problems
from .hub_errors import explained, retried
from .quantization import failures_named, pipeline_config, prepare


def load_base(name: str, dtype: str, quantization_config: Any = None) -> DiffusionPipeline:
    """
    Loads a base pipeline by its Hub id or folder, in `"float32"`, `"bfloat16"` or `"float16"`, and as a
    `quantization_config` of diffusers says.

    Raises:
        [`ValueError`]: if it cannot be loaded, with what to check.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "use_safetensors": True}
    config = pipeline_config(quantization_config)
    if config is not None:
        options["quantization_config"] = config
    with failures_named(name, config), explained(f"The base {name!r}", name):
        try:
            return retried(DiffusionPipeline.from_pretrained, name, **options)
        except OSError as error:
            if not os.path.isdir(name):
                raise
            raise ValueError(
                f"The base {name!r} cannot be loaded: it needs a model_index.json and .safetensors weights. ({error})"
            ) from error


@contextmanager
def borrowed(pipeline: Any) -> Iterator[Any]:
    """The pipeline's transformer to put LoRAs on, which are gone afterwards, also when a teacher cannot be loaded."""
    transformer = pipeline.components.get("transformer")
    if isinstance(transformer, nn.Module) and any(isinstance(m, BaseTunerLayer) for m in transformer.modules()):
        raise ValueError(
            "The pipeline already carries a LoRA, which would count as part of the base. Remove it with "
            "pipe.unload_lora_weights(), and pass it as a student or a teacher."
        )
    if isinstance(transformer, nn.Module):
        problems = transformer_problems(transformer)
        if problems:
            raise ValueError("The pipeline cannot be used as a base:\n" + "\n".join(f"- {line}" for line in problems))
        prepare(transformer)
    networks = [component for component in pipeline.components.values() if isinstance(component, nn.Module)]
    modes = [(module, module.training) for network in networks for module in network.modules()]
    trained = [(parameter, parameter.requires_grad) for network in networks for parameter in network.parameters()]
    for network in networks:
        network.eval()
    try:
        yield transformer
    finally:
        if isinstance(transformer, nn.Module):
            recurse_remove_peft_layers(transformer)
            # PEFT leaves it on the model, and load_lora_weights would take its names for adapters that are there.
            transformer.__dict__.pop("peft_config", None)
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
