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
"""SD3.5-M at 512 px in bfloat16 with random weights and three LoRA teachers: seconds, arithmetic, memory and kernels of an update."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from trl_diffusion_opd import DiffusionOPDTrainer, estimate_memory
from trl_diffusion_opd.flops import matmul_rate

from .report import ROOT, Report


sys.path.insert(0, str(ROOT / "benchmarks"))

import step_cost  # noqa: E402


# Batch, steps of the walk (one of them is not trained), and repeats. Every step costs the same, so fewer of them show it too.
SETTINGS = {"batch 8": (8, 4, 3), "batch 1": (1, 10, 3)}
# What an update may hold at its peak with checkpointing, by batch: the configs in examples/ rely on it.
PEAK_GIB = {8: 22.0, 1: 10.0}


def set_checkpointing(trainer: DiffusionOPDTrainer, on: bool) -> None:
    transformer: Any = trainer.velocity_field.pipeline.components["transformer"]
    trainer.args.activation_checkpointing = on
    if on:
        transformer.enable_gradient_checkpointing()
    else:
        transformer.disable_gradient_checkpointing()


def model_flops(trainer: DiffusionOPDTrainer, batches: Any) -> int:
    """Floating-point operations of an update in one pass, without checkpointing: what the method itself computes."""
    with FlopCounterMode(display=False) as counter:
        step_cost.one_pass(trainer, batches)
    return counter.get_total_flops()


def peak_gib(trainer: DiffusionOPDTrainer, form: str, batches: Any) -> float:
    device = trainer.accelerator.device
    torch.cuda.reset_peak_memory_stats(device)
    step_cost.FORMS[form](trainer, batches)
    return torch.cuda.max_memory_allocated(device) / 2**30


def kernels(trainer: DiffusionOPDTrainer, batches: Any, device: str) -> list[dict[str, Any]]:
    """The ten kernels (on a CPU: operations) that an update spends most time in, with their shares."""
    activities = [ProfilerActivity.CUDA] if device == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=activities, acc_events=True) as profiler:
        step_cost.one_pass(trainer, batches)
        if device == "cuda":
            torch.cuda.synchronize()
    rows = [
        (row.self_device_time_total if device == "cuda" else row.self_cpu_time_total, row.count, row.key)
        for row in profiler.key_averages()
    ]
    total = sum(time for time, _, _ in rows)
    longest = sorted(rows, reverse=True)[:10]
    return [{"kernel": key[:120], "calls": count, "share": round(time / total, 4)} for time, count, key in longest]


def measure(
    trainer: DiffusionOPDTrainer, checkpointing: bool, report: Report, repeats: int, flops: float, rate: float
) -> dict[str, Any]:
    batch = trainer.args.per_device_train_batch_size
    batches = step_cost.micro_batches(batch)
    set_checkpointing(trainer, checkpointing)
    found = step_cost.timed(trainer, batches, repeats)
    passed = found["share_of_bound"] >= 0.95 and (checkpointing or found["speedup"] >= 1.3)
    if report.device == "cuda":
        estimate = estimate_memory(trainer)["peak"]["bytes"] / 2**30
        for form in step_cost.FORMS:
            found[form]["peak_gib"] = peak_gib(trainer, form, batches)
        peak = found["one_pass"]["peak_gib"]
        mfu = flops / found["one_pass"]["seconds"] / rate
        found |= {"estimate_gib": estimate, "estimate_over_peak": estimate / peak, "mfu": mfu}
        passed &= abs(estimate / peak - 1) <= 0.1 and mfu >= 0.45
        if checkpointing:
            passed &= peak < PEAK_GIB[batch]
    # A CPU with other work says nothing by a ratio: there the code is tried, no more.
    return {**found, "passed": passed or report.small}


def run(report: Report) -> None:
    rate = 0.0
    if report.device == "cuda":
        rate = matmul_rate(torch.device("cuda"), torch.bfloat16)
        report.check("matrix products", lambda: {"bf16_tflops": rate / 1e12})
    for name, (batch, steps, repeats) in SETTINGS.items():
        size = "tiny" if report.small else "sd35_medium"
        if report.small:
            batch, steps, repeats = min(batch, 2), 2, 1
        with tempfile.TemporaryDirectory() as folder:
            trainer = step_cost.make_trainer(
                size,
                Path(folder),
                "float32" if report.small else "bfloat16",
                num_inference_steps=steps,
                per_device_train_batch_size=batch,
                use_cpu=report.small,
            )
            batches = step_cost.micro_batches(batch)
            flops = model_flops(trainer, batches)
            for checkpointing in (False, True):
                title = f"{name}, checkpointing" if checkpointing else name
                report.check(title, measure, trainer, checkpointing, report, repeats, flops, rate)
            set_checkpointing(trainer, False)
            report.check(f"kernels, {name}", lambda t=trainer, b=batches: {"longest": kernels(t, b, report.device)})
            del trainer
        if report.device == "cuda":
            torch.cuda.empty_cache()
