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

"""Starts a command on all devices through accelerate's launcher."""

import logging
import os
import subprocess
import sys
from collections.abc import Sequence

import torch
from accelerate.commands.config import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..problems import Refusal
from .arguments import config_path
from .refusals import REFUSED


# The module that the launcher starts. It runs a command in its own process and ignores the launcher's options.
MODULE = "trl_diffusion_opd.scripts.main"


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """
    Splits words of a command line into options of accelerate's launcher and others.

    Args:
        words (`list[str]`): the words that belong to no option of the command.

    Returns:
        The launcher's words, then the others.

    Raises:
        [`Refusal`]: if `--accelerate_config` names no config.
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
                raise Refusal(f"--accelerate_config takes one name or file, but has {given}.")
            ours += ["--config_file", config_path("accelerate_config", given[0], "accelerate_configs")]
        elif _is_launchers(option):
            ours += option
        else:
            theirs += option
    return ours, theirs


def _is_launchers(option: Sequence[str]) -> bool:
    if not option[0].startswith("-"):
        return False
    # The parser takes the first word that belongs to no option as the script.
    known, unknown = launch_command_parser().parse_known_args([*option, MODULE])
    return not unknown and known.training_script == MODULE


def needs_launcher(words: Sequence[str]) -> bool:
    """Whether to use the launcher: it got options, `accelerate config` was run, or there are several devices."""
    return bool(words) or os.path.isfile(default_config_file) or torch.accelerator.device_count() > 1


def launch(words: Sequence[str], command: str, arguments: Sequence[str]) -> None:
    """
    Runs a command as `accelerate launch` would, and waits for it.

    Args:
        words (`list[str]`): options of the launcher.
        command (`str`), arguments (`list[str]`): the command and its arguments, the same for every process.

    Raises:
        [`SystemExit`]: if the command fails, with its exit status.
    """
    given = launch_command_parser().parse_args([*words, "--module", MODULE, command, *arguments])
    # It says, after the command's own message, that the others are ended, and repeats the first failure's status.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        launch_command(given)
    except subprocess.CalledProcessError as error:  # the command has printed the reason
        sys.exit(_status(error.returncode))
    except ChildFailedError as error:  # the same for several processes
        status = _status(error.get_first_failure()[1].exitcode)
        if status != REFUSED:
            print(error, file=sys.stderr)  # which process failed first
        sys.exit(status)


def _status(code: int) -> int:
    """The exit status that a shell gives to a process: the launcher counts those that a signal ended below 0."""
    return code if code > 0 else 128 - code
