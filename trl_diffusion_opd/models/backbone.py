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

"""Holds the base network once and switches it between its roles: base, student, LoRA teachers, old policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from ..acceleration.compilation import compile_blocks
from .adapter_switch import AdapterSwitch
from .lora_adapter import adapter_parameters, add_adapter
from .student import STUDENT_ADAPTER, Student, frozen_copy


BASE, STUDENT = "base", "student"


class Backbone:
    """
    Holds the base once and activates one LoRA on it at a time: the student's, a teacher's, or none (the base itself).

    Models that are whole networks (a full teacher, a fully trained student) are kept beside it and chosen by the same
    role names.

    Args:
        network (`nn.Module`, *optional*):
            The network that LoRAs are added to: a `PeftModel` that holds the student's adapter, or the base. The base
            is frozen, and the first LoRA wraps it in place. `None` if nobody computes with the base.
        student (`str`, *optional*):
            Name of the student's adapter, which is active outside of [`~Backbone.use`]. `None` if there is none.
        whole_student (`nn.Module`, *optional*): a student that is trained in full, beside `network`.

    Attributes:
        network (`nn.Module`, *optional*): the given network with the LoRAs added since.
    """

    def __init__(
        self, network: nn.Module | None, student: str | None = None, whole_student: nn.Module | None = None
    ) -> None:
        self.network = network
        self._home = student
        self._student = whole_student
        # By role, all frozen: a network of its own, or None for a LoRA on `network`.
        self._added: dict[str, nn.Module | None] = {}
        self._look_again()

    @classmethod
    def of(cls, student: nn.Module, with_base: bool = True) -> Backbone:
        """
        Makes the backbone of a student in training.

        Args:
            student (`PeftModel` or `nn.Module`): a base with the student's LoRA, or a transformer that is trained in
                full.
            with_base (`bool`, *optional*): whether the base, or a LoRA on it, is computed too. For a student that is
                trained in full this takes a frozen copy of it.
        """
        if isinstance(student, PeftModel):
            return cls(student, STUDENT_ADAPTER)
        return cls(frozen_copy(student) if with_base else None, whole_student=student)

    def _look_again(self) -> None:
        """
        Finds the adapters again after some were added or removed. PEFT leaves an arbitrary one active, and new
        wrappers in training mode.
        """
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
            trainable (`bool`, *optional*): whether its weights get the student's precision instead of the base's.
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
        """Adds a whole frozen network, which plays `role` alone."""
        self._added[role] = network

    @property
    def base(self) -> nn.Module | None:
        """The transformer without any LoRA's wrapper."""
        return self.network.get_base_model() if isinstance(self.network, PeftModel) else self.network

    @property
    def active(self) -> str | None:
        """The active adapter of `network`; `None` if none is active, which is the base."""
        return self._switch.active

    @contextmanager
    def use(self, role: str) -> Iterator[nn.Module]:
        """
        Yields the module that computes as `role`: `"base"`, `"student"`, or a name that was added.

        Call it under `torch.no_grad()`. On exit, also after an exception, the adapter that was active before (usually
        the student's) is active again. `requires_grad` of the parameters never changes.
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
        """Yields the network for a forward in which rows use different adapters. See [`AdapterSwitch.mixed`]."""
        assert self.network is not None
        with self._switch.mixed(adapter):
            yield self.network

    def frozen(self) -> dict[str, list[nn.Parameter]]:
        """The frozen parameters of each role, each once. The base is among them if no student's adapter is on it."""
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
        """All parameters of [`~Backbone.frozen`]."""
        return (parameter for of_role in self.frozen().values() for parameter in of_role)

    def networks(self) -> list[nn.Module]:
        """The networks other than the student's: the whole ones, and the base if no student's adapter is on it."""
        own = [network for network in self._added.values() if network is not None]
        return own if self._home is not None or self.base is None else [self.base, *own]

    def rounding(self, mixed: torch.dtype | None) -> float:
        """
        Estimates the relative difference between outputs of two equal networks: the rounding of one number, times 4
        for the layers.

        Args:
            mixed (`torch.dtype`, *optional*): the dtype that mixed precision computes in.
        """
        assert self.network is not None
        frozen = (p.dtype for p in self.network.parameters() if not p.requires_grad)
        weights = next(dtype for dtype in frozen if dtype.is_floating_point)  # quantized ones are integers
        return 4 * max(torch.finfo(dtype).eps for dtype in (weights, mixed) if dtype is not None)

    def to(self, device: torch.device | str) -> Backbone:
        """Moves [`~Backbone.networks`] with their LoRAs to a device. The trainer moves the student itself."""
        for network in self.networks():
            network.to(device)
        return self

    def compile(self, backend: str | None = None, mode: str | None = None) -> Backbone:
        """Compiles [`~Backbone.networks`] with [`~compilation.compile_blocks`]. Switching does not recompile."""
        if self.network is not None:
            self._switch.share_name()
        for network in self.networks():
            compile_blocks(network, backend, mode)
        return self


def base_backbone(student: Student, known: Backbone | None) -> Backbone | None:
    """
    Returns the backbone that computes the base; `None` where nothing keeps a copy of the base.

    Args:
        student ([`Student`]): the student. A LoRA's own network is the base too.
        known ([`Backbone`], *optional*): the run's, if it has one.
    """
    if known is None and student.is_lora:
        known = Backbone.of(student.model)
    return None if known is None or known.network is None else known
