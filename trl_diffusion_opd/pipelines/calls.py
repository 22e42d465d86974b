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
from PIL.Image import new as new_image
from torch import Tensor

from ..data.pictured_prompt import PicturedPrompt
from .denoised_part import DenoisedPart
from .denoiser import denoiser, denoiser_name
from .guidance import guidance_name
from .guiders import guiders, scaled
from .pictures import (
    PICTURES,
    PictureCache,
    are_alike,
    digest_of,
    needs_pictures,
    picture_argument,
    same_rows,
    takes_pictures,
)
from .prediction import NoiseGrid, grid_scheduler
from .prompt_cache import PromptCache
from .prompt_store import PromptStore
from .view import PipelineView, Probe, StandIn, Stop, noting, stop, view_class, zeros_like


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
        one_by_one (`bool`):
            Whether samples with pictures are always asked one by one, so that the number of forwards does not depend on
            them. By default pictures of one size are asked together where the pipeline can.
        takes_pictures, needs_pictures, has_common_picture (`bool`):
            Whether prompts may come with pictures to edit or to refer to; whether they must; whether the options have
            one for all prompts.
        sized (`bool`): whether the call takes a size. If not, it draws in a size that follows from the picture's.
        height, width (`int`, *optional*): the size of images, in pixels; of pictures, if the call takes none.
    """

    one_by_one = False
    height: int | None = None
    width: int | None = None

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
        self._pictures = PictureCache()
        self.takes_pictures = takes_pictures(self._parameters)
        self.has_common_picture = PICTURES in options
        self.sized = "height" in self._parameters and "width" in self._parameters
        self.needs_pictures = False
        self._prepared: dict[tuple[int, torch.device], tuple[torch.dtype, tuple, Tensor | None]] = {}
        self._view_class = view_class(type(pipeline))
        self._part: DenoisedPart | None = None
        self._closing: Callable[..., tuple[Tensor]] | None = None
        self._probe = Probe.of(pipeline.scheduler)
        self._grid: NoiseGrid  # whoever inherits sets it before the first step

    def _find_need(self, num_inference_steps: int) -> None:
        """Finds out whether the pipeline draws nothing without a picture."""

        def draw() -> None:
            self._to_denoiser([""], 1.0, grid_scheduler(self.pipeline.scheduler), num_inference_steps)

        if not self.has_common_picture:
            self.needs_pictures = needs_pictures(self.pipeline, self._parameters, draw)

    def call_options(self, prompts: list[str], guidance_scale: float) -> dict[str, object]:
        """The arguments of the pipeline's `__call__` for these prompts at this scale, except `num_inference_steps`."""
        options = {"prompt": [str(prompt) for prompt in prompts], **self._options, **self._picture_options(prompts)}
        if self._guidance is not None:
            options[self._guidance] = guidance_scale - self._guidance_offset
        if "negative_prompt" in self._parameters:
            negative = options.get("negative_prompt")
            if self._guidance == "true_cfg_scale" and negative is None and guidance_scale != 1.0:
                negative = ""  # without one, true_cfg_scale is off
            if isinstance(negative, str):
                options["negative_prompt"] = [negative] * len(prompts)
        return options

    def _picture_options(self, prompts: list[str]) -> dict[str, object]:
        if any(isinstance(prompt, PicturedPrompt) for prompt in prompts):
            if not self.takes_pictures or self.has_common_picture:
                name = type(self.pipeline).__name__
                reason = "generation_kwargs has one for all" if self.has_common_picture else "it takes none"
                raise ValueError(f"Prompts come with pictures of their own, but {name} can't get them: {reason}.")
            return {PICTURES: picture_argument(prompts)}
        # Trials ask with a text alone.
        return {PICTURES: new_image("RGB", self.trial_size, "grey")} if self.needs_pictures else {}

    def _is_apart(self, prompts: list[str]) -> bool:
        """
        Whether the samples of a batch are asked one by one. Most pipelines take a list of pictures as several pictures
        of one prompt, or bring all to the size of the first.
        """
        if len(prompts) == 1:
            return False
        if not any(isinstance(prompt, PicturedPrompt) for prompt in prompts):
            return self.needs_pictures
        if self.one_by_one or not are_alike(prompts):
            return True
        if self._pictures.in_batches is None:
            self._pictures.in_batches = self._try_batch()
        return not self._pictures.in_batches

    def try_pictures(self, sizes: Sequence[tuple[int, int]]) -> torch.Size:
        """
        Runs the pipeline up to its denoiser with a prompt that has grey pictures of these sizes (width, height), to see
        whether it can. Returns the shape of the latents.
        """
        pictures = [new_image("RGB", size, "grey") for size in sizes]
        return self._prepare([PicturedPrompt("a", pictures)]).prepared[0].shape

    def _try_batch(self) -> bool:
        """Whether the network gets the same for two prompts with one picture each as for one after the other."""
        prompts: list[str] = [
            PicturedPrompt("a", [new_image("RGB", self.trial_size, colour)]) for colour in ("grey", "white")
        ]
        apart = [self._prepare([prompt]).seen for prompt in prompts]
        if self._cache.reads_pictures:
            return False
        # A pipeline that takes the list for one prompt's may stumble over it.
        with suppress(ValueError, RuntimeError, TypeError, IndexError):
            return same_rows(self._prepare(prompts).seen, apart)
        return False

    @property
    def trial_size(self) -> tuple[int, int]:
        """Width and height of pictures for trials."""
        # FLUX.2 takes no picture of less than 64 pixels a side.
        least = 64 if self.sized else 1
        return max(least, self.width or 256), max(least, self.height or 256)

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
        view = self._view(StandIn(noting(seen), self._base), scheduler, prompts=prompts)
        self._call(view, prompts, guidance_scale, num_inference_steps=num_inference_steps, generator=generators)
        if view.prepared is None and seen:  # the call draws the latents itself (ERNIE-Image)
            view.prepared = next(iter(seen[0].values()))[: len(prompts)]
        view.prepared = view.prepared if isinstance(view.prepared, tuple) else (view.prepared,)
        view.seen = seen[0] if seen else {}
        if not view.beside:
            self._prepared[len(prompts), view.stand_in.device] = self._kept(view.prepared)
        return view

    def _kept(self, prepared: tuple) -> tuple[torch.dtype, tuple, Tensor | None]:
        """What later calls need of prepared latents: all of them only where the loop denoises a part."""
        return prepared[0].dtype, prepared[1:], None if self._part is None else prepared[0]

    @torch.no_grad()
    def _find_denoised_part(self) -> None:
        """
        Finds out by one step whether the loop denoises only a part of the latents. Only latents that are prepared with a
        picture may have another part.
        """
        preparing = () if self._takes_latents else inspect.signature(type(self.pipeline).prepare_latents).parameters
        if not (self.needs_pictures or self.has_common_picture) or PICTURES not in preparing:
            return
        latents = self._prepare([""]).prepared[0].contiguous()
        outputs: list[Tensor] = []

        def model(**inputs: Any) -> tuple:
            output = self._base(**inputs)
            outputs.append(output[0])
            return output

        def ended(scheduler: Probe) -> PipelineView:
            view = self._view(StandIn(model, self._base), scheduler, latents.clone(), [""])
            self._call(view, [""], 1.0)
            return view

        after_step = ended(self._probe_at(float(self._grid.levels[0])).passing())
        if after_step.scheduler.sample is None or after_step.x is None:
            return
        part = DenoisedPart.find(after_step.scheduler.sample, after_step.x)
        if part is None:
            return
        # Some loops put a picture's latents back into the state at each step (HunyuanVideo).
        at_once = ended(self._probe.at(None))
        if not torch.allclose(after_step.images, at_once.images, rtol=0, atol=0, equal_nan=True):
            self._closing = zeros_like(outputs[0])
        self._part = part
        self._prepared.clear()

    def _step(self, x: Tensor, t: float, prompts: list[str], guidance_scale: float, stand_in: StandIn) -> PipelineView:
        """Runs one step of the pipeline's loop, at the level `t` and at latents `x` that are scaled for the network."""
        view = self._view(stand_in, self._probe_at(float(t)), x, prompts)
        self._call(view, prompts, guidance_scale)
        return view

    def _probe_at(self, t: float) -> Probe:
        return self._probe.at(t, self._grid.timestep(t))

    def _end(self, x: Tensor, prompts: list[str], output_type: str, **parts: object) -> PipelineView:
        """Runs the part of the pipeline's `__call__` that follows its loop, on the latents `x`."""
        model: Callable[..., tuple] = stop
        scheduler = self._probe.at(None)
        if self._closing is not None:
            model, scheduler = self._closing, self._probe_at(float(self._grid.levels[-2])).passing()
        view = self._view(StandIn(model, self._base), scheduler, x, prompts, decoding=not parts, **parts)
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
            beside=digest_of(prompts),
            rows=len(prompts),
            pictures=self._pictures,
            x=x,
            part=self._part,
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

    def _extras(self, prompts: list[str]) -> tuple[torch.dtype, tuple, Tensor | None]:
        """
        The latents' dtype, and what else `prepare_latents` returns (ids, latents of an image to edit). Computed once
        for each batch size, and for each batch of pictures. See `_kept`.
        """
        device = next(self._base.parameters()).device
        if beside := digest_of(prompts):

            def encoded() -> tuple[torch.dtype, tuple, Tensor | None]:
                return self._kept(self._prepare(prompts).prepared)

            return self._pictures.remembered(("prepared", len(prompts), beside), device, encoded)
        key = (len(prompts), device)
        if key not in self._prepared:
            self._prepare(prompts)
        return self._prepared[key]

    def _prepare(self, prompts: list[str]) -> PipelineView:
        generators = [torch.Generator().manual_seed(0) for _ in prompts]
        scheduler = grid_scheduler(self.pipeline.scheduler)
        return self._to_denoiser(prompts, 1.0, scheduler, len(self._grid.levels) - 1, generators)


def call_parameters(pipeline: DiffusionPipeline) -> Mapping[str, inspect.Parameter]:
    """The parameters of a pipeline's `__call__`."""
    return inspect.signature(inspect.unwrap(type(pipeline).__call__)).parameters
