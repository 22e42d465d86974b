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
from .taught_config import TaughtConfig


@dataclass
class DiffusionSFTConfig(TaughtConfig):
    r"""
    Configuration class for the [`DiffusionSFTTrainer`].

    This class includes only the parameters that are specific to supervised fine-tuning. Those that control the
    teachers are in [`TaughtConfig`], those of all trainers of this package in [`DiffusionConfig`], and the other
    training arguments in [`~transformers.TrainingArguments`]. The loss needs no trajectory: `num_inference_steps`,
    `sampler` and `noise_level` only matter for the images that teachers draw. `guidance_scale` is used by teachers and
    in evaluations; the student is trained without guidance.

    Parameters:
        > Parameters that control the images

        image_column (`str`, *optional*, defaults to `"image"`):
            Column of the dataset with the images. Not needed with teachers.
        teacher_cache_dir (`str`, *optional*):
            Folder for the latents of the teachers' images. They are drawn once, before the first update. An existing
            folder is reused, and completed if images are missing. `None` draws fresh images for every update.
        num_images_per_prompt (`int`, *optional*, defaults to `1`):
            Images of each prompt in that folder. An update takes one of them at random.

        > Parameters that control the objective

        timestep_density (`str`, *optional*, defaults to `"logit_normal"`):
            Distribution of the timesteps that images are trained at: `"uniform"` or `"logit_normal"` (as in
            [SD3](https://huggingface.co/papers/2403.03206)). The pipeline's own shift is then applied to them.
        logit_mean (`float`, *optional*, defaults to `0.0`), logit_std (`float`, *optional*, defaults to `1.0`):
            Mean and standard deviation of the normal distribution that `"logit_normal"` takes the sigmoid of. A
            positive mean prefers high noise levels, a negative one low levels.
    """

    # Parameters that control the images
    image_column: str = field(default="image", metadata={"help": "Column of the dataset with the images."})
    teacher_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for the teachers' images. If not set, every update draws fresh ones."}
    )
    num_images_per_prompt: int = field(default=1, metadata={"help": "Images of each prompt in `teacher_cache_dir`."})

    # Parameters that control the objective
    timestep_density: str = field(
        default="logit_normal",
        metadata={"help": "Distribution of the timesteps before the shift.", "choices": list(TIMESTEP_DENSITIES)},
    )
    logit_mean: float = field(default=0.0, metadata={"help": "Mean of logit_normal before the sigmoid."})
    logit_std: float = field(default=1.0, metadata={"help": "Standard deviation of logit_normal before the sigmoid."})

    def _problems(self) -> list[str]:
        problems = super()._problems()
        problems += self._choice_problems("timestep_density")
        if not self.logit_std > 0:
            problems.append(f"logit_std={self.logit_std}: it must be positive.")
        if self.timestep_density == "uniform" and (self.logit_mean, self.logit_std) != (0.0, 1.0):
            problems.append(
                f"logit_mean={self.logit_mean} and logit_std={self.logit_std} have no effect with "
                "timestep_density='uniform': leave them unset, or choose 'logit_normal'."
            )
        if self.num_images_per_prompt < 1:
            problems.append(f"num_images_per_prompt={self.num_images_per_prompt}: it must be at least 1.")
        if self.num_images_per_prompt > 1 and self.teacher_cache_dir is None:
            problems.append(
                f"num_images_per_prompt={self.num_images_per_prompt} without teacher_cache_dir has no effect: each "
                "update draws one fresh image for each prompt. Set teacher_cache_dir, or leave num_images_per_prompt "
                "unset."
            )
        return problems
