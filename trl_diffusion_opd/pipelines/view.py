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
A pipeline seen from inside its loop: the parts that stand in for its scheduler, its transformer and itself, so that its
own `__call__` runs for one step at a state of ours. `velocity.py` puts them to work.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, NoReturn, Self, TypeVar

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from peft import PeftModel
from torch import Tensor, nn

from ..acceleration.quantization import base_weight, dequantized
from .images import Images
from .prompt_cache import PromptCache
from .prompt_store import Encoded


T = TypeVar("T")

_TIMESTEPS = ("timestep", "timesteps", "t")  # as transformers call them


class Stop(Exception):  # noqa: N818 (it is not an error)
    """Leaves a pipeline's `__call__` once it has told what was asked."""


class Probe(FlowMatchEulerDiscreteScheduler):
    """Scheduler of a loop of one step (or none) that keeps the velocity which the pipeline hands to `step`."""

    level: float | None = None
    own_timestep: float = 0.0
    velocity: Tensor | None = None

    def at(self, level: float | None, own_timestep: float = 0.0) -> "Probe":
        """One for a step at a level that the pipeline calls `own_timestep`, or for no step."""
        probe = copy.copy(self)
        probe.level, probe.own_timestep = level, own_timestep
        return probe

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: object = None,
        mu: float | None = None,
        timesteps: object = None,
    ) -> None:
        levels = [] if self.level is None else [self.level]
        self.timesteps = torch.tensor([self.own_timestep for _ in levels], device=device)
        self.sigmas = torch.tensor([*levels, 0.0], device=device)
        self.num_inference_steps = len(levels)
        self._step_index = self._begin_index = None

    def step(self, model_output: Tensor, timestep: object, sample: Tensor, **kwargs: object) -> None:
        self.velocity = model_output
        raise Stop


class StandIn(nn.Module):
    """
    Stands in for `pipeline.transformer`: calls the model that we name and answers everything else from the base.

    A module, with its own `device` and `dtype`, since a pipeline asks those of its components; the model is not
    registered, so that nobody finds its parameters twice. Precision is decided here and nowhere else: floating inputs
    are cast to the weights' dtype, but never timesteps, guidance embeddings and position ids, which bfloat16 ruins; a
    half-precision model runs under autocast, for its float32 LoRA, but for its output projection; out comes at least
    float32.

    Args:
        model (`Callable`), base (`nn.Module`): what is called, and the pipeline's own.
        timesteps (`list[torch.Tensor]`, *optional*): of each sample, where they are not all at the same level.
        adapters (`list[str]`, *optional*): of each sample's LoRA, where they don't all have the active one.
    """

    def __init__(
        self,
        model: Callable[..., tuple],
        base: nn.Module,
        timesteps: list[Tensor] | None = None,
        adapters: list[str] | None = None,
    ):
        super().__init__()
        # Under mixed precision FSDP2's student, trained in full, is float32 where its frozen base is not.
        weight = base_weight(model if isinstance(model, nn.Module) else base)
        self.__dict__.update(model=model, base=base, dtype=weight.dtype, device=weight.device, rows=0)
        network: Any = type(base)
        self.__dict__.update(names=_input_names(network), timesteps=timesteps, adapters=adapters)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["base"], name)

    def forward(self, *args: Any, **kwargs: Any) -> tuple:
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        self.__dict__["rows"] += len(inputs[self.names[0]])
        if self.timesteps is not None:
            inputs[timestep_name(inputs)] = _rows_of(self.timesteps)
        inputs = {name: self._cast(name, value) for name, value in inputs.items()}
        if self.adapters is not None:
            # With guidance there are several times as many rows as samples, as for timesteps.
            rows = len(inputs[self.names[0]])
            inputs["adapter_names"] = [self.adapters[row % len(self.adapters)] for row in range(rows)]
        if self.dtype in (torch.bfloat16, torch.float16):
            with torch.autocast(self.device.type, self.dtype), _float32_projection(self.model, self.base):
                output = self.model(**inputs)
        else:
            output = self.model(**inputs)
        sample = output[0]
        return (
            [row.float() for row in sample] if isinstance(sample, list) else at_least_float32(sample),
            *output[1:],
        )

    def _cast(self, name: str, value: Any) -> Any:
        if name in (*_TIMESTEPS, "guidance") or name.endswith("_ids"):
            return value
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(self.dtype)
        return [self._cast(name, item) for item in value] if isinstance(value, list) else value


@cache
def _input_names(network: type[nn.Module]) -> list[str]:
    return list(inspect.signature(network.forward).parameters)[1:]


def timestep_name(inputs: Mapping[str, object]) -> str:
    """What a transformer calls its timesteps."""
    return next(name for name in _TIMESTEPS if name in inputs)


def _rows_of(timesteps: list[Tensor]) -> Tensor:
    """
    Timesteps of a batch of which sample `i` is at level `i`, from those of the whole batch at each of the levels. With
    guidance there are several times as many rows as samples, sample after sample each time.
    """
    n, rows = len(timesteps), len(timesteps[0])
    if rows % n:
        raise ValueError(
            f"{rows} timesteps don't belong to {n} samples: only one noise level a batch is possible here."
        )
    return torch.stack([timesteps[row % n][row] for row in range(rows)])


@contextmanager
def _float32_projection(model: Callable[..., tuple], base: nn.Module) -> Iterator[None]:
    """
    Computes the output projection in float32. Student and teacher differ by little, and what is rounded last of each is
    all there in the difference, which guidance then multiplies.
    """
    # A teacher may be a transformer of its own, or a LoRA on a frozen copy of the base: its own projection is meant.
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    children = dict(inner.named_children()) if isinstance(inner, nn.Module) else {}
    projection = children.get("proj_out", dict(base.named_children()).get("proj_out"))
    if not isinstance(projection, nn.Linear):
        yield
        return

    def forward(x: Tensor) -> Tensor:
        # FSDP2 has them whole within a forward alone.
        weight, bias = dequantized(projection), projection.bias
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())

    with exchanged_forward(projection, forward):
        yield


@contextmanager
def exchanged_forward(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """Within it a module computes `forward`; after it what it did before, also of a call within a call."""
    outer = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if outer is not None:
            module.__dict__["forward"] = outer


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def stop(**kwargs: object) -> NoReturn:
    raise Stop


class DecoderStandIn(nn.Module):
    """
    Stands in for `pipeline.vae`: keeps what the pipeline would have decoded, and answers everything else from the VAE.

    Its `dtype` is float32, so that the pipeline does its arithmetic in it.
    """

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.__dict__.update(vae=vae, dtype=torch.float32, device=next(vae.parameters()).device, latents=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["vae"], name)

    def decode(self, latents: Tensor, *args: object, **kwargs: object) -> NoReturn:
        self.__dict__["latents"] = latents
        raise Stop


class PipelineView(DiffusionPipeline):
    """A pipeline whose latents, embeddings and device are ours."""

    transformer: StandIn
    cache: PromptCache
    encoding: Callable[[], AbstractContextManager[None]]
    x: Tensor | None
    prepared: tuple
    decoding: bool
    images: Images
    encoded: list[Encoded]

    @classmethod
    def of(cls, pipeline: DiffusionPipeline, **parts: object) -> Self:
        """A view of a pipeline, with these parts in place of its own. Made without `__init__`, from its attributes."""
        view = object.__new__(cls)
        view.__dict__.update({**vars(pipeline), "images": None, "encoded": [], **parts})
        return view

    @property
    def _execution_device(self) -> torch.device:
        # diffusers takes the first component's device: an offloaded encoder would drag everything to the CPU.
        return self.transformer.device

    def encode_prompt(self, *args: object, **kwargs: object) -> Encoded:
        with self.encoding():
            self.encoded.append(self.cache.encode(super().encode_prompt, *args, **kwargs))
        return self.encoded[-1]

    def prepare_latents(self, *args: object, **kwargs: object) -> Tensor | tuple:
        if self.x is None:
            self.prepared = super().prepare_latents(*args, **kwargs)
            return self.prepared
        dtype, extras = self.prepared
        # The decoder gets the dtype that the pipeline would have given it; the loop keeps ours.
        x = self.x.to(dtype) if self.decoding else self.x
        return (x, *extras) if extras else x

    def progress_bar(
        self, iterable: Iterable[T] | None = None, total: int | None = None
    ) -> Iterable[T] | AbstractContextManager[None]:
        """None: a loop of one step would make and close one at every step."""
        return nullcontext() if iterable is None else iterable

    def maybe_free_model_hooks(self) -> None:
        """Offloading is the trainer's business."""
