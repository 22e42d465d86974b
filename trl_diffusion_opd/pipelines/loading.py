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

"""Loads a base pipeline, and lets code without a trainer put LoRAs on its transformer for a while."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from huggingface_hub.errors import HFValidationError
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..acceleration.quantization import QuantizationConfig, failures_named, pipeline_config, prepare
from ..guards.files import JSON
from ..guards.redaction import shown
from ..hub.errors import explained, retried
from ..problems import Problems, Refusal
from .base_state import denoiser_problems
from .denoiser import denoiser, denoiser_name, denoiser_name_in
from .loading_options import loading_options
from .single_file import SUFFIX, load_single_file


_OTHER_FILES = (".ckpt", ".pt", ".pth", ".bin", ".gguf")


def load_pipeline(
    model: str | DiffusionPipeline,
    dtype: str,
    model_init_kwargs: Mapping[str, JSON] | None = None,
    quantization_config: QuantizationConfig = None,
) -> DiffusionPipeline:
    """
    Returns a base pipeline that is ready for training. Loads it if it is given by name.

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]): a Hub id, a folder, a pipeline, or a single file: a path or
            `owner/repo/file.safetensors`. See [`~single_file.load_single_file`].
        dtype (`str`): dtype of the weights: `"float32"`, `"bfloat16"` or `"float16"`.
        model_init_kwargs (`dict`, *optional*): further arguments of `from_pretrained`, such as `revision` and
            `variant`; of a single file `config`, a folder or Hub id with the configs that it lacks.
        quantization_config (*optional*): a quantization config of diffusers, for the transformer or the whole
        pipeline.

    Raises:
        [`ValueError`]: if it cannot be loaded. The message says what to check.
    """
    if not isinstance(model, str | DiffusionPipeline):
        raise Refusal(
            f"The model is a {type(model).__name__}; it must be a Hub id, a folder or a diffusers pipeline (the "
            "trainer uses its transformer)."
        )
    pipeline = _loaded(model, dtype, model_init_kwargs, quantization_config) if isinstance(model, str) else model
    transformer = denoiser(pipeline)
    if isinstance(transformer, nn.Module):
        prepare(transformer)
    return pipeline


def _loaded(
    name: str, dtype: str, model_init_kwargs: Mapping[str, JSON] | None, quantization_config: QuantizationConfig
) -> DiffusionPipeline:
    check_base_name(name)
    options = loading_options(dtype, model_init_kwargs)
    if name.endswith(SUFFIX) and not Path(name).is_dir():
        if quantization_config is not None:
            raise Refusal(
                f"The base {name!r} is a single file, which is not quantized while it is loaded. Load it without, save "
                "the pipeline with save_pretrained, and name that folder."
            )
        return load_single_file(name, options, options.pop("config", None), options.pop("revision", None))
    try:
        with explained(f"The base model {name!r}", name, options.get("revision")):
            config = pipeline_config(quantization_config, lambda: _denoiser_name(name, options))
        if config is not None:
            options["quantization_config"] = config
        with failures_named(name, config), explained(f"The base model {name!r}", name, options.get("revision")):
            return retried(DiffusionPipeline.from_pretrained, name, **options)
    except (OSError, HFValidationError) as error:
        raise Refusal(
            f"The base model {name!r} cannot be loaded. If it is a Hub id, check its spelling, your connection and, "
            "for a gated model, `hf auth login`; if it is a folder, it needs a model_index.json and .safetensors "
            f"weights. ({shown(error, 500)})"
        ) from error


def _denoiser_name(name: str, options: Mapping[str, Any]) -> str:
    """The name of the denoiser of a pipeline that is not loaded yet."""
    where = {key: options[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in options}
    return denoiser_name_in(retried(DiffusionPipeline.load_config, name, **where))


def check_base_name(name: str) -> None:
    """
    Checks that a base is no file of a kind that is not read, and no folder with a single file.

    Raises:
        [`ValueError`]: if it is. The message says how to load it.
    """
    path = Path(name)
    if path.suffix in _OTHER_FILES and not path.is_dir():
        raise Refusal(
            f"The base {name!r} is a {path.suffix} file, and of single files only .safetensors are read: others may run "
            "code or hold quantized weights. Where you trust it: "
            f'safetensors.torch.save_file(torch.load("{path.name}", weights_only=True), "{path.stem}.safetensors"), '
            'with ["state_dict"] behind torch.load(…) if it has that key.'
        )
    if path.is_dir() and not (path / "model_index.json").exists() and not (path / "config.json").exists():
        files = sorted(file for file in path.iterdir() if file.suffix in (SUFFIX, *_OTHER_FILES))
        if files:
            raise Refusal(
                f"The base {name!r} is a folder without a model_index.json. If {files[0].name!r} in it is a single file "
                f"with the whole model, name that file: {str(files[0])!r}."
            )


@contextmanager
def borrowed(pipeline: DiffusionPipeline) -> Iterator[ModelMixin]:
    """
    Yields the pipeline's transformer, on which its block may put LoRAs. Afterwards they are removed and the pipeline
    is as before, even after an error.
    """
    transformer = denoiser(pipeline)
    if isinstance(transformer, nn.Module) and any(isinstance(m, BaseTunerLayer) for m in transformer.modules()):
        raise Refusal(
            "The pipeline already carries a LoRA, which would count as part of the base. Remove it with "
            "pipe.unload_lora_weights(), and pass it as a student or a teacher."
        )
    if isinstance(transformer, nn.Module):
        Problems(denoiser_problems(transformer, denoiser_name(pipeline))).raise_under(
            "The pipeline cannot be used as a base"
        )
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
            # PEFT leaves its config on the model, and load_lora_weights would take its names for existing adapters.
            transformer.__dict__.pop("peft_config", None)
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
