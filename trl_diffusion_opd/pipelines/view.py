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
Replacements for a pipeline's scheduler, denoiser, VAE and the pipeline itself. With them, the pipeline's own `__call__`
runs one step at latents that we choose. `calls.py` uses them.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from operator import attrgetter
from typing import Any, NoReturn, Self, TypeVar

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.utils import BaseOutput
from peft import PeftModel
from torch import Tensor, nn

from ..acceleration.quantization import base_weight, dequantized
from .denoised_part import DenoisedPart
from .experts import HIGH_NOISE, LOW_NOISE, Experts
from .images import Images
from .pictures import PictureCache
from .prompt_cache import PromptCache
from .prompt_store import Encoded
from .text_length import no_cut_lines


T = TypeVar("T")

_TIMESTEPS = ("timestep", "timesteps", "t")  # names that networks use for them
# Numbers that a network turns into embeddings by itself, in float32: half precision would distort them.
_NUMBERS = (*_TIMESTEPS, "guidance", "image_meta_size", "resolution", "aspect_ratio")


class Stop(Exception):  # noqa: N818 (it is not an error)
    """Ends a pipeline's `__call__` as soon as the needed value is known."""


class Probe(FlowMatchEulerDiscreteScheduler):
    """
    A scheduler for a loop of one step (or none). It keeps the network's output, after guidance, that the pipeline passes
    to `step`, and the state with it.
    """

    level: float | None = None
    own_timestep: float = 0.0
    output: Tensor | None = None
    sample: Tensor | None = None
    init_noise_sigma = 1.0  # pipelines of noise-predicting models ask for it
    # Whether the pipeline lets its scheduler scale the network's input. One for flow matching does not.
    scales_input: bool = False
    # Whether the pipeline goes on after the step, with the same state.
    passes: bool = False

    @classmethod
    def of(cls, scheduler: SchedulerMixin) -> "Probe":
        """A probe with the scheduler's configuration, as far as it is an Euler scheduler's."""
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            return cls.from_config(scheduler.config)
        return cls(num_train_timesteps=scheduler.config.num_train_timesteps)

    def at(self, level: float | None, own_timestep: float = 0.0) -> "Probe":
        """A copy for one step at `level`, whose timestep in the pipeline is `own_timestep`. `None` means no step."""
        probe = copy.copy(self)
        probe.level, probe.own_timestep = level, own_timestep
        return probe

    def passing(self) -> "Probe":
        """A copy whose step changes nothing and stops nothing."""
        probe = copy.copy(self)
        probe.passes = True
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

    def scale_model_input(self, sample: Tensor, timestep: object = None) -> Tensor:
        """The sample: our latents are already scaled as the network gets them."""
        self.scales_input = True
        return sample

    def step(self, model_output: Tensor, timestep: object, sample: Tensor, **kwargs: object) -> tuple[Tensor]:
        self.output, self.sample = model_output, sample
        if self.passes:
            return (sample,)
        raise Stop


class StandIn(nn.Module):
    """
    Replaces the pipeline's denoiser: calls another model, and takes all attributes from the pipeline's own denoiser.

    It is a module with its own `device` and `dtype`, since a pipeline reads those of its components. The model is not
    registered, so its parameters are not found twice.

    The precision of the forward is decided only here. Floating inputs are cast to the weights' dtype, except
    timesteps, guidance embeddings and position ids, which bfloat16 would distort. A half-precision model runs under
    autocast, for its float32 LoRA, but its output projection runs in float32. The output is at least float32.

    Args:
        model (`Callable`): the model to call.
        base (`nn.Module`): the pipeline's own denoiser. Of two experts, the stand-in replaces the first, and its
            `second` the other one. Both call the same model, and say which expert is meant.
        timesteps (`list[torch.Tensor]`, *optional*): if samples have different noise levels, the whole batch's
            timesteps at the level of each sample.
        adapters (`list[str]`, *optional*): the LoRA of each sample, if not all use the active one.
        expert (`str`, *optional*): the expert that is meant; by default the first, if there are two.
    """

    def __init__(
        self,
        model: Callable[..., tuple],
        base: nn.Module,
        timesteps: list[Tensor] | None = None,
        adapters: list[str] | None = None,
        expert: str | None = None,
    ):
        super().__init__()
        second = None
        if isinstance(base, Experts):
            if expert is None:
                expert, second = HIGH_NOISE, StandIn(model, base, timesteps, adapters, LOW_NOISE)
            base = base.of(expert)
        self.__dict__.update(expert=expert, second=second)
        # With mixed precision, a fully trained student under FSDP2 is float32, but its frozen base is not.
        weight = base_weight(model if isinstance(model, nn.Module) else base)
        self.__dict__.update(model=model, base=base, dtype=weight.dtype, device=weight.device, rows=0)
        network: Any = type(base)
        self.__dict__.update(names=_input_names(network), timesteps=timesteps, adapters=adapters)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["base"], name)

    def components(self, name: str) -> dict[str, "StandIn"]:
        """The stand-ins by the names of the pipeline's components that they replace, the first of which is `name`."""
        return {name: self} if self.second is None else {name: self, LOW_NOISE: self.second}

    def total_rows(self) -> int:
        """The number of rows that the model has got."""
        return self.rows + (0 if self.second is None else self.second.rows)

    def forward(self, *args: Any, **kwargs: Any) -> tuple | BaseOutput:
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        self.__dict__["rows"] += len(inputs[self.names[0]])
        if self.timesteps is not None:
            inputs[timestep_name(inputs)] = _rows_of(self.timesteps)
        inputs = {name: self._cast(name, value) for name, value in inputs.items()}
        if self.adapters is not None:
            # With guidance, the samples come several times in a row, as in `_rows_of`.
            rows = len(inputs[self.names[0]])
            inputs["adapter_names"] = [self.adapters[row % len(self.adapters)] for row in range(rows)]
        if self.expert is not None:
            inputs.setdefault("expert", self.expert)
        if self.dtype in (torch.bfloat16, torch.float16):
            with torch.autocast(self.device.type, self.dtype), _float32_projection(self.model, self.base, self.expert):
                output = self.model(**inputs)
        else:
            output = self.model(**inputs)
        sample = output[0]
        sample = [row.float() for row in sample] if isinstance(sample, list) else at_least_float32(sample)
        if isinstance(output, BaseOutput):  # some pipelines (Kandinsky 5) ask for the output by its name
            return type(output)(**{**output, "sample": sample})
        return (sample, *output[1:])

    def _cast(self, name: str, value: Any) -> Any:
        if name in _NUMBERS or name.endswith("_ids"):
            return value
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(self.dtype)
        if isinstance(value, dict):  # a UNet's added conditions
            return {key: self._cast(key, item) for key, item in value.items()}
        return [self._cast(name, item) for item in value] if isinstance(value, list) else value


@cache
def _input_names(network: type[nn.Module]) -> list[str]:
    return list(inspect.signature(network.forward).parameters)[1:]


def timestep_name(inputs: Mapping[str, object]) -> str:
    """The name of a network's argument for timesteps."""
    return next(name for name in _TIMESTEPS if name in inputs)


def timesteps_of(inputs: Mapping[str, Any]) -> Tensor:
    """The timesteps of a network's inputs, one for each row. A UNet gets a single one for all rows."""
    timesteps, rows = inputs[timestep_name(inputs)], len(next(iter(inputs.values())))
    return timesteps if timesteps.ndim else timesteps.expand(rows)


def _rows_of(timesteps: list[Tensor]) -> Tensor:
    """
    The timesteps of a batch whose samples have different levels. `timesteps[i]` are those of the whole batch at the
    level of sample `i`. With guidance, a batch has several rows a sample: all samples in order, then again all
    samples.
    """
    n, rows = len(timesteps), len(timesteps[0])
    if rows % n:
        raise ValueError(
            f"The pipeline makes {rows} timesteps for {n} samples, so all samples of a batch must have the same noise "
            "level."
        )
    return torch.stack([timesteps[row % n][row] for row in range(rows)])


@contextmanager
def _float32_projection(model: Callable[..., tuple], base: nn.Module, expert: str | None) -> Iterator[None]:
    """
    Computes the output projection in float32 in its block. Student and teacher differ by little, so rounding their
    outputs would dominate the difference, and guidance would multiply it.
    """
    # A teacher may be a network of its own, or a LoRA on a frozen copy of the base: use its own projection.
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    inner = inner.of(expert) if isinstance(inner, Experts) and expert is not None else inner
    children = dict(inner.named_children()) if isinstance(inner, nn.Module) else {}
    of_base = dict(base.named_children())
    found = (part[name] for name in ("proj_out", "conv_out") for part in (children, of_base) if name in part)
    projection = next(found, None)
    if not isinstance(projection, nn.Linear | nn.Conv2d):
        yield
        return

    def forward(x: Tensor) -> Tensor:
        # Read here, since FSDP2 gathers full weights only during a forward.
        bias = None if projection.bias is None else projection.bias.float()
        with torch.autocast(x.device.type, enabled=False):
            if isinstance(projection, nn.Linear):
                return nn.functional.linear(x.float(), dequantized(projection).float(), bias)
            # A UNet's is a convolution of stride 1.
            return nn.functional.conv2d(x.float(), projection.weight.float(), bias, padding=projection.padding)

    with exchanged_forward(projection, forward):
        yield


@contextmanager
def exchanged_forward(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """
    Replaces a module's forward by `forward` in its block, and restores the previous one afterwards. May be nested.
    """
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


def zeros_like(output: Tensor) -> Callable[..., tuple[Tensor]]:
    """A model that computes nothing: its output has the shape of `output`, for any number of rows."""

    def model(**inputs: Any) -> tuple[Tensor]:
        rows = next(iter(inputs.values()))
        return (rows.new_zeros((len(rows), *output.shape[1:])),)

    return model


def noting(seen: list[dict[str, Any]]) -> Callable[..., NoReturn]:
    """A model that keeps the arguments of its call, by name, in `seen` and stops the pipeline."""

    def note(**inputs: Any) -> NoReturn:
        seen.append(inputs)
        raise Stop

    return note


class DecoderStandIn(nn.Module):
    """
    Replaces `pipeline.vae`: keeps the latents that the pipeline would decode, and takes all attributes from the VAE.

    Its `dtype` is float32, so that the pipeline converts the latents in float32.
    """

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.__dict__.update(vae=vae, dtype=torch.float32, device=next(vae.parameters()).device, latents=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["vae"], name)

    def decode(self, latents: Tensor, *args: object, **kwargs: object) -> NoReturn:
        self.__dict__["latents"] = latents
        raise Stop


class _NoBar:
    """In place of a progress bar."""

    def update(self) -> None:
        """Shows nothing."""


# What pipelines call, at every step, to encode pictures apart from their latents.
_ENCODES_PICTURES = (
    "encode_image",
    "encode_prompt_multiple_images",
    "prepare_cond_latents_and_mask",
    "prepare_image_latents",
    "prepare_reference_latents",
    "prepare_siglip_embeds",
    "_prepare_first_frame_conditioning",
)


class PipelineView(DiffusionPipeline):
    """A pipeline with our latents, our caches of embeddings and pictures, and our device."""

    stand_in: StandIn
    cache: PromptCache
    pictures: PictureCache
    beside: str
    rows: int
    encoding: Callable[[], AbstractContextManager[None]]
    x: Tensor | None
    part: DenoisedPart | None
    prepared: tuple
    decoding: bool
    images: Images
    encoded: list[Encoded]
    encodings: dict[str, int]
    seen: dict[str, Any]

    @classmethod
    def of(cls, pipeline: DiffusionPipeline, **parts: object) -> Self:
        """A shallow copy of a pipeline with these parts in place of its own. `__init__` is not called."""
        view = object.__new__(cls)
        view.__dict__.update({**vars(pipeline), "images": None, "encoded": [], "encodings": {}, **parts})
        return view

    @property
    def _execution_device(self) -> torch.device:
        # diffusers uses the first component's device: an offloaded text encoder would move everything to the CPU.
        return self.stand_in.device

    def encode_prompt(self, *args: object, **kwargs: object) -> Encoded:
        with self.encoding(), no_cut_lines(type(self)):
            self.encoded.append(self.cache.encode(super().encode_prompt, *args, beside=self.beside, **kwargs))
        return self.encoded[-1]

    def prepare_latents(self, *args: object, **kwargs: object) -> Tensor | tuple:
        if self.x is None:
            if self.prepared is not None:
                raise ValueError(
                    f"{type(self).__name__} prepares latents twice, for two networks one after the other: only one of "
                    "them could be trained. Use a pipeline with one network that denoises."
                )
            self.prepared = super().prepare_latents(*args, **kwargs)
            return self.prepared
        dtype, extras, latents = self.prepared
        x = self.x if self.part is None else self.part.within(self.x, latents)
        # The decoder gets the dtype that the pipeline itself would use; the loop keeps ours.
        x = x.to(dtype) if self.decoding else x
        return (x, *extras) if extras else x

    def progress_bar(
        self, iterable: Iterable[T] | None = None, total: int | None = None
    ) -> Iterable[T] | AbstractContextManager[_NoBar]:
        """No progress bar, since each step would open and close one."""
        return nullcontext(_NoBar()) if iterable is None else iterable

    def maybe_free_model_hooks(self) -> None:
        """Does nothing, since the trainer offloads modules itself."""


def view_class(kind: type[DiffusionPipeline]) -> type[PipelineView]:
    """The class of views of pipelines of this class."""
    encoders = {name: _remembering(name, attrgetter(name)(kind)) for name in _ENCODES_PICTURES if name in dir(kind)}
    return type(kind.__name__, (PipelineView, kind), encoders)


def _plain(value: object) -> object:
    """What tells apart two calls that encode the same pictures."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    return value if isinstance(value, bool | int | float | str | torch.dtype) else None


def _remembering(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method in place of one that encodes pictures, which does so once for all steps."""

    def encode(view: PipelineView, *args: object, **kwargs: object) -> Any:
        # A call may encode several pictures one after the other, and with guidance it may want another form of them.
        nth = view.encodings[name] = view.encodings.get(name, 0) + 1
        key = (name, nth, *map(_plain, (*args, *kwargs.values())), view.rows, view.beside)
        with view.encoding():
            return view.pictures.remembered(key, view.stand_in.device, lambda: method(view, *args, **kwargs))

    return encode
