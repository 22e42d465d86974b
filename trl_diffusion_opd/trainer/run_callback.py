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

"""A callback that calls a trainer's own hooks when a run begins and after each update."""

import logging
from collections.abc import Callable

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


logger = logging.getLogger(__name__)


class RunCallback(TrainerCallback):
    """
    Calls a trainer's hooks at three moments of a run.

    Args:
        begin (`Callable`): called when training begins.
        first_gradients (`Callable`): called before the first optimizer step.
        end_update (`Callable`): called after every update, before it is evaluated or saved.
    """

    def __init__(self, begin: Callable[[], None], first_gradients: Callable[[], None], end_update: Callable[[], None]):
        self._begin = begin
        self._first_gradients: Callable[[], None] | None = first_gradients
        self._end_update = end_update

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step >= state.max_steps:
            more = state.global_step > state.max_steps
            logger.warning(
                f"This run has done {state.global_step} updates, more than the {state.max_steps} asked for. Nothing is "
                f"trained, and its student is that of update {state.global_step}. For an earlier one, name its "
                "checkpoint as resume_from_checkpoint."
                if more
                else f"This run is finished: {state.global_step} of {state.max_steps} updates are done. To extend it, set "
                "a larger max_steps (or num_train_epochs)."
            )
        self._begin()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self._first_gradients is not None:
            self._first_gradients()
            self._first_gradients = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._end_update()
