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

"""Shared code for the tests with two processes: settings, and running a script of `distributed/`."""

import json
from pathlib import Path
from typing import Any

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from helpers.launching import Forks
from helpers.opd_fixtures import AVERAGED, first_pixel, logged, make_dataset
from safetensors.torch import load_file
from torch import Tensor


FSDP_CONFIG = Path(__file__).parents[2] / "examples" / "accelerate_configs" / "fsdp2.yaml"
UPDATES = 3
OPTIONS = dict(
    max_steps=UPDATES,
    gradient_accumulation_steps=4,
    sampler="flow_sde",
    learning_rate=1e-2,
    **AVERAGED,
)
# Of three images and two processes one is drawn twice and counted once.
SCORED = dict(reward_funcs=first_pixel, eval_dataset=make_dataset(count=3, draw=1))


def fsdp_environment():
    """What `accelerate launch` sets for the example's FSDP settings."""
    args, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(FSDP_CONFIG), "x.py"])
    )
    environment = prepare_multi_gpu_env(args)
    return {name: value for name, value in environment.items() if "FSDP" in name}


def reports_in(folder: Path) -> list[Any]:
    """What each process wrote down."""
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)]


def weights_in(folder: Path, name: str = "rank") -> list[dict[str, Tensor]]:
    """What each process had at its end, of a run of that name."""
    return [load_file(folder / f"{name}_{rank}.safetensors") for rank in (0, 1)]


def trained_by_two(
    processes: Forks, folder: Path, script: str, scenario: Any, environment: dict[str, str] | None = None
) -> tuple[list[Any], list[dict[str, Tensor]], Path]:
    """Reports and weights of both processes that a script of `distributed/` trains in, and its folder."""
    (folder / "scenario.json").write_text(json.dumps(scenario))
    processes.run_script(script, folder, environment=environment)
    return reports_in(folder), weights_in(folder), folder


def on_two_processes(
    processes: Forks, tmp_path: Path, fixtures: str, options: dict[str, Any]
) -> tuple[list[Any], list[Any]]:
    """
    Logs and weights of both ranks of the trainer that `fixtures` makes.

    Both have reduced their gradients once an update, or it fails.
    """
    (tmp_path / "options.json").write_text(json.dumps(options))
    processes.run_script("train_rl.py", tmp_path, fixtures)
    reports, weights = reports_in(tmp_path), weights_in(tmp_path)
    for report in reports:
        assert report["reduced_bytes"] == [4 * report["trained_parameters"]] * options["max_steps"] + [0]
    return [report["log"] for report in reports], weights


def losses(report):
    return logged(report["log"], "loss")
