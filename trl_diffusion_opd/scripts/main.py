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

"""
The console script: `trl-diffusion-opd COMMAND …`.

A training command is started through accelerate if the command line has `--accelerate_config` or other options of
`accelerate launch`, if `accelerate config` has written a configuration, or if there are several devices. Otherwise it
runs in this process. `python -m trl_diffusion_opd.scripts.main COMMAND …` always runs in its own process; accelerate
starts it that way.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence


PROG = "trl-diffusion-opd"
# No command is imported before it is run, so that `--help` is fast.
COMMANDS = {
    "opd": "Distil teachers into one student (DiffusionOPD).",
    "grpo": "Train a teacher by reinforcement learning (Flow-GRPO, GRPO-Guard).",
    "nft": "Train a teacher by reinforcement learning on the forward process (DiffusionNFT).",
    "sft": "Fine-tune on images of a dataset, or on images that teachers draw.",
    "dmd": "Distil teachers into a student of few steps by matching distributions (DMD2, TDM).",
    "stages": "Run trainers one after another, from a file of stages.",
    "evaluate": "Measure how much of its teachers' gains a student has.",
    "merge": "Merge teachers' LoRAs into one, without training.",
    "prompts": "Fetch the prompts of the paper's setting.",
    "push": "Upload the output folder of a run to the Hub.",
    "env": "Print versions and devices, for a bug report.",
}
_WITH_OWN_PARSER = ("prompts", "push", "env")


def usage() -> str:
    """Returns the text of `--help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {what}" for name, what in COMMANDS.items()]
    head = f"usage: {PROG} COMMAND [options]\n\ncommands:"
    return "\n".join([head, *lines, f"\n`{PROG} COMMAND --help` shows the options of a command."])


def main(arguments: Sequence[str] | None = None, may_launch: bool = True) -> int:
    """
    Runs a command.

    Args:
        arguments (`list[str]`, *optional*): the command and its options. By default, those of the process.
        may_launch (`bool`, *optional*, defaults to `True`): whether it may be started through accelerate.

    Returns:
        `int`: the exit status.

    Raises:
        [`SystemExit`]: after a message, if the command refuses what it was given.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    sys.argv[0] = PROG  # for messages that repeat the command
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(version(PROG))
        return 0
    name, *given = words
    if name not in COMMANDS:
        alike = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {alike[0]!r}?" if alike else ""
        print(f"{PROG}: there is no command {name!r}; there are {', '.join(COMMANDS)}.{hint}", file=sys.stderr)
        return 2
    from .refusals import refusals_told

    with refusals_told():
        _run(name, given, may_launch)
    return 0


def _run(name: str, given: Sequence[str], may_launch: bool) -> None:
    module = importlib.import_module(f".{name}", __package__)
    if name in _WITH_OWN_PARSER:
        module.main(given)
        return

    from .parser import CommandParser, refuse

    launched = name != "merge"
    parser = CommandParser(module.ARGUMENTS, prog=f"{PROG} {name}", launched=launched)
    launcher: list[str] = []
    unknown = parser.unclaimed(given)
    if launched:
        from .launching import launch, needs_launcher, split

        launcher, unknown = split(unknown)
    refuse(module.ARGUMENTS, unknown)
    if launched and may_launch and needs_launcher(launcher):
        parser.require(given)
        launch(launcher, name, given)
        return
    *parsed, _ = parser.read(given)
    module.main(*parsed)


if __name__ == "__main__":
    sys.exit(main(may_launch=False))
