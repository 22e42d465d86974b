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
How far an update on a bfloat16 base is from one in float32 of the same weights.

The student starts as one of the tiny world's teachers, and its teacher is the same LoRA plus a share of another, such that
their velocities differ by a given part: the end of a distillation, where precision is needed. The reference is the whole
update in float32: its own walk, with the base and the teacher rounded to bfloat16. Compared are the loss and the gradient of
the LoRA, averaged over trained steps and samples, in two forms: as the trainer computes them, and with the means of the
transitions subtracted in bfloat16, as published loops do.

    python benchmarks/precision.py --output precision.json
"""

import argparse
import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from run_settings import QUIET, TINY
from safetensors.torch import load_file, save_file
from torch import Tensor

from trl_diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer, tiny
from trl_diffusion_opd.algorithms.flow import velocity_gap_sq


TASK = "letters"
OTHER = "compose"
GAPS = (0.1, 0.01, 0.001)
GUIDANCE_SCALES = (1.0, 4.5)
FORMS = ("velocities", "means")
ADAPTER_FILE = "adapter_model.safetensors"


class MeasuredTrainer(DiffusionOPDTrainer):
    """Keeps what it steps back from, and can subtract means in bfloat16 in place of velocities."""

    form = "velocities"
    walked_loss = 0.0
    whole_teacher: dict[str, Tensor]
    _walked: Tensor

    def _student_velocity(self, model: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._walked = x
        return super()._student_velocity(model, x, *args, **kwargs)

    def _step_loss(self, j: int, student: Tensor, target: Tensor, noise: Any) -> Tensor:
        if self.form == "velocities":
            return super()._step_loss(j, student, target, noise)
        a, c = float(self.plan.table.a[j]), float(self.plan.table.c[j])
        means = [(a * self._walked + c * v).bfloat16() for v in (student, target)]
        return float(self.plan.weights[j]) / c**2 * velocity_gap_sq(*means)

    def _backward(self, loss: Tensor) -> None:
        self.walked_loss += loss.item()
        super()._backward(loss)


def combine(student: str, other: str, folder: Path) -> str:
    """Writes the teacher: a LoRA whose first ranks are the student's and whose last ones are another's."""
    config, other_config = LoraConfig.from_pretrained(student), LoraConfig.from_pretrained(other)
    ours, theirs = (load_file(Path(path) / ADAPTER_FILE) for path in (student, other))
    assert (config.r, config.lora_alpha) == (other_config.r, other_config.lora_alpha)
    config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    config.save_pretrained(str(folder))
    weights = {name: torch.cat([w, theirs[name]], 0 if "lora_A" in name else 1) for name, w in ours.items()}
    save_file(weights, folder / ADAPTER_FILE)
    return str(folder)


def make_trainer(
    pipeline: DiffusionPipeline,
    student: str,
    teacher: str,
    prompts: list[str],
    dtype: torch.dtype,
    folder: Path,
    **options: Any,
) -> MeasuredTrainer:
    """
    A trainer whose base and teacher are rounded to bfloat16 and computed in `dtype`. The student is float32.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): changed in place.
        student (`str`): folder of the LoRA that the student starts from.
        teacher (`str`): folder of what [`combine`] made of it.
        prompts (`list[str]`): of one micro-batch.
        dtype (`torch.dtype`)
        folder (`Path`): for the trainer's files.
        options: fields of the config.
    """
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.to(torch.bfloat16).to(dtype)
    args = DiffusionOPDConfig(
        output_dir=str(folder),
        student_init=student,
        learning_rate=0.0,
        per_device_train_batch_size=len(prompts),
        gradient_checkpointing=False,
        bf16=False,
        ema_decay=None,
        max_steps=1,
        logging_steps=1,
        **QUIET,
        **options,
    )
    rows = Dataset.from_list([{"prompt": prompt, "task": TASK} for prompt in prompts])
    trainer = MeasuredTrainer(pipeline, {TASK: teacher}, args=args, train_dataset=rows)
    trainer.whole_teacher = {name: p.detach().bfloat16().float() for name, p in _teacher_parameters(trainer).items()}
    trainer.train()  # optimizer and wrapping as in training; nothing moves at learning rate 0
    return trainer


def _teacher_parameters(trainer: DiffusionOPDTrainer) -> dict[str, torch.nn.Parameter]:
    of_teachers = {id(p) for p in trainer.bank.backbone.parameters()}
    return {name: p for name, p in trainer.model.named_parameters() if id(p) in of_teachers and "lora_" in name}


def update(trainer: MeasuredTrainer, share: float, form: str = "velocities") -> dict[str, Any]:
    """One update against a teacher that has `share` of the other LoRA: its figures, and the gradient, flat."""
    trainer.form, trainer.walked_loss, trainer._measured_floor_at = form, 0.0, -1
    for name, parameter in _teacher_parameters(trainer).items():
        whole = trainer.whole_teacher[name].clone()
        if "lora_B" in name:
            whole[:, whole.shape[1] // 2 :] *= share
        parameter.data.copy_(whole.bfloat16())
    trainer._metrics["train"].clear()
    trainer.model_wrapped.zero_grad()
    trainer.training_step(trainer.model_wrapped, list(trainer.train_dataset))
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return {
        "loss": trainer.walked_loss,
        "kl": metrics["kl"],
        "noise_floor": metrics["noise_floor"],
        "velocity_gap": metrics[f"velocity_gap/{TASK}"],
        "gradient": torch.cat([p.grad.double().flatten() for p in trainer.student.parameters() if p.grad is not None]),
    }


def agreement(run: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """Loss and gradient of a run against those of another."""
    ours, theirs = run["gradient"], reference["gradient"]
    return {
        "loss_ratio": run["loss"] / reference["loss"],
        "gradient_cosine": float(torch.nn.functional.cosine_similarity(ours, theirs, 0)),
        "gradient_norm_ratio": float(ours.norm() / theirs.norm()),
    }


def share_of_gap(trainer: MeasuredTrainer, gap: float) -> float:
    """The share of the other LoRA at which the velocities differ by `gap`: almost linear in it."""
    share = gap
    for _ in range(2):
        share *= gap / update(trainer, share)["velocity_gap"]
    return share


def measure(
    float32: MeasuredTrainer,
    bfloat16: MeasuredTrainer,
    gap: float,
    forms: Sequence[str] = FORMS,
    share: float | None = None,
) -> dict[str, Any]:
    """
    An update on a bfloat16 base against one in float32, in some of the forms, of which the first is `"velocities"`.
    `share` is that of the gap, if it is known.

    Returns:
        `dict`: `"velocity_gap"` and `"kl"` in float32; `"kl_bfloat16"` and `"noise_floor"` as the bfloat16 run logs them; and by
        form its [`agreement`] with float32.
    """
    if share is None:
        share = share_of_gap(float32, gap) if gap else 0.0
    reference = update(float32, share)
    runs = {form: update(bfloat16, share, form) for form in forms}
    return {
        "velocity_gap": reference["velocity_gap"],
        "kl": reference["kl"],
        "kl_bfloat16": runs["velocities"]["kl"],
        "noise_floor": runs["velocities"]["noise_floor"],
        **{form: agreement(run, reference) for form, run in runs.items()},
    }


def tiny_world(guidance_scale: float, batch_size: int, folder: Path) -> list[MeasuredTrainer]:
    """The same update of the tiny world in float32 and on a bfloat16 base."""
    (folder / "teacher").mkdir()
    teacher = combine(tiny.TEACHERS[TASK], tiny.TEACHERS[OTHER], folder / "teacher")
    prompts = [row["prompt"] for row in tiny.dataset("train") if row["task"] == TASK][:batch_size]
    options = {**TINY, "guidance_scale": guidance_scale, "num_inference_steps": 10}
    return [
        make_trainer(
            DiffusionPipeline.from_pretrained(tiny.BASE),
            tiny.TEACHERS[TASK],
            teacher,
            prompts,
            dtype,
            folder / str(dtype),
            **options,
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]


def print_table(results: list[dict[str, Any]]) -> None:
    print(
        "| guidance | gap | form | loss / float32's | cosine | norm ratio | kl, float32 | kl, bfloat16 | noise floor |"
    )
    print("|---:|---:|---|---:|---:|---:|---:|---:|---:|")
    for row in results:
        for form in FORMS:
            found = row[form]
            logged = [f"{row[name]:.1e}" for name in ("kl", "kl_bfloat16", "noise_floor")]
            print(
                f"| {row['guidance_scale']} | {row['gap']:.1%} | {form} | {found['loss_ratio']:.3g} | "
                f"{found['gradient_cosine']:.4f} | {found['gradient_norm_ratio']:.3f} | "
                f"{' | '.join(logged) if form == 'velocities' else '| |'} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    parser.add_argument("--batch-size", type=int, default=8, help="samples that the gradient is averaged over")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    results = []
    for guidance_scale in GUIDANCE_SCALES:
        with tempfile.TemporaryDirectory() as folder:
            pair = tiny_world(guidance_scale, args.batch_size, Path(folder))
            for gap in GAPS:
                results.append({"guidance_scale": guidance_scale, "gap": gap, **measure(*pair, gap)})
    print_table(results)
    if args.output:
        settings = {"torch": torch.__version__, "batch_size": args.batch_size, "student": TASK, "other": OTHER}
        args.output.write_text(json.dumps({"settings": settings, "rows": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
