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

"""
Uses the `meta` device, whose tensors have shapes but no values, as an accelerator that every machine has.

As on a GPU, an operation on tensors of two devices is an error. These helpers also report what is slow on GPUs and
impossible on Apple's: float64 on the device, and waits, where the host reads a value from the device.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainingArguments

import trl_diffusion_opd
from trl_diffusion_opd.pipelines.velocity import VelocityField


DEVICE = torch.device("meta")
PACKAGE = Path(trl_diffusion_opd.__file__).parent
# What a network does in its own forward, and in the backward of it, is diffusers' business.
_NETWORKS = Path(diffusers.__file__).parent / "models"
_AUTOGRAD = Path(torch.autograd.__file__).parent
_ATEN = torch.ops.aten
# They are for tensors of two devices.
_COPIES = (_ATEN.copy_.default, _ATEN._to_copy.default)
# A list of integers or a mask to index with may come from the host, as it may on a GPU.
_INDEXING = (_ATEN.index.Tensor, _ATEN.index_put_.default, _ATEN._index_put_impl_.default)


class Accelerator(TorchDispatchMode):
    """
    Within it the device's tensors behave as a GPU's, and whatever a value is asked of answers with zeros, after a
    wait.

    Attributes:
        waits (`list[str]`): the places of this package, or else of another, where the host waited for the device.
        mixed (`list[str]`): the places where an operation took tensors of both, which a GPU refuses.
        wide (`list[str]`): the places where float64 reached the device, which Apple's GPUs refuse.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.mixed: list[str] = []
        self.wide: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [t for t in tensors if t.device == DEVICE]
        # A number on the host, which has no dimensions, goes with the call.
        here = [t for t in tensors if t.device != DEVICE and t.ndim > 0]
        if there and here and op not in _COPIES and op not in _INDEXING:
            self.mixed.append(f"{place()[0]}: {op}")
        result = self._read(op, args, kwargs, there)
        if result is None:
            result = op(*args, **kwargs)
        if any(isinstance(leaf, Tensor) and _is_wide(leaf) for leaf in tree_leaves(result)):
            where, in_network = place()
            if not in_network:  # there it is asked for by the kind of device
                self.wide.append(f"{where}: {op}")
        return result

    def _read(self, op: Any, args: Any, kwargs: Any, there: list[Tensor]) -> Any:
        """The answer of an operation that brings values to the host; `None` of another."""
        if not there:
            return None
        if op is _ATEN._local_scalar_dense.default:
            self.waits.append(place()[0])
            return torch.zeros((), dtype=there[0].dtype).item()
        if op is _ATEN.equal.default:
            self.waits.append(place()[0])
            return True
        target = kwargs.get("device")
        if op is _ATEN._to_copy.default and target is not None and torch.device(target) != DEVICE:
            self.waits.append(place()[0])
            return torch.zeros(there[0].shape, dtype=kwargs.get("dtype") or there[0].dtype)
        if op is _ATEN.copy_.default and args[0].device != DEVICE:
            self.waits.append(place()[0])
            return args[0].zero_()
        return None


def _is_wide(tensor: Tensor) -> bool:
    return tensor.device == DEVICE and tensor.dtype in (torch.float64, torch.complex128)


def place() -> tuple[str, bool]:
    """
    The innermost line of the package that is being run, and whether it is one of diffusers' networks that it runs.
    """
    frame: Any = sys._getframe(2)
    in_network = False
    while frame is not None:
        in_package, of_network = _whose(frame.f_code.co_filename)
        if in_package:
            name = Path(frame.f_code.co_filename).name
            return f"{name}, line {frame.f_lineno}, {frame.f_code.co_name}", in_network
        in_network = in_network or of_network
        frame = frame.f_back
    return "outside of the package", in_network


@functools.cache  # asked for every frame of every operation
def _whose(name: str) -> tuple[bool, bool]:
    """Whether a file is the package's, and whether it is one of diffusers' networks or runs their backward."""
    file = Path(name)
    return PACKAGE in file.parents, _NETWORKS in file.parents or file.parent == _AUTOGRAD


def place_parts(field: VelocityField) -> None:
    """Moves the pipeline of `field`, whose prompts are encoded, and what it has found out about it."""
    for component in field.pipeline.components.values():
        if isinstance(component, nn.Module):
            component.to(DEVICE)
    field._prepared.clear()
    if field._latent_map is not None:
        found = field._latent_map
        places = {name: getattr(found, name).to(DEVICE) for name in ("index", "scale", "shift")}
        field._latent_map = dataclasses.replace(found, **places)


def trained_elsewhere(trainer: Any, patch: Callable[..., None]) -> Accelerator:
    """
    Trains with the networks on the device, for which the prompts are encoded beforehand.

    Args:
        trainer: made on the CPU.
        patch (`Callable`): pytest's `monkeypatch.setattr`.
    """
    field = trainer.velocity_field
    trainer._get_train_sampler()
    field.encode_together(trainer._companies())  # as an update does, which keeps them by their company
    for task in trainer.tasks:
        prompts = [trainer.train_dataset[row]["prompt"] for row in trainer.rounds.rows[task]]
        for prompt in prompts:
            field.encode_prompts([prompt] * trainer.args.per_device_train_batch_size, trainer.guidance_scales(task))
    trainer.args.optim = "adamw_torch"  # a fused one knows real devices alone
    patch(accelerate.Accelerator, "device", property(lambda _: DEVICE))
    patch(TrainingArguments, "device", property(lambda _: DEVICE))
    place_parts(field)
    trainer.model.to(DEVICE)
    accelerator = Accelerator()
    with accelerator:
        trainer.train()
    return accelerator
