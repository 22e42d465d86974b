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

    This class includes only the parameters that are specific to training on the forward process. For what it shares with
    the package's other trainers see [`DiffusionRLConfig`] and [`DiffusionConfig`], for a full list of training arguments
    [`~transformers.TrainingArguments`]. The defaults are those of the
    [DiffusionNFT](https://huggingface.co/papers/2509.16117) paper.

    Parameters:
        > Parameters that control the objective

        nft_beta (`float`, *optional*, defaults to `1.0`):
            The paper's \\( \beta \\), positive: how far the two implicit policies are from the old one. With a smaller one the
            student goes further from the old policy, faster and less stably; the paper uses 1 and 0.1.
        loss_weighting (`str`, *optional*, defaults to `"adaptive"`):
            `"adaptive"`: squared errors of predicted images, each divided by its own mean absolute error. `"velocity"`:
            squared errors of velocities as they are.
        timestep_sampling (`str`, *optional*, defaults to `"grid"`):
            Noise levels that images are trained at, drawn anew for every update: `"grid"`, different ones of the
            rollout's grid, or `"uniform"`, one in each of as many equal parts of (0, 1].
        num_trained_timesteps (`int`, *optional*):
            Number of these levels, as many as the rollout has steps if not set.
        beta (`float`, *optional*, defaults to `0.0`):
            Coefficient of the distance from the base model: the mean squared difference of the velocities. At 0 the base is
            not evaluated. The paper's code has 1e-4.

        > Parameters that control the old policy

        old_policy_decay_rate (`float`, *optional*, defaults to `0.001`):
            The old policy, which draws the images, keeps the share
            \\( \min(\text{rate} \cdot (i - \text{start}), \text{max}) \\) of itself after a round that ends with update
            \\( i \\); the rest is the student.
        old_policy_decay_max (`float`, *optional*, defaults to `0.5`):
            Largest share, below 1.
        old_policy_decay_start (`int`, *optional*, defaults to `0`):
            Updates after which the share begins to grow. Before that the old policy becomes the student after every round.

    > [!NOTE]
    > These parameters have default values different from [`DiffusionRLConfig`]:
    > - `sampler`: Defaults to `"dpm2m"` instead of `"ode"`. Any sampler will do: only the images are used.
    > - `guidance_scale`: Defaults to `1.0` instead of `4.5`: the student learns to do without guidance.
    > - `scale_rewards`: Defaults to `"batch"` instead of `"group"`.
    >
    > An image whose advantage is `advantage_clip` counts as certainly good, and with its negative as certainly bad. With
    > `scale_rewards="batch"` that is the paper's \\( Z_c \\) in standard deviations of the task's rewards.
    """

    # Defaults that differ from DiffusionRLConfig
    sampler: str = field(
        default="dpm2m",
        metadata={"help": "Sampler of the training rollout.", "choices": list(SAMPLERS)},
    )
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance scale. 1.0 for none."})
    scale_rewards: str = field(
        default="batch",
        metadata={"help": "Standard deviation by which advantages are divided, if any.", "choices": list(SCALINGS)},
    )

    # Parameters that control the objective
    nft_beta: float = field(
        default=1.0, metadata={"help": "The paper's beta: how far the implicit policies are from the old one."}
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
            "help": "Noise levels that images are trained at: those of the rollout, or any.",
            "choices": list(LEVEL_SAMPLINGS),
        },
    )
    num_trained_timesteps: int | None = field(
        default=None, metadata={"help": "Noise levels that an image is trained at. `num_inference_steps` if not set."}
    )
    beta: float = field(default=0.0, metadata={"help": "Coefficient of the distance from the base model."})

    # Parameters that control the old policy
    old_policy_decay_rate: float = field(
        default=0.001, metadata={"help": "Growth, an update, of the share that the old policy keeps of itself."}
    )
    old_policy_decay_max: float = field(default=0.5, metadata={"help": "Largest share that the old policy keeps."})
    old_policy_decay_start: int = field(default=0, metadata={"help": "Updates after which that share begins to grow."})

    def _problems(self) -> list[str]:
        problems = super()._problems()
        problems += self._choice_problems("loss_weighting", "timestep_sampling")
        if not self.nft_beta > 0:
            problems.append(
                f"nft_beta={self.nft_beta}: it must be positive, or the student has no part in the loss. The paper uses 1 "
                "and 0.1."
            )
        if self.beta < 0:
            problems.append(f"beta={self.beta} is negative.")
        if not self.old_policy_decay_rate >= 0:
            problems.append(f"old_policy_decay_rate={self.old_policy_decay_rate} is negative.")
        if not 0 <= self.old_policy_decay_max < 1:
            problems.append(
                f"old_policy_decay_max={self.old_policy_decay_max}: it must be in [0, 1). At 1 the old policy would stay "
                "what it is."
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
