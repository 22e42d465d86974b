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

"""Every family of pipelines that the tests have: its velocity against the pipeline's own, in half precision, and one update."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from run_settings import QUIET

from trl_diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer, VelocityField

from .report import ROOT, Report


sys.path.insert(0, str(ROOT / "tests"))

from helpers.families import FAMILIES, Family  # noqa: E402
from helpers.pipeline_recorder import STEPS, recorder  # noqa: E402


# A batch-doubled and a packed family.
SMALL = ("sd3", "flux")


def velocity(family: Family, device: str) -> dict[str, Any]:
    """Largest differences from what the pipeline's own loop hands to its scheduler, over the largest of its values."""
    pipeline = family.build().to(device)
    field = VelocityField(pipeline, num_inference_steps=STEPS, **family.kwargs)
    scheduler = pipeline.scheduler
    pipeline.scheduler = recorder(scheduler)
    with torch.no_grad():
        pipeline(
            **family.call_kwargs(family.guidance_scale),
            num_inference_steps=STEPS,
            generator=[torch.Generator().manual_seed(i) for i in range(len(family.prompts))],
            output_type="latent",
        )
        trace, pipeline.scheduler = pipeline.scheduler.trace, scheduler
        prompts, scale = list(family.prompts), family.guidance_scale
        own = [field(x, level, prompts, scale) for level, x, _ in trace]
        off = max(float((a - v).abs().max() / v.abs().max()) for a, (_, _, v) in zip(own, trace, strict=True))
        # Half precision against float32, by the norm.
        pipeline.transformer.to(torch.bfloat16)
        half = VelocityField(pipeline, num_inference_steps=STEPS, **family.kwargs)
        rounded = [half(x.float(), level, prompts, scale) for level, x, _ in trace]
        bf16 = max(float((b - a).norm() / a.norm()) for a, b in zip(own, rounded, strict=True))
    # Guidance makes a difference of two nearly equal velocities larger.
    passed = off < 1e-4 and 0 < bf16 < 0.5 and all(v.device.type == device for v in own)
    return {"velocity": off, "bf16_against_float32": bf16, "passed": passed}


def update(family: Family, device: str) -> dict[str, Any]:
    """One update with a LoRA teacher a task; its loss on the CPU beside it."""
    losses = {}
    for place in dict.fromkeys(("cpu", device)):
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(family, place, Path(folder))
            before = [p.detach().clone() for p in trainer.student.parameters()]
            trainer.train()
            moved = any(not torch.equal(a, b) for a, b in zip(before, trainer.student.parameters(), strict=True))
            losses[place] = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    off = abs(losses[device] - losses["cpu"]) / losses["cpu"]
    return {"loss": losses, "relative_difference": off, "passed": moved and off < 1e-3}


def make_trainer(family: Family, device: str, folder: Path) -> DiffusionOPDTrainer:
    targets = list(family.lora_targets)
    torch.manual_seed(1)
    lora = LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    get_peft_model(family.build().transformer, lora).save_pretrained(folder / "teacher")
    args = DiffusionOPDConfig(
        str(folder / "student"),
        **family.kwargs,
        num_inference_steps=STEPS,
        guidance_scale=family.guidance_scale,
        per_device_train_batch_size=1,
        max_steps=1,
        learning_rate=1e-2,
        dtype="float32",
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        **QUIET,
        use_cpu=device == "cpu",
    )
    rows = Dataset.from_list([{"prompt": family.prompts[0], "task": "a"}])
    return DiffusionOPDTrainer(
        family.build(),
        str(folder / "teacher"),
        args=args,
        train_dataset=rows,
        peft_config=LoraConfig(r=2, target_modules=targets),
    )


def run(report: Report) -> None:
    torch.backends.cudnn.allow_tf32 = False  # compared with a CPU's float32
    names = SMALL if report.small else tuple(FAMILIES)
    for name in names:
        report.check(f"velocity of {name}", velocity, FAMILIES[name], report.device)
    for name in names:
        if FAMILIES[name].trainable:
            report.check(f"update of {name}", update, FAMILIES[name], report.device)
