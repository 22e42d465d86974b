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

"""Draws images with the deterministic sampler. An image is the same on whichever process it is drawn."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..algorithms.rollout import DRAWING, sample_generators, walk
from ..algorithms.samplers import sampler_table
from .images import Picture
from .velocity import VelocityField


# velocity(x, level, prompts)
Velocity = Callable[[Tensor, float, list[str]], Tensor]


def draw_images(
    field: VelocityField,
    transformer: Callable[..., tuple],
    prompts: list[str],
    *,
    entropy: Sequence[int],
    guidance_scale: float,
    batch_size: int,
    process: tuple[int, int] = (0, 1),
    on_batch: Callable[[list[int], list[Picture]], None] | None = None,
) -> list[tuple[int, Picture]]:
    """
    Draws one image for each prompt with the deterministic sampler.

    Except for rounding, an image depends only on `entropy` and on its position in `prompts`, not on its batch or
    process. Every process calls the transformer the same number of times; images that are drawn twice for that are
    dropped.

    Args:
        field ([`VelocityField`]): the pipeline, with the noise grid to use.
        transformer (`Callable`): the model to call in place of the pipeline's transformer.
        prompts (`list[str]`): the prompts of all processes.
        entropy (`Sequence[int]`): the words of the seed that the images share, not negative: seed and task. The noise
            never equals training's.
        guidance_scale (`float`): scale of classifier-free guidance. 1 turns it off.
        batch_size (`int`): number of images that a process draws at a time.
        process (`tuple[int, int]`, *optional*): index of this process and number of processes.
        on_batch (`Callable`, *optional*): called as `on_batch(positions, images)` after each batch, so that it can be
            scored while the next one is drawn.

    Returns:
        `list[tuple[int, PIL.Image.Image]]`: position in `prompts` and image (or the list of a video's frames), for this
            process's share of the prompts.
    """

    def velocity(x: Tensor, t: float, batch: list[str]) -> Tensor:
        return field(x, t, batch, guidance_scale, transformer)

    return draw_with(
        field, velocity, prompts, entropy=entropy, batch_size=batch_size, process=process, on_batch=on_batch
    )


def draw_with(
    field: VelocityField,
    velocity: Velocity,
    prompts: list[str],
    *,
    entropy: Sequence[int],
    batch_size: int,
    process: tuple[int, int] = (0, 1),
    on_batch: Callable[[list[int], list[Picture]], None] | None = None,
) -> list[tuple[int, Picture]]:
    """
    Draws one image for each prompt with any velocity, such as the mean of several teachers'. Its arguments are those
    of [`draw_images`], with `velocity(x, level, prompts)` in place of a transformer and a guidance scale.
    """
    rank, world = process
    share = range(rank, -(-len(prompts) // world) * world, world)
    drawn: list[tuple[int, Picture]] = []
    for start in range(0, len(share), batch_size):
        positions = list(share[start : start + batch_size])
        images = draw_batch(field, velocity, [prompts[i % len(prompts)] for i in positions], entropy, positions)
        mine = [(i, image) for i, image in zip(positions, images, strict=True) if i < len(prompts)]
        if on_batch is not None and mine:
            on_batch([i for i, _ in mine], [image for _, image in mine])
        drawn += mine
    return drawn


@torch.no_grad()
def draw_batch(
    field: VelocityField, velocity: Velocity, prompts: list[str], entropy: Sequence[int], numbers: Sequence[int]
) -> list[Picture]:
    """
    Draws a batch of images.

    Args:
        field ([`VelocityField`]): the pipeline, with the noise grid to use.
        velocity (`Callable`): `velocity(x, level, prompts)` returns the velocity.
        prompts (`list[str]`): the prompt of each image.
        entropy (`Sequence[int]`): as in [`draw_images`].
        numbers (`Sequence[int]`): the number of each image. It completes the seed.
    """
    table = sampler_table("ode", field.levels)
    levels = table.levels.tolist()
    x = field.initial_latents(prompts, sample_generators([DRAWING, *entropy], numbers))
    x = walk(lambda j, x, _: velocity(x, levels[j], prompts), x, table)
    return field.decode(field.clean(x), prompts)
