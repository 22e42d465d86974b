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

"""The commands' parser: TRL's, plus configs by name, help in groups, and a suggestion for each unknown option."""

import argparse
import copy
import inspect
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from ..pipelines.loading_options import full_dtype
from ..problems import Refusal
from ..trainer.option_checks import UNUSED, WITHOUT_EFFECT, unknown_option
from .arguments import QuantizationArguments, config_path, configs
from .values import PACKAGE


# Options that are fields of no dataclass. TRL's parser reads --config before it parses; `launching` takes the
# launcher's.
_OF_THE_COMMAND = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
_OPTIONS = (
    _OF_THE_COMMAND.add_argument("-h", "--help", action="help", help="Show this and exit."),
    _OF_THE_COMMAND.add_argument(
        "--config", metavar="NAME|FILE", help="YAML with any of these options, or the name of one in the package."
    ),
)
_LAUNCHER_OPTIONS = (
    _OF_THE_COMMAND.add_argument(
        "--accelerate_config", metavar="NAME|FILE", help="How to launch: cpu, multi_gpu, fsdp2, … or a YAML file."
    ),
    _OF_THE_COMMAND.add_argument(
        "--num_processes", metavar="N", help="Number of processes. Other options of `accelerate launch` work too."
    ),
)


_COMMAND, _QUANTIZATION, _INHERITED = "options", "quantization of the base", "transformers.TrainingArguments"
_NOT_LISTED = (
    "Not listed: options of transformers.TrainingArguments that have no effect here, and --no_NAME, which turns off the "
    "option NAME."
)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows one spelling of each option, and no default if it is None."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required:
            return f"{action.help} (required)"
        return action.help if action.default is None else super()._get_help_string(action)


class CommandParser(TrlParser):
    """
    Parses a command line into dataclasses.

    Args:
        dataclass_types (`tuple[type, ...]`): the command's arguments, then its trainer's config if it has one.
        prog (`str`, *optional*): the command's name in messages.
        launched (`bool`, *optional*, defaults to `False`): whether help lists the launcher's options.
    """

    dataclass_types: list[Any]

    def __init__(self, dataclass_types: Sequence[type], prog: str | None = None, launched: bool = False):
        usage = "%(prog)s [--config NAME|FILE] [options]"
        # To TRL the type of a dataclass is one of its own.
        super().__init__(
            dataclass_types,  # type: ignore[arg-type]
            prog=prog,
            usage=usage,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,  # `--lr` would be short for three options, none of which is the learning rate
        )
        for action in self._actions:
            if action.dest == "report_to":
                action.nargs = "+"  # as in a YAML file
            elif action.dest == "dtype":
                action.type = full_dtype
        self.options_of_the_command = (*_OPTIONS, *_LAUNCHER_OPTIONS) if launched else _OPTIONS

    def error(self, message: str) -> NoReturn:
        """Refuses a command line in words, without the list of all options."""
        one_spelling = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)
        raise Refusal(f"{self.prog}: {one_spelling}")

    def unclaimed(self, arguments: Sequence[str]) -> list[str]:
        """Returns the words of a command line and of its `--config` that belong to no option. Makes no dataclass."""
        words, found = self._with_config(arguments)
        asks_help = not {"-h", "--help"}.isdisjoint(words)
        required = [action for action in self._actions if action.required and not asks_help]
        for action in required:
            action.required = False  # a misspelt option is told first
        try:
            return found + self.parse_known_args(words)[1]
        finally:
            for action in required:
                action.required = True

    def require(self, arguments: Sequence[str]) -> None:
        """
        Refuses a command line that lacks an option. Makes no dataclass.

        Raises:
            [`Refusal`]: if an option is missing, in it and in its `--config`.
        """
        self.parse_known_args(self._with_config(arguments)[0])

    def _with_config(self, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
        """Takes defaults from a command line's `--config`. Returns the other words, and those that it does not know."""
        words = config_by_name(arguments)
        if "--config" not in words:
            return words, []
        at = words.index("--config")
        content = _content(words[at + 1])
        words[at : at + 2] = []
        return words, self.set_defaults_with_config(**{k: v for k, v in content.items() if k != "env"})

    def read(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """Returns the dataclasses, then the list of words that belong to none of them."""
        try:
            return self.parse_args_and_config(config_by_name(arguments), return_remaining_strings=True)
        except ValueError as error:  # some are transformers' own
            raise Refusal(str(error)) from error

    def format_help(self) -> str:
        """Lists the command's own options first, and those of transformers' `TrainingArguments` last."""
        groups: dict[str, list[argparse.Action]] = {title: [] for title in self._titles()}
        for action in self._actions:
            # `--no_…` turns off what is on by default; its help would be that of the option itself.
            is_negative = action.nargs == 0 and action.const is False
            if not is_negative and action.dest not in ("help", *WITHOUT_EFFECT, *UNUSED):
                groups[self._title(action.dest)].append(action)
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        for i, (title, actions) in enumerate(groups.items()):
            formatter.start_section(title)
            formatter.add_arguments(self.options_of_the_command if i == 0 else ())
            formatter.add_arguments(sorted(actions, key=lambda action: not action.required))
            formatter.end_section()
        if len(self.dataclass_types) > 1:
            formatter.add_text(_NOT_LISTED)
        return formatter.format_help()

    def _titles(self) -> list[str]:
        """The titles of all groups, in their order."""
        owners = [owner for given in self.dataclass_types[1:] for owner in given.__mro__ if _is_ours(owner)]
        return [_COMMAND, *(owner.__name__ for owner in owners), _QUANTIZATION, _INHERITED]

    def _title(self, name: str) -> str:
        first, *trainers = self.dataclass_types
        if name in first.__dataclass_fields__:
            return _QUANTIZATION if name in inspect.get_annotations(QuantizationArguments) else _COMMAND
        owners = (owner for given in trainers for owner in given.__mro__ if _is_ours(owner))
        return next((owner.__name__ for owner in owners if name in inspect.get_annotations(owner)), _INHERITED)


def _is_ours(owner: type) -> bool:
    return owner.__module__.partition(".")[0] == PACKAGE.name


def _content(path: str) -> dict[str, Any]:
    """Reads a YAML file of options."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refusal(f"--config: {path!r} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise Refusal(f"--config: {path!r} is not a mapping from options to values.")
    return content


def config_by_name(arguments: Sequence[str]) -> list[str]:
    """Returns the words of a command line, with the name after `--config` replaced by its path."""
    words = list(arguments)
    joined = [at for at, word in enumerate(words) if word.startswith("--config=")]
    for at in joined[::-1]:
        words[at : at + 1] = ["--config", words[at].removeprefix("--config=")]
    if "--config" in words:
        at = words.index("--config") + 1
        if at == len(words):
            raise Refusal("--config needs the name of a config in the package, or of a file.")
        words[at] = config_path("config", os.path.expanduser(words[at]))
    return words


def parse(dataclass_types: Sequence[type], arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
    """
    Reads a command's arguments and its trainer's config from the command line and from `--config`.

    Args:
        dataclass_types (`tuple[type, ...]`): the command's arguments, then its trainer's config if it has one.
        arguments (`list[str]`, *optional*): the words. By default, those of the process.

    Raises:
        [`Refusal`]: for an option that none of them has. The message names another trainer's config that has it.
    """
    parser, words = CommandParser(dataclass_types), sys.argv[1:] if arguments is None else arguments
    refuse(dataclass_types, parser.unclaimed(words))
    *parsed, _ = parser.read(words)
    return tuple(parsed)


def refuse(dataclass_types: Sequence[type], words: Sequence[str]) -> None:
    """
    Refuses words that belong to no option.

    Raises:
        [`Refusal`]: if there are any.
    """
    unknown = dict.fromkeys(word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--"))
    problems = [unknown_option(dataclass_types[-1], name, configs(), dataclass_types[0]) for name in unknown]
    if words:
        raise Refusal("\n".join(problems or [f"{list(words)} belong to no option."]))
