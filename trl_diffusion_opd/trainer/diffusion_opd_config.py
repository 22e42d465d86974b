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

from ..algorithms.opd import WEIGHTINGS
from ..guards.files import JSON
from .base_config import DiffusionConfig


@dataclass
class DiffusionOPDConfig(DiffusionConfig):
    r"""
    Configuration class for the [`DiffusionOPDTrainer`].

    This class includes only the parameters that are specific to on-policy distillation. For what it shares with the
    package's other trainers see [`DiffusionConfig`], for a full list of training arguments
    [`~transformers.TrainingArguments`].

    Parameters:
        > Parameters that control the teachers

        teacher_guidance_scale (`float`, *optional*):
            Guidance scale of the teachers that name none of their own, `guidance_scale` if not set. With
            `guidance_scale=1.0` the student learns its teachers' guided velocity and needs no guidance itself.
        batch_teachers (`bool`, *optional*, defaults to `False`):
            Where a task has several teachers, compute those that are LoRAs (or `"base"`) at the same guidance scale in one
            forward, with a copy of the micro-batch for each, in place of one forward each. The result is the same; a
            teacher's forward needs as many times the memory. Refused with `torch_compile`.

        > Parameters that control the objective

        loss_type (`str`, *optional*, defaults to `"kl"`):
            `"kl"`: the KL of student from teacher in closed form (Eq. 11 and 12 of the
            [DiffusionOPD](https://huggingface.co/papers/2605.15055) paper). `"policy_gradient"`: its REINFORCE
            estimate from the walk's own noise, for comparison; it needs a stochastic sampler.
        loss_weighting (`str`, *optional*, defaults to `"kl"`):
            Weight of a step's squared velocity gap: `"kl"`, `"released"`, `"velocity"` or `"x0"`.
        skip_last_steps (`int`, *optional*):
            Steps at the end of a walk that are not trained. Not set, it is 1, and 2 for `cps` and `ddim`, whose
            weights diverge there.
        num_trained_timesteps (`int`, *optional*):
            Steps of a walk that are trained, drawn anew for every update in proportion to their weights, without
            bias. All if not set. The walk stops after the last of them.
        beta (`float`, *optional*, defaults to `0.0`):
            Coefficient of the KL to the base model. At 0 the base is not evaluated.
        on_policy (`bool`, *optional*, defaults to `True`):
            Whether the student's own walk is trained on (the method) or its teacher's, for comparison.
    """

    # Parameters that control the teachers
    teacher_guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance scale of teachers that name none. `guidance_scale` if not set."}
    )
    batch_teachers: bool = field(
        default=False,
        metadata={
            "help": "Compute a task's LoRA teachers at one guidance scale in one forward, a copy of the batch each."
        },
    )

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
        metadata={"help": "Weight of a step's squared velocity gap.", "choices": list(WEIGHTINGS)},
    )
    skip_last_steps: int | None = field(
        default=None, metadata={"help": "Steps at the end that are not trained. 1 if not set, 2 for cps and ddim."}
    )
    num_trained_timesteps: int | None = field(
        default=None, metadata={"help": "Steps of a walk that are trained, drawn for every update. All if not set."}
    )
    beta: float = field(default=0.0, metadata={"help": "Coefficient of the KL to the base model."})
    on_policy: bool = field(
        default=True, metadata={"help": "Whether to train on the student's own walk (the method) or its teacher's."}
    )

    def retention_options(self) -> dict[str, JSON]:
        """The arguments of [`evaluate_retention`] that these settings decide."""
        return {
            "num_inference_steps": self.eval_num_inference_steps,
            "guidance_scale": self.evaluation_guidance,
            "teacher_guidance_scale": self.teacher_guidance_scale,
            "height": self.height,
            "width": self.width,
            "max_sequence_length": self.max_sequence_length,
            "generation_kwargs": self.generation_kwargs,
            "dtype": self.dtype,
            "model_init_kwargs": self.model_init_kwargs,
            "task_column": self.task_column,
            "batch_size": self.per_device_eval_batch_size,
            "seed": self.seed,
            "reward_timeout": self.reward_timeout,
        }

    def _problems(self) -> list[str]:
        problems = super()._problems()
        problems += self._choice_problems("loss_type", "loss_weighting")
        if self.loss_type == "policy_gradient" and (self.sampler in ("ode", "dpm2m") or self.noise_level == 0):
            problems.append(
                f"loss_type='policy_gradient' needs a walk with noise, and sampler='{self.sampler}' with "
                f"noise_level={self.noise_level} has none: choose flow_sde, dance_sde, cps or ddim, or loss_type='kl'."
            )
        if self.loss_type == "policy_gradient" and not self.on_policy:
            problems.append(
                "loss_type='policy_gradient' is an estimate on the student's own walk: set on_policy=True."
            )
        if self.teacher_guidance_scale is not None and self.teacher_guidance_scale < 1:
            problems.append(f"teacher_guidance_scale={self.teacher_guidance_scale}: it must be at least 1.0.")
        if self.beta < 0:
            problems.append(f"beta={self.beta} is negative.")
        if self.skip_last_steps is not None and not 0 <= self.skip_last_steps < self.num_inference_steps:
            problems.append(
                f"skip_last_steps={self.skip_last_steps}: it must leave at least one of the "
                f"{self.num_inference_steps} steps."
            )
        if self.num_trained_timesteps is not None and self.num_trained_timesteps < 1:
            problems.append(f"num_trained_timesteps={self.num_trained_timesteps}: it must be at least 1.")
        return problems
