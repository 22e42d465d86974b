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

"""A trainer's evaluations: images of its student, drawn, scored, logged and shown."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from diffusers import DiffusionPipeline
from torch import nn
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import speed_metrics

from ..acceleration.offload import Offload
from ..acceleration.sharding import is_split
from ..data.tasks import plain_dataset
from ..models.student import Student
from ..reporting.completions import log_completions
from ..reporting.trackers import tensorboard_writers
from .base_config import DiffusionConfig
from .image_evaluator import ImageEvaluator


class Evaluations:
    """What [`DiffusionTrainer`] draws of its student. Of the trainer it uses what is declared here."""

    args: DiffusionConfig
    state: TrainerState
    control: TrainerControl
    callback_handler: CallbackHandler
    accelerator: Accelerator
    model: nn.Module
    train_dataset: Any
    eval_dataset: Any
    student: Student
    base_pipeline: DiffusionPipeline
    offload: Offload
    evaluator: ImageEvaluator
    log: Callable[..., None]
    _grid_at = -1  # the update of which images were last shown

    def _evaluate_method(self, dataset: Dataset, metric_key_prefix: str) -> dict[str, float]:
        """Metrics of the method itself, such as its loss on the evaluation's prompts."""
        return {}

    def evaluate(
        self,
        eval_dataset: str | Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Draws images for the prompts of `eval_dataset` with the averaged weights and scores them.

        The noise of an image is fixed by the seed, its task and its number, so evaluations can be compared.

        Returns:
            `dict[str, float]`: `eval_{task}/{reward}` for every reward, `eval_reward` (the mean over the tasks of their
            rewards' means) and timings, among them the seconds of `eval_generation_time` and, meanwhile, of each
            `eval_reward_time/{reward}`; with a dict of datasets the same under `eval_{name}_…`.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if isinstance(dataset, Mapping):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if dataset is None:
            raise ValueError("Evaluation needs an eval_dataset.")
        dataset = plain_dataset(dataset, self.args.task_column)
        start = time.time()
        metrics, count = self.evaluator.evaluate(
            dataset, metric_key_prefix, self.state, lambda: self._evaluate_method(dataset, metric_key_prefix)
        )
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=count)
        self.log(metrics)
        self._log_completions()  # the first log opens the trackers
        self.offload.rest()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _log_completions(self) -> None:
        """Shows images of the student, once an update. Their prompts and noise are fixed, so that they can be compared."""
        if not self.args.log_completions or self._grid_at == self.state.global_step:
            return
        self._grid_at = self.state.global_step
        dataset = self.train_dataset if self.eval_dataset is None else self.eval_dataset
        if isinstance(dataset, Mapping):
            dataset = next(iter(dataset.values()))
        shown = self.evaluator.completions(dataset, self.state)
        if self.accelerator.is_main_process:
            folder, step, trackers = self.args.output_dir or ".", self.state.global_step, self.args.report_to or []
            log_completions(shown, folder, step, trackers, tensorboard_writers(self.callback_handler.callbacks))

    @contextmanager
    def averaged_student(self) -> Iterator[nn.Module]:
        """Within it, the student's network with its averaged weights; afterwards the encoders are at rest."""
        with self.student.ema_weights():
            yield self.student.model
        self.offload.rest()

    def pipeline(self, *args: Any, **kwargs: Any) -> Any:
        """
        The pipeline with the student as it is now (its averaged weights): takes what the pipeline's own `__call__` takes.

        Raises:
            [`RuntimeError`]: once FSDP or ZeRO-3 has split the model.
        """
        if is_split(self.model):
            raise RuntimeError(
                "trainer.pipeline(...) has no whole model to draw with: it is split over the processes. Call "
                "trainer.save_model(folder) on all of them and load the folder into a pipeline, or trainer.evaluate()."
            )
        with self.averaged_student(), torch.no_grad():
            return self.base_pipeline(*args, **kwargs)
