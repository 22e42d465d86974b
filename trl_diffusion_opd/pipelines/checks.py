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

"""Checks that a pipeline, and options of its `__call__`, can be used one denoising step at a time."""

from collections.abc import Collection, Iterable

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import nn

from .denoiser import denoiser
from .guidance import guidance_name
from .guiders import guider_problems
from .images import pixels_a_latent


# Options that depend on a step's index in the pipeline's loop. Here every step runs in a loop of its own.
LOOP_INDEX_OPTIONS = (
    "skip_guidance_layers",
    "skip_layer_guidance_scale",
    "skip_layer_guidance_start",
    "skip_layer_guidance_stop",
    "cfg_trunc_ratio",
    "cfg_truncation",
    "cfg_normalization_start",
    "guidance_interval",
    "guidance_start",
    "guidance_stop",
)
# Options that the trainer sets itself.
MANAGED_OPTIONS = (
    "prompt",
    "num_inference_steps",
    "timesteps",
    "sigmas",
    "latents",
    "generator",
    "num_images_per_prompt",
    "output_type",
    "return_dict",
    "callback_on_step_end",
    "height",
    "width",
    "max_sequence_length",
)


def option_problems(
    pipeline: DiffusionPipeline,
    parameters: Collection[str],
    options: Iterable[str],
    height: int | None,
    width: int | None,
    max_sequence_length: int | None,
) -> list[str]:
    """
    Says what is wrong with arguments for a pipeline's `__call__`, which has these `parameters`, one sentence each.
    """
    name = type(pipeline).__name__
    problems = []
    for option in options:
        if option in LOOP_INDEX_OPTIONS:
            problems.append(
                f"generation_kwargs: {option!r} depends on the step's index within the pipeline's loop, but training "
                "runs one step at a time. Remove it."
            )
        elif option in MANAGED_OPTIONS or option == guidance_name(denoiser(pipeline), parameters):
            problems.append(f"generation_kwargs: {option!r} is set by the trainer's own arguments. Remove it.")
        elif option not in parameters:
            problems.append(f"generation_kwargs: {name} takes no {option!r}.")
    if max_sequence_length is not None and "max_sequence_length" not in parameters:
        problems.append(f"max_sequence_length={max_sequence_length}: {name} takes none. Leave it unset.")
    factor = pixels_a_latent(pipeline)
    for side, size in (("height", height), ("width", width)):
        if size is not None and (size <= 0 or size % factor):
            problems.append(
                f"{side}={size} is not a multiple of {factor}, the number of pixels per latent of {name}. "
                f"Use {max(factor, round(size / factor) * factor)}."
            )
    return problems


def pipeline_problems(pipeline: DiffusionPipeline) -> list[str]:
    """Says why velocities can't be computed with a pipeline, one sentence each."""
    name = type(pipeline).__name__
    scheduler = pipeline.components.get("scheduler")
    missing = [] if isinstance(pipeline.components.get("transformer"), nn.Module) else ["transformer"]
    missing += [method for method in ("encode_prompt", "prepare_latents") if method not in dir(type(pipeline))]
    problems = []
    if missing:
        problems.append(
            f"{name} has no {', '.join(missing)}: only pipelines with a denoising transformer are supported."
        )
    if scheduler is None or not _is_flow_matching(scheduler):
        prediction = None if scheduler is None else scheduler.config.get("prediction_type")
        problems.append(
            f"{name} is not a flow-matching pipeline: its scheduler is {type(scheduler).__name__} with "
            f"prediction_type={prediction!r}. Use a model with a FlowMatchEulerDiscreteScheduler or a flow-prediction "
            "solver."
        )
    return problems + guider_problems(pipeline)


def _is_flow_matching(scheduler: SchedulerMixin) -> bool:
    config = scheduler.config
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or (
        config.get("prediction_type") == "flow_prediction" and bool(config.get("use_flow_sigmas"))
    )
