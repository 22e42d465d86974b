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

"""Runs the example scripts with a user's command line, but in the tests' own process."""

import runpy
import sys
from pathlib import Path


SCRIPT = Path(__file__).parents[2] / "examples" / "opd_sd3.py"


def run_opd(monkeypatch, base, *arguments, **options):
    """Runs the script as `python examples/opd_sd3.py …` does."""
    settings = {
        "output_dir": "out",
        "height": 16,
        "width": 16,
        "max_sequence_length": 16,
        "num_inference_steps": 2,
        "eval_num_inference_steps": 2,
        "guidance_scale": 1.0,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "lora_r": 2,
        "gradient_checkpointing": "false",
        "ema_update_interval": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": "true",
        "dataloader_pin_memory": "false",
        **options,
    }
    given = []
    for name, value in settings.items():
        given += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--model_name_or_path", str(base), *given, *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
