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

"""The four trainers on the tiny base: their figures against the CPU's, in three precisions, and what a run needs around them."""

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from run_settings import QUIET, TINY
from safetensors.torch import load_file
from trainers import TRAINERS

from trl_diffusion_opd import evaluate_retention, tiny

from .report import Report


PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32", "bf16": False},
    "bf16": {"dtype": "bfloat16", "bf16": True},
    "fp16": {"dtype": "float16", "fp16": True, "bf16": False},
}
# What a precision is compared with on the CPU, which has no mixed precision in float16, and the largest relative difference
# of the first update. PyTorch before 2.12 draws other noise in half precision, and so another trajectory, than in float32.
COMPARED_WITH = {"float32": ("float32", 1e-3), "bf16": ("bf16", 0.05), "fp16": ("float32", 0.25)}


def brightness(images: list[Any], **columns: Any) -> list[float]:
    """Mean of the pixels: a reward in which a rounded pixel is a rounded reward, where a verdict would change sides."""
    return [float(np.asarray(image).mean()) for image in images]


def settings(folder: Path, device: str, **options: Any) -> dict[str, Any]:
    common = dict(
        output_dir=str(folder),
        **TINY,
        **QUIET,
        num_inference_steps=4,
        per_device_train_batch_size=4,
        max_steps=2,
        learning_rate=1e-3,
        gradient_checkpointing=False,
        logging_steps=1,
        use_cpu=device == "cpu",
        # A LoRA whose factors are given: those of a new one are random, and other ones on another machine.
        student_init=tiny.TEACHERS["compose"],
    )
    return {**common, **options}


def pictures() -> Dataset:
    """The tiny world's prompts with the pictures that they ask for."""
    rows = tiny.dataset("train").select(range(24))
    return rows.map(lambda row: {"image": tiny.render(row["spec"])})


METHODS = ("opd", "sft", "grpo", "nft")
REWARDED = ("grpo", "nft")


def make_trainer(method: str, folder: Path, device: str, **options: Any) -> Any:
    given: dict[str, Any] = {"train_dataset": pictures() if method == "sft" else tiny.dataset("train")}
    if method == "opd":
        given["teachers"] = tiny.TEACHERS
    if method in REWARDED:
        given["reward_funcs"] = brightness
        options["num_generations"] = 4
    kind = TRAINERS[method]
    return kind(tiny.BASE, args=kind.config_class(**settings(folder, device, **options)), **given)


def trained(method: str, device: str, **options: Any) -> dict[str, list[float]]:
    """Loss and gradient's norm of each update."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(method, Path(folder), device, **options)
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        return {name: [float(entry[name]) for entry in log] for name in ("loss", "grad_norm")}


def against_cpu(
    method: str, precision: str, device: str, reference: dict[Any, dict[str, list[float]]]
) -> dict[str, Any]:
    """
    The first update's figures: after it Adam has made a step in the direction of every gradient's sign, and one that is
    rounding has any sign. What rewards train has a loss of about zero: there the gradient's norm alone is compared.
    """
    other, tolerance = COMPARED_WITH[precision]
    if (method, other) not in reference:
        reference[method, other] = trained(method, "cpu", **PRECISIONS[other])
    expected = reference[method, other]
    found = expected if (device, precision) == ("cpu", other) else trained(method, device, **PRECISIONS[precision])
    off = {name: abs(found[name][0] - expected[name][0]) / abs(expected[name][0] or 1.0) for name in found}
    # A scaler of fp16 finds its scale by updates that overflow, whose gradient has no norm.
    names = ["loss"] if precision == "fp16" else ["grad_norm"] if method in REWARDED else ["loss", "grad_norm"]
    passed = all(off[name] < tolerance for name in names) and all(map(math.isfinite, found["loss"]))
    return {"cpu": expected, "found": found, "relative_difference": off, "passed": passed}


def same_losses(plain: list[float], device: str, **options: Any) -> dict[str, Any]:
    """Options that change where things are and nothing else: the losses of a run without them."""
    other = trained("opd", device, **options)["loss"]
    off = max(abs(a - b) / abs(a) for a, b in zip(plain, other, strict=True))
    return {"losses": other, "relative_difference": off, "passed": off < 1e-5}


def prompt_cache(plain: list[float], device: str, **options: Any) -> dict[str, Any]:
    """A second run that finds its prompts on disk."""
    with tempfile.TemporaryDirectory() as folder:
        trained("opd", device, prompt_cache_dir=folder, **options)
        return same_losses(plain, device, prompt_cache_dir=folder, **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def resume(device: str) -> dict[str, Any]:
    """Two updates, and one and one more: bit for bit, with PyTorch's deterministic kernels."""
    torch.use_deterministic_algorithms(True)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            options: dict[str, Any] = dict(save_strategy="steps", save_steps=1)
            whole = make_trainer("opd", folder / "whole", device, **options)
            whole.train()
            checkpoint = str(folder / "whole" / "checkpoint-1")
            again = make_trainer("opd", folder / "again", device, **options)
            again.train(resume_from_checkpoint=checkpoint)
            a, b = (weights(folder / run / "checkpoint-2") for run in ("whole", "again"))
            off = max(float((a[key].float() - b[key].float()).abs().max()) for key in a)
            same = all(torch.equal(a[key], b[key]) for key in a)
    finally:
        torch.use_deterministic_algorithms(False)
    return {"largest_difference": off, "bitwise": same, "passed": same}


def saved_student(device: str) -> dict[str, Any]:
    """A trained student's file in plain diffusers gives the trainer's own image."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer("opd", Path(folder), device, ema_decay=None, learning_rate=1e-2)
        trainer.train()
        trainer.save_model()
        options: dict[str, Any] = dict(TINY, num_inference_steps=6, output_type="pt")
        prompt = 'the word "CJ"'
        own = trainer.pipeline(prompt, generator=torch.Generator().manual_seed(0), **options).images
        plain = DiffusionPipeline.from_pretrained(tiny.BASE).to(device)
        plain.set_progress_bar_config(disable=True)
        base = plain(prompt, generator=torch.Generator().manual_seed(0), **options).images
        plain.load_lora_weights(folder)
        loaded = plain(prompt, generator=torch.Generator().manual_seed(0), **options).images
    off, moved = (float((x.float() - own.float()).abs().max()) for x in (loaded, base))
    return {"largest_difference": off, "of_the_base": moved, "passed": off < 2e-3 < moved}


def evaluation(device: str, small: bool) -> dict[str, Any]:
    """The report of the tiny world's teacher of letters, here and on the CPU."""
    scores = {}
    for place in dict.fromkeys(("cpu", device)):
        pipeline = DiffusionPipeline.from_pretrained(tiny.BASE).to(place)
        pipeline.set_progress_bar_config(disable=True)
        rows = tiny.dataset("test").filter(lambda row: row["task"] == "letters")
        report = evaluate_retention(
            pipeline,
            {"letters": tiny.TEACHERS["letters"]},
            tiny.TEACHERS["letters"],
            {"letters": tiny.rewards["letters"]},
            rows,
            num_images=4 if small else 32,
            num_inference_steps=6,
            batch_size=16,
            **TINY,
        )
        scores[place] = {who: report["tasks"]["letters"][who] for who in ("base", "teacher")}
    here, there = scores[device], scores["cpu"]
    off = max(abs(here[who] - there[who]) for who in here)
    # A verdict is all or nothing: an image at its edge may change sides.
    return {"scores": scores, "largest_difference": off, "passed": off <= 0.07}


def run(report: Report) -> None:
    torch.backends.cudnn.allow_tf32 = False  # compared with a CPU's float32
    reference: dict[Any, dict[str, list[float]]] = {}
    for precision in ("float32",) if report.small else PRECISIONS:
        for method in METHODS:
            report.check(f"{method} in {precision}", against_cpu, method, precision, report.device, reference)
    exact = PRECISIONS["float32"]
    plain = trained("opd", report.device, **exact)["loss"]
    report.check("offloaded encoders", lambda: same_losses(plain, report.device, offload_encoders=True, **exact))
    report.check("prompt cache", lambda: prompt_cache(plain, report.device, **exact))
    report.check("resume", resume, report.device)
    report.check("student in diffusers", saved_student, report.device)
    report.check("evaluation", evaluation, report.device, report.small)
