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

"""The head that LAION's aesthetic predictor and ImageReward put on an embedding."""

from collections.abc import Mapping

import torch
from torch import nn

from .model_files import ModelFiles, check_loaded


_WIDTHS = (1024, 128, 64, 16, 1)
# The official heads have dropout, which does nothing here but counts in their names.
_POSITIONS = (0, 2, 4, 6, 7)


def load_head(files: ModelFiles, tensors: Mapping[str, torch.Tensor], width: int) -> nn.Sequential:
    """
    Five linear layers, with no nonlinearity between them.

    Args:
        files (`ModelFiles`): where the tensors are from, for messages.
        tensors (`dict[str, torch.Tensor]`): `layers.0.weight` and so on; dropout is counted.
        width (`int`): of the embedding.

    Returns:
        [`torch.nn.Sequential`]: from `[batch, width]` to `[batch, 1]`.
    """
    sizes = zip((width, *_WIDTHS[:-1]), _WIDTHS, strict=True)
    with torch.device("meta"):
        head = nn.Sequential(*(nn.Linear(inputs, outputs) for inputs, outputs in sizes))
    names = {
        f"layers.{official}.{part}": f"{own}.{part}"
        for own, official in enumerate(_POSITIONS)
        for part in ("weight", "bias")
    }
    shapes = {name: head.get_parameter(own).shape for name, own in names.items()}
    check_loaded(
        files,
        sorted(names.keys() - tensors.keys()),
        sorted(tensors.keys() - names.keys()),
        [name for name, shape in shapes.items() if name in tensors and tensors[name].shape != shape],
    )
    head.load_state_dict({own: tensors[name].float() for name, own in names.items()}, assign=True)
    return head
