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

from dataclasses import dataclass, field

from ..algorithms.sft import TIMESTEP_DENSITIES
from .base_config import DiffusionConfig


@dataclass
class DiffusionSFTConfig(DiffusionConfig):
    r"""
    Configuration class for the [`DiffusionSFTTrainer`].

    This class includes only the parameters that are specific to supervised fine-tuning. For what it shares with the
    package's other trainers see [`DiffusionConfig`], for a full list of training arguments
    [`~transformers.TrainingArguments`]. `num_inference_steps`, `sampler` and `noise_level` are those with which teachers
    draw images; the loss has no trajectory. `guidance_scale` is that of evaluations and of teachers; the trained velocity
    is the one without guidance.

    Parameters:
        > Parameters that control the images

        image_column (`str`, *optional*, defaults to `"image"`):
            Column of the dataset with the images. Not needed with teachers.
        teacher_guidance_scale (`float`, *optional*):
            Guidance scale of the teachers that name none of their own, `guidance_scale` if not set.
        batch_teachers (`bool`, *optional*, defaults to `False`):
            Where a task has several teachers, compute those that are LoRAs (or `"base"`) at the same guidance scale in one
            forward, with a copy of the micro-batch for each. Refused with `torch_compile`.
        teacher_cache_dir (`str`, *optional*):
            Folder in which the latents of the teachers' images are kept. They are drawn before the first update, once: a
            folder that is there already is used, and completed if it is not complete. Not set, every update has fresh
            images.
        num_images_per_prompt (`int`, *optional*, defaults to `1`):
            Images a prompt in that folder. An update takes one of them at random.

        > Parameters that control the objective

        timestep_density (`str`, *optional*, defaults to `"logit_normal"`):
            Density from which the timestep of each image is drawn, `"uniform"` or `"logit_normal"` (that of
            [SD3](https://huggingface.co/papers/2403.03206)). The pipeline's own shift is applied to what is drawn.
        logit_mean (`float`, *optional*, defaults to `0.0`), logit_std (`float`, *optional*, defaults to `1.0`):
            Mean and standard deviation of the normal density whose sigmoid `"logit_normal"` is. A positive mean prefers
            noise, a negative one images.
    """

    # Parameters that control the images
    image_column: str = field(default="image", metadata={"help": "Column of the dataset with the images."})
    teacher_guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance scale of teachers that name none. `guidance_scale` if not set."}
    )
    batch_teachers: bool = field(
        default=False,
        metadata={
            "help": "Compute a task's LoRA teachers at one guidance scale in one forward, a copy of the batch each."
        },
    )
    teacher_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of the teachers' images. Fresh ones for every update if not set."}
    )
    num_images_per_prompt: int = field(default=1, metadata={"help": "Images a prompt in `teacher_cache_dir`."})

    # Parameters that control the objective
    timestep_density: str = field(
        default="logit_normal",
        metadata={"help": "Density of the timesteps before the shift.", "choices": list(TIMESTEP_DENSITIES)},
    )
    logit_mean: float = field(default=0.0, metadata={"help": "Mean of the normal density under the sigmoid."})
    logit_std: float = field(default=1.0, metadata={"help": "Standard deviation of it."})

    def _problems(self) -> list[str]:
        problems = super()._problems()
        problems += self._choice_problems("timestep_density")
        if not self.logit_std > 0:
            problems.append(f"logit_std={self.logit_std}: it must be positive.")
        if self.timestep_density == "uniform" and (self.logit_mean, self.logit_std) != (0.0, 1.0):
            problems.append(
                f"logit_mean={self.logit_mean} and logit_std={self.logit_std} with timestep_density='uniform', which has "
                "neither: leave them unset, or choose 'logit_normal'."
            )
        if self.teacher_guidance_scale is not None and self.teacher_guidance_scale < 1:
            problems.append(f"teacher_guidance_scale={self.teacher_guidance_scale}: it must be at least 1.0.")
        if self.num_images_per_prompt < 1:
            problems.append(f"num_images_per_prompt={self.num_images_per_prompt}: it must be at least 1.")
        if self.num_images_per_prompt > 1 and self.teacher_cache_dir is None:
            problems.append(
                f"num_images_per_prompt={self.num_images_per_prompt} without teacher_cache_dir: fresh images are drawn one a "
                "prompt. Set teacher_cache_dir, or leave it unset."
            )
        return problems
