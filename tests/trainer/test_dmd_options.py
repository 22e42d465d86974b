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

"""Distribution matching with what saves time or memory, and with a base of two experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.dmd_fixtures import fake_weights, make_trainer
from helpers.families import PROMPTS
from helpers.families_experts import WAN_2_2, save_pair
from helpers.opd_fixtures import relative_difference, snapshot, train_losses
from peft import LoraConfig

from trl_diffusion_opd.pipelines.experts import EXPERTS


@pytest.mark.parametrize(
    "options",
    [
        {"batch_teachers": True},
        {"offload_encoders": True},
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow),
    ],
)
def test_what_saves_time_or_memory_changes_nothing(options: dict[str, Any], tmp_path: Path, teachers: Any) -> None:
    several = {task: [teacher, "base"] for task, teacher in teachers.items()}
    plain = make_trainer(tmp_path / "plain", several, max_steps=2, learning_rate=1e-3)
    other = make_trainer(tmp_path / "other", several, max_steps=2, learning_rate=1e-3, **options)
    before = snapshot(plain)
    for trainer in (plain, other):
        trainer.train()
    assert train_losses(other) == pytest.approx(train_losses(plain), rel=1e-4)
    assert relative_difference(snapshot(other), snapshot(plain)) < 1e-3 < relative_difference(before, snapshot(plain))


@pytest.mark.slow
def test_two_experts(tmp_path: Path) -> None:
    save_pair(tmp_path / "teacher", 0)
    trainer = make_trainer(
        tmp_path,
        str(tmp_path / "teacher"),
        pipeline=WAN_2_2.build(),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        peft_config=LoraConfig(r=2, target_modules=list(WAN_2_2.lora_targets)),
        learning_rate=1e-2,
        fake_learning_rate=1e-2,
        num_inference_steps=4,
        per_device_train_batch_size=4,
        max_steps=3,
        **WAN_2_2.kwargs,
    )
    before, fake = snapshot(trainer), {name: p.clone() for name, p in fake_weights(trainer).items()}
    trainer.train()
    for start, after in ((before, snapshot(trainer)), (fake, fake_weights(trainer))):
        for expert in EXPERTS:
            assert any(not torch.equal(after[name], p) for name, p in start.items() if f"{expert}." in name), expert
