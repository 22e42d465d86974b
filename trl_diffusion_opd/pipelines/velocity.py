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
Computes the velocity of any flow-matching pipeline of diffusers, by running one step of the pipeline itself.

Every model family encodes prompts, scales timesteps, arranges guidance and signs its output differently. Its
pipeline's `__call__` knows how. [`VelocityField`] therefore runs one step of that `__call__` on a view (a shallow
copy) of the pipeline with three replaced parts: `prepare_latents` returns our latents `x`, `transformer` calls the
model we want, and the scheduler's `step` keeps what it gets (the velocity after guidance, slicing and sign) and stops
the call. Only this file and `view.py` use a pipeline's internals.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NoReturn

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from PIL.Image import Image
from PIL.Image import new as new_image
from torch import Tensor

from .checks import option_problems, pipeline_problems
from .guidance import guidance_embedding, guidance_lines, guidance_name
from .guiders import default_scale, scaled
from .images import Images, decoded, encoded, encoder_problem
from .latent_map import LatentMap
from .prompt_cache import PromptCache
from .prompt_store import Encoded, PromptStore
from .text_length import TRIAL_PROMPT, NoCache, TextLimit, limits, recorders
from .view import (
    DecoderStandIn,
    PipelineView,
    Probe,
    StandIn,
    Stop,
    at_least_float32,
    stop,
    timestep_name,
)


class VelocityField:
    """
    Computes `v(x, t | prompts, guidance)` of a flow-matching pipeline, bit for bit as in the pipeline's own loop.

    Noise levels run from `t = 1` (noise) to `t = 0` (image), and `v` points from the image to the noise:
    `x0 = x - t v`. The pipeline is never changed.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            A pipeline with `transformer`, `encode_prompt`, `prepare_latents` and a flow-matching scheduler.
        num_inference_steps (`int`):
            Number of steps of the noise grid. The pipeline's own scheduler makes the grid.
        height (`int`, *optional*), width (`int`, *optional*):
            Size of the images in pixels. Defaults to the pipeline's.
        max_sequence_length (`int`, *optional*):
            Length of the text in tokens. Defaults to the pipeline's.
        generation_kwargs (`dict`, *optional*):
            Further arguments of the pipeline's `__call__`. Options that depend on a step's index in the loop are
            refused.
        prompt_store ([`PromptStore`], *optional*):
            Keeps embeddings of prompts on disk across runs. By default they are kept in memory.

    Attributes:
        levels (`torch.Tensor` of shape `(num_inference_steps + 1,)`, float64):
            The noise grid, decreasing, with a final 0.
        encoding (`Callable`):
            Returns a context manager in which prompts and images are encoded, for example to time it.

    Raises:
        [`ValueError`]: if the pipeline is not a flow-matching pipeline or lacks a needed part, or if the size or an
            option does not fit it. One message lists everything that is wrong.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        num_inference_steps: int,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int | None = None,
        generation_kwargs: Mapping[str, object] | None = None,
        prompt_store: PromptStore | None = None,
    ):
        self.pipeline = pipeline
        self._base = pipeline.components.get("transformer")
        self.height, self.width = height, width
        self._parameters = inspect.signature(inspect.unwrap(type(pipeline).__call__)).parameters
        options = dict(generation_kwargs or {})
        problems = pipeline_problems(pipeline) or option_problems(
            pipeline, self._parameters, options, height, width, max_sequence_length
        )
        if problems:
            raise ValueError("\n".join(problems))
        if max_sequence_length is not None:
            options["max_sequence_length"] = max_sequence_length
        options.update({k: v for k, v in (("height", height), ("width", width)) if v is not None})
        self._options = options
        self._guidance = guidance_name(self._base, self._parameters)
        self._cache = PromptCache(store=prompt_store)
        self.encoding: Callable[[], AbstractContextManager[None]] = nullcontext
        self._working_scales = {1.0}
        self._prepared: dict[tuple[int, torch.device], tuple[torch.dtype, tuple]] = {}
        self._view_class: type[PipelineView] = type(type(pipeline).__name__, (PipelineView, type(pipeline)), {})
        self._probe = Probe.of(pipeline.scheduler)
        self._guidance_offset = 0.0
        self._latent_map: LatentMap | None = None
        self.set_grid(num_inference_steps)

    def set_grid(self, num_inference_steps: int) -> None:
        """Reads the noise grid with this number of steps from the pipeline's scheduler, as its `__call__` sets it."""
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        view = self._to_transformer([""], 1.0, scheduler, num_inference_steps)
        # Flow-prediction solvers (Sana's) have integer timesteps, so only their levels are used.
        self.levels = scheduler.sigmas.to("cpu", torch.float64)
        if len(self.levels) != num_inference_steps + 1:
            raise ValueError(
                f"{type(scheduler).__name__} makes {len(self.levels) - 1} levels for {num_inference_steps} steps. Use "
                "a FlowMatchEulerDiscreteScheduler, which makes one level a step."
            )
        timesteps = self.levels[:-1] * scheduler.config.num_train_timesteps
        own = scheduler.timesteps.to("cpu", torch.float64)
        # CogView4 shifts the levels but gives its transformer the timesteps from before the shift.
        self._shifted_apart = isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not torch.allclose(
            own, timesteps
        )
        self._timesteps = torch.cat([own, own.new_zeros(1)])
        # Z-Image and Krea 2 write guidance as v + s (v - v_empty): their s is one less than other pipelines' scale,
        # and s = 1 is guidance. The offset corrects this: a scale of 1 is then no guidance, so the next call adds
        # nothing.
        named = self._guidance == "guidance_scale" and "do_classifier_free_guidance" in dir(view)
        self._guidance_offset += float(named and view.do_classifier_free_guidance)

    def with_steps(self, num_inference_steps: int) -> "VelocityField":
        """A copy of this field with another number of steps. Both share the embeddings."""
        other = copy.copy(self)
        other.set_grid(num_inference_steps)
        return other

    @property
    def num_inference_steps(self) -> int:
        return len(self.levels) - 1

    def __call__(
        self,
        x: Tensor,
        t: float | Sequence[float],
        prompts: list[str],
        guidance_scale: float,
        transformer: Callable[..., tuple] | None = None,
        adapters: list[str] | None = None,
    ) -> Tensor:
        """
        Computes the velocity at `x`, after guidance.

        Args:
            x (`torch.Tensor` of shape `(B, ...)`, float32): latents in the layout of the pipeline's loop (some pack
                them).
            t (`float` or `Sequence[float]` of length `B`): noise level in (0, 1], one for all samples or one for each.
            prompts (`list[str]` of length `B`): the prompt of each sample.
            guidance_scale (`float`):
                Scale of classifier-free guidance. 1 turns it off, even if the pipeline itself counts from 0.
            transformer (`Callable`, *optional*): the model to call in place of the pipeline's transformer.
            adapters (`list[str]` of length `B`, *optional*):
                The LoRA of a `PeftModel` for each sample, `"__base__"` for none. By default the active one is used for
                all.

        Returns:
            `torch.Tensor` of `x`'s shape, float32 (float64 if the model is).
        """
        timesteps = None
        if isinstance(t, Sequence):
            # A pipeline's loop has one level at a time. First ask which timesteps it gives the transformer at each
            # level.
            shown = {level: self._shown_timesteps(x, level, prompts, guidance_scale) for level in dict.fromkeys(t)}
            timesteps, t = [shown[level] for level in t], t[0]
        stand_in = StandIn(transformer or self._base, self._base, timesteps, adapters)
        return self._velocity(x, t, prompts, guidance_scale, stand_in)

    def one_forward(self, transformer: Callable[..., tuple], batch_size: int) -> None:
        """
        Runs a transformer once, at the first noise level, to try it out.

        Args:
            transformer (`Callable`): the model to call.
            batch_size (`int`): 2 or more runs two prompts of different length, so that families that pad a batch use a
                mask.
        """
        prompts = ["a", "a b c"][: max(1, batch_size)]
        x = self.initial_latents(prompts, [torch.Generator().manual_seed(i) for i in range(len(prompts))])
        self(x, float(self.levels[0]), prompts, 1.0, transformer)

    def _shown_timesteps(self, x: Tensor, t: float, prompts: list[str], guidance_scale: float) -> Tensor:
        """The timesteps that the pipeline gives its transformer for a batch at level `t`, one for each row."""
        inputs = self._first_inputs(x, t, prompts, guidance_scale)
        return inputs[timestep_name(inputs)]

    def _first_inputs(self, x: Tensor, t: float, prompts: list[str], guidance_scale: float) -> dict[str, Any]:
        """The arguments, by name, of the pipeline's first call of its transformer at level `t`."""
        seen: list[dict[str, Any]] = []

        def note(**inputs: Any) -> NoReturn:
            seen.append(inputs)
            raise Stop

        self._step(x, t, prompts, guidance_scale, StandIn(note, self._base))
        return seen[0]

    def _velocity(
        self, x: Tensor, t: float, prompts: list[str], guidance_scale: float, transformer: StandIn
    ) -> Tensor:
        velocity = self._step(x, t, prompts, guidance_scale, transformer).scheduler.velocity
        assert velocity is not None, "the pipeline's loop ended without a call of scheduler.step"
        return at_least_float32(velocity)

    def _timestep(self, t: float) -> float:
        """The timestep that the pipeline's loop uses for the level `t`."""
        if self._shifted_apart:
            return float(np.interp(t, self.levels.flip(0).numpy(), self._timesteps.flip(0).numpy()))
        return t * self._probe.config.num_train_timesteps

    def initial_latents(self, prompts: list[str], generators: list[torch.Generator]) -> Tensor:
        """
        The noise from which the pipeline itself would start with `generator=generators`.

        Returns:
            `torch.Tensor` of shape `(B, ...)`, float32.
        """
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        view = self._to_transformer(prompts, 1.0, scheduler, self.num_inference_steps, generators)
        return at_least_float32(view.prepared[0])

    def encode_together(self, companies: Iterable[Sequence[str]]) -> None:
        """
        Sets which prompts are encoded together from now on, for this field and its `with_steps` copies. All other
        prompts are encoded alone. See [`PromptCache.set_companies`].
        """
        self._cache.set_companies(companies)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], guidance_scales: Iterable[float]) -> None:
        """
        Encodes the prompts of a batch in advance, so that later calls need no text encoder.

        Args:
            prompts (`list[str]`): the prompts of one batch. In some pipelines embeddings depend on the whole batch.
            guidance_scales (`Iterable[float]`): the guidance scales of the later calls.
        """
        x = self.initial_latents(prompts, [torch.Generator().manual_seed(0) for _ in prompts])
        for scale in guidance_scales:
            self._step(x, 1.0, prompts, scale, StandIn(stop, self._base))

    @torch.no_grad()
    def embeddings(self, prompts: Iterable[str], guidance_scale: float) -> Iterator[list[Encoded]]:
        """
        Yields the embeddings of each prompt, encoded as a batch of one. The transformer is not run.

        Args:
            prompts (`Iterable[str]`): the prompts.
            guidance_scale (`float`): the guidance scale with which the embeddings will be used.

        Yields:
            `list`: what each call of the pipeline's `encode_prompt` for this prompt returned.
        """
        x = self.initial_latents([""], [torch.Generator().manual_seed(0)])
        for prompt in prompts:
            yield self._step(x, 1.0, [prompt], guidance_scale, StandIn(stop, self._base)).encoded

    @torch.no_grad()
    def text_limits(self) -> list[TextLimit]:
        """What each text encoder reads of a prompt at most; empty if unknown. Encodes a short prompt."""
        recorded: dict[str, Any] = recorders(self.pipeline.components)
        view = self._view(StandIn(stop, self._base), self._probe.at(1.0), cache=NoCache(), **recorded)
        self._call(view, [TRIAL_PROMPT], 1.0, generator=[torch.Generator().manual_seed(0)])
        default = self._parameters.get("max_sequence_length")
        return limits(recorded, self._options.get("max_sequence_length", default and default.default))

    @torch.no_grad()
    def decode(self, x: Tensor, prompts: list[str], output_type: str = "pil") -> Images:
        """
        Decodes final latents to images as the pipeline does, by running its `__call__` with a loop of no steps.

        Args:
            x (`torch.Tensor` of shape `(B, ...)`): latents at level 0.
            prompts (`list[str]` of length `B`): the prompts of the images.
            output_type (`str`): as in the pipeline: `"pil"`, `"np"` in [0, 1], or `"pt"`.

        Raises:
            [`FloatingPointError`]: if latents or images contain NaN or infinity.
        """
        return decoded(x, lambda: self._end(x, prompts, output_type).images)

    @torch.no_grad()
    def encode(self, images: Sequence[Image]) -> Tensor:
        """
        Encodes images to latents in the layout of the pipeline's loop at level 0. It is the inverse of [`decode`].

        Images are cropped around the centre to the aspect ratio of `height` and `width`, resized, and encoded by the
        pipeline's VAE. A variational VAE adds no noise here.

        Args:
            images (`list[PIL.Image.Image]` of length `B`): of any size and mode.

        Returns:
            `torch.Tensor` of shape `(B, ...)`, float32, on the transformer's device.

        Raises:
            [`ValueError`]: if images of this pipeline can't be encoded.
        """
        if self._latent_map is None:
            self._latent_map = self._find_latent_map()
        device = next(self._base.parameters()).device
        with self.encoding():
            return encoded(self.pipeline, self._latent_map, images, (self.height, self.width), device)

    def check_encode(self) -> None:
        """
        Encodes a grey image, to check that images can be encoded.

        Raises:
            [`ValueError`]: if images can't be encoded for this pipeline. The message gives the reason.
        """
        if (problem := encoder_problem(self.pipeline)) is not None:
            raise ValueError(problem)
        self.encode([new_image("RGB", (self.width or 64, self.height or 64), "grey")])

    def _find_latent_map(self) -> LatentMap:
        """Finds out how the pipeline rearranges and scales the loop's latents before decoding."""
        vae = self.pipeline.components["vae"]
        generators = [torch.Generator().manual_seed(0)]

        def to_vae(x: Tensor) -> Tensor:
            stand_in = DecoderStandIn(vae)
            self._end(x, [""], "pt", vae=stand_in)
            return stand_in.latents

        return LatentMap.find(to_vae, self.initial_latents([""], generators), type(self.pipeline).__name__)

    def check_guidance(self, guidance_scale: float) -> None:
        """
        Refuses a guidance scale that the pipeline would silently ignore.

        It compares the number of rows that the transformer gets with that at scale 1: guidance adds rows.

        Raises:
            [`ValueError`]: if the transformer gets as many rows as at scale 1.
        """
        if guidance_scale in self._working_scales:
            return
        without, guided = self._rows(1.0), self._rows(guidance_scale)
        if without == guided:
            raise ValueError(
                f"guidance_scale={guidance_scale} does nothing: {type(self.pipeline).__name__} gives its transformer "
                f"{guided} row(s) a prompt, as at 1.0. Set guidance_scale=1.0 (a guidance embedding, as Flux has "
                "one, is set through generation_kwargs)."
            )
        self._working_scales.add(guidance_scale)

    def default_guidance_scale(self) -> float:
        """The scale of classifier-free guidance that the pipeline's own `__call__` has by default; 1.0 if it has none."""
        if self._guidance is None:
            return default_scale(self.pipeline) or 1.0
        given = self._parameters[self._guidance].default
        if not isinstance(given, int | float):
            return 1.0
        scale = float(given) + self._guidance_offset
        if scale <= 1 or self._rows(scale) == self._rows(1.0):  # a distilled Klein ignores its default
            return 1.0
        self._working_scales.add(scale)
        return scale

    def guidance_lines(self, guidance_scale: float, is_default: bool) -> list[str]:
        """Says what this scale is and costs, and what else guides. See [`~guidance.guidance_lines`]."""
        embedding = guidance_embedding(self._base, self._parameters, self._options)
        return guidance_lines(guidance_scale, self._guidance, is_default, embedding)

    def _rows(self, guidance_scale: float) -> int:
        """The number of rows that the transformer gets for one prompt. Guidance adds some."""
        x = self.initial_latents([""], [torch.Generator().manual_seed(0)])
        stand_in = StandIn(self._base, self._base)
        with torch.no_grad():
            self._velocity(x, float(self.levels[0]), [""], guidance_scale, stand_in)
        return stand_in.rows

    @torch.no_grad()
    def check_rows(self, guidance_scale: float) -> None:
        """
        Refuses a pipeline that gives its transformer rows in an order from which a row's sample can't be known.

        Raises:
            [`ValueError`]: if the rows are not in the order of the samples (with guidance several times in that
            order).
        """
        prompts = ["", ""]
        x = self.initial_latents(prompts, [torch.Generator().manual_seed(i) for i in range(2)])
        rows = next(iter(self._first_inputs(x, 1.0, prompts, guidance_scale).values()))
        in_order = len(rows) % 2 == 0 and all(torch.equal(row, rows[i % 2]) for i, row in enumerate(rows))
        if not in_order or torch.equal(rows[0], rows[1]):
            raise ValueError(
                f"{type(self.pipeline).__name__} does not give its transformer the samples of a batch one after the "
                "other."
            )

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

    def _to_transformer(
        self,
        prompts: list[str],
        guidance_scale: float,
        scheduler: SchedulerMixin,
        num_inference_steps: int,
        generators: list[torch.Generator] | None = None,
    ) -> PipelineView:
        """
        Runs the pipeline's `__call__` up to its transformer. By then it has set its grid and prepared its latents.
        """
        view = self._view(StandIn(stop, self._base), scheduler)
        self._call(view, prompts, guidance_scale, num_inference_steps=num_inference_steps, generator=generators)
        view.prepared = view.prepared if isinstance(view.prepared, tuple) else (view.prepared,)
        self._prepared[len(prompts), view.transformer.device] = (view.prepared[0].dtype, view.prepared[1:])
        return view

    def _step(
        self, x: Tensor, t: float, prompts: list[str], guidance_scale: float, transformer: StandIn
    ) -> PipelineView:
        """Runs one step of the pipeline's loop, at `x`."""
        t = float(t)
        view = self._view(transformer, self._probe.at(t, self._timestep(t)), x, prompts)
        self._call(view, prompts, guidance_scale)
        return view

    def _end(self, x: Tensor, prompts: list[str], output_type: str, **parts: object) -> PipelineView:
        """Runs the part of the pipeline's `__call__` that follows its loop, on the latents `x`."""
        view = self._view(StandIn(stop, self._base), self._probe.at(None), x, prompts, decoding=not parts, **parts)
        self._call(view, prompts, 1.0, output_type=output_type)
        return view

    def _view(
        self,
        transformer: StandIn,
        scheduler: SchedulerMixin,
        x: Tensor | None = None,
        prompts: Sequence[str] = (),
        **parts: object,
    ) -> PipelineView:
        if x is not None and len(x) != len(prompts):
            raise ValueError(f"{len(x)} latents, but {len(prompts)} prompts.")
        return self._view_class.of(
            self.pipeline,
            transformer=transformer,
            scheduler=scheduler,
            encoding=self.encoding,
            x=x,
            prepared=None if x is None else self._extras(list(prompts)),
            **{"cache": self._cache, "decoding": False, **parts},
        )

    def _call(self, view: PipelineView, prompts: list[str], guidance_scale: float, **how: object) -> None:
        # The scheduler alone says how many steps there are, but some grids (Mochi's) cannot be made for one.
        options = {"num_inference_steps": 2, "generator": None, "output_type": "latent", **how}
        options.update(self.call_options(prompts, guidance_scale), return_dict=False)
        view.__dict__.update(scaled(self.pipeline, guidance_scale))
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
            self._to_transformer(
                prompts, 1.0, copy.deepcopy(self.pipeline.scheduler), self.num_inference_steps, generators
            )
        return self._prepared[key]
