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

from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn

from .calls import call_parameters
from .denoiser import denoiser
from .experts import expert_problems
from .guidance import guidance_name
from .guiders import guider_problems
from .images import pixels_a_latent
from .pictures import takes_pictures
from .prediction import scheduler_problem


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
    "denoising_end",
)
# Images beside the prompt, which would be the same for every prompt.
_IMAGE_OPTIONS = ("ip_adapter_image", "ip_adapter_image_embeds")
# Components that turn an image into further inputs of the denoiser.
_EXTRA_NETWORKS = ("controlnet", "adapter")
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
    "callback",
    "eta",
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
        elif option in _IMAGE_OPTIONS:
            problems.append(
                f"generation_kwargs: {option!r} needs an IP-Adapter, which is not part of the model. Remove it."
            )
        elif option in MANAGED_OPTIONS or option == guidance_name(denoiser(pipeline), parameters):
            problems.append(f"generation_kwargs: {option!r} is set by the trainer's own arguments. Remove it.")
        elif option not in parameters:
            problems.append(f"generation_kwargs: {name} takes no {option!r}.")
    if max_sequence_length is not None and "max_sequence_length" not in parameters:
        problems.append(f"max_sequence_length={max_sequence_length}: {name} takes none. Leave it unset.")
    factor = pixels_a_latent(pipeline)
    for side, size in (("height", height), ("width", width)):
        if size is not None and side not in parameters and not takes_pictures(parameters):
            problems.append(f"{side}={size}: {name} takes none, so what it draws has the size that it chooses itself.")
        if size is not None and (size <= 0 or size % factor):
            problems.append(
                f"{side}={size} is not a multiple of {factor}, the number of pixels per latent of {name}. "
                f"Use {max(factor, round(size / factor) * factor)}."
            )
    return problems


def pipeline_problems(pipeline: DiffusionPipeline) -> list[str]:
    """Says why velocities can't be computed with a pipeline, one sentence each."""
    if problems := expert_problems(pipeline):
        return problems
    name = type(pipeline).__name__
    scheduler, network = pipeline.components.get("scheduler"), denoiser(pipeline)
    missing = [] if isinstance(network, nn.Module) else ["transformer or unet"]
    methods, parameters = dir(type(pipeline)), call_parameters(pipeline)
    missing += [] if "encode_prompt" in methods else ["encode_prompt"]
    # A call that takes latents may draw them itself (ERNIE-Image's).
    missing += [] if "prepare_latents" in methods or "latents" in parameters else ["prepare_latents"]
    problems = []
    if "num_inference_steps" not in parameters:
        problems.append(
            f"{name} takes no num_inference_steps: it denoises in stages of its own, not on one noise grid."
        )
    if missing:
        problems.append(
            f"{name} has no {', '.join(missing)}: only text-to-image pipelines with a denoising transformer or UNet are "
            "supported."
        )
    if scheduler is None:
        problems.append(f"{name} has no scheduler. Load the pipeline with the one it was published with.")
    elif (problem := scheduler_problem(scheduler, name)) is not None:
        problems.append(problem)
    if extra := [part for part in _EXTRA_NETWORKS if pipeline.components.get(part) is not None]:
        problems.append(
            f"{name} has a {extra[0]}, whose image would be the same for every prompt. Use the text-to-image pipeline of "
            "the same model."
        )
    if isinstance(network, UNet2DConditionModel):
        problems += _unet_problems(network, name, takes_pictures(parameters))
    return problems + guider_problems(pipeline)


def _unet_problems(unet: UNet2DConditionModel, name: str, takes_pictures: bool) -> list[str]:
    problems = []
    # It returns more where it predicts a variance too. Of pictures to edit, latents are further channels.
    if unet.config.in_channels > unet.config.out_channels and not takes_pictures:
        problems.append(
            f"{name}'s UNet takes {unet.config.in_channels} channels and returns {unet.config.out_channels}, so it needs "
            "an image besides the latents (to fill in, to edit or to enlarge). Use the text-to-image model."
        )
    if unet.config.encoder_hid_dim_type not in (None, "text_proj"):
        problems.append(
            f"{name}'s UNet takes an image as a prompt (encoder_hid_dim_type="
            f"{unet.config.encoder_hid_dim_type!r}), as with an IP-Adapter. Remove it with pipe.unload_ip_adapter()."
        )
    return problems
