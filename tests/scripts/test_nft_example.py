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

"""The script that trains a teacher by DiffusionNFT, run as a user runs it; what it saves is a teacher."""

import json
from pathlib import Path

import datasets
from helpers.example_script import run_rl
from helpers.opd_fixtures import make_dataset
from helpers.opd_fixtures import make_trainer as make_distillation
from helpers.tiny_sd3 import make_pipeline


def test_a_teacher_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    make_pipeline().save_pretrained("base")
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"draw{i}"}) + "\n" for i in range(3)))
    run_rl(
        monkeypatch,
        "teacher_nft_sd3.py",
        prompts="draw=prompts.jsonl",
        reward_funcs="draw=helpers.grpo_fixtures:brightness",
        num_inference_steps=3,
        ema_update_interval=1,
    )
    names = {path.name for path in Path("teacher").iterdir()}
    assert names >= {"adapter_config.json", "pytorch_lora_weights.safetensors", "curves.png", "README.md"}
    assert "old_policy.safetensors" not in names
    arguments = json.loads(Path("teacher/training_args.json").read_text())
    assert arguments["sampler"] == "dpm2m" and arguments["guidance_scale"] == 1.0
    trainer = make_distillation(tmp_path / "student", "teacher", train_dataset=make_dataset(draw=4))
    assert [role.teacher.kind for role in trainer.bank.teachers["draw"]] == ["lora"]
