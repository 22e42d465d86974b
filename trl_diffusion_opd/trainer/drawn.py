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

"""Data of an update of distribution matching: the states that the student's walks leave for training."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.readers import Texts


@dataclass
class Drawn:
    """
    What a micro-batch's walks leave for training. Each sample has a step of its own, drawn at random.

    Attributes:
        task (`str`), texts ([`Texts`]): the task, and what each model reads. The fake reads what the student does.
        positions (`list[int]`): as [`Rounds.turn`] gives them.
        generators (`list[torch.Generator]`): those of the noise at which the student is judged.
        start (`Tensor` of shape `(B, ...)`), levels (`Tensor` of shape `(B,)`): the state before the step.
        image (`Tensor` of the same shape): the image that the step predicts, detached.
        end (`Tensor` of the same shape), end_levels (`Tensor` of shape `(B,)`): what is noised again: the image, or
            in TDM the state after the step.
    """

    task: str
    texts: Texts
    positions: list[int]
    generators: list[torch.Generator]
    start: Tensor
    levels: Tensor
    image: Tensor
    end: Tensor
    end_levels: Tensor
