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

import argparse
import logging
import os
import subprocess
import sys
from collections.abc import Sequence

import torch
from accelerate.commands.config import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DistributedType
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
        [`Refusal`]: if several processes are asked for, but accelerate would start one.
        [`SystemExit`]: if the command fails, with its exit status.
    """
    given = launch_command_parser().parse_args([*words, "--module", MODULE, command, *arguments])
    _refuse_one_of_several(given)
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


def _refuse_one_of_several(given: argparse.Namespace) -> None:
    """
    Refuses a number of processes that accelerate would ignore: without a kind of parallelism, it starts one process
    and says nothing.
    """
    config, file = None, given.config_file or default_config_file
    if given.config_file is not None or (os.path.isfile(file) and not given.cpu):
        config = load_config_from_file(file)
    number = given.num_processes if config is None or given.num_processes is not None else config.num_processes
    if number is None or number < 2 or given.mpirun_hostfile is not None:
        return
    if given.cpu:
        reason = "--cpu is for one process"
    elif any((given.multi_gpu, given.use_deepspeed, given.use_fsdp, given.use_megatron_lm, given.tpu)):
        return
    elif config is not None:
        if config.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU):
            return
        reason = f"{os.path.basename(file)} is for one process"
    elif torch.accelerator.device_count() < 2:
        reason = "this machine has fewer than two devices"
    else:
        return
    use_cpu = "" if torch.accelerator.device_count() >= number else " --use_cpu true"
    raise Refusal(
        f"num_processes={number}, but one process would be started: {reason}. For {number} processes: "
        f"--accelerate_config multi_gpu --num_processes {number}{use_cpu}"
    )


def _status(code: int) -> int:
    """The exit status that a shell gives to a process: the launcher counts those that a signal ended below 0."""
    return code if code > 0 else 128 - code
