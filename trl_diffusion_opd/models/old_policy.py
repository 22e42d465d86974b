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

"""The old policy of DiffusionNFT: a frozen copy of the student that follows it slowly and draws the images."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from ..acceleration.sharding import forget_gathered, gathered, is_part, own_part, split_like
from ..hub.files import OLD_POLICY_FILE
from .backbone import Backbone
from .student import STUDENT_ADAPTER, frozen_copy, write_weights


OLD = "old"


class OldPolicy:
    """
    A frozen copy of the student's trained weights, in the student's precision.

    If the student is a LoRA, the copy is one more adapter on the same base. A fully trained student is copied whole.
    [`Backbone.use`] computes with the copy under the role name `OLD`.

    Args:
        backbone ([`Backbone`]): the student's backbone, to which the copy is added.
        student ([`~peft.PeftModel`] or `nn.Module`): the student. Its trained weights require gradients.
    """

    def __init__(self, backbone: Backbone, student: nn.Module):
        self._names = [name for name, p in student.named_parameters() if p.requires_grad]
        self._is_lora = isinstance(student, PeftModel)
        if isinstance(student, PeftModel):
            self._network: nn.Module = student
            weights = get_peft_model_state_dict(student, adapter_name=STUDENT_ADAPTER, save_embedding_layers=False)
            # Trainable gives it the student's precision: in a half-precision base's, small moves would be rounded
            # away.
            backbone.add_adapter(OLD, student.peft_config[STUDENT_ADAPTER], weights, trainable=True)
        else:
            self._network = frozen_copy(student)
            backbone.add_network(OLD, self._network)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Its weights, under the student's names. Don't call it between a forward and its backward."""
        forget_gathered(self._network)
        parameters = dict(self._network.named_parameters())
        if not self._is_lora:
            return {name: parameters[name] for name in self._names}
        return {name: parameters[name.replace(f".{STUDENT_ADAPTER}.", f".{OLD}.")] for name in self._names}

    @torch.no_grad()
    def follow(self, student: Mapping[str, nn.Parameter], decay: float) -> None:
        """
        Sets `old = decay old + (1 - decay) student` (arXiv 2509.16117, Algorithm 1). With decay 0 it equals the
        student to the bit.
        """
        for name, parameter in self.named_parameters().items():
            # The copy of a fully trained student is not split among processes.
            weight = own_part(student[name]) if is_part(parameter) else gathered(student[name])
            own_part(parameter).lerp_(weight, 1 - decay)

    def save(self, folder: str | Path, write: bool = True) -> None:
        """Writes it into a checkpoint, beside the weights of [`Student.save_state`]. A saved student has none."""
        write_weights(self.named_parameters(), folder, OLD_POLICY_FILE, write)

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Restores what [`save`] wrote for the same student."""
        parameters = self.named_parameters()
        for name, weight in load_file(os.path.join(folder, OLD_POLICY_FILE)).items():
            own_part(parameters[name]).copy_(split_like(weight, parameters[name]))
