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

"""One network and the roles that it plays: base, student, teachers, an old policy; and the networks that play one alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from ..acceleration.compilation import compile_blocks
from .adapter_switch import AdapterSwitch
from .lora_adapter import adapter_parameters, add_adapter
from .student import STUDENT_ADAPTER, frozen_copy


BASE, STUDENT = "base", "student"


class Backbone:
    """
    Computes as the base, the student, or any of the LoRAs and networks that were added, without copies of the base.

    Args:
        network (`nn.Module`, *optional*):
            What LoRAs are added to: the `PeftModel` that holds the student's adapter, or the base, which the first LoRA wraps in
            place and which is frozen. None where nobody computes with the base.
        student (`str`, *optional*):
            The student's adapter, active outside of [`~Backbone.use`]; `None` without one.
        whole_student (`nn.Module`, *optional*): a student that is trained in full, beside `network`.

    Attributes:
        network (`nn.Module`, *optional*): the same, with what has been added.
    """

    def __init__(
        self, network: nn.Module | None, student: str | None = None, whole_student: nn.Module | None = None
    ) -> None:
        self.network = network
        self._home = student
        self._student = whole_student
        # By role, each frozen: a network of its own, or None for a LoRA on `network`.
        self._added: dict[str, nn.Module | None] = {}
        self._look_again()

    @classmethod
    def of(cls, student: nn.Module, with_base: bool = True) -> Backbone:
        """
        The backbone of a student that is trained.

        Args:
            student (`PeftModel` or `nn.Module`): the LoRA on its base, or a transformer that is trained in full.
            with_base (`bool`, *optional*): whether anybody computes with the base, or with a LoRA on it. Beside full weights that
                takes a frozen copy.
        """
        if isinstance(student, PeftModel):
            return cls(student, STUDENT_ADAPTER)
        return cls(frozen_copy(student) if with_base else None, whole_student=student)

    def _look_again(self) -> None:
        """After adapters have come or gone: PEFT leaves any of them active, and a new wrapper in training mode."""
        if self.network is not None:
            self._switch = AdapterSwitch(self.network, self._home)
            if self._home is None:
                self.network.requires_grad_(False).eval()

    def add_adapter(
        self, role: str, config: LoraConfig, weights: Mapping[str, Tensor], trainable: bool = False
    ) -> None:
        """
        Adds a frozen LoRA on the base.

        Args:
            role (`str`), config (`LoraConfig`), weights (`dict[str, Tensor]`): as [`add_adapter`] takes them.
            trainable (`bool`, *optional*): whether it gets the precision of what is trained, and not that of the base.
        """
        assert self.network is not None
        try:
            self.network = add_adapter(self.network, role, config, weights, trainable)
            for parameter in adapter_parameters(self.network, role):
                parameter.requires_grad_(False)
            self._added[role] = None
        finally:
            self._look_again()

    def add_network(self, role: str, network: nn.Module) -> None:
        """Adds a frozen network of its own."""
        self._added[role] = network

    @property
    def base(self) -> nn.Module | None:
        """The transformer without any LoRA's wrapper."""
        return self.network.get_base_model() if isinstance(self.network, PeftModel) else self.network

    @property
    def active(self) -> str | None:
        """The adapter of `network` that is active now; `None` for none, which is the base."""
        return self._switch.active

    @contextmanager
    def use(self, role: str) -> Iterator[nn.Module]:
        """
        Yields the module that computes as `"base"`, as `"student"`, or as what was added under that name.

        Call it under `torch.no_grad()`. On exit, also by an exception, what was active before is active again: the student. No
        parameter's `requires_grad` changes.
        """
        alone = self._student if role == STUDENT else self._added.get(role)
        if alone is not None:
            yield alone
            return
        assert self.network is not None
        with self._switch.use({BASE: None, STUDENT: self._home}.get(role, role)):
            yield self.network

    @contextmanager
    def mixed(self, adapter: str) -> Iterator[nn.Module]:
        """Yields the network for a forward with PEFT's `adapter_names`: see [`AdapterSwitch.mixed`]."""
        assert self.network is not None
        with self._switch.mixed(adapter):
            yield self.network

    def frozen(self) -> dict[str, list[nn.Parameter]]:
        """By role the parameters that are not the student's, each once; without a student's adapter also the base's."""
        found: dict[str, list[nn.Parameter]] = {}
        if self._home is None and self.network is not None:
            found[BASE] = list(self.network.parameters())
        for role, network in self._added.items():
            if network is not None:
                found[role] = list(network.parameters())
            elif self._home is not None and self.network is not None:
                found[role] = list(adapter_parameters(self.network, role))
        return found

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of [`~Backbone.frozen`]."""
        return (parameter for of_role in self.frozen().values() for parameter in of_role)

    def networks(self) -> list[nn.Module]:
        """The transformers that are not the student's: those of their own, and without a student's adapter the base."""
        own = [network for network in self._added.values() if network is not None]
        return own if self._home is not None or self.base is None else [self.base, *own]

    def rounding(self, mixed: torch.dtype | None) -> float:
        """
        What two equal networks differ by: the relative rounding of one number, a few times over the layers.

        Args:
            mixed (`torch.dtype`, *optional*): what mixed precision computes in.
        """
        assert self.network is not None
        frozen = (p.dtype for p in self.network.parameters() if not p.requires_grad)
        weights = next(dtype for dtype in frozen if dtype.is_floating_point)  # quantized ones are integers
        return 4 * max(torch.finfo(dtype).eps for dtype in (weights, mixed) if dtype is not None)

    def to(self, device: torch.device | str) -> Backbone:
        """Moves what the trainer does not: [`~Backbone.networks`] with their LoRAs."""
        for network in self.networks():
            network.to(device)
        return self

    def compile(self, backend: str | None = None, mode: str | None = None) -> Backbone:
        """Compiles [`~Backbone.networks`] ([`~compilation.compile_blocks`]), so that switching does not compile again."""
        if self.network is not None:
            self._switch.share_name()
        for network in self.networks():
            compile_blocks(network, backend, mode)
        return self
