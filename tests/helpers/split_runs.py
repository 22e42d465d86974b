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

"""The runs that are trained both under FSDP2 and on one process, for comparison: all methods, and full fine-tuning."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import dmd_fixtures, grpo_fixtures, nft_fixtures
from helpers.opd_fixtures import AVERAGED, make_dataset, make_trainer, student_lora
from helpers.sft_fixtures import sft_trainer
from helpers.tiny_sd3 import ATTENTION, make_pipeline
from torch import Tensor

from trl_diffusion_opd.acceleration.sharding import whole


# The last is of the root, whose weights FSDP2 keeps gathered after a forward without gradients.
TARGETS = [*ATTENTION, "proj_out"]
UPDATES, STOP = 3, 2
COMMON = dict(
    max_steps=UPDATES,
    gradient_accumulation_steps=4,
    learning_rate=1e-3,
    lr_scheduler_type="cosine",
    **AVERAGED,
)
REWARDED = dict(beta=0.1, num_generations=4)


def dark(images: Any, **columns: Any) -> list[float]:
    """A reward in few steps, so that rounding hardly ever changes it."""
    return [-float(image.getpixel((0, 0))[0] // 16) for image in images]


def _lora() -> Any:
    return student_lora(target_modules=TARGETS)


def _opd(folder: Path, teachers: Any, **options: Any) -> Any:
    return make_trainer(folder, teachers, sampler="flow_sde", **{"peft_config": _lora(), **COMMON, **options})


def _itself(folder: Path, teachers: Any, **options: Any) -> Any:
    """The student's average teaches one task, whose student's prompts have a template too."""
    rows = make_dataset().map(lambda row: {"teacher_prompt": f"{row['prompt']} blue"})
    read = {"train_dataset": rows, "prompt_templates": {"draw": "{prompt} red"}}
    return _opd(folder, {**teachers, "count": "student"}, **read, **options)


def _full(folder: Path, teachers: Any, **options: Any) -> Any:
    return _opd(folder, teachers, **{"peft_config": None, "learning_rate": 1e-4, **options})


def _half(folder: Path, teachers: Any, **options: Any) -> Any:
    pipeline = make_pipeline().to(torch.bfloat16)
    return _opd(folder, teachers, pipeline=pipeline, **{"dtype": "bfloat16", "bf16": True, **options})


def _half_full(folder: Path, teachers: Any, **options: Any) -> Any:
    return _half(folder, teachers, **{"peft_config": None, "max_steps": 1, **options})


def _sft(folder: Path, teachers: Any, **options: Any) -> Any:
    return sft_trainer(folder, teachers, **{"peft_config": _lora(), **COMMON, **options})


def _grpo(folder: Path, teachers: Any, **options: Any) -> Any:
    return grpo_fixtures.make_trainer(folder, dark, **{"peft_config": _lora(), **COMMON, **REWARDED, **options})


def _grpo_one_pass(folder: Path, teachers: Any, **options: Any) -> Any:
    return _grpo(folder, teachers, one_pass=True, sde_window_size=2, **options)


def _nft(folder: Path, teachers: Any, **options: Any) -> Any:
    settings = {"num_trained_timesteps": 2, "old_policy_decay_rate": 0.1, **COMMON, **REWARDED}
    return nft_fixtures.make_trainer(folder, reward_funcs=dark, **{"peft_config": _lora(), **settings, **options})


def _nft_full(folder: Path, teachers: Any, **options: Any) -> Any:
    return _nft(folder, teachers, **{"peft_config": None, "learning_rate": 1e-4, **options})


def _dmd(folder: Path, teachers: Any, **options: Any) -> Any:
    settings = {"peft_config": _lora(), "loss_type": "tdm", "fake_updates": 2, "sampler": "cps", **COMMON}
    return dmd_fixtures.make_trainer(folder, teachers, **{**settings, **options})


def _dmd_full(folder: Path, teachers: Any, **options: Any) -> Any:
    settings = {"peft_config": None, "learning_rate": 1e-4, "loss_type": "dmd2", "max_steps": 2}
    return _dmd(folder, teachers, **{**settings, **options})


MAKE: dict[str, Callable[..., Any]] = {
    "opd": _opd,
    "itself": _itself,
    "full": _full,
    "half": _half,
    "half_full": _half_full,
    "sft": _sft,
    "grpo": _grpo,
    "grpo_one_pass": _grpo_one_pass,
    "nft": _nft,
    "nft_full": _nft_full,
    "dmd": _dmd,
    "dmd_full": _dmd_full,
}
# What has a state of its own goes through a checkpoint as well, from one process and to one.
RESUMED = ("opd", "itself", "full", "nft", "dmd")


def trained_alone(folder: Path, teachers: Any) -> Callable[[str], Any]:
    """The runs on one process, by name, each trained when it is first asked for."""

    @functools.cache
    def run(name: str) -> Any:
        trainer = MAKE[name](folder / name, teachers, per_device_train_batch_size=4)
        trainer.train()
        return trainer

    return run


def state_of(trainer: Any) -> dict[str, Tensor]:
    """All that training goes on from: weights, their average, an old policy and a fake. All processes must call it."""
    state = whole(trainer.student.named_parameters())
    with trainer.student.ema_weights():
        state |= whole({f"average {name}": p for name, p in trainer.student.named_parameters().items()})
    if isinstance(trainer, nft_fixtures.DiffusionNFTTrainer):
        state |= whole({f"old {name}": p for name, p in trainer.old_policy.named_parameters().items()})
    if isinstance(trainer, dmd_fixtures.DiffusionDMDTrainer):
        state |= whole({f"fake {name}": p for name, p in trainer.fake.named_parameters().items()})
    return state
