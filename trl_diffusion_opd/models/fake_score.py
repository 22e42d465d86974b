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

"""The fake score of distribution matching distillation: a copy of the student that learns to denoise its images."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..acceleration.sharding import gathered, load_whole_optimizer_state, mean_gradients, whole_optimizer_state
from ..hub.files import FAKE_OPTIMIZER_FILE, FAKE_SCORE_FILE
from .student_copy import KeptCopy


FAKE = "fake"

# Entries of an optimizer's parameter group that the arguments set. Some optimizers keep state in others.
_SETTINGS = ("lr", "weight_decay", "betas", "eps")


class FakeScore(KeptCopy):
    """
    A copy of the student's weights, under the role name `FAKE`, with an optimizer of its own. See [`StudentCopy`].

    Its weights require gradients only inside [`~FakeScore.trained`]. So the student's optimizer never gets them, and
    DDP, which wraps the model outside, does not wait for their gradients.
    """

    role, file = FAKE, FAKE_SCORE_FILE
    optimizer: torch.optim.Optimizer | None = None

    def start_optimizer(self, kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> torch.optim.Optimizer:
        """Makes its optimizer. Call it when the weights have been split among processes, if they will be."""
        self.optimizer = kind(list(self.named_parameters().values()), **options)
        return self.optimizer

    @contextmanager
    def trained(self) -> Iterator[None]:
        """Context in which its weights require gradients. Afterwards they have none."""
        # PEFT finds an adapter's parameters in the modules, which hold others while FSDP2 has gathered them.
        parameters = list(self.named_parameters().values())
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in self.named_parameters().values():
                parameter.requires_grad_(False)
                parameter.grad = None

    def step(self, max_norm: float) -> float:
        """
        Takes a step of the optimizer with the mean of all processes' gradients, and removes the gradients.

        Args:
            max_norm (`float`): gradients of a larger norm are scaled down to it; 0 for no limit.

        Returns:
            `float`: the norm of the gradients, before it is limited. If it is not finite, no step is taken.
        """
        assert self.optimizer is not None
        parameters = [p for p in self.named_parameters().values() if p.grad is not None]
        mean_gradients(parameters)
        norm: Tensor = nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
        size = float(gathered(norm))
        if math.isfinite(size):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return size

    def states(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors that training changes, by name: weights and states of the optimizer."""
        for name, parameter in self.named_parameters().items():
            yield f"{name} (fake score)", parameter.detach()
        for i, state in enumerate([] if self.optimizer is None else self.optimizer.state.values()):
            for name, value in state.items():
                if isinstance(value, Tensor):
                    yield f"optimizer of the fake score {i} {name}", value

    def save_optimizer(self, folder: str | Path, write: bool) -> None:
        """Writes the optimizer's state in Trainer's format. All processes must call it; those with `write` write."""
        assert self.optimizer is not None
        state = whole_optimizer_state(self.optimizer, keep=write)
        if write:
            torch.save(state, os.path.join(folder, FAKE_OPTIMIZER_FILE))

    def load_optimizer(self, folder: str | Path) -> None:
        """
        Restores what [`save_optimizer`] wrote, from any number of processes. Learning rate and betas stay those of
        this run.
        """
        assert self.optimizer is not None
        path = os.path.join(folder, FAKE_OPTIMIZER_FILE)
        settings = [{k: group[k] for k in _SETTINGS if k in group} for group in self.optimizer.param_groups]
        load_whole_optimizer_state(self.optimizer, torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        for group, kept in zip(self.optimizer.param_groups, settings, strict=True):
            group |= kept
