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

"""What an image and a score depend on, as digests: stored ones of another digest are not used again."""

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pickle import PicklingError
from typing import Any

import torch
from datasets.fingerprint import Hasher
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..acceleration.quantization import plain_tensors
from ..models.teachers import Role
from ..rewards import Reward, RewardFunc


# Of a component's config: who wrote it, and in what precision, which the weights tell.
_UNIMPORTANT = ("architectures", "dtype", "torch_dtype", "transformers_version")


def digest(*parts: Any) -> str:
    """A short digest of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def base_digest(pipeline: DiffusionPipeline) -> str:
    """
    SHA-256 over everything of a pipeline that its images depend on: weights, configs and vocabularies of its components.

    It is taken from memory, so it is the same for a pipeline that was loaded here and for one that was handed in. Weights
    in another precision are other weights.
    """
    hashed = hashlib.sha256(type(pipeline).__name__.encode())
    for name, component in sorted(pipeline.components.items()):
        hashed.update(json.dumps([name, type(component).__name__, _config(component)], default=str).encode())
        if isinstance(component, PreTrainedTokenizerBase):
            hashed.update(json.dumps(sorted(component.get_vocab().items())).encode())
        if isinstance(component, nn.Module):
            for key, tensor in sorted(component.state_dict().items()):
                for part in plain_tensors(tensor):
                    hashed.update(f"{key} {part.dtype} {tuple(part.shape)}".encode())
                    hashed.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def _config(component: Any) -> dict[str, Any]:
    if isinstance(component, ConfigMixin):
        config = dict(component.config)
    elif isinstance(component, nn.Module) and isinstance(component.__dict__.get("config"), PretrainedConfig):
        config = component.__dict__["config"].to_dict()
    else:
        return {}
    return {key: config[key] for key in sorted(config) if not key.startswith("_") and key not in _UNIMPORTANT}


def model_identity(roles: Sequence[Role]) -> list[list[Any]]:
    """What tells a model from others on the same base: files, guidance and weight of each of its networks."""
    return [[role.teacher.kind, role.teacher.sha256, role.guidance_scale, role.weight] for role in roles]


def rows_digest(columns: Mapping[str, Sequence[Any]]) -> str:
    """Of the rows of a dataset, all columns."""
    return Hasher.hash({name: list(values) for name, values in columns.items()})


def reward_digest(function: RewardFunc) -> str | None:
    """
    What a reward's scores depend on besides image and row; `None` if it can't be told, and it must score again.

    A reward of this package says it itself. Of another function it is its content and the source of its module, since a
    function that can be imported is hashed by its name alone.
    """
    if isinstance(function, Reward):
        return function.fingerprint
    try:
        content = Hasher.hash(function)
    except (PicklingError, TypeError, AttributeError):
        return None
    module = inspect.getmodule(function if inspect.isroutine(function) else type(function))
    try:
        return digest(content, inspect.getsource(module) if module is not None else None)
    except (OSError, TypeError):  # typed in, or not written in Python
        return digest(content)
