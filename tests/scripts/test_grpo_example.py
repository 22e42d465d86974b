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

"""The example script of GRPO, run as a user runs it: two tasks, one with two rewards."""

import json
import re
from pathlib import Path

import datasets
from helpers.example_script import run_rl
from helpers.tiny_sd3 import make_pipeline


def test_multi_task_rl_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("COLUMNS", "120")  # a narrower console has a shorter line
    make_pipeline().save_pretrained("base")
    rows = [{"prompt": f"draw{i}", "target": i} for i in range(3)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_rl(
        monkeypatch,
        "teacher_grpo_sd3.py",
        prompts=["draw=prompts.jsonl", "count=prompts.jsonl"],
        reward_funcs=[
            "draw=helpers.grpo_fixtures:brightness",
            "draw=helpers.opd_fixtures:first_pixel",
            "count=helpers.grpo_fixtures:brightness",
        ],
        reward_weights=[1.0, 0.0],
        guidance_scale=1.0,
        num_inference_steps=4,
        sde_window_size=1,
        sde_window_range=[0, 2],
        loss_type="grpo_guard",
        num_iterations=2,
    )
    names = {path.name for path in Path("teacher").iterdir()}
    assert names >= {"adapter_config.json", "pytorch_lora_weights.safetensors", "curves.png", "README.md"}
    assert "draw: brightness x 1, first_pixel x 0" in Path("teacher/README.md").read_text()
    make_pipeline().load_lora_weights("teacher")
    shown = capsys.readouterr().out
    assert "Steps of flow_sde, 1 of 2 with noise" in shown
    assert re.search(r"^1/2  reward \S+  spread \S+  count \S+ draw \S+", shown, re.MULTILINE)
