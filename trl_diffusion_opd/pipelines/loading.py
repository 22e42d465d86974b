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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..acceleration.quantization import failures_named, pipeline_config, prepare
from ..guards.redaction import listed, shown
from ..hub.errors import explained, retried
from ..trainer.options import dtype_name
from .base_state import transformer_problems


_WHOLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")


def load_base(
    name: str, dtype: str, quantization_config: Any = None, model_init_kwargs: Mapping[str, Any] | None = None
) -> DiffusionPipeline:
    """
    Loads a base pipeline by its Hub id or folder, in `"float32"`, `"bfloat16"` or `"float16"`, as a `quantization_config` of
    diffusers says, and with further arguments of `from_pretrained`, such as `revision` and `variant`.

    Raises:
        [`ValueError`]: if it cannot be loaded, with what to check.
    """
    check_base_name(name)
    options = loading_options(dtype, model_init_kwargs)
    config = pipeline_config(quantization_config)
    if config is not None:
        options["quantization_config"] = config
    with failures_named(name, config), explained(f"The base {name!r}", name, options.get("revision")):
        try:
            return retried(DiffusionPipeline.from_pretrained, name, **options)
        except OSError as error:
            if not os.path.isdir(name):
                raise
            raise ValueError(
                f"The base {name!r} cannot be loaded: it needs a model_index.json and .safetensors weights. ({shown(error, 500)})"
            ) from error


def loading_options(dtype: str, model_init_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """
    Arguments of `DiffusionPipeline.from_pretrained`, which takes a dtype that is text for none.

    Args:
        dtype (`str`): of the base.
        model_init_kwargs (`dict`, *optional*): further arguments. A `dtype` or `torch_dtype` of theirs counts where it has one
            for each component.
    """
    options = dict(model_init_kwargs or {})
    named = [options.pop(name, None) for name in ("dtype", "torch_dtype")]
    of_components = next((one for one in named if isinstance(one, Mapping)), None)
    if of_components is None:
        options["dtype"] = getattr(torch, dtype)
    else:
        options["dtype"] = {part: getattr(torch, dtype_name(one) or "") for part, one in of_components.items()}
    return {**options, "use_safetensors": True}


def check_base_name(name: str) -> None:
    """
    Refuses what holds a whole model in one file, in place of a folder of diffusers.

    Raises:
        [`ValueError`]: with how to load it.
    """
    path = Path(name)
    files = [path] if path.suffix in _WHOLE_FILES else []
    if path.is_dir() and not (path / "model_index.json").exists() and not (path / "config.json").exists():
        files = sorted(file for file in path.iterdir() if file.suffix in _WHOLE_FILES)
    if files:
        where = (
            f"{name!r} is" if files == [path] else f"{name!r} has no model_index.json, and {files[0].name!r} in it is"
        )
        raise ValueError(
            f"The base {where} a single file, and a base by name is a folder of diffusers or a Hub id. If it holds the whole "
            f"model: pipe = StableDiffusion3Pipeline.from_single_file({str(files[0])!r}), or with the class of your model, "
            "then pass pipe as the model, or pipe.save_pretrained(folder) and name that folder."
        )


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
            raise ValueError("The pipeline cannot be used as a base:\n" + listed(problems))
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
