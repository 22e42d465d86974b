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

"""Runs or imports scripts that are not in the package, in the tests' own process."""

import importlib.util
import runpy
import sys
from pathlib import Path
from types import ModuleType


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
# Of a run that takes seconds on the tiny base, by whatever method.
TINY_OPTIONS = {
    "output_dir": "out",
    "height": 16,
    "width": 16,
    "max_sequence_length": 16,
    "num_inference_steps": 2,
    "eval_num_inference_steps": 2,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "lora_r": 2,
    "gradient_checkpointing": "false",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": "true",
    "dataloader_pin_memory": "false",
}


def load_script(path: str) -> ModuleType:
    """A script, by its path in the repository, as a module of its own, in which a test may change what it likes."""
    name = f"script_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def command_line(options):
    """The words of `--name value …`, where a list has several values."""
    given = []
    for name, value in options.items():
        given += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return given


def run_example(monkeypatch, name, *arguments):
    """Runs a script as `python examples/NAME …` does."""
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def run_rl(monkeypatch, script, **options):
    """Runs a script that trains a teacher by reward, with `base` and `prompts.jsonl` of this folder."""
    settings = {
        "model_name_or_path": "base",
        **TINY_OPTIONS,
        "eval_prompts": "draw=prompts.jsonl",
        "output_dir": "teacher",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        **options,
    }
    run_example(monkeypatch, script, *command_line(settings))


def run_opd(monkeypatch, base, *arguments, **options):
    """Runs `examples/opd_sd3.py` on a tiny base."""
    settings = {
        "model_name_or_path": base,
        **TINY_OPTIONS,
        "guidance_scale": 1.0,
        "ema_update_interval": 1,
        **options,
    }
    run_example(monkeypatch, "opd_sd3.py", *command_line(settings), *arguments)
