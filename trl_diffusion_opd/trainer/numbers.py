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

"""What stops a training, or is said of it, when numbers are not what they should be. All processes decide alike."""

import logging
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..checkpointing.checkpoint import resume_advice
from ..guards.finite import not_finite
from ..guards.redaction import shown
from ..models.student import Student


logger = logging.getLogger(__name__)


def gather_finite(
    accelerator: Accelerator, values: Tensor, task: str, levels: Mapping[int, float] | None, update: int
) -> Tensor:
    """
    A micro-batch's figures of all processes.

    Args:
        accelerator ([`~accelerate.Accelerator`])
        values (`Tensor` of shape `(k, n)`): k figures of every step, on this process.
        task (`str`): its task.
        levels (`dict[int, float]`, *optional*): noise levels of its n trained steps by their numbers, for the message.
            Not given where the figures belong to no step.
        update (`int`): that it is a part of, counted from 1.

    Returns:
        `Tensor` of shape `(processes, k, n)`, float64, on the CPU.

    Raises:
        [`FloatingPointError`]: on all processes, if a figure of one is not finite.
    """
    # One collective and one wait for the device a micro-batch.
    everyone = accelerator.gather(values[None]).cpu().double()  # not every device knows float64
    bad = [i for i in range(everyone.shape[2]) if not everyone[:, :, i].isfinite().all()]
    if bad:
        where = "in"
        if levels is not None:
            step, level = list(levels.items())[bad[0]]
            where = f"at step {step} (noise level {level:.3f}) of"
        raise FloatingPointError(
            f"The loss of task {task!r} is not finite {where} update {update}. Training stops before the optimizer's step; "
            "the last checkpoint is untouched. Try a smaller learning_rate, or dtype float32."
        )
    return everyone


def refuse_infinite_weights(
    student: Student,
    optimizer: torch.optim.Optimizer | None,
    accelerator: Accelerator,
    update: int,
    output_dir: str | None,
) -> None:
    """
    An optimizer's step that overflows shows in no loss of this update.

    Args:
        optimizer (`torch.optim.Optimizer`, *optional*): whose state is looked at too.

    Raises:
        [`FloatingPointError`]: on all processes, if what would be saved is not finite.
    """
    bad = not_finite(student.named_states())
    if optimizer is not None:
        states = enumerate(optimizer.state.values())
        bad += not_finite(
            (f"optimizer {i} {k}", v) for i, state in states for k, v in state.items() if isinstance(v, Tensor)
        )
    bad = gather_object(bad) if accelerator.num_processes > 1 else bad
    if bad:
        raise FloatingPointError(
            f"{len(bad)} trained tensors are not finite after update {update}, such as {bad[0]}. Nothing of "
            f"them is saved. Try a smaller learning_rate, or dtype float32. {resume_advice(output_dir)}"
        )


def warn_of_idle_weights(trained: Mapping[str, nn.Parameter]) -> None:
    """Says which of the trained weights take no part: the forward passes them by, or an operation has no gradient."""
    idle = [name for name, parameter in trained.items() if parameter.grad is None]
    if idle:
        logger.warning(
            f"{len(idle)} of the {len(trained)} tensors that are trained got no gradient in the first update, such as {shown(idle[0])}, "
            "and stay as they are. Either the transformer does not use these layers, and target_modules of peft_config need "
            "not name them, or something in its forward passes no gradient, such as an attention backend."
        )
