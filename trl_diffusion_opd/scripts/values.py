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

"""Values of options that are more than text: paths into the package, JSON objects, and lists of `task=value`."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from ..guards.files import JSON
from ..problems import Refusal


PACKAGE = Path(__file__).parents[1]


def packaged(path: str) -> str:
    """Looks up a path in the installed package if it begins with `trl_diffusion_opd/` and does not exist locally."""
    inside = PACKAGE.parent / path
    return (
        str(inside) if path.startswith(f"{PACKAGE.name}/") and not os.path.exists(path) and inside.exists() else path
    )


def json_object(option: str, text: str) -> dict[str, JSON]:
    """Parses an option that is given as a JSON object."""
    reason = ""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        value, reason = None, f" ({error})"
    if not isinstance(value, dict):
        raise Refusal(
            f'--{option}: {text!r} is not a JSON object such as \'{{"key": {{"name": 1}}}}\', with names and texts in double '
            f"quotes.{reason}"
        )
    return value


# `task=value` strings. A YAML file may have a mapping instead, from task to a value or a list of values.
OfTasks = list[str] | Mapping[str, JSON]


def by_task(option: str, values: OfTasks | None, what: str = "task=value") -> dict[str, list[str]]:
    """Groups `task=value` strings by task. `what` is the form of a string in messages."""
    if isinstance(values, Mapping):
        given = {str(task): value if isinstance(value, list) else [value] for task, value in values.items()}
        unset = [task for task, of_task in given.items() if not of_task or None in of_task]
        if unset:
            raise Refusal(f"--{option}: task {unset[0]!r} has no value.")
        return {task: [str(value) for value in of_task] for task, of_task in given.items()}
    result: dict[str, list[str]] = {}
    for value in [values] if isinstance(values, str) else values or []:  # YAML may have a single value without a list
        if isinstance(value, Mapping):  # "- task: value"
            for task, of_task in by_task(option, value).items():
                result.setdefault(task, []).extend(of_task)
            continue
        task, equals, content = value.partition("=")
        if not (task and equals and content):
            file = Path(value)
            advice = f" Name its task, such as {file.stem}={value}." if file.suffix and not equals else ""
            raise Refusal(f"--{option}: {value!r} is not of the form {what}.{advice}")
        result.setdefault(task, []).append(content)
    return result


def single(values: OfTasks) -> str | None:
    """Returns the value if there is exactly one (a YAML file may give it without a list), else `None`."""
    if isinstance(values, str):
        return values
    return values[0] if not isinstance(values, Mapping) and len(values) == 1 and isinstance(values[0], str) else None
