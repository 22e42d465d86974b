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

"""How many frames a pipeline's videos have, and which numbers of frames its VAE can hold."""

from collections.abc import Mapping
from inspect import unwrap
from typing import Any

from diffusers import DiffusionPipeline

from .calls import call_parameters
from .images import draws_videos


# What the calls of pipelines name the number of frames, and where pipelines keep the number of frames a latent one.
FRAMES_ARGUMENTS = ("num_frames", "frames", "video_length")
_STRIDES = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")


def frames_argument(pipeline: DiffusionPipeline) -> str | None:
    """What the pipeline's call names the number of frames; `None` if it draws images."""
    parameters = call_parameters(pipeline)
    return next((name for name in FRAMES_ARGUMENTS if name in parameters), None) if draws_videos(pipeline) else None


def number_of_frames(pipeline: DiffusionPipeline, options: Mapping[str, object]) -> int | None:
    """
    The number of frames that the pipeline's call is asked for, with these arguments or by its default: 1 if it draws
    images, `None` if only the call knows it.
    """
    argument = frames_argument(pipeline)
    if argument is None:
        return 1
    number = options.get(argument)
    default = call_parameters(pipeline)[argument].default
    chosen = default if number is None else number
    return chosen if isinstance(chosen, int) else None


def frames_problems(pipeline: DiffusionPipeline, options: Mapping[str, Any]) -> list[str]:
    """
    Says what is wrong with the number of frames among the arguments `options` of a pipeline's call, a sentence each.

    Most VAEs keep the first frame alone and then one latent frame for each `stride` frames, so `frames - 1` must be a
    multiple. Pipelines round other numbers, and then draw another number than they were asked for.
    """
    argument = frames_argument(pipeline)
    number = None if argument is None else options.get(argument)
    if number is None:
        return []
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        return [f"generation_kwargs: {argument}={number!r} is not a number of frames. Use 1 or more."]
    stride = _stride(pipeline)
    if stride is None or (number - 1) % stride == 0:
        return []
    below = (number - 1) // stride * stride + 1
    return [
        f"generation_kwargs: {argument}={number} does not fit the VAE of {type(pipeline).__name__}, which keeps one frame "
        f"and then {stride} in each latent frame: {argument} - 1 must be a multiple of {stride}. Use {below} or "
        f"{below + stride}."
    ]


def _stride(pipeline: DiffusionPipeline) -> int | None:
    """The frames that are one latent frame, where the pipeline takes only some numbers of frames."""
    own = vars(pipeline)
    # A pipeline that rounds up (Allegro) cuts its video to the number that it was asked for.
    kind: Any = type(pipeline)
    rounds_up = "ceil" in unwrap(kind.prepare_latents).__code__.co_names
    return None if rounds_up else next((own[name] for name in _STRIDES if name in own), None)


def still_problem(pipeline: DiffusionPipeline, options: Mapping[str, Any]) -> str | None:
    """Says why images of a dataset are not what the pipeline draws; `None` if they are."""
    number, argument = number_of_frames(pipeline, options), frames_argument(pipeline)
    if number == 1:
        return None
    drawn = "several frames" if number is None else f"{number} frames"
    return (
        f"{type(pipeline).__name__} draws videos of {drawn}, and an image can't be encoded as one. Set {argument}=1 in "
        "generation_kwargs to train on images. Videos can be learned from teachers and rewards, whose trainers draw them."
    )
