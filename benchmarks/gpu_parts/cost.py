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
from peft.helpers import disable_input_dtype_casting
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from trl_diffusion_opd import DiffusionOPDTrainer, estimate_memory
from trl_diffusion_opd.profiling.flops import matmul_rate

from .report import ROOT, Report


sys.path.insert(0, str(ROOT / "benchmarks"))

import step_cost  # noqa: E402


# Steps of the walk, of which the last is not trained. All steps cost the same, so two of them show it.
STEPS = 2
REPEATS = {8: 3, 1: 5}
# What an update may hold at its peak with checkpointing, by batch: the configs in examples/ rely on it.
PEAK_GIB = {8: 22.0, 1: 10.0}


def set_checkpointing(trainer: DiffusionOPDTrainer, on: bool) -> None:
    transformer: Any = trainer.velocity_field.pipeline.components["transformer"]
    trainer.args.activation_checkpointing = on
    if on:
        transformer.enable_gradient_checkpointing()
    else:
        transformer.disable_gradient_checkpointing()


def set_batch_size(trainer: DiffusionOPDTrainer, size: int) -> None:
    """Of updates that a benchmark makes itself: a trainer in training has one."""
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = size


def flops_of_a_sample(trainer: DiffusionOPDTrainer) -> float:
    """
    Floating-point operations of a sample's share of an update, in one pass without checkpointing: what the method itself
    computes. They do not depend on the batch.
    """
    set_batch_size(trainer, 1)
    batches = step_cost.micro_batches(1)
    with FlopCounterMode(display=False) as counter:
        step_cost.one_pass(trainer, batches)
    return counter.get_total_flops() / len(batches)


def peak_gib(trainer: DiffusionOPDTrainer, form: str, batches: Any) -> float:
    device = trainer.accelerator.device
    torch.cuda.reset_peak_memory_stats(device)
    step_cost.FORMS[form](trainer, batches)
    return torch.cuda.max_memory_allocated(device) / 2**30


def kernels(trainer: DiffusionOPDTrainer, batch: int, device: str) -> dict[str, Any]:
    """
    The ten kernels (on a CPU: operations) that an update spends most time in, with their shares, and the seconds of all of them
    beside those of the update: where these are more, the device waits for the processor that launches them.
    """
    set_batch_size(trainer, batch)
    batches = step_cost.micro_batches(batch)
    step_cost.one_pass(trainer, batches)
    whole = step_cost.seconds_of(trainer, lambda: step_cost.one_pass(trainer, batches))
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
    found = [{"kernel": key[:120], "calls": count, "share": round(time / total, 4)} for time, count, key in longest]
    launched = sum(count for _, count, _ in rows)
    return {"seconds": whole, "device_seconds": total / 1e6, "launched": launched, "longest": found}


def seconds(trainer: DiffusionOPDTrainer, batch: int, checkpointing: bool, rate: float) -> dict[str, Any]:
    """One pass against three, and the share of the arithmetic that one pass uses, of a device that does `rate` FLOP/s."""
    set_checkpointing(trainer, checkpointing)
    set_batch_size(trainer, batch)
    batches = step_cost.micro_batches(batch)
    found = step_cost.timed(trainer, batches, REPEATS[batch] if rate else 1)
    if not rate:  # a CPU in small: its ratios say nothing
        return found
    found["samples"] = batch * len(batches)
    found["trained_steps"] = len(trainer.plan)
    passed = found["share_of_bound"] >= 0.95 and (checkpointing or found["speedup"] >= 1.3)
    flops = flops_of_a_sample(trainer) * found["samples"]
    if not checkpointing:
        found["mfu"] = flops / found["one_pass"]["seconds"] / rate
        passed &= found["mfu"] >= 0.45
    return {**found, "passed": passed}


def memory(trainer: DiffusionOPDTrainer, batch: int, checkpointing: bool, device: str) -> dict[str, Any]:
    """The peak of both forms of an update against `estimate_memory`."""
    set_checkpointing(trainer, checkpointing)
    set_batch_size(trainer, batch)
    found: dict[str, Any] = {"estimate_gib": estimate_memory(trainer)["peak"]["bytes"] / 2**30}
    if device == "cpu":
        return found
    for form in step_cost.FORMS:
        found[form] = {"peak_gib": peak_gib(trainer, form, step_cost.micro_batches(batch))}
    peak = found["one_pass"]["peak_gib"]
    found["estimate_over_peak"] = found["estimate_gib"] / peak
    within = abs(found["estimate_over_peak"] - 1) <= 0.1
    return {**found, "passed": within and (not checkpointing or peak < PEAK_GIB[batch])}


def run(report: Report) -> None:
    rate = 0.0
    if report.device == "cuda":
        rate = matmul_rate(torch.device("cuda"), torch.bfloat16)
        report.check("matrix products", lambda: {"bf16_tflops": rate / 1e12})
    size, dtype = ("tiny", "float32") if report.small else ("sd35_medium", "bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        options = {"num_inference_steps": STEPS, "use_cpu": report.small}
        trainer = step_cost.make_trainer(size, Path(folder), dtype, **options)
        settings = [
            (batch, checkpointing) for batch in ((1,) if report.small else (8, 1)) for checkpointing in (False, True)
        ]

        def title(what: str, batch: int, checkpointing: bool) -> str:
            return f"{what}, batch {batch}{', checkpointing' if checkpointing else ''}"

        with disable_input_dtype_casting(trainer.model):  # as it is while the trainer trains
            if not report.small:
                report.check("kernels, batch 8", kernels, trainer, 8, report.device)
            for batch, checkpointing in settings:
                report.check(title("seconds", batch, checkpointing), seconds, trainer, batch, checkpointing, rate)
            set_checkpointing(trainer, False)
            report.check("kernels, batch 1", kernels, trainer, 1, report.device)
            for batch, checkpointing in settings:
                report.check(
                    title("memory", batch, checkpointing), memory, trainer, batch, checkpointing, report.device
                )
