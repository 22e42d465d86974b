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

"""Counts what a training costs, update by update: seconds, and rows that the network sees forward and backward."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_diffusion_opd.trainer.base_trainer import DiffusionTrainer


COST_FILE = "cost.jsonl"
CURVE_FILE = "curve.jsonl"
COSTS = ("forwards", "backwards", "seconds")


class CostCallback(TrainerCallback):
    """
    Writes the cost so far after every update to `cost.jsonl` in the output folder, and with the scores of every evaluation to
    `curve.jsonl`. Evaluations and checkpoints are not counted. A resumed run goes on from the cost of its checkpoint.

    Args:
        trainer ([`DiffusionTrainer`]): to which it is added; what is done from now on is counted.
    """

    def __init__(self, trainer: DiffusionTrainer):
        self.folder = Path(trainer.args.output_dir)
        self.total = dict.fromkeys(COSTS, 0.0)
        self._calls = dict.fromkeys(("forwards", "backwards"), 0)
        transformer = trainer.accelerator.unwrap_model(trainer.model)
        transformer = transformer.get_base_model()
        transformer.register_forward_pre_hook(self._count, with_kwargs=True)
        trainer.add_callback(self)
        self._mark()

    def _count(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        rows = len(kwargs["hidden_states"])
        self._calls["forwards"] += rows
        # Every forward with gradients has one backward here.
        self._calls["backwards"] += rows * torch.is_grad_enabled()

    def _mark(self) -> None:
        self._start = time.perf_counter()
        self._calls = dict.fromkeys(self._calls, 0)

    def _add(self) -> None:
        for name, count in self._calls.items():
            self.total[name] += count
        self.total["seconds"] += time.perf_counter() - self._start
        self._mark()

    def _write(self, name: str, line: dict[str, Any]) -> None:
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step:
            recorded = {line["step"]: line for line in read_lines(self.folder / COST_FILE)}
            self.total = {name: recorded[state.global_step][name] for name in COSTS}
            self._mark()
        else:
            self._add()  # images that were drawn before

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._add()
        self._write(COST_FILE, {"step": state.global_step, **self.total})

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        scores = {name.removeprefix("eval_"): value for name, value in metrics.items() if "/" in name}
        self._write(CURVE_FILE, {"step": state.global_step, **self.total, "scores": scores})
        self._mark()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._mark()


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_curve(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of a training, the last one of each update."""
    lines = {line["step"]: line for line in read_lines(folder / CURVE_FILE)}
    return [lines[step] for step in sorted(lines)]


def read_cost(folder: Path) -> dict[str, float]:
    """The cost of a whole training."""
    last = read_lines(folder / COST_FILE)[-1]
    return {name: last[name] for name in COSTS} | {"updates": last["step"]}
