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

from ..algorithms.grpo import LOSS_TYPES, SDE_SAMPLERS
from ..algorithms.samplers import default_skip_last_steps
from .rl_config import DiffusionRLConfig


@dataclass
class DiffusionGRPOConfig(DiffusionRLConfig):
    r"""
    Configuration class for the [`DiffusionGRPOTrainer`].

    This class includes only the parameters that are specific to GRPO. For what it shares with the other trainers by reward,
    among it what `per_device_train_batch_size` counts, see [`DiffusionRLConfig`]; for what it shares with all trainers of
    the package [`DiffusionConfig`], and for a full list of training arguments [`~transformers.TrainingArguments`].

    Parameters:
        > Parameters that control the rollout

        sampler (`str`, *optional*, defaults to `"flow_sde"`):
            One of `"flow_sde"` (Flow-GRPO), `"dance_sde"` (DanceGRPO) and `"cps"`. Only a step with noise has a
            probability.
        sde_window_size (`int`, *optional*):
            Consecutive steps that have noise and are trained ([MixGRPO](https://huggingface.co/papers/2507.21802)); the
            others are ODE steps. Where the window lies in `sde_window_range` is drawn for every round. Not set, the
            window is the whole range.
        sde_window_range (`list[int]`, *optional*):
            First step of the range, counted from 0, and the one after its last. Not set, it is the whole walk without
            its last step, which would leave its noise in the image (for `"cps"` the last two: one has no noise, the other
            almost none).

        > Parameters that control the objective

        loss_type (`str`, *optional*, defaults to `"flow_grpo"`):
            `"flow_grpo"`: the clipped surrogate of [Flow-GRPO](https://huggingface.co/papers/2505.05470).
            `"grpo_guard"`: that of [GRPO-Guard](https://huggingface.co/papers/2510.22319), with normalised ratios and
            with gradients balanced over the steps.
        epsilon (`float`, *optional*, defaults to `1e-4`):
            Ratios are clipped to `1 - epsilon` and `1 + epsilon`. Log-probabilities are means over the latent dimensions, so
            ratios differ little from 1: published settings are 1e-5 to 1e-3, and 2e-6 for `"grpo_guard"`. With
            `sampler="cps"` published settings do not carry over: their code leaves the variance \\( s^2 \\) out of the
            log-probability, and so clips a log-ratio that is \\( 2 s^2 \\) times the true one, which is used here. Without
            effect while `num_iterations` is 1.
        beta (`float`, *optional*, defaults to `0.0`):
            Coefficient of the KL to the base model, in nats: a mean over latent dimensions and trained steps. At 0 the base
            is not evaluated. Published code of the Flow-GRPO family leaves the length of the step out of its KL: a
            `beta` of 0.04 there is about 0.009 here, on 10 steps of Stable Diffusion 3.

    > [!NOTE]
    > `sampler` defaults to `"flow_sde"` instead of `"ode"`.
    """

    # Parameters that control the rollout
    sampler: str = field(
        default="flow_sde",
        metadata={"help": "Sampler of the training rollout.", "choices": list(SDE_SAMPLERS)},
    )
    sde_window_size: int | None = field(
        default=None, metadata={"help": "Consecutive steps with noise and loss. The whole range if not set."}
    )
    sde_window_range: list[int] | None = field(
        default=None,
        metadata={"help": "First step of the range of windows, and the one after its last.", "nargs": 2},
    )

    # Parameters that control the objective
    loss_type: str = field(
        default="flow_grpo",
        metadata={
            "help": "Clipped surrogate as it is, or with normalised ratios and balanced steps.",
            "choices": list(LOSS_TYPES),
        },
    )
    epsilon: float = field(default=1e-4, metadata={"help": "Ratios are clipped to 1 - epsilon and 1 + epsilon."})
    beta: float = field(default=0.0, metadata={"help": "Coefficient of the KL to the base model."})

    def sde_range(self) -> range:
        """The steps in which the window may lie."""
        if self.sde_window_range is not None:
            return range(*self.sde_window_range)
        return range(self.num_inference_steps - default_skip_last_steps(self.sampler))

    def _problems(self) -> list[str]:
        problems = super()._problems()
        problems += self._choice_problems("loss_type")
        if self.sampler not in SDE_SAMPLERS:
            problems.append(
                f"loss_type='{self.loss_type}' compares the probabilities of steps, which sampler='{self.sampler}' does not "
                f"have: choose {', '.join(SDE_SAMPLERS)}. For a walk without noise in most steps set sde_window_size."
            )
        else:
            if self.noise_level == 0:
                problems.append("noise_level=0: without noise a step has no probability. Leave it unset for 0.7.")
            problems += self._window_problems()
        if not 0 < self.epsilon < 1:
            problems.append(f"epsilon={self.epsilon}: it must be between 0 and 1.")
        if self.beta < 0:
            problems.append(f"beta={self.beta} is negative.")
        return problems

    def _window_problems(self) -> list[str]:
        steps, window = self.num_inference_steps, self.sde_window_range
        if window is not None and not (len(window) == 2 and 0 <= window[0] < window[1] <= steps):
            return [
                f"sde_window_range={window}: it is a first step and the one after the last of the {steps} steps, such as "
                f"0 {max(1, steps // 2)}."
            ]
        size = len(self.sde_range())
        if size < 1:
            return [
                f"num_inference_steps={steps} leaves no step to train: the last of {self.sampler} are left out. Take more "
                "steps, or set sde_window_range."
            ]
        if self.sde_window_size is not None and not 1 <= self.sde_window_size <= size:
            return [f"sde_window_size={self.sde_window_size}: the range of windows has {size} steps."]
        return []
