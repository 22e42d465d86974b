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

"""Tensors in lists and tuples, as pipelines return them: embeddings of prompts, latents with their position ids."""

from typing import Any

import torch
from torch import Tensor


def on_device(value: Any, device: str | torch.device | None) -> Any:
    """The same with its tensors on a device. Anything else in it stays as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(on_device(item, device) for item in value)
    return value


def nbytes(value: Any) -> int:
    """The size of its tensors."""
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(nbytes(item) for item in value) if isinstance(value, (list, tuple)) else 0
