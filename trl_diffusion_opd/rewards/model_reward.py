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

"""The base class of rewards that run a model, and strict loading of such models."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from PIL.Image import Image
from safetensors import SafetensorError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..guards.redaction import shown
from .base import Reward, Row
from .model_files import ModelFiles, check_loaded


M = TypeVar("M", bound=nn.Module)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class ModelReward(Reward):
    """
    A reward that is computed by a frozen model.

    Subclasses load their models in the constructor, so that problems show before the first step. They implement
    [`_predict`], which is called in inference mode and without autocast.

    Attributes:
        identity (`str`): the files that the score depends on, for the fingerprint.

    Args:
        files (`list[ModelFiles]`): all files that the score depends on.
        device (`str` or [`torch.device`], *optional*): the model's device. Defaults to this process's own.
        dtype (`str` or [`torch.dtype`], *optional*, defaults to `"float32"`): the model's dtype: `"float32"`,
            `"float16"` or `"bfloat16"`. Everything after the model's features is computed in float32.
        batch_size (`int`, *optional*, defaults to `16`): number of images at a time. It does not change the scores.
    """

    def __init__(
        self,
        files: Sequence[ModelFiles],
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "float32",
        batch_size: int = 16,
    ):
        super().__init__(batch_size)
        self.dtype = parse_dtype(self.name, dtype)
        self.device = PartialState().device if device is None else torch.device(device)
        self.identity = " ".join(dict.fromkeys(part.identity for part in files))

    @property
    def fingerprint(self) -> str:
        """Name, repositories with their commits, and dtype."""
        return f"{self.name} {self.identity} {str(self.dtype).removeprefix('torch.')}"

    def _placed(self, model: M, dtype: torch.dtype | None = None) -> M:
        """Moves a model to this reward's device and dtype (or the given one), without dropout and gradients."""
        return model.to(self.device, dtype or self.dtype).eval().requires_grad_(False)

    def _score(self, prompts: list[str], images: list[Image], rows: list[Row]) -> list[float]:
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            return self._predict(prompts, images).float().tolist()

    def _predict(self, prompts: list[str], images: list[Image]) -> torch.Tensor:
        """Scores a batch of RGB images. Returns `[batch]`."""
        raise NotImplementedError


def parse_dtype(reward: str, dtype: str | torch.dtype) -> torch.dtype:
    """Returns a dtype by its name. Only dtypes in which reward models work are accepted."""
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"Reward {reward!r}: dtype={name!r}, it must be one of {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def load_pretrained(
    model_class: type[PreTrainedModel],
    files: ModelFiles,
    config: PretrainedConfig | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
    **options: Any,
) -> Any:
    """
    Loads a transformers model in float32 on the CPU. The files must have exactly the model's weights.

    Args:
        model_class (`type`): the model's class, such as [`~transformers.CLIPModel`].
        files (`ModelFiles`): the model's files, with `config.json` and safetensors unless the next two are given.
        config ([`~transformers.PreTrainedConfig`], *optional*), tensors (`dict[str, torch.Tensor]`, *optional*): the
            model's configuration, and its weights by their names in transformers.
        options: other arguments of the class.

    Raises:
        [`ValueError`]: if weights are missing, unexpected or of another shape.
    """
    try:
        loaded: Any = model_class.from_pretrained(
            files.folder if tensors is None else None,
            config=config,
            state_dict=tensors,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with the others
            **options,
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{files.shown}: cannot be loaded: {shown(error, 500)}") from error
    model, info = loaded
    check_loaded(
        files,
        info["missing_keys"],
        info["unexpected_keys"],
        [name for name, *_ in info["mismatched_keys"]],
    )
    return model
