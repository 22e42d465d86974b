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

from ..algorithms.dmd import DMD_LOSSES
from .taught_config import TaughtConfig


# Of each loss: updates of the fake in an update, its learning rate over the student's, and its Adam betas.
_FAKE_DEFAULTS = {"dmd2": (5, 0.5, (0.9, 0.999)), "tdm": (1, 5.0, (0.0, 0.95))}


@dataclass
class DiffusionDMDConfig(TaughtConfig):
    r"""
    Configuration class for the [`DiffusionDMDTrainer`].

    This class includes only the parameters that are specific to distribution matching distillation. Those that control
    the teachers are in [`TaughtConfig`], those of all trainers of this package in [`DiffusionConfig`], and the other
    training arguments in [`~transformers.TrainingArguments`].

    `num_inference_steps` is the number of steps that the student is trained to draw in: 4 makes a four-step student.

    Parameters:
        > Parameters that control the objective

        loss_type (`str`, *optional*, defaults to `"dmd2"`):
            `"dmd2"`: the student's predicted images are noised again to any level
            ([DMD2](https://huggingface.co/papers/2405.14867), without its adversarial loss). `"tdm"`: the states at
            the end of each of its steps are noised further, to the levels of that step
            ([TDM](https://huggingface.co/papers/2503.06674)).
        huber_c (`float`, *optional*, defaults to `1e-3`):
            The constant of the pseudo-Huber loss of `"tdm"`. 0 is the squared loss.
        min_renoise_level (`float`, *optional*, defaults to `0.02`), \
        max_renoise_level (`float`, *optional*, defaults to `0.98`):
            The least and the largest timestep at which teacher and fake are compared, before the pipeline's own shift
            is applied to it.

        > Parameters that control the fake score

        fake_learning_rate (`float`, *optional*):
            Learning rate of the fake score, a copy of the student that learns to denoise the student's images. It is
            constant. `None` is half of `learning_rate` with `"dmd2"`, and five times it with `"tdm"`.
        fake_updates (`int`, *optional*):
            Updates of the fake score before each update of the student, each on fresh noise. `None` is 5 with
            `"dmd2"`, and 1 with `"tdm"`.
        fake_adam_beta1 (`float`, *optional*), fake_adam_beta2 (`float`, *optional*):
            Adam's betas of the fake score. `None` is 0.9 and 0.999 with `"dmd2"`, 0 and 0.95 with `"tdm"`.

    > [!NOTE]
    > These parameters have default values different from [`DiffusionConfig`]:
    > - `learning_rate`: Defaults to `1e-4` instead of `3e-4`.
    > - `eval_num_inference_steps`: Defaults to `num_inference_steps` instead of `40`: the student is trained for so
    > many steps.
    """

    # Defaults that differ from DiffusionConfig
    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate of the student."})
    eval_num_inference_steps: int = field(
        default=None,  # type: ignore[assignment]  # None until __post_init__
        metadata={"help": "Denoising steps of images in evaluations. If not set, `num_inference_steps`."},
    )

    # Parameters that control the objective
    loss_type: str = field(
        default="dmd2",
        metadata={
            "help": "DMD2's distribution matching, or trajectory distribution matching.",
            "choices": list(DMD_LOSSES),
        },
    )
    huber_c: float = field(
        default=1e-3, metadata={"help": "Constant of tdm's pseudo-Huber loss; 0 is the squared loss."}
    )
    min_renoise_level: float = field(
        default=0.02, metadata={"help": "Least timestep at which teacher and fake are compared, before the shift."}
    )
    max_renoise_level: float = field(
        default=0.98, metadata={"help": "Largest timestep at which teacher and fake are compared, before the shift."}
    )

    # Parameters that control the fake score
    fake_learning_rate: float = field(
        default=None,  # type: ignore[assignment]  # None until __post_init__
        metadata={"help": "Learning rate of the fake score. If not set, learning_rate / 2 for dmd2, times 5 for tdm."},
    )
    fake_updates: int = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "Updates of the fake score before each of the student's. If not set, 5 for dmd2, 1 for tdm."
        },
    )
    fake_adam_beta1: float = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "Adam's beta1 of the fake score. If not set, 0.9 for dmd2, 0 for tdm."},
    )
    fake_adam_beta2: float = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "Adam's beta2 of the fake score. If not set, 0.999 for dmd2, 0.95 for tdm."},
    )

    def __post_init__(self) -> None:
        if self.eval_num_inference_steps is None:
            self.eval_num_inference_steps = self.num_inference_steps
        # An unknown loss is refused later.
        updates, share, betas = _FAKE_DEFAULTS.get(self.loss_type, _FAKE_DEFAULTS["dmd2"])
        defaults = {
            "fake_updates": updates,
            "fake_learning_rate": share * self.learning_rate,
            "fake_adam_beta1": betas[0],
            "fake_adam_beta2": betas[1],
        }
        for name, value in defaults.items():
            if self.__dict__[name] is None:
                self.__dict__[name] = value
        super().__post_init__()

    def _problems(self) -> list[str]:
        problems = super()._problems()
        problems += self._choice_problems("loss_type")
        if not self.huber_c >= 0:
            problems.append(f"huber_c={self.huber_c}: it must not be negative; 0 is the squared loss.")
        if self.loss_type == "dmd2" and self.huber_c != 1e-3:
            problems.append(f"huber_c={self.huber_c} has no effect with loss_type='dmd2', whose loss is squared.")
        if not 0 <= self.min_renoise_level < self.max_renoise_level <= 1:
            problems.append(
                f"min_renoise_level={self.min_renoise_level} and max_renoise_level={self.max_renoise_level}: they must "
                "be in [0, 1], the first below the second."
            )
        elif self.min_renoise_level == 0 and self.loss_type == "tdm":
            problems.append(
                "min_renoise_level=0 with loss_type='tdm': without noise the teacher and the fake predict no image, "
                "and the fake's loss divides by the level. Use 0.02."
            )
        problems += self._fake_problems()
        return problems

    def _fake_problems(self) -> list[str]:
        problems = []
        if not self.fake_learning_rate > 0:
            problems.append(
                f"fake_learning_rate={self.fake_learning_rate}: it must be positive. A fake score that does not learn "
                "stays that of the first student, and the student has nothing to follow."
            )
        if self.fake_updates < 1:
            problems.append(
                f"fake_updates={self.fake_updates}: it must be at least 1, or the fake score never learns the "
                "student's images."
            )
        for name in ("fake_adam_beta1", "fake_adam_beta2"):
            if not 0 <= self.__dict__[name] < 1:
                problems.append(f"{name}={self.__dict__[name]}: it must be in [0, 1).")
        if self.fp16:
            problems.append(
                "fp16=True is not supported: one loss scale can't serve two optimizers. Use bf16, or train in float32."
            )
        if self.deepspeed_plugin is not None:
            problems.append(
                "DeepSpeed has one optimizer, but student and fake score have one each. Use multi_gpu.yaml or "
                "fsdp2.yaml of examples/accelerate_configs/."
            )
        return problems
