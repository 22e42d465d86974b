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

"""A scheduler that records every step of a pipeline's own loop."""

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor


STEPS = 3


class Recorder(FlowMatchEulerDiscreteScheduler):
    """Keeps the level, the state and the velocity of every step that a pipeline makes."""

    solver_levels: Tensor | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        self.trace: list[tuple[float, Tensor, Tensor]] = []
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        if self.solver_levels is not None:
            self.sigmas, self.timesteps = self.solver_levels, (self.solver_levels[:-1] * 1000).to(device)

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """Some pipelines ask any scheduler but the flow-matching class itself for this."""
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        level = self.sigmas[len(self.trace)]
        self.trace.append((float(level), sample.clone(), model_output.clone()))
        return super().step(model_output, timestep, sample, **kwargs)


def recorder(scheduler: Any) -> Recorder:
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return Recorder.from_config(scheduler.config)
    own = Recorder()
    scheduler.set_timesteps(STEPS)
    own.solver_levels = scheduler.sigmas
    return own
