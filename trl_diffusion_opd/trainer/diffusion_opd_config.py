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

import math
from dataclasses import dataclass, field

from ..algorithms.opd import WEIGHTINGS
from ..guards.files import JSON
from .taught_config import TaughtConfig


@dataclass
class DiffusionOPDConfig(TaughtConfig):
    r"""
    Configuration class for the [`DiffusionOPDTrainer`].

    This class includes only the parameters that are specific to on-policy distillation. Those that control the
    teachers are in [`TaughtConfig`], those of all trainers of this package in [`DiffusionConfig`], and the other
    training arguments in [`~transformers.TrainingArguments`].

    Parameters:
        > Parameters that control the objective

        loss_type (`str`, *optional*, defaults to `"kl"`):
            `"kl"`: the KL divergence between student and teacher in closed form (Eq. 11 and 12 of the
            [DiffusionOPD](https://huggingface.co/papers/2605.15055) paper). `"policy_gradient"`: its REINFORCE
            estimate from the sampler's own noise. That is noisier, meant for comparison, and needs a stochastic
            sampler.
        loss_weighting (`str`, *optional*, defaults to `"kl"`):
            How much each denoising step's squared velocity difference counts: `"kl"`, `"released"`, `"velocity"` or
            `"x0"`. Try `"velocity"` if one step has most of the weight in the table at the start.
        skip_last_steps (`int`, *optional*):
            Steps at the end of a trajectory that are not trained. `None` is 1, or 2 for `cps` and `ddim`, whose
            weights diverge there.
        num_trained_timesteps (`int`, *optional*):
            Number of steps of a trajectory that are trained. They are drawn anew for every update, in proportion to
            their weights; the gradient stays unbiased. `None` trains all. Fewer save time: sampling stops after the
            last one.
        timestep_density (`list[float]`, *optional*):
            Two positive numbers `a b` of a Beta distribution from which `num_trained_timesteps` steps are drawn, instead
            of in proportion to their weights. It lies between the image at 0 and the noise at 1, counted in steps: `5 2`
            prefers early steps.
        unbiased_timesteps (`bool`, *optional*, defaults to `True`):
            Whether a drawn step counts 1 / its probability, so that `timestep_density` changes the variance only. With
            `False` it also changes how much the steps count, as methods do that draw one step a rollout.
        beta (`float`, *optional*, defaults to `0.0`):
            Coefficient of the KL to the base model, which keeps the student near it. At 0 the base is not computed.
        teacher_extrapolation (`float`, *optional*, defaults to `1.0`):
            How far the target lies from the base: `v_base + teacher_extrapolation * (v_teacher - v_base)`. 1 is the
            teacher; 1.25 goes beyond it by a quarter of what its training has changed. It costs a forward of the
            base a trained step, which `beta` shares where the guidance scale is the same. Values above 1.5 are
            warned of.
        guidance_branch_weight (`float`, *optional*, defaults to `0.0`):
            Above 0 the student learns its teachers' velocities with the prompt and without it, instead of the guided
            velocity alone, so that it is right at other guidance scales too. The weight is that of the direction of
            guidance, 1 is usual. Student and teachers must have one guidance scale, above 1.
        on_policy (`bool`, *optional*, defaults to `True`):
            Whether to train on the student's own trajectories (the method). `False` trains on its teacher's, for
            comparison.
    """

    # Parameters that control the objective
    loss_type: str = field(
        default="kl",
        metadata={
            "help": "Closed-form KL, or its REINFORCE estimate for comparison.",
            "choices": ["kl", "policy_gradient"],
        },
    )
    loss_weighting: str = field(
        default="kl",
        metadata={"help": "How much each step's squared velocity gap counts.", "choices": list(WEIGHTINGS)},
    )
    skip_last_steps: int | None = field(
        default=None, metadata={"help": "Last steps that are not trained. If not set, 1, or 2 for cps and ddim."}
    )
    num_trained_timesteps: int | None = field(
        default=None, metadata={"help": "Steps that are trained, drawn anew for every update. If not set, all."}
    )
    timestep_density: list[float] | None = field(
        default=None,
        metadata={
            "help": "Numbers a b of the Beta distribution that trained steps are drawn from; 5 2 is early.",
            "nargs": 2,
        },
    )
    unbiased_timesteps: bool = field(
        default=True,
        metadata={"help": "Count a drawn step 1 / its probability, so that the loss is that of all steps."},
    )
    beta: float = field(default=0.0, metadata={"help": "Coefficient of the KL to the base model."})
    teacher_extrapolation: float = field(
        default=1.0,
        metadata={"help": "How far the target lies from the base. 1 is the teacher, 1.25 beyond it by a quarter."},
    )
    guidance_branch_weight: float = field(
        default=0.0,
        metadata={"help": "Above 0, match both branches of guidance, the direction with this weight. 1 is usual."},
    )
    on_policy: bool = field(
        default=True, metadata={"help": "Train on the student's own trajectories (the method), or on its teacher's."}
    )

    def retention_options(self) -> dict[str, JSON]:
        """Returns the arguments of [`evaluate_retention`] that follow from these settings."""
        return {
            "num_inference_steps": self.eval_num_inference_steps,
            "guidance_scale": self.evaluation_guidance,
            "teacher_guidance_scale": self.teacher_guidance_scale,
            "prompt_templates": self.prompt_templates,
            "height": self.height,
            "width": self.width,
            "max_sequence_length": self.max_sequence_length,
            "generation_kwargs": self.generation_kwargs,
            "dtype": self.dtype,
            "model_init_kwargs": self.model_init_kwargs,
            "task_column": self.task_column,
            "source_images_column": self.source_images_column,
            "batch_size": self.per_device_eval_batch_size,
            "seed": self.seed,
            "reward_timeout": self.reward_timeout,
        }

    def _problems(self) -> list[str]:
        problems = super()._problems()
        problems += self._choice_problems("loss_type", "loss_weighting")
        if self.loss_type == "policy_gradient" and (self.sampler in ("ode", "dpm2m") or self.noise_level == 0):
            problems.append(
                f"loss_type='policy_gradient' needs a sampler with noise, but sampler='{self.sampler}' with "
                f"noise_level={self.noise_level} has none: choose flow_sde, dance_sde, cps or ddim, or loss_type='kl'."
            )
        if self.loss_type == "policy_gradient" and not self.on_policy:
            problems.append(
                "loss_type='policy_gradient' is an estimate on the student's own trajectories: set on_policy=True."
            )
        if self.beta < 0:
            problems.append(f"beta={self.beta} is negative.")
        if not 0 <= self.teacher_extrapolation < math.inf:
            problems.append(
                f"teacher_extrapolation={self.teacher_extrapolation}: it must be at least 0. 1 is the teacher, 0 the "
                "base; below 0 the student would learn the opposite of its teacher."
            )
        if not 0 <= self.guidance_branch_weight < math.inf:
            problems.append(
                f"guidance_branch_weight={self.guidance_branch_weight}: it must be at least 0, which is off."
            )
        if self.guidance_branch_weight > 0 and self.loss_type == "policy_gradient":
            problems.append(
                "guidance_branch_weight compares velocities in closed form, and the policy gradient sees the guided "
                "step alone: set loss_type='kl', or guidance_branch_weight=0."
            )
        if self.skip_last_steps is not None and not 0 <= self.skip_last_steps < self.num_inference_steps:
            problems.append(
                f"skip_last_steps={self.skip_last_steps}: it must leave at least one of the "
                f"{self.num_inference_steps} steps."
            )
        if self.num_trained_timesteps is not None and self.num_trained_timesteps < 1:
            problems.append(f"num_trained_timesteps={self.num_trained_timesteps}: it must be at least 1.")
        return problems + self._density_problems()

    def _density_problems(self) -> list[str]:
        density = self.timestep_density
        if density is None:
            if not self.unbiased_timesteps:
                return ["unbiased_timesteps=False has no effect without timestep_density. Set both, or leave it out."]
            return []
        if len(density) != 2 or not all(0 < number < math.inf for number in density):
            return [
                f"timestep_density={density}: it must be the two positive numbers of a Beta distribution, such as 5 2."
            ]
        if self.num_trained_timesteps is None:
            return [
                f"timestep_density={density} has no effect while all steps are trained. Set num_trained_timesteps, such "
                "as 1, or leave it out."
            ]
        return []
