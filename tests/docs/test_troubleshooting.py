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

"""The messages on the page "Troubleshooting" are those of the package: each is caused here."""

import atexit
import re
import shutil
import tempfile
import warnings
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers.models.attention_processor import JointAttnProcessor2_0
from helpers.loopback_hub import TOKEN
from helpers.pages import SOURCE, blocks
from peft import LoraConfig

from trl_diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer, tiny
from trl_diffusion_opd.guards.finite import finite_images


pytestmark = pytest.mark.slow

PAGE = (SOURCE / "troubleshooting.md").read_text(encoding="utf-8")
OPTIONS = {
    "height": 32,
    "width": 32,
    "max_sequence_length": 12,
    "guidance_scale": 1.0,
    "num_inference_steps": 3,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": False,
    "report_to": "none",
}
SAVED = {"save_strategy": "steps", "save_steps": 1}


def make(teachers=tiny.TEACHERS, dataset=None, peft_config="default", **options):
    dataset = tiny.dataset("train") if dataset is None else dataset
    args = DiffusionOPDConfig("run", **{**OPTIONS, **options})
    return DiffusionOPDTrainer(tiny.BASE, teachers, args=args, train_dataset=dataset, peft_config=peft_config)


def cannot_start():
    teachers = {task: tiny.TEACHERS[task] for task in ("compose", "style")}
    make(teachers, gradient_accumulation_steps=4, num_trained_timesteps=10)


def with_teacher(name):
    make({**tiny.TEACHERS, "compose": name})


def no_gradient():
    lora = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj_out"], init_lora_weights=False)
    # An attention without a gradient, as some kernels are.
    with patch.object(JointAttnProcessor2_0, "__call__", torch.no_grad()(JointAttnProcessor2_0.__call__)):
        make(peft_config=lora, max_steps=1).train()


def log_near_the_floor():
    trainer = make()
    trainer.state.global_step = 400
    trainer.log({"kl/letters": 1.9e-6, "noise_floor": 1.4e-6})


def black_pixels():
    with finite_images():
        (np.full((2, 2), np.nan) * 255).astype("uint8")


def not_finite():
    trainer = make()
    next(weight for weight in trainer.model.parameters() if weight.requires_grad).data.fill_(np.nan)
    trainer.train()


def alike():
    prompts = [row["prompt"] for row in tiny.dataset("train") if row["task"] == "compose"]
    rows = [{"prompt": prompt, "task": task} for task in ("compose", "style") for prompt in prompts]
    teachers = {task: tiny.TEACHERS[task] for task in ("compose", "style")}
    make(teachers, Dataset.from_list(rows), max_steps=1).train()


def unread():
    rows = [
        row | {"teacher_prompt": row["prompt"] if row["task"] == "letters" else None} for row in tiny.dataset("train")
    ]
    next(row for row in rows if row["task"] == "letters")["teacher_prompt"] = " "
    teachers = {**tiny.TEACHERS, "style": "student"}
    make(teachers, Dataset.from_list(rows), prompt_templates={"night": "{prompt}, night"})


@cache
def saved_run():
    """The folder of a run, made once."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make(**SAVED).train()
    return shutil.move("run", folder)


def another_run():
    shutil.copytree(saved_run(), "run")
    teachers = {**tiny.TEACHERS, "style": tiny.TEACHERS["letters"]}
    make(teachers, **SAVED, num_inference_steps=4).train(resume_from_checkpoint=True)


def damaged():
    shutil.copytree(saved_run(), "run")
    file = Path("run/checkpoint-2/student_raw.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    make(**SAVED).train(resume_from_checkpoint=True)


# By the message's first words, in the order of the page.
CAUSES = {
    "DiffusionOPDTrainer cannot start: - gradient": cannot_start,
    "DiffusionOPDTrainer cannot start: - The teachers cannot be used: - task 'compose': me/gated": lambda: (
        with_teacher("me/gated")
    ),
    "DiffusionOPDTrainer cannot start: - The teachers cannot be used: - task 'compose': me/nowhere": lambda: (
        with_teacher("me/nowhere")
    ),
    "30 of the 32 trained tensors": no_gradient,
    "kl/letters": log_near_the_floor,
    "The VAE computed": black_pixels,
    "The loss of task": not_finite,
    "The prompts of these tasks": alike,
    "DiffusionOPDTrainer cannot start: - prompt_templates": unread,
    "DiffusionOPDConfig: - prompt_templates": lambda: DiffusionOPDConfig("run", prompt_templates={"style": "painted"}),
    "Can't resume from checkpoint-2: - num_inference_steps was": another_run,
    "Can't resume from checkpoint-2: - student_raw": damaged,
    "DiffusionOPDConfig: - noise": lambda: DiffusionOPDConfig("run", noise_level=0.7),
}


def plain(text: str) -> str:
    """A message on one line, without what differs from machine to machine: figures and hashes."""
    return re.sub(r"\b[0-9a-f]{64}\b|\d[\d.]*(e-\d+)?", "0", " ".join(text.split()))


MESSAGES = [" ".join(block.text.split()) for block in blocks(PAGE) if not block.language]


def test_every_message_has_its_cause():
    assert [next((start for start in CAUSES if message.startswith(start)), message) for message in MESSAGES] == [
        *CAUSES
    ]


@pytest.mark.parametrize("start", CAUSES)
def test_message(start, tmp_path, monkeypatch, caplog, hub):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.create("me/gated", {"adapter_config.json": b"{}"}, gated=True)
    monkeypatch.delenv("HF_TOKEN")
    message = next(message for message in MESSAGES if message.startswith(start))
    said = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy, where a NaN becomes a pixel
        try:
            CAUSES[start]()
        except (ValueError, FloatingPointError) as error:
            said = str(error)
    assert plain(message) in plain(said + "\n" + caplog.text)
