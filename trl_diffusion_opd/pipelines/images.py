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

"""Converts latents to images and back, with a pipeline's own decoder and VAE."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor
from PIL.Image import Image
from torch import Tensor, nn

from ..guards.finite import finite_images
from .latent_map import LatentMap


Images = Any  # a list of PIL images or of videos, an array or a tensor, depending on `output_type`
Picture = Image | list[Image]  # what is drawn for one prompt: an image, or the frames of a video


def decoded(x: Tensor, decode: Callable[[], Images]) -> Images:
    """
    Returns the images that `decode()` makes of the latents `x`.

    Raises:
        [`FloatingPointError`]: if latents or images contain NaN or infinity.
    """
    if bad := int((~x.isfinite()).flatten(1).any(1).sum()):
        raise FloatingPointError(
            f"{bad} of {len(x)} images have latents with NaN or infinity: the model computes NaN."
        )
    with finite_images():
        images = decode()
    one_frame = isinstance(images[0], list) and len(images[0]) == 1  # a pipeline for videos, asked for an image
    return [video[0] for video in images] if one_frame else images


def copied(picture: Picture) -> Picture:
    """A copy that shares no pixels."""
    return [frame.copy() for frame in picture] if isinstance(picture, list) else picture.copy()


def encoded(
    pipeline: DiffusionPipeline,
    latent_map: LatentMap,
    images: Sequence[Image],
    size: tuple[int | None, int | None],
    device: torch.device,
) -> Tensor:
    """
    The latents of images, in the layout of the pipeline's loop at level 0. Images are first cropped and resized to
    `size` (height, width).
    """
    vae = pipeline.components["vae"]
    pixels = (
        image_processor(pipeline)
        .preprocess([image.convert("RGB") for image in images], *size, resize_mode="crop")
        .to(device, next(vae.parameters()).dtype)  # the VAE may be offloaded
    )
    latents = vae.encode(pixels.unsqueeze(2) if latent_map.of_video else pixels, return_dict=False)[0]
    return latent_map.from_vae(latents if isinstance(latents, Tensor) else latents.mode())


def encoder_problem(pipeline: DiffusionPipeline) -> str | None:
    """Says what a pipeline lacks for encoding images; `None` if nothing."""
    if isinstance(pipeline.components.get("vae"), nn.Module) and image_processor(pipeline) is not None:
        return None
    return f"{type(pipeline).__name__} has no VAE with an image processor to encode images with."


def draws_videos(pipeline: DiffusionPipeline) -> bool:
    """Whether the pipeline returns videos, as `frames`. An image is a video of one frame."""
    return isinstance(image_processor(pipeline), VideoProcessor)


def pixels_a_latent(pipeline: DiffusionPipeline) -> int:
    """
    Pixels per latent, along one side; per token in pipelines that pack 2 x 2 latents into one. Sizes must be
    multiples.
    """
    processor = image_processor(pipeline)
    return 1 if processor is None else processor.config.vae_scale_factor


def image_processor(pipeline: DiffusionPipeline) -> Any:
    """The pipeline's processor of images (or videos) for its VAE, or `None`."""
    own = vars(pipeline)
    # Some pipelines have another one besides, for the encoder of a picture to begin a video with.
    found = (own.get(name) for name in ("image_processor", "video_processor"))
    return next((processor for processor in found if isinstance(processor, VaeImageProcessor)), None)
