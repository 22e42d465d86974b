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

"""FLUX.1-dev's transformer, 12 billion random weights in bfloat16, with a LoRA and a teacher: what fits, and what was foretold."""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from trl_diffusion_opd import estimate_memory

from .options import flux_trainer, step_cost
from .report import Report


def measure(report: Report, folder: Path, layers: tuple[int, int], checkpointing: bool) -> dict[str, Any]:
    trainer = flux_trainer(report, folder, layers=layers, gradient_checkpointing=checkpointing)
    batches = [[{"prompt": "two dogs", "task": "a"}]]
    if report.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [step_cost.seconds_of(trainer, lambda: step_cost.one_pass(trainer, batches)) for _ in range(2)]
    found = {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "trained_steps": len(trainer.plan),
        "seconds": statistics.median(times),
    }
    peak = torch.cuda.max_memory_allocated() / 2**30 if report.device == "cuda" else None
    estimate = estimate_memory(trainer)["peak"]["bytes"] / 2**30
    if peak is None:
        return {**found, "estimate_gib": estimate}
    return {**found, "estimate_gib": estimate, "peak_gib": peak, "passed": abs(estimate / peak - 1) <= 0.1}


def run(report: Report) -> None:
    with tempfile.TemporaryDirectory() as name:
        # A few blocks first: what stops there is no question of size.
        for blocks, layers in (("six blocks", (2, 4)), ("57 blocks", (19, 38)))[: 1 if report.small else 2]:
            for checkpointing in (True, False):
                title = f"{blocks}, one sample{', checkpointing' if checkpointing else ''}"
                report.check(title, measure, report, Path(name) / title, layers, checkpointing)
                if report.device == "cuda":
                    torch.cuda.empty_cache()
