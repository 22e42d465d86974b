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
Runs a pipeline's own `__call__` on a view of it, for one step, up to its denoiser, or from the end of its loop.

Every model family encodes prompts, scales timesteps, arranges guidance and signs its output differently. Its
pipeline's `__call__` knows how. It therefore runs here, on a shallow copy of the pipeline with three replaced parts:
`prepare_latents` returns our latents, `transformer` (or `unet`) calls the model we want, and the scheduler's `step` keeps
what it gets (the output after guidance, slicing and sign) and stops the call. Only this file and `view.py` use a
pipeline's internals.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor

from .denoiser import denoiser, denoiser_name
from .guidance import guidance_name
from .guiders import guiders, scaled
from .prediction import NoiseGrid, grid_scheduler
from .prompt_cache import PromptCache
from .prompt_store import PromptStore
from .view import PipelineView, Probe, StandIn, Stop, noting, stop


class PipelineCalls:
    """
    Runs parts of a pipeline's `__call__`. The pipeline is never changed.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): the pipeline.
        options (`dict`): arguments of every call.
        prompt_store ([`PromptStore`], *optional*): keeps embeddings of prompts on disk across runs.

    Attributes:
        encoding (`Callable`):
            Returns a context manager in which prompts and images are encoded, for example to time it.
    """

    def __init__(self, pipeline: DiffusionPipeline, options: Mapping[str, object], prompt_store: PromptStore | None):
        self.pipeline = pipeline
        self.encoding: Callable[[], AbstractContextManager[None]] = nullcontext
        # Read once: a pipeline's `components` and `dir()` look through its whole class, which every step would wait for.
        self._base, self._base_name = denoiser(pipeline), denoiser_name(pipeline)
        self._guiders = guiders(pipeline)
        self._takes_latents = "prepare_latents" not in dir(type(pipeline))
        self._parameters = call_parameters(pipeline)
        self._options = dict(options)
        self._guidance = guidance_name(self._base, self._parameters)
        self._guidance_offset = 0.0
        self._cache = PromptCache(store=prompt_store)
        self._prepared: dict[tuple[int, torch.device], tuple[torch.dtype, tuple]] = {}
        self._view_class: type[PipelineView] = type(type(pipeline).__name__, (PipelineView, type(pipeline)), {})
        self._probe = Probe.of(pipeline.scheduler)
        self._grid: NoiseGrid  # whoever inherits sets it before the first step

    def call_options(self, prompts: list[str], guidance_scale: float) -> dict[str, object]:
        """The arguments of the pipeline's `__call__` for these prompts at this scale, except `num_inference_steps`."""
        options = {"prompt": prompts, **self._options}
        if self._guidance is not None:
            options[self._guidance] = guidance_scale - self._guidance_offset
        if "negative_prompt" in self._parameters:
            negative = options.get("negative_prompt")
            if self._guidance == "true_cfg_scale" and negative is None and guidance_scale != 1.0:
                negative = ""  # without one, true_cfg_scale is off
            if isinstance(negative, str):
                options["negative_prompt"] = [negative] * len(prompts)
        return options

    def _to_denoiser(
        self,
        prompts: list[str],
        guidance_scale: float,
        scheduler: SchedulerMixin,
        num_inference_steps: int,
        generators: list[torch.Generator] | None = None,
    ) -> PipelineView:
        """
        Runs the pipeline's `__call__` up to its denoiser. By then it has set its grid and prepared its latents.
        """
        seen: list[dict[str, Any]] = []
        view = self._view(StandIn(noting(seen), self._base), scheduler)
        self._call(view, prompts, guidance_scale, num_inference_steps=num_inference_steps, generator=generators)
        if view.prepared is None and seen:  # the call draws the latents itself (ERNIE-Image)
            view.prepared = next(iter(seen[0].values()))[: len(prompts)]
        view.prepared = view.prepared if isinstance(view.prepared, tuple) else (view.prepared,)
        self._prepared[len(prompts), view.stand_in.device] = (view.prepared[0].dtype, view.prepared[1:])
        return view

    def _step(self, x: Tensor, t: float, prompts: list[str], guidance_scale: float, stand_in: StandIn) -> PipelineView:
        """Runs one step of the pipeline's loop, at the level `t` and at latents `x` that are scaled for the network."""
        t = float(t)
        view = self._view(stand_in, self._probe.at(t, self._grid.timestep(t)), x, prompts)
        self._call(view, prompts, guidance_scale)
        return view

    def _end(self, x: Tensor, prompts: list[str], output_type: str, **parts: object) -> PipelineView:
        """Runs the part of the pipeline's `__call__` that follows its loop, on the latents `x`."""
        view = self._view(StandIn(stop, self._base), self._probe.at(None), x, prompts, decoding=not parts, **parts)
        self._call(view, prompts, 1.0, output_type=output_type)
        return view

    def _view(
        self,
        stand_in: StandIn,
        scheduler: SchedulerMixin,
        x: Tensor | None = None,
        prompts: Sequence[str] = (),
        **parts: object,
    ) -> PipelineView:
        if x is not None and len(x) != len(prompts):
            raise ValueError(f"{len(x)} latents, but {len(prompts)} prompts.")
        return self._view_class.of(
            self.pipeline,
            stand_in=stand_in,
            scheduler=scheduler,
            encoding=self.encoding,
            x=x,
            prepared=None if x is None else self._extras(list(prompts)),
            **stand_in.components(self._base_name),
            **{"cache": self._cache, "decoding": False, **parts},
        )

    def _call(self, view: PipelineView, prompts: list[str], guidance_scale: float, **how: object) -> None:
        # The scheduler alone says how many steps there are, but some grids (Mochi's) cannot be made for one.
        options = {"num_inference_steps": 2, "generator": None, "output_type": "latent", **how}
        options.update(self.call_options(prompts, guidance_scale), return_dict=False)
        if view.x is not None and self._takes_latents:
            options["latents"] = view.x
        view.__dict__.update(scaled(self._guiders, guidance_scale))
        with suppress(Stop):
            view.images = inspect.unwrap(type(self.pipeline).__call__)(view, **options)[0]

    def _extras(self, prompts: list[str]) -> tuple[torch.dtype, tuple]:
        """
        The latents' dtype, and what else `prepare_latents` returns (ids, latents of an image to edit). Computed once
        for each batch size.
        """
        key = (len(prompts), next(self._base.parameters()).device)
        if key not in self._prepared:
            generators = [torch.Generator().manual_seed(0) for _ in prompts]
            scheduler = grid_scheduler(self.pipeline.scheduler)
            self._to_denoiser(prompts, 1.0, scheduler, len(self._grid.levels) - 1, generators)
        return self._prepared[key]


def call_parameters(pipeline: DiffusionPipeline) -> Mapping[str, inspect.Parameter]:
    """The parameters of a pipeline's `__call__`."""
    return inspect.signature(inspect.unwrap(type(pipeline).__call__)).parameters
