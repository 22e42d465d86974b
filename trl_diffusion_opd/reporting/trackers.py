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

"""
Callbacks for TensorBoard, Weights & Biases and Trackio that differ from Transformers' in three ways: everything is
logged with the update as its step, timings have a section of their own, and no token, local path or machine name is
sent. Images are logged in `completions.py`.
"""

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from huggingface_hub.utils import httpx
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.integrations.integration_utils import rewrite_logs

from ..guards.files import file_name
from ..guards.redaction import public_arguments
from ..models.student import STUDENT_ADAPTER


if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


logger = logging.getLogger(__name__)

_TIMES = ("step_time", "generation_time")
_TIME_PREFIXES = ("time/", "reward_time/")


def use_public_trackers(callbacks: list[TrainerCallback]) -> None:
    """Replaces, in the list, the trackers' callbacks that Trainer made for `report_to` by those of this file."""
    for i, callback in enumerate(callbacks):
        # Only the exact class: a subclass is the user's own and stays.
        if type(callback) is TensorBoardCallback:
            callbacks[i] = _TensorBoard(callback.tb_writer)
        elif type(callback) is WandbCallback:
            callbacks[i] = _Wandb()
        elif type(callback) is TrackioCallback:
            callbacks[i] = _Trackio()


def tensorboard_writers(callbacks: Sequence[TrainerCallback]) -> "list[SummaryWriter]":
    """Returns the open writers of TensorBoard's callbacks."""
    writers = [callback.tb_writer for callback in callbacks if isinstance(callback, TensorBoardCallback)]
    return [writer for writer in writers if writer is not None]


class _ShownModel(nn.Module):
    """Shows a model to trackers without its own config, which names the folder that it was loaded from."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.config: dict[str, object] = {}
        if isinstance(model, PeftModel):
            lora = model.peft_config[STUDENT_ADAPTER]
            targets = lora.target_modules
            shown = targets if isinstance(targets, str) else sorted(targets or ())
            self.config = {"lora_r": lora.r, "lora_alpha": lora.lora_alpha, "lora_target_modules": shown}

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def _shown_arguments(args: TrainingArguments) -> TrainingArguments:
    shown: Any = copy.copy(args)
    public = public_arguments(args)
    shown.to_dict = lambda: public
    return shown


def in_sections(logs: Mapping[str, float]) -> dict[str, float]:
    """
    Names metrics as Transformers does, with the prefix `train/` or `eval/`, but timings of updates with `time/`: they
    are many, and would hide the others.
    """
    named = {}
    for name, value in rewrite_logs(logs).items():
        metric = name.removeprefix("train/")
        is_time = metric in _TIMES or metric.startswith(_TIME_PREFIXES)
        named[f"time/{metric.removeprefix('time/')}" if is_time and metric != name else name] = value
    return named


def _own_section() -> AbstractContextManager[object]:
    # Transformers' callbacks name the metrics with this function of their module.
    return patch("transformers.integrations.integration_utils.rewrite_logs", in_sections)


class _TensorBoard(TensorBoardCallback):
    logging_dir: str | None

    def _init_summary_writer(self, args: TrainingArguments) -> None:
        if self.logging_dir is None:  # the default contains the machine's name
            named = f"{file_name(args.run_name)}_" if args.run_name else ""
            self.logging_dir = os.path.join(args.output_dir or ".", "runs", f"{named}{datetime.now():%b%d_%H-%M-%S}")
        # The file's name contains it too, and no option changes that.
        with patch("socket.gethostname", return_value="run"):
            super()._init_summary_writer(args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not state.is_world_process_zero:
            return
        if self.tb_writer is None:
            self._init_summary_writer(args)
        # Without the model: TensorBoard's callback expects a language model's config.
        super().on_train_begin(_shown_arguments(args), state, control)

    def on_log(self, args: Any, state: Any, control: Any, *others: Any, **kwargs: Any) -> None:
        with _own_section():
            super().on_log(args, state, control, *others, **kwargs)


class _Wandb(WandbCallback):
    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module, **kwargs: object) -> None:
        # Otherwise wandb sends host, user, paths and the command line. A user who wants that sets these variables.
        os.environ.setdefault("WANDB__DISABLE_META", "true")
        os.environ.setdefault("WANDB_HOST", "trainer")
        super().setup(_shown_arguments(args), state, _ShownModel(model), **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, *others: Any, **kwargs: Any) -> None:
        with _own_section():
            super().on_log(args, state, control, *others, **kwargs)


class _Trackio(TrackioCallback):
    def __init__(self) -> None:
        super().__init__()
        self._run_name: str | None = None

    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module, **kwargs: object) -> None:
        shown = _shown_arguments(args)
        # The run ends with training. A later evaluation must reopen the same run.
        shown.run_name = self._run_name or args.run_name
        super().setup(shown, state, _ShownModel(model), **kwargs)
        run = self._trackio.context_vars.current_run.get()
        self._run_name = run and run.name  # only the main process has a run

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if not self._initialized:
            self.setup(args, state, model)
        if state.is_world_process_zero:
            # Without a step Trackio uses its own counter, which counts calls.
            step = state.global_step
            self._trackio.log({**in_sections(logs or {}), "train/global_step": step}, step=step)

    def on_push_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: object = None,
        **kwargs: object,
    ) -> None:
        # On every push of a checkpoint it also syncs the project to a Space of its own.
        try:
            super().on_push_begin(args, state, control, model, **kwargs)
        except (OSError, ValueError, httpx.HTTPError) as error:
            logger.warning(f"Trackio's Space could not be updated; training goes on, and its logs are here: {error}")
