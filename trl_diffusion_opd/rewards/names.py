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

"""Finds a reward by one of this package's names or by an import path, and checks its options."""

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from .base import Reward, RewardFunc


# Name of a reward (and of its module) -> its class. Imported on first use: most need transformers, some an extra.
REWARDS = {
    "aesthetic": "Aesthetic",
    "clipscore": "CLIPScore",
    "geneval": "GenEval",
    "hpsv2": "HPSv2",
    "imagereward": "ImageReward",
    "jpeg_compressibility": "JPEGCompressibility",
    "ocr": "OCR",
    "pickscore": "PickScore",
    "remote": "RemoteReward",
    "unifiedreward": "UnifiedReward",
}


def load_named(spec: str, **options: object) -> RewardFunc:
    """Loads a reward function by a single name or import path. See [`load_reward`]."""
    if spec in REWARDS:
        reward = reward_class(spec)
        _check_options(spec, reward, options)
        return reward(**options)
    found = _imported(spec, options)
    if inspect.isclass(found):
        found = found(**options)
    return found


def check_named(spec: str, **options: object) -> None:
    """Checks a reward like [`load_named`], but without loading weights."""
    if spec in REWARDS:
        _check_options(spec, reward_class(spec), options)
    else:
        _imported(spec, options)


def _imported(spec: str, options: Mapping[str, object]) -> Any:
    """Imports the function or class of an import path, and checks the options for it."""
    module, colon, name = spec.partition(":")
    if not colon:
        raise ValueError(
            f"There is no reward {spec!r}. There are {', '.join(REWARDS)} (ocr needs `pip install "
            '"trl-diffusion-opd[ocr]"`, unifiedreward "trl-diffusion-opd[unifiedreward]"), sums of them such as '
            "pickscore+clipscore+hpsv2, and any function by its import path, package.module:function."
        )
    if module.endswith(".py") or "/" in module:
        path = module.removesuffix(".py").strip("./").replace("/", ".")
        raise ValueError(
            f"Reward {spec!r} is a path to a file. Name the module as Python imports it, from the working folder: "
            f"{path}:{name}."
        )
    # A script's search path has its own folder, but not the working folder. `python -m` has that one too.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"Reward {spec!r} cannot be imported: {error}. Modules are searched in the working folder, "
            f"{os.getcwd()!r}, and among the installed packages."
        ) from error
    if inspect.isclass(found):
        _check_options(spec, found, options)
    elif options:
        raise ValueError(f"Reward {spec!r} is a function and takes no options, but {sorted(options)} are given.")
    elif not callable(found):
        raise ValueError(f"Reward {spec!r} is not a function but a {type(found).__name__}.")
    return found


def _check_options(spec: str, reward: RewardFunc, options: Mapping[str, object]) -> None:
    parameters = inspect.signature(reward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and name not in options
    ]
    if missing:
        given = ", ".join(f'"{name}": ...' for name in missing)
        raise ValueError(
            f"Reward {spec!r} needs {', '.join(missing)}: load_reward({spec!r}, "
            f"{', '.join(f'{m}=...' for m in missing)}) in Python, --reward_kwargs '{{\"{spec}\": {{{given}}}}}' on the command line."
        )
    unknown = [name for name in options if name not in parameters]
    if unknown and not takes_any:
        raise ValueError(f"Reward {spec!r} has no options {unknown}; it has {list(parameters)}.")


def reward_class(name: str) -> Callable[..., Reward]:
    """The class of a named reward."""
    return getattr(importlib.import_module(f".{name}", __package__), REWARDS[name])
