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

"""What a run says of itself: the metrics of its updates, the table of an evaluation, the lines at start and end."""

import logging
import math

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import TrainerState

from ..acceleration.quantization import base_weight
from ..checkpointing.resume import comparable_after
from ..data.tasks import task_rows
from ..models.average import average_line, lag_problem
from ..models.student import Student
from ..profiling.flops import matmul_rate
from ..profiling.timing import UpdateCost
from ..reporting import console as tables
from ..reporting.evaluation_table import print_evaluation
from ..rewards import RewardFunc
from ..rewards.scoring import score_names
from .base_config import DiffusionConfig
from .image_evaluator import applicable_mean
from .references import References
from .rounds import Rounds


logger = logging.getLogger(__name__)


class RunLogs:
    """[`DiffusionTrainer`]'s methods for its logs and the console. They use the attributes declared here."""

    args: DiffusionConfig
    state: TrainerState
    student: Student
    tasks: list[str]
    reward_funcs: dict[str, list[RewardFunc]]
    accelerator: Accelerator
    rounds: Rounds
    repeats: int
    passes: int
    changes: list[dict[str, object]]
    _mixed_precision: str
    _cost: UpdateCost
    _metrics: dict[str, dict[str, list[float]]]

    @property
    def micro_batch_size(self) -> int:
        """Samples of a micro-batch on a process."""
        raise NotImplementedError

    def _say_start(self, guidance: list[str]) -> None:
        """Prints the samples of an update as a product, and the lines about guidance."""
        generations = None if self.repeats == 1 else self.repeats
        counts = self.micro_batch_size, len(self.tasks), self.rounds.micro_batches
        if self.state.is_world_process_zero:
            for line in (tables.update_line(self.accelerator.num_processes, *counts, generations), *guidance):
                tables.print_line(line)

    def _add_metrics(self, logs: dict[str, float], samples: int) -> None:
        """Adds the metrics gathered since the last training log, and what the updates took."""
        metrics = {name: applicable_mean(values) for name, values in self._metrics["train"].items()}
        logs |= {name: value for name, value in metrics.items() if not math.isnan(value)}
        logs |= self._cost.metrics(samples, bool(self.args.activation_checkpointing))
        self._metrics["train"].clear()

    @property
    def mixed_dtype(self) -> torch.dtype | None:
        """The dtype of mixed precision, if it is on."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self._mixed_precision)

    def _begin_costs(self) -> None:
        """Begins to measure updates. On a GPU, with the rate that its arithmetic is compared with."""
        rate, device = 0.0, self.accelerator.device
        if device.type == "cuda":
            rate = matmul_rate(device, self.mixed_dtype or base_weight(self.student.model).dtype)
        self._cost.begin(rate, self.passes)

    def _say_average(self, updates: int) -> None:
        """Prints how old the evaluated and saved weights will be, and warns if that is too old for this run."""
        if not self.state.is_world_process_zero:
            return
        average = self.args.ema_decay, updates, self.args.ema_update_interval
        tables.print_line(average_line(*average))
        if (problem := lag_problem(*average)) is not None:
            logger.warning(problem)

    def _print_evaluation(
        self, metrics: dict[str, float], dataset: Dataset, prefix: str, references: References
    ) -> None:
        if not self.state.is_world_process_zero:
            return
        rewards = {
            task: [name for function in self.reward_funcs[task] for name in score_names(function)]
            for task in task_rows(dataset, self.args.task_column)
        }
        of_average = " of the average" if self.student.ema is not None else ""
        name = "" if prefix == "eval" else f" on {prefix.removeprefix('eval_')}"
        title = f"Evaluation{of_average}{name} at update {self.state.global_step}"
        since, history = comparable_after(self.changes), self.state.log_history
        comparable = [entry for entry in history if entry["step"] > since] or history[-1:]
        print_evaluation(metrics, comparable, references, rewards, prefix, title)
