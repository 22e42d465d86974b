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

from ..algorithms.advantages import SCALINGS
from ..algorithms.nft import LEVEL_SAMPLINGS, NFT_WEIGHTINGS
from ..algorithms.samplers import SAMPLERS
from .rl_config import DiffusionRLConfig


@dataclass
class DiffusionNFTConfig(DiffusionRLConfig):
    r"""
    Configuration class for the [`DiffusionNFTTrainer`].

    This class includes only the parameters that are specific to training on the forward process. [`DiffusionRLConfig`]
    has those of all trainers that learn from rewards, [`DiffusionConfig`] those of all trainers of this package, and
    [`~transformers.TrainingArguments`] the other training arguments. The defaults are those of the
    [DiffusionNFT](https://huggingface.co/papers/2509.16117) paper.

    Parameters:
        > Parameters that control the objective

        nft_beta (`float`, *optional*, defaults to `1.0`):
            The paper's \\( \beta \\), positive: how far the two implicit policies are from the old one. A smaller
            value moves the student further from the old policy, which is faster and less stable. The paper uses 1 and
            0.1.
        loss_weighting (`str`, *optional*, defaults to `"adaptive"`):
            `"adaptive"`: squared errors of predicted images, each divided by its own mean absolute error.
            `"velocity"`: squared errors of velocities, not divided.
        timestep_sampling (`str`, *optional*, defaults to `"grid"`):
            How the noise levels that images are trained at are drawn for every update. `"grid"`: distinct levels of
            the rollout's grid. `"uniform"`: (0, 1] is cut into equal parts, and one level is drawn from each.
        num_trained_timesteps (`int`, *optional*):
            Number of these levels. `None` is `num_inference_steps`.
        beta (`float`, *optional*, defaults to `0.0`):
            Coefficient of the distance from the base model, which is the mean squared difference of the velocities. At
            0 the base is not computed. The paper's code uses 1e-4.

        > Parameters that control the old policy

        old_policy_decay_rate (`float`, *optional*, defaults to `0.001`):
            The old policy draws the images and follows the student. After a round that ends with update \\( i \\), it
            keeps the share \\( \min(\text{rate} \cdot (i - \text{start}), \text{max}) \\) of its weights; the rest is
            the student's. A larger rate lets it lag behind sooner.
        old_policy_decay_max (`float`, *optional*, defaults to `0.5`):
            Largest share that it keeps, below 1.
        old_policy_decay_start (`int`, *optional*, defaults to `0`):
            Number of updates before the share begins to grow. Until then, the old policy equals the student after
            every round.

    > [!NOTE]
    > These parameters have default values different from [`DiffusionRLConfig`]:
    > - `sampler`: Defaults to `"dpm2m"` instead of `"ode"`. Any sampler works, since only the images are used.
    > - `guidance_scale`: Defaults to `1.0` instead of the pipeline's own: the student learns to work without guidance.
    > - `scale_rewards`: Defaults to `"batch"` instead of `"group"`.
    >
    > An image with the advantage `advantage_clip` counts as certainly good, one with its negative as certainly bad.
    With > `scale_rewards="batch"` it is the paper's \\( Z_c \\), in standard deviations of the task's rewards.
    """

    # Defaults that differ from DiffusionRLConfig
    sampler: str = field(
        default="dpm2m",
        metadata={"help": "Sampler of the training rollout.", "choices": list(SAMPLERS)},
    )
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance scale; 1.0 is none."})
    scale_rewards: str = field(
        default="batch",
        metadata={"help": "Standard deviation that advantages are divided by, if any.", "choices": list(SCALINGS)},
    )

    # Parameters that control the objective
    nft_beta: float = field(
        default=1.0, metadata={"help": "The paper's beta. Smaller moves the student further from the old policy."}
    )
    loss_weighting: str = field(
        default="adaptive",
        metadata={
            "help": "Whether errors are divided by their own size, as in the paper.",
            "choices": list(NFT_WEIGHTINGS),
        },
    )
    timestep_sampling: str = field(
        default="grid",
        metadata={
            "help": "Noise levels that images are trained at: those of the rollout's grid, or any.",
            "choices": list(LEVEL_SAMPLINGS),
        },
    )
    num_trained_timesteps: int | None = field(
        default=None, metadata={"help": "Noise levels that an image is trained at. If not set, `num_inference_steps`."}
    )
    beta: float = field(default=0.0, metadata={"help": "Coefficient of the distance from the base model."})

    # Parameters that control the old policy
    old_policy_decay_rate: float = field(
        default=0.001,
        metadata={"help": "The old policy keeps a share of its weights that grows by this every update."},
    )
    old_policy_decay_max: float = field(default=0.5, metadata={"help": "Largest share that the old policy keeps."})
    old_policy_decay_start: int = field(default=0, metadata={"help": "Updates before that share begins to grow."})

    def _problems(self) -> list[str]:
        problems = super()._problems()
        problems += self._choice_problems("loss_weighting", "timestep_sampling")
        if not self.nft_beta > 0:
            problems.append(
                f"nft_beta={self.nft_beta}: it must be positive, or the loss does not depend on the student. The "
                "paper uses 1 and 0.1."
            )
        if self.beta < 0:
            problems.append(f"beta={self.beta} is negative.")
        if not self.old_policy_decay_rate >= 0:
            problems.append(f"old_policy_decay_rate={self.old_policy_decay_rate} is negative.")
        if not 0 <= self.old_policy_decay_max < 1:
            problems.append(
                f"old_policy_decay_max={self.old_policy_decay_max}: it must be in [0, 1). At 1 the old policy would "
                "never change."
            )
        if self.old_policy_decay_start < 0:
            problems.append(f"old_policy_decay_start={self.old_policy_decay_start} is negative.")
        if self.num_trained_timesteps is not None:
            most = self.num_inference_steps if self.timestep_sampling == "grid" else None
            if self.num_trained_timesteps < 1:
                problems.append(f"num_trained_timesteps={self.num_trained_timesteps}: it must be at least 1.")
            elif most is not None and self.num_trained_timesteps > most:
                problems.append(
                    f"num_trained_timesteps={self.num_trained_timesteps}: the grid has {most} levels "
                    "(num_inference_steps). Lower it, or set timestep_sampling='uniform'."
                )
        return problems
