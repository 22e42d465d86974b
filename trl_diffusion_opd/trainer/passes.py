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

"""The student's forward and backward, whatever accelerate has wrapped around it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from accelerate import Accelerator
from torch import Tensor, nn
from trl.models.utils import _ForwardRedirection

from ..pipelines.velocity import VelocityField
from .base_config import DiffusionConfig


class StudentPasses:
    """What [`DiffusionTrainer`] computes of the student in training. Of the trainer it uses what is declared here."""

    args: DiffusionConfig
    accelerator: Accelerator
    is_deepspeed_enabled: bool
    velocity_field: VelocityField
    _part: Callable[[str], AbstractContextManager[None]]
    _redirect: _ForwardRedirection
    _wrapped_and_own: tuple[nn.Module, nn.Module] | None = None

    @contextmanager
    def _gradient_sync(self, model: nn.Module, last: bool) -> Iterator[None]:
        """
        Reduces gradients only in the round's last backward.

        `no_sync` alone is not enough: under DeepSpeed every backward with `sync_gradients` is an optimizer step, and
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
        # DeepSpeed would divide by the accumulation steps once more: a task's share is in the loss already.
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        with self._part("backward"):
            self.accelerator.backward(loss, **options)

    def _unwrapped(self, model: nn.Module) -> nn.Module:
        """The network in Trainer's wrapper. accelerate looks at every module to find it, which is too slow for every step."""
        if self._wrapped_and_own is None or self._wrapped_and_own[0] is not model:
            self._wrapped_and_own = model, self.accelerator.unwrap_model(model)
        return self._wrapped_and_own[1]

    @staticmethod
    def _in_eval_mode(model: nn.Module) -> None:
        """No dropout; checkpointing in diffusers depends on the grad mode alone."""
        if model.training:  # Trainer's mode. To set it takes a walk over all modules
            model.eval()

    def _student_velocity(
        self,
        model: nn.Module,
        x: Tensor,
        t: float | list[float],
        prompts: list[str],
        guidance_scale: float | None = None,
        field: VelocityField | None = None,
    ) -> Tensor:
        """The student's velocity with gradient. Under DDP all of a replay counts as one forward of the wrapper."""
        unwrapped = self._unwrapped(model)
        field = self.velocity_field if field is None else field
        inputs = (x, t, prompts, self.args.guidance_scale if guidance_scale is None else guidance_scale)
        with self._part("student"):
            if unwrapped is model:
                return field(*inputs, model)
            return self._redirect(model, unwrapped, field, *inputs, unwrapped)
