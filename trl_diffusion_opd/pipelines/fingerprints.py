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
Hashes of everything that a pipeline's images and embeddings depend on. Kept images and embeddings are reused only if
the hash is the same.
"""

import hashlib
import json
import tempfile
from pathlib import Path

import diffusers
import torch
import transformers
import xxhash
from diffusers import ConfigMixin, DiffusionPipeline
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..acceleration.quantization import plain_tensors
from .denoiser import DENOISERS


# Entries of a component's config that don't change its output, or that the weights show already (the precision).
_UNIMPORTANT = ("architectures", "dtype", "torch_dtype", "transformers_version")
# Settings of a component that don't change its embeddings: where it comes from, a tokenizer's last call, and what the
# weights show already.
_PASSING = (
    "_name_or_path",
    "name_or_path",
    "is_local",
    "local_files_only",
    "architectures",
    "_class_name",
    "dtype",
    "truncation",
    "padding",
    "transformers_version",
    "_diffusers_version",
)


def base_digest(pipeline: DiffusionPipeline) -> str:
    """
    A SHA-256 digest of everything in a pipeline that affects its images: weights, configs and vocabularies.

    It is computed from memory, so it does not matter how the pipeline was loaded. The same weights in another
    precision have another digest.
    """
    hashed = hashlib.sha256(type(pipeline).__name__.encode())
    for name, component in sorted(pipeline.components.items()):
        hashed.update(json.dumps([name, type(component).__name__, config_of(component)], default=str).encode())
        if isinstance(component, PreTrainedTokenizerBase):
            hashed.update(json.dumps(sorted(component.get_vocab().items())).encode())
        if isinstance(component, nn.Module):
            for key, tensor in sorted(component.state_dict().items()):
                for part in plain_tensors(tensor):
                    hashed.update(f"{key} {part.dtype} {tuple(part.shape)}".encode())
                    hashed.update(bytes_of(part).numpy().data)
    return hashed.hexdigest()


def config_of(component: object) -> dict[str, object]:
    """A component's settings that affect its output, with sorted names; empty if it has no config."""
    if isinstance(component, ConfigMixin):
        config = dict(component.config)
    elif isinstance(component, nn.Module) and isinstance(component.__dict__.get("config"), PretrainedConfig):
        config = component.__dict__["config"].to_dict()
    else:
        return {}
    return {key: config[key] for key in sorted(config) if not key.startswith("_") and key not in _UNIMPORTANT}


def encoder_fingerprint(pipeline: DiffusionPipeline) -> str:
    """
    A hash of everything that a pipeline's text embeddings depend on besides the prompt and the options of the call.

    It includes the weights, buffers and config of its text encoders (all modules but denoiser, VAE and scheduler),
    the files of its tokenizers, its own settings, the denoiser's dtype (some pipelines cast embeddings to it), and
    the versions of diffusers and transformers.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    digest = xxhash.xxh3_128()
    digest.update(type(pipeline).__name__.encode())
    digest.update(_settings({k: v for k, v in pipeline.config.items() if k not in pipeline.components}))
    digest.update(f"{diffusers.__version__} {transformers.__version__}".encode())
    for name, component in sorted(pipeline.components.items()):
        digest.update(f"{name}: {type(component).__name__}".encode())
        if name.startswith(DENOISERS) and isinstance(component, nn.Module):
            dtypes = {str(p.dtype) for n, p in component.named_parameters() if "lora_" not in n}
            digest.update(repr(sorted(dtypes)).encode())
        elif name == "scheduler" or name.startswith((*DENOISERS, "vae")) or component is None:
            continue
        elif isinstance(component, nn.Module):
            _add_module(digest, component)
        elif isinstance(component, (int, float, str, bool)):
            digest.update(repr(component).encode())
        else:
            _add_files(digest, component)
    return digest.hexdigest()


def _add_module(digest: xxhash.xxh3_128, module: nn.Module) -> None:
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            for part in plain_tensors(value):
                digest.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
                digest.update(bytes_of(part).numpy().data)
    # Facts that the weights don't show: number of heads, activations, which layer is used.
    if isinstance(module, PreTrainedModel):
        entries = module.config.to_dict()
    else:
        entries = dict(module.config) if isinstance(module, ConfigMixin) else {"modules": repr(module)}
    digest.update(_settings(entries))


def _add_files(digest: xxhash.xxh3_128, component: PreTrainedTokenizerBase | ProcessorMixin) -> None:
    """Adds the files of a tokenizer or processor. Saving it covers all classes, whatever their formats."""
    with tempfile.TemporaryDirectory() as folder:
        component.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(str(path.relative_to(folder)).encode())
                digest.update(
                    _settings(json.loads(path.read_bytes())) if path.suffix == ".json" else path.read_bytes()
                )


def _settings(entries: object) -> bytes:
    """A component's settings as JSON, without those in `_PASSING`."""
    if isinstance(entries, dict):
        entries = {name: value for name, value in entries.items() if name not in _PASSING}
    return json.dumps(entries, sort_keys=True, default=str).encode()


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
