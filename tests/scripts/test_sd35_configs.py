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

"""The configs for Stable Diffusion 3.5: the released settings, and a run with each of them, on a tiny base instead."""

import json
from pathlib import Path

import datasets
import pytest
from helpers.example_script import command_line, run_example
from helpers.tiny_sd3 import make_lora, make_pipeline

from trl_diffusion_opd.scripts import arguments as cli
from trl_diffusion_opd.scripts import opd
from trl_diffusion_opd.scripts.parser import parse


ROOT = Path(__file__).parents[2]
CONFIGS = {name: ROOT / "examples" / "configs" / f"sd35_{name}.yaml" for name in ("24gb", "80gb")}
TASKS = ("aesthetic", "ocr", "geneval")


def parsed(name, *arguments):
    return parse(opd.ARGUMENTS, ["--config", str(CONFIGS[name]), "--use_cpu", "true", *arguments])


@pytest.mark.parametrize("name", CONFIGS)
def test_released_settings(name):
    script, args = parsed(name)
    assert (args.height, args.width, args.max_sequence_length) == (512, 512, 128)
    assert (args.num_inference_steps, args.eval_num_inference_steps, args.sampler) == (10, 40, "ode")
    assert args.skip_last_steps is None and args.num_trained_timesteps is None  # 9 of them are trained
    assert (args.guidance_scale, args.teacher_guidance_scale) == (4.5, None)
    assert script.teacher_guidance_scales == ["geneval=1.0"]
    assert (script.lora_r, script.lora_alpha, script.lora_target_modules) == (32, 64, None)
    assert (args.learning_rate, args.weight_decay, args.max_grad_norm) == (3e-4, 1e-4, 1.0)
    assert (args.adam_beta1, args.adam_beta2, args.lr_scheduler_type) == (0.9, 0.999, "constant")
    assert (args.ema_decay, args.ema_update_interval) == (0.9, 8)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 72
    assert args.dtype == "bfloat16" and args.gradient_checkpointing
    assert list(cli.by_task("prompts", script.prompts)) == list(TASKS)
    assert args.offload_encoders == (name == "24gb") and args.prompt_cache_dir == "outputs/prompt_cache"


def test_the_optimizers_in_the_comments_are_options():
    for line in CONFIGS["24gb"].read_text().splitlines():
        if line.startswith("# optim: "):
            _, args = parsed("24gb", "--optim", line.removeprefix("# optim: "))
            assert args.optim == line.removeprefix("# optim: ")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_on_a_tiny_base(name, tmp_path, monkeypatch):
    make_pipeline().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Path("prompts").mkdir()
    for source, first, second in (
        ("pickscore_sfw", "one cat", "a dog"),
        ("ocr", "a sign", "two signs"),
        ("geneval", "three birds", "a car"),
    ):
        Path(f"prompts/{source}_train.jsonl").write_text(f'{{"prompt": "{first}"}}\n{{"prompt": "{second}"}}\n')
    for seed, task in enumerate(TASKS):
        make_lora(make_pipeline(), tmp_path / task, seed=seed)
    small = {
        "model_name_or_path": tmp_path / "base",
        "teachers": [f"{task}={tmp_path / task}" for task in TASKS],
        "height": 16,
        "width": 16,
        "max_sequence_length": 16,
        "num_inference_steps": 3,
        "eval_num_inference_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "lora_r": 2,
        "max_steps": 2,
        "use_cpu": "true",
        "dataloader_pin_memory": "false",
    }
    run_example(monkeypatch, "opd_sd3.py", "--config", CONFIGS[name], *command_line(small))
    out = tmp_path / "outputs" / "sd35"
    assert (out / "pytorch_lora_weights.safetensors").exists() and list((out / "completions").glob("step_*.png"))
    manifest = json.loads((out / "teacher_manifest.json").read_text())
    assert {task: entry["guidance_scale"] for task, (entry,) in manifest.items()} == {
        "aesthetic": 4.5,
        "ocr": 4.5,
        "geneval": 1.0,
    }
    assert json.loads((out / "training_args.json").read_text())["dtype"] == "bfloat16"
    (stored,) = (tmp_path / "outputs" / "prompt_cache").rglob("*.arrow")
    assert "three birds" in str(datasets.Dataset.from_file(str(stored))["key"][:])
