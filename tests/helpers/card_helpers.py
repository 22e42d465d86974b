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

"""A stand-in for a trainer, with only what cards and pushes need, and checks of a card's content."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from datasets import Dataset
from diffusers import StableDiffusion3Pipeline
from helpers.tiny_sd3 import ATTENTION
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image

from trl_diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer
from trl_diffusion_opd.guards.files import write_json
from trl_diffusion_opd.models.student import Student
from trl_diffusion_opd.models.teacher_files import weights_in
from trl_diffusion_opd.pipelines.velocity import VelocityField
from trl_diffusion_opd.reporting.model_card import write_model_card


ROWS = {"prompt": ["a cat", "a dog", "two cats", "two dogs"], "task": ["ocr", "style", "ocr", "style"]}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FIELDS = {
    "method": "It learned from two teachers.",
    "teachers": {
        "ocr": [
            {
                "source": "someone/teachers",
                "subfolder": "ocr/lora",
                "revision": COMMIT,
                "sha256": "feed" * 16,
                "kind": "lora",
                "rank": 16,
                "guidance_scale": 4.5,
                "weight": 1.0,
                "lora_scale": 1.0,
            }
        ],
        "style|x": [
            {
                "source": "local-teacher",
                "subfolder": None,
                "revision": None,
                "sha256": "beef" * 16,
                "kind": "lora",
                "rank": 4,
                "guidance_scale": 1.0,
                "weight": 1.0,
                "lora_scale": 1.0,
            }
        ],
    },
    "settings": {"loss": "kl"},
}
REPORT = {
    "tasks": {
        "ocr": {"reward": "ocr", "base": 0.25, "teacher": 0.75, "student": 0.7, "retention": 0.9, "ci95": [0.8, 1.01]},
        "style": {"reward": "look", "base": 0.5, "teacher": 0.52, "student": 0.5, "retention": None, "ci95": None},
    },
    "mean_retention": 0.9,
    "mean_ci95": [0.8, 1.01],
    "num_images": 64,
    "seed": 7,
    "scores": {"teacher/ocr": {"ocr": {"ocr": 0.75}, "style": {"look": 0.4, "ocr": 0.1}}},
    "scores_ci95": {"teacher/ocr": {"ocr": {"ocr": [0.7, 0.8]}, "style": {"look": None, "ocr": None}}},
}


def shown_lora() -> LoraConfig:
    """A LoRA whose effect shows."""
    torch.manual_seed(0)
    return LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, init_lora_weights=False)


def stand_in(pipeline: StableDiffusion3Pipeline, folder: Path, model: torch.nn.Module) -> SimpleNamespace:
    """A trainer of which only cards and pushes are asked, with its output in `folder/out`."""
    args = DiffusionOPDConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        num_inference_steps=3,
        eval_num_inference_steps=4,
        guidance_scale=2.5,
        eval_guidance_scale=2.0,
        height=16,
        width=16,
        report_to="none",
        gradient_accumulation_steps=2,
    )
    student = Student(model, pipeline)
    student.save(args.output_dir)
    return SimpleNamespace(
        base_pipeline=pipeline,
        _tag_names=["trl", "diffusion-opd"],
        _name=DiffusionOPDTrainer._name,
        _paper=DiffusionOPDTrainer._paper,
        _card_fields=lambda: FIELDS,
        changes=[],
        student=student,
        args=args,
        tasks=["ocr", "style"],
        hub_model_id=None,
        state=SimpleNamespace(global_step=12, epoch=1.0, log_history=[]),
        control=None,
        callback_handler=SimpleNamespace(callbacks=[], on_push_begin=lambda *_: None),
        is_world_process_zero=lambda: True,
        push_in_progress=None,
        train_dataset=Dataset.from_dict(ROWS),
        eval_dataset=None,
        evaluator=SimpleNamespace(field=VelocityField(pipeline, num_inference_steps=4, height=16, width=16)),
    )


def write_report(folder: Path, report: dict = REPORT) -> None:
    """A report of the student in a folder."""
    write_json(folder / "retention.json", report | {"weights_sha256": {"student": weights_in(folder)}})


def write_card(trainer: SimpleNamespace, *names: str, **options: object) -> None:
    """The card of a stand-in, as its trainer writes it."""
    write_model_card(trainer.args.output_dir, DiffusionOPDTrainer.card_facts(trainer), *names, **options)


def read_card(trainer: SimpleNamespace) -> ModelCard:
    return ModelCard.load(Path(trainer.args.output_dir) / "README.md")


def code_of(text: str) -> list[str]:
    """The Python blocks of a card."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run_code(code: str) -> dict:
    """Runs a block and returns its names."""
    names: dict = {}
    exec(compile(code, "card", "exec"), names)
    return names


def run_card(text: str) -> Image.Image:
    """Runs the only Python block of a card and returns the image it makes."""
    (code,) = code_of(text)
    return run_code(code)["image"]


def own_image(pipeline: StableDiffusion3Pipeline) -> Image.Image:
    """The image that the stand-in's card makes."""
    options = {"height": 16, "width": 16, "guidance_scale": 2.0, "num_inference_steps": 4}
    return pipeline(prompt="a cat", generator=torch.Generator().manual_seed(0), **options).images[0]


def difference(one: Image.Image, two: Image.Image) -> int:
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(two, dtype=int)).max())
