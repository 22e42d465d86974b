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

"""Finds a reward by one of this package's names, an import path or a file, and checks its options."""

import difflib
import functools
import hashlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ..problems import Refusal
from .base import Reward, RewardFunc


# Name of a reward (and of its module) -> its class. Imported on first use: most need transformers, some an extra.
REWARDS = {
    "aesthetic": "Aesthetic",
    "clip_image_similarity": "CLIPImageSimilarity",
    "clipscore": "CLIPScore",
    "frames": "Frames",
    "geneval": "GenEval",
    "hpsv2": "HPSv2",
    "imagereward": "ImageReward",
    "jpeg_compressibility": "JPEGCompressibility",
    "motion": "Motion",
    "ocr": "OCR",
    "pickscore": "PickScore",
    "remote": "RemoteReward",
    "unifiedreward": "UnifiedReward",
    "vlm_judge": "VLMJudge",
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
    place, colon, name = spec.rpartition(":")
    if not colon:
        alike = difflib.get_close_matches(spec, REWARDS, n=1, cutoff=0.7)
        meant = f" Did you mean {alike[0]!r}?" if alike else ""
        raise Refusal(
            f"There is no reward {spec!r}.{meant} There are {', '.join(REWARDS)} (ocr needs `pip install "
            '".[ocr]"` in a checkout of trl-diffusion-opd, unifiedreward ".[unifiedreward]"), sums of them such as '
            "pickscore+clipscore+hpsv2, frames(pickscore) and the like for videos, and any function by its import path, package.module:function, or by its file, "
            "my_rewards.py:function."
        )
    module = _module(spec, place)
    try:
        found = functools.reduce(getattr, name.split("."), module)
    except AttributeError as error:
        members = inspect.getmembers(module, lambda value: inspect.isfunction(value) or inspect.isclass(value))
        own = [key for key, value in members if value.__module__ == module.__name__ and not key.startswith("_")]
        raise Refusal(
            f"Reward {spec!r}: {place} has no {name!r}; it has {', '.join(own) or 'no function'}."
        ) from error
    if inspect.isclass(found):
        _check_options(spec, found, options)
    elif options:
        raise Refusal(f"Reward {spec!r} is a function and takes no options, but {sorted(options)} are given.")
    elif not callable(found):
        raise Refusal(f"Reward {spec!r} is not a function but a {type(found).__name__}.")
    return found


def _module(spec: str, place: str) -> ModuleType:
    """Imports a module by its name, also from the working folder, or by the path of its file."""
    is_file = place.endswith(".py")
    if is_file and not os.path.isfile(place):
        raise Refusal(f"Reward {spec!r}: there is no file {place!r}. The working folder is {os.getcwd()!r}.")
    if "/" in place and not is_file:
        raise Refusal(f"Reward {spec!r}: a path must end in .py, as {place}.py:{spec.rpartition(':')[2]}.")
    try:
        if is_file:
            return _of_file(Path(place))
        # A script's search path has its own folder, but not the working folder. `python -m` has that one too.
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.insert(0, os.getcwd())
        return importlib.import_module(place)
    except Exception as error:  # the module is the user's: it can raise anything
        if isinstance(error, ModuleNotFoundError) and f"{place}.".startswith(f"{error.name}."):
            raise Refusal(
                f"Reward {spec!r} cannot be imported: {error}. Modules are searched in the working folder, "
                f"{os.getcwd()!r}, and among the installed packages. For a file elsewhere give its path, "
                "my_rewards.py:function."
            ) from error
        frame = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")][-1]
        where = "" if isinstance(error, SyntaxError) else f" in {Path(frame.filename).name}, line {frame.lineno}"
        raise Refusal(f"Reward {spec!r} cannot be imported: {type(error).__name__}{where}: {error}.") from error


def _of_file(path: Path) -> ModuleType:
    """Imports a file. It is named after its content, so that a file is imported once, from wherever it is."""
    name = f"{path.stem}_{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.resolve().parent) not in sys.path:
        sys.path.append(str(path.resolve().parent))  # for what it imports from beside it, as a script can
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the path ends in .py
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


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
        raise Refusal(
            f"Reward {spec!r} needs {', '.join(missing)}: load_reward({spec!r}, "
            f"{', '.join(f'{m}=...' for m in missing)}) in Python, --reward_kwargs '{{\"{spec}\": {{{given}}}}}' on the command line."
        )
    unknown = [name for name in options if name not in parameters]
    if unknown and not takes_any:
        raise Refusal(f"Reward {spec!r} has no options {unknown}; it has {list(parameters)}.")


def reward_class(name: str) -> Callable[..., Reward]:
    """The class of a named reward."""
    return getattr(importlib.import_module(f".{name}", __package__), REWARDS[name])
