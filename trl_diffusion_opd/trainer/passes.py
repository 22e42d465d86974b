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

"""The student's forward and backward in training, under any wrapper of accelerate (DDP, FSDP, DeepSpeed)."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerState
from trl.models.utils import _ForwardRedirection

from ..data.readers import Texts
from ..guards.redaction import shown
from ..models.student import Student
from ..models.teachers import TeacherBank
from ..pipelines.velocity import VelocityField
from .base_config import DiffusionConfig


logger = logging.getLogger(__name__)


class StudentPasses:
    """[`DiffusionTrainer`]'s methods for the student's forward and backward. They use the attributes declared here."""

    args: DiffusionConfig
    state: TrainerState
    accelerator: Accelerator
    student: Student
    is_deepspeed_enabled: bool
    velocity_field: VelocityField
    bank: TeacherBank | None
    _part: Callable[[str], AbstractContextManager[None]]
    _redirect: _ForwardRedirection

    @property
    def graphs_alive(self) -> int:
        """Forwards of a micro-batch whose activations are kept at once, at most."""
        return 1

    @contextmanager
    def _gradient_sync(self, model: nn.Module, last: bool) -> Iterator[None]:
        """
        Context that reduces gradients among processes only in the round's last backward.

        `no_sync` alone is not enough. Under DeepSpeed every backward with `sync_gradients` is an optimizer step, and
        FSDP2's `no_sync` turns the reduction on again when it ends.
        """
        state = self.accelerator.gradient_state
        if last or not state.sync_gradients:
            yield
            return
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(True)

    def _backward(self, loss: Tensor) -> None:
        # The loss includes the task's share already, so DeepSpeed must not divide by the accumulation steps again.
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        with self._part("backward"):
            self.accelerator.backward(loss, **options)

    @staticmethod
    def _in_eval_mode(model: nn.Module) -> None:
        """Turns dropout off. Checkpointing in diffusers depends only on the grad mode, so it stays on."""
        if model.training:  # Trainer sets it. Checked first, since eval() walks over all modules
            model.eval()

    def _student_velocity(
        self,
        model: nn.Module,
        x: Tensor,
        t: float | list[float],
        prompts: list[str],
        guidance_scale: float | None = None,
        field: VelocityField | None = None,
        branches: bool = False,
    ) -> Tensor:
        """
        The student's velocity with gradient, with `branches` as [`VelocityField.branches`] returns it. To DDP, a whole
        pipeline step is one forward of the wrapper.
        """
        own = self.student.model  # the network inside the wrapper
        field = self.velocity_field if field is None else field
        velocity: Callable[..., Tensor] = field.branches if branches else field
        inputs = (x, t, prompts, self.args.guidance_scale if guidance_scale is None else guidance_scale)
        with self._part("student"):
            if own is model:
                return velocity(*inputs, model)
            return self._redirect(model, own, velocity, *inputs, own)

    def _as_forward(self, model: nn.Module, output: Tensor) -> Tensor:
        """
        What the student's network has computed with gradient outside of the wrapper `model`, as if inside of it.

        DDP learns in a forward which gradients the next backward will give, and waits for these. That forward may come
        after the network's own: it need not compute anything.
        """
        own = self.student.model
        return output if own is model else self._redirect(model, own, lambda: output)

    def _target(self, task: str, x: Tensor, t: float | list[float], texts: Texts) -> Tensor:
        """The weighted mean velocity of the task's teachers, each with its own guidance scale, on what they read."""
        assert self.bank is not None
        with self._part("teacher"):
            return self.bank.mean_velocity(self.velocity_field, self.bank.teachers[task], x, t, texts.teacher)

    def _gather_finite(self, task: str, levels: Mapping[int, float] | None, values: Tensor) -> Tensor:
        """
        Gathers a micro-batch's figures from all processes, and checks that they are finite.

        Args:
            task (`str`): the micro-batch's task.
            levels (`dict[int, float]`, *optional*): noise levels of the n trained steps by step number, for the
                message. `None` if the figures belong to no step.
            values (`Tensor` of shape `(k, n)`): k figures of every step, on this process.

        Returns:
            `Tensor` of shape `(processes, k, n)`, float64, on the CPU.

        Raises:
            [`FloatingPointError`]: on all processes, if a figure of any process is not finite.
        """
        # One collective and one wait for the device in each micro-batch. All processes decide alike.
        everyone = self.accelerator.gather(values[None]).cpu().double()  # not every device has float64
        bad = [i for i in range(everyone.shape[2]) if not everyone[:, :, i].isfinite().all()]
        if bad:
            where = "in"
            if levels is not None:
                step, level = list(levels.items())[bad[0]]
                where = f"at step {step} (noise level {level:.3f}) of"
            raise FloatingPointError(
                f"The loss of task {task!r} is not finite {where} update {self.state.global_step + 1}. Training stops "
                "before the optimizer's step; the last checkpoint is untouched. Try a smaller learning_rate, or dtype "
                "float32."
            )
        return everyone

    def _warn_of_idle_weights(self) -> None:
        """Warns of trained weights without gradient, which the forward or the backward does not reach."""
        # DeepSpeed keeps the gradients to itself.
        if self.is_deepspeed_enabled or not self.accelerator.is_main_process:
            return
        trained = self.student.named_parameters()
        idle = [name for name, parameter in trained.items() if parameter.grad is None]
        for own in self.student.by_expert(trained):  # an update's levels may all be on one side of the boundary
            if set(own) <= set(idle):
                idle = [name for name in idle if name not in own]
        if idle:
            logger.warning(
                f"{len(idle)} of the {len(trained)} trained tensors got no gradient in the first update, such as "
                f"{shown(idle[0])}. They are not trained. Either the transformer does not use these layers, so "
                "target_modules of peft_config need not name them, or a part of its forward passes no gradient, such "
                "as an attention backend."
            )
