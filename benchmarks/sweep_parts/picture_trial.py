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
What is tried with a tiny pipeline that takes pictures beside the prompt: as in `trial.py`, for rows that each have pictures of
their own. The pipeline's own call has one row at a time.
"""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from helpers.edit_families import EditFamily, picture
from PIL import Image
from torch import Tensor

from trl_diffusion_opd.algorithms.rollout import walk
from trl_diffusion_opd.algorithms.samplers import sampler_table
from trl_diffusion_opd.data.pictured_prompt import SOURCE_IMAGES, PicturedPrompt, with_pictures
from trl_diffusion_opd.pipelines.velocity import VelocityField

from .trial import STEPS, RefusedError, Trial, difference, in_flow_coordinates, update_drawing, with_recorder


def own_row(edit: EditFamily, pipeline: DiffusionPipeline, scale: float, row: int, output_type: str = "np") -> Any:
    """What a pipeline's own call returns for one row."""
    prompt, pictures = edit.rows()[row]
    return pipeline(
        **edit.call_kwargs(scale, prompt, pictures),
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(100 + row)],
        output_type=output_type,
        return_dict=False,
    )[0]


def own_rows(edit: EditFamily, pipeline: DiffusionPipeline, scale: float) -> np.ndarray:
    """The images (or videos) of all rows, one after the other."""
    return np.concatenate([np.asarray(own_row(edit, pipeline, scale, i)) for i in range(len(edit.rows()))])


def scales_of(edit: EditFamily) -> tuple[float, ...]:
    scale = edit.family.guidance_scale
    return (1.0,) if scale == 1.0 else (1.0, scale)


def velocity_and_walk(edit: EditFamily, trial: Trial) -> None:
    """Compares a batch of all rows with the pipeline's own loop for each of them, and its walk with their images."""
    family, rows = edit.family, edit.rows()
    prompts = [with_pictures(*row) for row in rows]
    try:
        field = VelocityField(family.build(), num_inference_steps=STEPS, **family.kwargs)
        start = field.initial_latents(prompts, [torch.Generator().manual_seed(100 + i) for i in range(len(rows))])
        field(start, float(field.levels[0]), prompts, 1.0)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    gaps = []
    for scale in scales_of(edit):
        field.check_guidance(scale)
        traces = []
        for i in range(len(rows)):
            own = with_recorder(family, field, scale)
            own_row(edit, own, scale, i, output_type="latent")
            steps = [in_flow_coordinates(own.scheduler, step) for step in own.scheduler.trace]
            traces.append(of_noise(steps, start[i : i + 1]))
        for steps in zip(*traces, strict=True):
            x, v = (torch.cat([step[part] for step in steps]) for part in (1, 2))
            gaps.append((field(x, steps[0][0], prompts, scale) - v).abs().max() / v.abs().max())
    if 1 in edit.numbers:
        gaps.append(together(edit, field))
    trial.velocity = float(torch.stack(gaps).max())
    table, scale = sampler_table("ode", field.levels), scales_of(edit)[-1]
    with torch.no_grad():
        x = walk(lambda j, x, _: field(x, field.levels[j].item(), prompts, scale), start, table)
        images = field.decode(field.clean(x), prompts, output_type="np")
    trial.walk = difference(images, own_rows(edit, with_recorder(family, field, scale), scale))
    others = [*prompts[:-1], with_pictures(str(prompts[-1]), [_negative(one) for one in rows[-1][1]])]
    level = float(field.levels[0])
    gap = (field(start, level, others, scale) - field(start, level, prompts, scale)).abs()
    if not gap[-1].max() > 1e-4 or gap[:-1].any():
        raise ValueError("another picture in one row must change that row's velocity, and no other row's")


def together(edit: EditFamily, field: VelocityField) -> Tensor:
    """
    The largest difference of velocities between rows of one batch, whose pictures have one size, and the same rows one by
    one. It is 0 where the pipeline does not take them together.
    """
    prompts: list[str] = [PicturedPrompt(f"{i} cats", [picture(20 + i, *edit.sizes[0])]) for i in range(2)]
    x = field.initial_latents(prompts, [torch.Generator().manual_seed(i) for i in range(len(prompts))])
    batch = field(x, float(field.levels[1]), prompts, 1.0)
    rows = [field(x[i : i + 1], float(field.levels[1]), [prompts[i]], 1.0) for i in range(len(prompts))]
    return (batch - torch.cat(rows)).abs().max() / batch.abs().max()


def of_noise(steps: list[tuple[float, Tensor, Tensor]], start: Tensor) -> list[tuple[float, Tensor, Tensor]]:
    """Recorded steps without the latents of pictures that some pipelines put before the state along one axis."""
    if steps[0][1].shape == start.shape:
        return steps
    sizes = zip(steps[0][1].shape, start.shape, strict=True)
    axis = next(axis for axis, (size, own) in enumerate(sizes) if size != own)
    return [
        (level, *(one.narrow(axis, -start.shape[axis], start.shape[axis]) for one in pair)) for level, *pair in steps
    ]


def _negative(image: Image.Image) -> Image.Image:
    return image.point(lambda value: 255 - value)


def update(edit: EditFamily, trial: Trial) -> None:
    """One update with a random LoRA as the teacher, on rows with pictures; then diffusers loads the student."""
    scale = edit.family.guidance_scale
    rows = [{"prompt": prompt, "task": "one", SOURCE_IMAGES: pictures} for prompt, pictures in edit.rows()]
    update_drawing(
        edit.family,
        trial,
        lambda pipeline: own_rows(edit, pipeline, scale),
        len(rows),
        train_dataset=Dataset.from_list(rows),
    )
