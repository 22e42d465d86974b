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
Computes the velocity of any text-to-image pipeline of diffusers, by running one step of the pipeline itself (see
`calls.py`). What the network predicts, and how its states and outputs become those of flow matching, is in
`prediction.py`.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from inspect import unwrap
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from PIL.Image import new as new_image
from torch import Tensor

from .branches import GuidanceBranches
from .calls import call_parameters
from .checks import option_problems, pipeline_problems
from .denoised_part import own_output
from .experts import Experts, expert_groups, in_groups
from .frames import frames_problems, number_of_frames, still_problem
from .guidance import guidance_embedding, guidance_lines
from .guiders import default_scale
from .images import Images, decoded, encoded, encoder_problem
from .latent_map import LatentMap
from .pictures import joined
from .prediction import all_levels, grid_scheduler, noise_grid, prediction_of
from .prompt_store import Encoded, PromptStore
from .text_length import TRIAL_PROMPT, NoCache, TextLimit, limits, recorders
from .view import DecoderStandIn, PipelineView, StandIn, at_least_float32, noting, stop, timesteps_of


class VelocityField(GuidanceBranches):
    """
    Computes `v(x, t | prompts, guidance)` of a text-to-image pipeline, in the coordinates of flow matching.

    Noise levels run from `t = 1` (noise) to `t = 0` (image), and `v` points from the image to the noise:
    `x = (1 - t) x0 + t eps`, `x0 = x - t v`. With a flow-matching pipeline states are those of its own loop, and the
    velocity is its own, bit for bit. Models that predict noise, v or the sample are converted (see `prediction.py`). The
    pipeline is never changed.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            A pipeline with `transformer` or `unet`, `encode_prompt`, `prepare_latents` and a scheduler that is
            deterministic and of first order or multistep.
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
            The noise grid, decreasing. It ends where the pipeline's own loop ends: at 0, or a little above.

    Raises:
        [`ValueError`]: if the pipeline's kind is not supported or it lacks a needed part, or if the size or an option
            does not fit it. One message lists everything that is wrong.
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
        self.height, self.width = height, width
        options, parameters = dict(generation_kwargs or {}), call_parameters(pipeline)
        problems = pipeline_problems(pipeline) or [
            *option_problems(pipeline, parameters, options, height, width, max_sequence_length),
            *frames_problems(pipeline, options),
        ]
        if problems:
            raise ValueError("\n".join(problems))
        if max_sequence_length is not None:
            options["max_sequence_length"] = max_sequence_length
        sizes = {"height": height, "width": width}
        # A pipeline that edits may take no size: that of the picture decides.
        options.update({k: v for k, v in sizes.items() if v is not None and k in parameters})
        super().__init__(pipeline, options, prompt_store)
        self._prediction = prediction_of(pipeline)
        self._working_scales = {1.0}
        self._latent_map: LatentMap | None = None
        self._find_need(num_inference_steps)
        self.set_grid(num_inference_steps)
        self._find_denoised_part()
        if not self._prediction.is_flow:
            self._check_input_scaling()

    def set_grid(self, num_inference_steps: int) -> None:
        """Reads the noise grid with this number of steps from the pipeline's scheduler, as its `__call__` sets it."""
        scheduler = grid_scheduler(self.pipeline.scheduler)
        view = self._to_denoiser([""], 1.0, scheduler, num_inference_steps)
        grid = noise_grid(self._prediction, scheduler)
        if len(grid.levels) != num_inference_steps + 1:
            raise ValueError(
                f"{type(scheduler).__name__} makes {len(grid.levels) - 1} levels for {num_inference_steps} steps. Use "
                "a FlowMatchEulerDiscreteScheduler, which makes one level a step."
            )
        self._grid, self.levels = grid, grid.levels
        # Z-Image and Krea 2 write guidance as v + s (v - v_empty): their s is one less than other pipelines' scale,
        # and s = 1 is guidance. The offset corrects this: a scale of 1 is then no guidance, so the next call adds
        # nothing.
        named = self._guidance == "guidance_scale" and "do_classifier_free_guidance" in dir(view)
        self._guidance_offset += float(named and view.do_classifier_free_guidance)

    def _check_input_scaling(self) -> None:
        """Refuses a flow-matching pipeline whose scheduler was exchanged by one for models that predict noise."""
        x = self.initial_latents([""], [torch.Generator().manual_seed(0)])
        with torch.no_grad():
            view = self._step(x, float(self.levels[0]), [""], 1.0, StandIn(stop, self._base))
        # A pipeline that scales its first noise by its scheduler (Kandinsky 3) is not of flow matching, and where nothing
        # is to be scaled it may leave the input as it is.
        prepares = unwrap(type(self.pipeline).prepare_latents).__code__.co_names
        if not (view.scheduler.scales_input or "init_noise_sigma" in prepares and self._grid_is_unscaled()):
            raise ValueError(
                f"{type(self.pipeline).__name__} is a flow-matching pipeline, but its scheduler is "
                f"{type(self.pipeline.scheduler).__name__} with prediction_type={self._prediction.kind!r}. Use the "
                "scheduler that the model was published with, or a FlowMatchEulerDiscreteScheduler."
            )

    def _grid_is_unscaled(self) -> bool:
        scheduler = grid_scheduler(self.pipeline.scheduler)
        scheduler.set_timesteps(self.num_inference_steps)
        return float(scheduler.scale_model_input(torch.ones(1), scheduler.timesteps[0])) == 1

    def with_steps(self, num_inference_steps: int) -> "VelocityField":
        """A copy of this field with another number of steps. Both share the embeddings."""
        other = copy.copy(self)
        other.set_grid(num_inference_steps)
        return other

    def with_all_levels(self) -> "VelocityField":
        """A copy of this field whose grid has a level for each timestep that the network was trained on."""
        scheduler = self.pipeline.scheduler
        if self._prediction.is_flow:
            return self.with_steps(scheduler.config.num_train_timesteps)
        other, grid = copy.copy(self), all_levels(self._prediction, scheduler)
        vars(other).update(_grid=grid, levels=grid.levels)
        return other

    @property
    def num_inference_steps(self) -> int:
        return len(self.levels) - 1

    @property
    def num_frames(self) -> int | None:
        """The number of frames of what is drawn: 1 for images, `None` for videos whose number only the pipeline knows."""
        return number_of_frames(self.pipeline, self._options)

    @property
    def trained_levels(self) -> tuple[float, float]:
        """The lowest and the highest noise level that the network was trained on; 0 and 1 for flow matching."""
        return self._grid.lowest, self._grid.highest

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
        timesteps, levels = None, t
        if self._is_apart(prompts):
            of_rows = partial(self._of_rows, x, t, prompts, guidance_scale, transformer, adapters)
            return in_groups([[i] for i in range(len(prompts))], of_rows)
        if isinstance(t, Sequence):
            if len(groups := self._groups(t)) > 1:
                of_rows = partial(self._of_rows, x, t, prompts, guidance_scale, transformer, adapters)
                return in_groups(groups, of_rows)
            # A pipeline's loop has one level at a time. First ask which timesteps it gives the transformer at each
            # level.
            shown = {level: self._shown_timesteps(x, level, prompts, guidance_scale) for level in dict.fromkeys(t)}
            timesteps, t = [shown[level] for level in t], t[0]
        stand_in = StandIn(transformer or self._base, self._base, timesteps, adapters)
        state = self._prediction.network_state(x, levels)
        return self._taken(self._step(state, t, prompts, guidance_scale, stand_in), x, levels)

    def _taken(self, view: PipelineView, x: Tensor, levels: float | Sequence[float]) -> Tensor:
        """The velocity at `x` that the pipeline has handed to its scheduler in one step."""
        output = view.scheduler.output
        if output is None:
            raise ValueError(
                f"{type(self.pipeline).__name__} steps with schedulers of its own (copies, one a frame), so its velocity "
                "can't be read. Use a pipeline with one scheduler for all frames."
            )
        output = own_output(output, view.scheduler.sample, view.x)
        if output.shape != x.shape:
            raise ValueError(
                f"{type(self.pipeline).__name__} prepares latents of shape {tuple(x.shape)}, but its loop has them as "
                f"{tuple(output.shape)}, so its steps can't be taken from outside."
            )
        return self._prediction.velocity(at_least_float32(output), x, levels)

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

    def _groups(self, t: Sequence[float]) -> list[list[int]]:
        """The positions of the samples of each network: those of one step of the pipeline can't have two experts."""
        if not isinstance(self._base, Experts):
            return [[*range(len(t))]]
        return expert_groups([self._grid.timestep(level) for level in t], self.pipeline)

    def _of_rows(
        self,
        x: Tensor,
        t: float | Sequence[float],
        prompts: list[str],
        guidance_scale: float,
        transformer: Callable[..., tuple] | None,
        adapters: list[str] | None,
        rows: list[int],
    ) -> Tensor:
        adapters = None if adapters is None else [adapters[i] for i in rows]
        t = [t[i] for i in rows] if isinstance(t, Sequence) else t
        return self(x[rows], t, [prompts[i] for i in rows], guidance_scale, transformer, adapters)

    def _shown_timesteps(self, x: Tensor, t: float, prompts: list[str], guidance_scale: float) -> Tensor:
        """The timesteps that the pipeline gives its transformer for a batch at level `t`, one for each row."""
        return timesteps_of(self._first_inputs(x, t, prompts, guidance_scale))

    def _first_inputs(self, x: Tensor, t: float, prompts: list[str], guidance_scale: float) -> dict[str, Any]:
        """The arguments, by name, of the pipeline's first call of its transformer at level `t`."""
        seen: list[dict[str, Any]] = []
        self._step(x, t, prompts, guidance_scale, StandIn(noting(seen), self._base))
        return seen[0]

    def initial_latents(self, prompts: list[str], generators: list[torch.Generator]) -> Tensor:
        """
        The noise from which the pipeline itself would start with `generator=generators`, in flow coordinates.

        Returns:
            `torch.Tensor` of shape `(B, ...)`, float32.
        """
        if self._is_apart(prompts):
            rows = zip(prompts, generators, strict=True)
            return torch.cat([self.initial_latents([prompt], [generator]) for prompt, generator in rows])
        scheduler = grid_scheduler(self.pipeline.scheduler)
        view = self._to_denoiser(prompts, 1.0, scheduler, self.num_inference_steps, generators)
        x = at_least_float32(view.prepared[0])
        x = x if self._part is None else self._part.of(x)
        return x if self._grid.start_scale == 1 else x / self._grid.start_scale

    def clean(self, x: Tensor) -> Tensor:
        """
        The latents that the pipeline decodes at the end of a walk: those of the image, at level 0.

        Args:
            x (`torch.Tensor` of shape `(B, ...)`): state at the last level, in flow coordinates.

        Returns:
            `torch.Tensor` of `x`'s shape; `x` itself for a grid that ends at 0. A grid that ends above 0 leaves a
            little noise in the image.
        """
        return x if self._grid.end_scale == 1 else x * self._grid.end_scale

    def output_weights(self, levels: Sequence[float]) -> list[float] | None:
        """
        Factors that turn squared errors of velocities at these levels into those of the network's outputs, in which it
        was trained; `None` for flow matching, whose outputs are velocities.
        """
        return None if self._prediction.is_flow else [self._prediction.output_weight(t) for t in levels]

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
        scales = list(guidance_scales)
        apart = [slice(i, i + 1) for i in range(len(prompts))] if self._is_apart(prompts) else [slice(None)]
        for rows in apart:
            for scale in scales:
                self._step(x[rows], 1.0, prompts[rows], scale, StandIn(stop, self._base))

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
            x (`torch.Tensor` of shape `(B, ...)`): latents at level 0, those that [`clean`] returns.
            prompts (`list[str]` of length `B`): the prompts of the images.
            output_type (`str`): as in the pipeline: `"pil"`, `"np"` in [0, 1], or `"pt"`.

        Returns:
            With `"pil"` a list of `B` images. A pipeline for videos that draws more than one frame returns `B` videos,
            each a list of its frames.

        Raises:
            [`FloatingPointError`]: if latents or images contain NaN or infinity.
        """
        if self._is_apart(prompts):
            return joined([self.decode(x[i : i + 1], prompts[i : i + 1], output_type) for i in range(len(prompts))])
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
        if (problem := encoder_problem(self.pipeline) or still_problem(self.pipeline, self._options)) is not None:
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
            self._step(x, float(self.levels[0]), [""], guidance_scale, stand_in)
        return stand_in.total_rows()

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
