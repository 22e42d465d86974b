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

"""A base in 8 bits by torchao, and by bitsandbytes where it is installed: the LoRA's gradient, memory and time."""

import statistics
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import (
    BitsAndBytesConfig,
    DiffusionPipeline,
    PipelineQuantizationConfig,
    SD3Transformer2DModel,
    TorchAoConfig,
)
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

from trl_diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer, estimate_memory, tiny
from trl_diffusion_opd.acceleration.quantization import dequantized, quantized_layers

from .report import ROOT, Report


sys.path.insert(0, str(ROOT / "benchmarks"))

import step_cost  # noqa: E402
from run_settings import ONE_UPDATE  # noqa: E402


WAYS: dict[str, Any] = {
    "torchao int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao float8": lambda: TorchAoConfig(Float8WeightOnlyConfig()),
    "bitsandbytes 8 bits": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
}
# Relative difference of the LoRA's gradient from that on the same weights, dequantised. bitsandbytes' 8 bits round inputs too.
TOLERANCE, EIGHT_BIT_INPUTS = 1e-3, 0.1
ROWS = [{"prompt": "two red circles", "task": "a"}]


def save_base(folder: Path, small: bool) -> str:
    """The tiny pipeline, on a GPU with six blocks of SD3.5-M's width; the folder of a random LoRA for it."""
    pipeline: Any = DiffusionPipeline.from_pretrained(tiny.BASE)
    if not small:
        config = {**pipeline.transformer.config, **step_cost.SIZES["sd35_medium"]["transformer"]}
        config |= {"num_layers": 6, "dual_attention_layers": (0, 1, 2)}
        with torch.device("cuda"):
            pipeline.transformer = SD3Transformer2DModel.from_config(config)
    pipeline.transformer.to(torch.bfloat16)
    teacher = step_cost.save_random_lora(pipeline, folder / "teacher")
    pipeline.save_pretrained(folder / "base")
    return teacher


def load(folder: Path, way: str | None, dtype: torch.dtype, device: str) -> Any:
    options = {}
    if way is not None:
        options["quantization_config"] = PipelineQuantizationConfig(quant_mapping={"transformer": WAYS[way]()})
    pipeline = DiffusionPipeline.from_pretrained(folder / "base", torch_dtype=dtype, **options).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_trainer(
    report: Report, folder: Path, pipeline: Any, teacher: str, dtype: str, **options: Any
) -> DiffusionOPDTrainer:
    side = 32 if report.small else 256
    args = DiffusionOPDConfig(
        str(folder / "student"),
        height=side,
        width=side,
        max_sequence_length=12,
        guidance_scale=1.0,
        num_inference_steps=3,
        per_device_train_batch_size=1,
        dtype=dtype,
        bf16=dtype == "bfloat16",
        gradient_checkpointing=False,
        **ONE_UPDATE,
        use_cpu=report.small,
        **options,
    )
    trainer = DiffusionOPDTrainer(pipeline, teacher, args=args, train_dataset=Dataset.from_list(ROWS))
    trainer.train()
    return trainer


def gradient(report: Report, folder: Path, pipeline: Any, teacher: str) -> torch.Tensor:
    """Of an untrained LoRA, whose A is the same in every trainer."""
    trainer = make_trainer(report, folder, pipeline, teacher, "float32", learning_rate=0.0)
    trainer.training_step(trainer.model_wrapped, ROWS)
    return torch.cat([p.grad.flatten() for p in trainer.student.parameters() if p.grad is not None])


def gradient_error(report: Report, folder: Path, teacher: str, way: str) -> float:
    """Relative difference of the gradient from that on the same weights, dequantised; all else in float32."""
    pipeline, plain = (load(folder, one, torch.float32, report.device) for one in (way, None))
    layers = dict(plain.transformer.named_modules())
    for name, layer in quantized_layers(pipeline.transformer):
        layers[name].weight.data.copy_(dequantized(layer))
    ours, theirs = (gradient(report, folder, one, teacher) for one in (pipeline, plain))
    return float((ours - theirs).norm() / theirs.norm())


def measure(report: Report, folder: Path, teacher: str, way: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if way is not None:
        found["gradient"] = gradient_error(report, folder, teacher, way)
    trainer = make_trainer(report, folder, load(folder, way, torch.bfloat16, report.device), teacher, "bfloat16")
    times = [step_cost.seconds_of(trainer, lambda: step_cost.one_pass(trainer, [ROWS])) for _ in range(4)]
    found["seconds"] = statistics.median(times[1:])
    estimate = estimate_memory(trainer)
    found["transformer_gib"] = estimate["transformer"]["bytes"] / 2**30
    if report.device == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step_cost.one_pass(trainer, [ROWS])
        found["update_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        found["update_estimate_gib"] = (estimate["activations"]["bytes"] + estimate["gradients"]["bytes"]) / 2**30
    tolerance = EIGHT_BIT_INPUTS if way == "bitsandbytes 8 bits" else TOLERANCE
    return {**found, "passed": found.get("gradient", 0.0) < tolerance}


def run(report: Report) -> None:
    ways = [way for way in WAYS if not way.startswith("bitsandbytes")]
    if find_spec("bitsandbytes") is not None and not report.small:  # diffusers asks for a GPU
        ways = list(WAYS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher = save_base(folder, report.small)
        for way in (None, *ways):
            report.check(way or "bfloat16", measure, report, folder, teacher, way)
            if report.device == "cuda":
                torch.cuda.empty_cache()
