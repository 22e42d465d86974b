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

"""Switches between the adapters of a model without PEFT's side effects."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


# The name under which compiled code finds the active adapter, unless it is the first one.
_SHARED_NAME = "switched"


def remove_adapters(model: nn.Module) -> None:
    """Removes all of PEFT's layers from a model, even if PEFT failed halfway through adding them."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            base = layer.get_base_layer()
        elif isinstance(layer, AuxiliaryTrainingWrapper):
            base = layer.original_module
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)
    model.__dict__.pop("peft_config", None)


class AdapterSwitch:
    """
    Chooses the active adapter of a model. A switch never changes `requires_grad`.

    Args:
        model (`nn.Module`): the model with all its adapters. A model without any is left alone.
        active (`str`, *optional*): the adapter to start with; `None` for none, which is the base.

    Attributes:
        active (`str`, *optional*): the adapter that is active now.
    """

    def __init__(self, model: nn.Module, active: str | None):
        # Keeping this list makes a switch cheap: PEFT's own switch walks over every module of the model.
        self._layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self._home = active
        self._shares_name = False
        self._activate(active)
        # Layers that PEFT has just made are in training mode, even if the model is not.
        model.train(model.training)

    def _activate(self, adapter: str | None) -> None:
        # Not set_adapter or disable_adapter: both change requires_grad, and the latter unfreezes frozen parameters.
        shares_name = self._shares_name and adapter != self._home
        for layer in self._layers:
            # object.__setattr__ skips nn.Module's own, which takes ten times as long.
            if adapter is not None:
                object.__setattr__(layer, "_active_adapter", [_SHARED_NAME if shares_name else adapter])
                if shares_name:
                    _point(layer, adapter)
            object.__setattr__(layer, "_disable_adapters", adapter is None)
        self.active = adapter

    def share_name(self) -> None:
        """
        From now on, activates every adapter but the first under one shared name, which points to the chosen adapter.

        Compiled code depends on the active adapter's name, shapes and scaling, but not on its weights. Under one name,
        adapters of the same rank and scaling share their compiled code. Don't use it with FSDP2, which does not expect
        one module under two names.
        """
        self._shares_name = True

    @contextmanager
    def use(self, adapter: str | None) -> Iterator[None]:
        """Context in which `adapter` is active. Afterwards, also after an exception, the previous one is again."""
        before = self.active
        self._activate(adapter)
        try:
            yield
        finally:
            self._activate(before)

    @contextmanager
    def mixed(self, adapter: str) -> Iterator[None]:
        """
        Context for a forward with PEFT's `adapter_names` (one adapter a row). PEFT ignores that argument unless some
        adapter is active, so `adapter` is made active.

        After an exception, hooks that PEFT left on the layers are removed. Otherwise the next forward would still
        compute its rows with these adapters.
        """
        known = [set(layer._forward_pre_hooks) for layer in self._layers]
        with self.use(adapter):
            try:
                yield
            except BaseException:
                for layer, before in zip(self._layers, known, strict=True):
                    for key in layer._forward_pre_hooks.keys() - before:
                        del layer._forward_pre_hooks[key]
                        layer._forward_pre_hooks_with_kwargs.pop(key, None)
                raise


def _point(layer: LoraLayer, adapter: str) -> None:
    for modules in (layer.lora_A, layer.lora_B, layer.lora_dropout):
        if adapter in modules:
            modules[_SHARED_NAME] = modules[adapter]
        elif _SHARED_NAME in modules:  # this adapter leaves the layer alone
            del modules[_SHARED_NAME]
    if adapter in layer.lora_A:
        layer.scaling[_SHARED_NAME] = layer.scaling[adapter]
