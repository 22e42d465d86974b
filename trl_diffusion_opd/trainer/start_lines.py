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

"""What a trainer says at its start, besides its method's tables."""

import logging

from accelerate import Accelerator

from ..models.average import average_line, lag_problem
from ..reporting import console as tables
from .base_config import DiffusionConfig
from .rounds import Rounds


logger = logging.getLogger(__name__)


class StartLines:
    """[`DiffusionTrainer`]'s lines at the start. They use the attributes declared here."""

    args: DiffusionConfig
    accelerator: Accelerator
    rounds: Rounds
    repeats: int

    @property
    def micro_batch_size(self) -> int:
        """Samples of a micro-batch on a process."""
        raise NotImplementedError

    def _say_start(self, guidance: list[str]) -> None:
        """Prints the samples of an update as a product, and the lines about guidance."""
        generations = None if self.repeats == 1 else self.repeats
        counts = self.micro_batch_size, len(self.rounds.tasks), self.rounds.micro_batches
        if self.accelerator.is_main_process:
            for line in (tables.update_line(self.accelerator.num_processes, *counts, generations), *guidance):
                tables.print_line(line)

    def _say_average(self, updates: int) -> None:
        """Prints how old the evaluated and saved weights will be, and warns if that is too old for this run."""
        if not self.accelerator.is_main_process:
            return
        average = self.args.ema_decay, updates, self.args.ema_update_interval
        tables.print_line(average_line(*average))
        if (problem := lag_problem(*average)) is not None:
            logger.warning(problem)
