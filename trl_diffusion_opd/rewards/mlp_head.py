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

"""Loads the head of LAION's aesthetic predictor and of ImageReward, which turns an embedding into a score."""

from collections.abc import Mapping

import torch
from torch import nn

from .model_files import ModelFiles, check_loaded


_WIDTHS = (1024, 128, 64, 16, 1)
# Numbers of the linear layers in the official heads' names. The gaps are dropout, which has no effect here.
_POSITIONS = (0, 2, 4, 6, 7)


def load_head(files: ModelFiles, tensors: Mapping[str, torch.Tensor], width: int) -> nn.Sequential:
    """
    Loads five linear layers without nonlinearities between them.

    Args:
        files (`ModelFiles`): the source of the tensors, for messages.
        tensors (`dict[str, torch.Tensor]`): `layers.0.weight` and so on, with the official heads' numbers.
        width (`int`): width of the embedding.

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
