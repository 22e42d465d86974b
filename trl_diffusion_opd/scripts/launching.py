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

"""How a command is started on the devices that there are, by the launcher of accelerate."""

import os
import subprocess
import sys
from collections.abc import Sequence

import torch
from accelerate.commands.config import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser

from .arguments import config_path


# Run as a module, it runs a command in its own process, and leaves the launcher's options to the launcher.
MODULE = "trl_diffusion_opd.scripts.main"


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """
    The words that are the launcher's, and those that are not.

    Args:
        words (`list[str]`): what no option of a command has claimed.

    Raises:
        [`ValueError`]: if `--accelerate_config` names no config.
    """
    options: list[list[str]] = []
    for word in words:
        if word.startswith("-") or not options:
            options.append([])
        options[-1].append(word)
    ours: list[str] = []
    theirs: list[str] = []
    for option in options:
        name, equals, value = option[0].partition("=")
        if name == "--accelerate_config":
            given = [value, *option[1:]] if equals else option[1:]
            if len(given) != 1:
                raise ValueError(f"--accelerate_config takes one name or file, and has {given}.")
            ours += ["--config_file", config_path("accelerate_config", given[0], "accelerate_configs")]
        elif _is_launchers(option):
            ours += option
        else:
            theirs += option
    return ours, theirs


def _is_launchers(option: Sequence[str]) -> bool:
    if not option[0].startswith("-"):
        return False
    # The parser takes the first word that is no option's for the script.
    known, unknown = launch_command_parser().parse_known_args([*option, MODULE])
    return not unknown and known.training_script == MODULE


def needs_launcher(words: Sequence[str]) -> bool:
    """Whether something of the launcher's is asked for, by options or by `accelerate config`, or there are several devices."""
    return bool(words) or os.path.isfile(default_config_file) or torch.accelerator.device_count() > 1


def launch(words: Sequence[str], command: str, arguments: Sequence[str]) -> None:
    """
    Runs a command as `accelerate launch` would, and waits for it.

    Args:
        words (`list[str]`): options of the launcher.
        command (`str`), arguments (`list[str]`): what is run, on every process.

    Raises:
        [`SystemExit`]: with its exit status, if it fails.
    """
    given = launch_command_parser().parse_args([*words, "--module", MODULE, command, *arguments])
    try:
        launch_command(given)
    except subprocess.CalledProcessError as error:  # it has said why
        sys.exit(error.returncode if error.returncode > 0 else 128 - error.returncode)
