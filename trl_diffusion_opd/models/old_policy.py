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

"""The policy that draws the images of DiffusionNFT: a frozen copy of the student, which follows it slowly."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from ..acceleration.sharding import forget_gathered, gathered, is_part, own_part, split_like, whole
from ..guards.file_modes import give_usual_mode
from ..hub.files import OLD_POLICY_FILE
from .backbone import Backbone
from .student import STUDENT_ADAPTER, frozen_copy


OLD = "old"


class OldPolicy:
    """
    A frozen copy of the student, weight by weight in the student's precision.

    Beside a LoRA it is one more adapter of the same base; a fully trained student is copied whole. [`Backbone.use`] computes
    as it by the name of `OLD`.

    Args:
        backbone ([`Backbone`]): the student's, to which it is added.
        student ([`~peft.PeftModel`] or `nn.Module`): of which what is trained requires gradients.
    """

    def __init__(self, backbone: Backbone, student: nn.Module):
        self._names = [name for name, p in student.named_parameters() if p.requires_grad]
        self._is_lora = isinstance(student, PeftModel)
        if isinstance(student, PeftModel):
            self._network: nn.Module = student
            weights = get_peft_model_state_dict(student, adapter_name=STUDENT_ADAPTER, save_embedding_layers=False)
            # As a trainable one it gets the student's precision: small moves would be lost in that of a half-precise base.
            backbone.add_adapter(OLD, student.peft_config[STUDENT_ADAPTER], weights, trainable=True)
        else:
            self._network = frozen_copy(student)
            backbone.add_network(OLD, self._network)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Its weights by the names of the student's. Not to be called between a forward and its backward."""
        forget_gathered(self._network)
        parameters = dict(self._network.named_parameters())
        if not self._is_lora:
            return {name: parameters[name] for name in self._names}
        return {name: parameters[name.replace(f".{STUDENT_ADAPTER}.", f".{OLD}.")] for name in self._names}

    @torch.no_grad()
    def follow(self, student: Mapping[str, nn.Parameter], decay: float) -> None:
        """`old = decay old + (1 - decay) student` (arXiv 2509.16117, Algorithm 1); at 0 it is the student, to the bit."""
        for name, parameter in self.named_parameters().items():
            # The copy of a fully trained student is not split.
            weight = own_part(student[name]) if is_part(parameter) else gathered(student[name])
            own_part(parameter).lerp_(weight, 1 - decay)

    def save(self, folder: str | Path, write: bool = True) -> None:
        """Writes it into a checkpoint, of which it is a part as [`Student.save_state`]'s weights; of a saved student not."""
        weights = whole(self.named_parameters(), keep=write)
        if write:
            save_file(weights, os.path.join(folder, OLD_POLICY_FILE), metadata={"format": "pt"})
            give_usual_mode(folder, OLD_POLICY_FILE)

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Restores what [`save`] wrote for the same student."""
        parameters = self.named_parameters()
        for name, weight in load_file(os.path.join(folder, OLD_POLICY_FILE)).items():
            own_part(parameters[name]).copy_(split_like(weight, parameters[name]))
