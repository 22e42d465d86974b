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

"""What makes an update cheaper, on SD3.5-M's shape: fewer steps, an unguided student, compilation, several teachers at once, attention, Adam."""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from datasets import Dataset
from peft import LoraConfig

from trl_diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer
from trl_diffusion_opd.trainer.memory_estimate import optimizer_bytes

from .report import ROOT, Report


sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import step_cost  # noqa: E402
import teachers_in_one_forward  # noqa: E402
from helpers.families import FAMILIES  # noqa: E402
from run_settings import ONE_UPDATE  # noqa: E402


# Fields of the config that an update reads when it runs, so that one trainer does for all of them. Two of the five trained
# steps are about four of the nine that are trained of ten.
OPTIONS: dict[str, dict[str, Any]] = {
    "one pass": {},
    "num_trained_timesteps=2": {"num_trained_timesteps": 2},
    "unguided student": {"guidance_scale": 1.0},
    "unguided student, num_trained_timesteps=2": {"guidance_scale": 1.0, "num_trained_timesteps": 2},
}
BACKENDS = ("native", "_native_cudnn", "_native_flash", "_native_efficient")


def make_trainer(report: Report, folder: Path, batch: int, **options: Any) -> DiffusionOPDTrainer:
    options = {"num_inference_steps": 6, "per_device_train_batch_size": batch, "use_cpu": report.small, **options}
    size, dtype = ("tiny", "float32") if report.small else ("sd35_medium", "bfloat16")
    return step_cost.make_trainer(size, folder, dtype, **options)


def updates(report: Report, folder: Path) -> dict[str, Any]:
    """Seconds of an update with each option and with three passes, in turns; teachers keep their guidance."""
    batch = 1 if report.small else 4
    trainer = make_trainer(report, folder, batch, guidance_scale=4.5, teacher_guidance_scale=4.5)
    batches = step_cost.micro_batches(batch)
    before = {name: getattr(trainer.args, name) for name in ("num_trained_timesteps", "guidance_scale")}
    seconds: dict[str, list[float]] = {"three passes": [], **{name: [] for name in OPTIONS}}
    for update in range(1 if report.small else 2):
        trainer.state.global_step = update  # which steps are trained is drawn anew
        three = step_cost.seconds_of(trainer, lambda: step_cost.three_pass(trainer, batches))
        seconds["three passes"].append(three)
        for name, changes in OPTIONS.items():
            trainer.args.__dict__.update({**before, **changes})
            seconds[name].append(step_cost.seconds_of(trainer, lambda: step_cost.one_pass(trainer, batches)))
        trainer.args.__dict__.update(before)
    mean = {name: statistics.mean(values) for name, values in seconds.items()}
    return {"seconds": mean, "speedup": {name: mean["three passes"] / value for name, value in mean.items()}}


def several_teachers(report: Report, batch: int) -> dict[str, Any]:
    """`batch_teachers`: the target of a step from three LoRA teachers of a task."""
    size, dtype = ("tiny", torch.float32) if report.small else ("sd35_medium", torch.bfloat16)
    device = torch.device(report.device)
    return teachers_in_one_forward.measure(size, 3, batch, 1 if report.small else 10, device, dtype)


def compilation(report: Report, folder: Path, batch: int) -> dict[str, Any]:
    """`torch_compile` by inductor: seconds until it has compiled everything, and of an update after that, beside none."""
    found: dict[str, Any] = {}
    batches = step_cost.micro_batches(batch)
    for compiled in (False, True):
        options: dict[str, Any] = {"torch_compile": True} if compiled else {}
        if compiled and report.small:
            options["torch_compile_backend"] = "eager"  # the compiler of C++ takes minutes
        begin = time.monotonic()
        trainer = make_trainer(report, folder / str(compiled), batch, num_inference_steps=2, **options)
        run: Callable[[], None] = lambda t=trainer: step_cost.one_pass(t, batches)  # noqa: E731
        run()  # compiles what the trainer's first update has not
        if compiled:
            found["until_compiled"] = time.monotonic() - begin
        times = [step_cost.seconds_of(trainer, run) for _ in range(3)]
        found["compiled" if compiled else "eager"] = statistics.median(times)
    return {**found, "speedup": found["eager"] / found["compiled"]}


def attention(report: Report, folder: Path, backend: str) -> dict[str, Any]:
    """A few layers of FLUX.1-dev's width through the trainer, with an attention backend."""
    trainer = flux_trainer(report, folder, attention_backend=backend)
    batches = [[{"prompt": "two dogs", "task": "a"}]]
    run: Callable[[], None] = lambda: step_cost.one_pass(trainer, batches)  # noqa: E731
    run()
    return {"seconds": statistics.median(step_cost.seconds_of(trainer, run) for _ in range(3))}


def flux_trainer(
    report: Report, folder: Path, layers: tuple[int, int] = (2, 4), **options: Any
) -> DiffusionOPDTrainer:
    """
    FLUX.1-dev's transformer with random weights and so many double and single blocks, a LoRA teacher, 512 px. The encoders and
    the VAE are tiny, so that the layers that take embeddings in are narrower.
    """
    family = FAMILIES["flux"]
    pipeline: Any = family.build()
    config: dict[str, Any] = dict(pipeline.transformer.config)
    if not report.small:
        config |= {
            "num_layers": layers[0],
            "num_single_layers": layers[1],
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "in_channels": 64,
            "axes_dims_rope": [16, 56, 56],
        }
    torch.set_default_dtype(torch.float32 if report.small else torch.bfloat16)  # no float32 copy of 12 billion weights
    try:
        with torch.device(report.device):
            pipeline.transformer = diffusers.FluxTransformer2DModel.from_config(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    teacher = step_cost.save_random_lora(pipeline, folder / "teacher")
    side = family.size if report.small else 128  # 64 latents, of 2 pixels each with this VAE
    args = DiffusionOPDConfig(
        str(folder / "student"),
        height=side,
        width=side,
        max_sequence_length=16 if report.small else 512,
        generation_kwargs={"guidance_scale": 3.5},
        guidance_scale=1.0,
        num_inference_steps=3,
        per_device_train_batch_size=1,
        dtype="float32" if report.small else "bfloat16",
        **ONE_UPDATE,
        use_cpu=report.small,
        **{"gradient_checkpointing": False, **options},
    )
    rows = Dataset.from_list([{"prompt": "a red cat", "task": "a"}])
    lora = LoraConfig(r=32, lora_alpha=64, target_modules=list(family.lora_targets))
    trainer = DiffusionOPDTrainer(pipeline, teacher, args=args, train_dataset=rows, peft_config=lora)
    trainer.train()
    return trainer


def adam(report: Report, folder: Path, optim: str) -> dict[str, Any]:
    """Bytes that an optimizer keeps for a byte of the LoRA, and seconds of its step."""
    trainer = make_trainer(report, folder, 1, num_inference_steps=2, optim=optim)
    kept, besides = optimizer_bytes(trainer)
    for parameter in trainer.student.parameters():
        parameter.grad = torch.randn_like(parameter)
    times = [step_cost.seconds_of(trainer, trainer.optimizer.step) for _ in range(4)]
    return {"bytes_a_byte": kept, "besides_in_a_step": besides, "seconds": statistics.median(times[1:])}


def run(report: Report) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for batch in (1,) if report.small else (1, 8):
            report.check(f"torch_compile, batch {batch}", compilation, report, folder / f"compile{batch}", batch)
        report.check("fewer steps, no guidance", updates, report, folder / "updates")
        for batch in (1,) if report.small else (1, 8):
            report.check(f"three teachers in one forward, batch {batch}", several_teachers, report, batch)
        for backend in BACKENDS[:1] if report.small else BACKENDS:
            report.check(f"attention {backend}", attention, report, folder / backend, backend)
        for optim in ("adamw_torch", "adamw_torch_fused", "adamw_torch_8bit")[: 1 if report.small else 3]:
            report.check(f"optim {optim}", adam, report, folder / optim, optim)
