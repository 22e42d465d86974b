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

"""A frozen copy of the student's trained weights: one more adapter on the same base, or a second whole network."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from ..acceleration.sharding import forget_gathered, own_part, split_like
from .backbone import Backbone
from .student import STUDENT_ADAPTER, frozen_copy, write_weights


class StudentCopy:
    """
    A frozen copy of the student's trained weights, in the student's precision.

    If the student is a LoRA, the copy is one more adapter on the same base. A fully trained student is copied whole.
    [`Backbone.use`] computes with the copy under its role name.

    Args:
        backbone ([`Backbone`]): the student's backbone, to which the copy is added.
        student ([`~peft.PeftModel`] or `nn.Module`): the student. Its trained weights require gradients.
        role (`str`): the copy's role name.

    Attributes:
        network (`nn.Module`): the module that it computes in.
        is_lora (`bool`): whether it is an adapter on the student's own network.
    """

    def __init__(self, backbone: Backbone, student: nn.Module, role: str):
        self.role = role
        self._names = [name for name, p in student.named_parameters() if p.requires_grad]
        self.is_lora = isinstance(student, PeftModel)
        if isinstance(student, PeftModel):
            self.network: nn.Module = student
            weights = get_peft_model_state_dict(student, adapter_name=STUDENT_ADAPTER, save_embedding_layers=False)
            # Trainable gives it the student's precision: in a half-precision base's, small moves would be rounded
            # away.
            backbone.add_adapter(role, student.peft_config[STUDENT_ADAPTER], weights, trainable=True)
        else:
            self.network = frozen_copy(student)
            backbone.add_network(role, self.network)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Its weights, under the student's names. Don't call it between a forward and its backward."""
        forget_gathered(self.network)
        parameters = dict(self.network.named_parameters())
        if not self.is_lora:
            return {name: parameters[name] for name in self._names}
        return {name: parameters[name.replace(f".{STUDENT_ADAPTER}.", f".{self.role}.")] for name in self._names}

    @torch.no_grad()
    def take(self, parts: Sequence[Tensor]) -> None:
        """
        Copies this process's parts of weights, in the student's order. The copy must be split among processes as the
        student is, which that of a fully trained one is not.
        """
        for parameter, part in zip(self.named_parameters().values(), parts, strict=True):
            own_part(parameter).copy_(part)


class KeptCopy(StudentCopy):
    """
    A copy that checkpoints hold. Subclasses name its `role` and its `file`.

    Args:
        backbone ([`Backbone`]), student ([`~peft.PeftModel`] or `nn.Module`): as for [`StudentCopy`].
    """

    role: str
    file: str

    def __init__(self, backbone: Backbone, student: nn.Module):
        super().__init__(backbone, student, self.role)

    def save(self, folder: str | Path, write: bool = True) -> None:
        """Writes it into a checkpoint, beside the weights of [`Student.save_state`]. A saved student has none."""
        write_weights(self.named_parameters(), folder, self.file, write)

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Restores what [`save`] wrote for the same student."""
        parameters = self.named_parameters()
        for name, weight in load_file(os.path.join(folder, self.file)).items():
            own_part(parameters[name]).copy_(split_like(weight, parameters[name]))
