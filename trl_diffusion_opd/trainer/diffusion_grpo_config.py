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

from ..algorithms.grpo import DIVERGENCE_THRESHOLD, LOSS_TYPES, SDE_SAMPLERS
from ..algorithms.samplers import default_skip_last_steps
from .rl_config import DiffusionRLConfig


WINDOW_SCHEDULES = ("random", "sliding")
SHIFT_EVERY = 25  # MixGRPO's


@dataclass
class DiffusionGRPOConfig(DiffusionRLConfig):
    r"""
    Configuration class for the [`DiffusionGRPOTrainer`].

    This class includes only the parameters that are specific to GRPO. [`DiffusionRLConfig`] has those of all trainers
    that learn from rewards, and says what `per_device_train_batch_size` counts. [`DiffusionConfig`] has those of all
    trainers of this package, and [`~transformers.TrainingArguments`] the other training arguments.

    Parameters:
        > Parameters that control the rollout

        sampler (`str`, *optional*, defaults to `"flow_sde"`):
            One of `"flow_sde"` (Flow-GRPO), `"dance_sde"` (DanceGRPO) and `"cps"`. GRPO needs a sampler with noise,
            since only a step with noise has a probability.
        sde_window_size (`int`, *optional*):
            Number of consecutive steps that have noise and are trained; the others are ODE steps
            ([MixGRPO](https://huggingface.co/papers/2507.21802)). `None` is the whole range. A smaller window trains
            fewer steps and is faster.
        sde_window_range (`list[int]`, *optional*):
            First step of the range, counted from 0, and the step after its last. `None` is all steps but the last,
            whose noise would stay in the image. For `"cps"` the last two are left out: one has no noise, the other
            almost none.
        sde_window_schedule (`str`, *optional*, defaults to `"random"`):
            Where in `sde_window_range` the window is. `"random"`: drawn anew for every round. `"sliding"`: MixGRPO's
            progressive schedule. It begins at the first step, moves on by one step every `sde_window_shift_every`
            updates, and stays at the end of the range.
        sde_window_shift_every (`int`, *optional*, defaults to `25`):
            Updates between two moves of a sliding window.
        one_pass (`bool`, *optional*, defaults to `False`):
            Whether the forwards of the rollout are the training forwards too, so that a trained step needs no second
            one. The gradient is the same. The activations of all trained steps of all micro-batches of an update are
            then kept until the images are scored. This needs `num_iterations=1`, and does not work with DeepSpeed.

        > Parameters that control the objective

        loss_type (`str`, *optional*, defaults to `"flow_grpo"`):
            `"flow_grpo"`: the clipped surrogate loss of [Flow-GRPO](https://huggingface.co/papers/2505.05470).
            `"grpo_guard"`: that of [GRPO-Guard](https://huggingface.co/papers/2510.22319), which normalizes the ratios
            and balances the gradients of the steps.
            `"dppo"`: that of [Flow-DPPO](https://huggingface.co/papers/2606.11025), which clips no ratio. It leaves
            out an image's step if model and sampling model are further apart than `divergence_threshold` there and the
            step would drive them further apart.
        epsilon (`float`, *optional*, defaults to `1e-4`):
            Probability ratios are clipped to `1 - epsilon` and `1 + epsilon`. Log-probabilities are means over the
            latent dimensions, so ratios are close to 1: published settings are 1e-5 to 1e-3, and 2e-6 for
            `"grpo_guard"`. For `sampler="cps"` published settings do not apply: their code leaves the variance \\( s^2
            \\) out of the log-probability, so its log-ratio is \\( 2 s^2 \\) times the true one, which is used here.
            It has no effect while `num_iterations` is 1, or with `"dppo"`.
        divergence_threshold (`float`, *optional*, defaults to `1e-5`):
            Largest KL divergence from the model that drew the images at which `"dppo"` trains every step, in nats per
            latent dimension. Like `epsilon` it has no effect while `num_iterations` is 1.
        beta (`float`, *optional*, defaults to `0.0`):
            Coefficient of the KL to the base model. The KL is in nats, a mean over latent dimensions and trained
            steps. At 0 the base is not computed. Published code of the Flow-GRPO family leaves the length of the step
            out of its KL: a `beta` of 0.04 there is about 0.009 here, on 10 steps of Stable Diffusion 3.

    > [!NOTE]
    > `sampler` defaults to `"flow_sde"` instead of `"ode"`.
    """

    # Parameters that control the rollout
    sampler: str = field(
        default="flow_sde",
        metadata={"help": "Sampler of the training rollout.", "choices": list(SDE_SAMPLERS)},
    )
    sde_window_size: int | None = field(
        default=None, metadata={"help": "Consecutive steps with noise and loss. If not set, the whole range."}
    )
    sde_window_range: list[int] | None = field(
        default=None,
        metadata={"help": "First step that windows may have, and the step after the last one.", "nargs": 2},
    )
    sde_window_schedule: str = field(
        default="random",
        metadata={
            "help": "Whether the window is drawn anew for every round, or slides from the first step to the last.",
            "choices": list(WINDOW_SCHEDULES),
        },
    )
    sde_window_shift_every: int = field(
        default=SHIFT_EVERY, metadata={"help": "Updates after which a sliding window moves on by one step."}
    )
    one_pass: bool = field(
        default=False,
        metadata={
            "help": "Trains on the forwards of the rollout itself. Faster, but all their activations are kept until "
            "the images are scored."
        },
    )

    # Parameters that control the objective
    loss_type: str = field(
        default="flow_grpo",
        metadata={
            "help": "The clipped surrogate loss of Flow-GRPO, that of GRPO-Guard (normalized ratios, balanced steps), or "
            "the masked one of Flow-DPPO.",
            "choices": list(LOSS_TYPES),
        },
    )
    epsilon: float = field(
        default=1e-4, metadata={"help": "Probability ratios are clipped to 1 - epsilon and 1 + epsilon."}
    )
    divergence_threshold: float = field(
        default=DIVERGENCE_THRESHOLD,
        metadata={"help": "Divergence from the sampling model above which dppo leaves steps out."},
    )
    beta: float = field(default=0.0, metadata={"help": "Coefficient of the KL to the base model."})

    def sde_range(self) -> range:
        """The steps that a window may have."""
        if self.sde_window_range is not None:
            return range(*self.sde_window_range)
        return range(self.num_inference_steps - default_skip_last_steps(self.sampler))

    def _problems(self) -> list[str]:
        problems = super()._problems()
        problems += self._choice_problems("loss_type", "sde_window_schedule")
        if self.sampler not in SDE_SAMPLERS:
            problems.append(
                f"loss_type='{self.loss_type}' compares the probabilities of steps, but the steps of "
                f"sampler='{self.sampler}' have none: choose {', '.join(SDE_SAMPLERS)}. To have noise in a few steps "
                "only, set sde_window_size."
            )
        else:
            if self.noise_level == 0:
                problems.append("noise_level=0: without noise a step has no probability. Leave it unset for 0.7.")
            problems += self._window_problems()
        if not 0 < self.epsilon < 1:
            problems.append(f"epsilon={self.epsilon}: it must be between 0 and 1.")
        if self.beta < 0:
            problems.append(f"beta={self.beta} is negative.")
        if self.loss_type != "dppo" and self.divergence_threshold != DIVERGENCE_THRESHOLD:
            problems.append(
                f"divergence_threshold={self.divergence_threshold} has no effect with loss_type='{self.loss_type}'. Set "
                "loss_type='dppo', or leave it out."
            )
        elif not self.divergence_threshold > 0:
            problems.append(
                f"divergence_threshold={self.divergence_threshold}: it must be positive. A large one, such as 1, leaves "
                "nothing out."
            )
        return problems + self._one_pass_problems()

    def _one_pass_problems(self) -> list[str]:
        if not self.one_pass:
            return []
        problems = []
        if self.num_iterations > 1:
            problems.append(
                f"one_pass=True with num_iterations={self.num_iterations}: the rollout's forwards are the training "
                "forwards of the round's first update alone, since weights change after it. Set num_iterations=1, or "
                "leave out one_pass."
            )
        if self.deepspeed_plugin is not None:
            problems.append(
                "one_pass=True is not supported with DeepSpeed, whose engine takes a forward's backward before the next "
                "forward. Use multi_gpu.yaml or fsdp2.yaml of examples/accelerate_configs/, or leave out one_pass."
            )
        return problems

    def _window_problems(self) -> list[str]:
        steps, window = self.num_inference_steps, self.sde_window_range
        if window is not None and not (len(window) == 2 and 0 <= window[0] < window[1] <= steps):
            return [
                f"sde_window_range={window}: it must be a first step and the step after the last, of the {steps} "
                f"steps, such as 0 {max(1, steps // 2)}."
            ]
        size = len(self.sde_range())
        if size < 1:
            return [
                f"num_inference_steps={steps} leaves no step to train, since the last steps of {self.sampler} are "
                "left out. Use more steps, or set sde_window_range."
            ]
        if self.sde_window_size is not None and not 1 <= self.sde_window_size <= size:
            return [f"sde_window_size={self.sde_window_size}: the range of windows has {size} steps."]
        return self._schedule_problems(size)

    def _schedule_problems(self, steps: int) -> list[str]:
        problems = []
        if self.sde_window_schedule != "sliding":
            if self.sde_window_shift_every != SHIFT_EVERY:
                problems.append(
                    f"sde_window_shift_every={self.sde_window_shift_every} has no effect with sde_window_schedule="
                    f"'{self.sde_window_schedule}'. Set it to 'sliding', or leave sde_window_shift_every out."
                )
            return problems
        if self.sde_window_size is None or self.sde_window_size == steps:
            problems.append(
                f"sde_window_schedule='sliding' with sde_window_size={self.sde_window_size}: the window is the whole "
                f"range of {steps} steps, so it can't slide. Set a smaller sde_window_size."
            )
        if self.sde_window_shift_every < 1:
            problems.append(f"sde_window_shift_every={self.sde_window_shift_every}: it must be at least 1.")
        return problems
