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

from collections.abc import Mapping

import torch
from torch import nn

from ..acceleration.sharding import gathered, is_part, own_part
from ..hub.files import OLD_POLICY_FILE
from .student_copy import KeptCopy


OLD = "old"


class OldPolicy(KeptCopy):
    """A frozen copy of the student's trained weights, under the role name `OLD`. See [`StudentCopy`]."""

    role, file = OLD, OLD_POLICY_FILE

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
