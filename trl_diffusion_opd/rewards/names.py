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

"""Rewards by name: those of this package, and functions by their import path."""

import functools
import importlib
from typing import Any

from .base import RewardFunc


# Imported when asked for: most need transformers, some an extra.
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


def load_reward(spec: str, **options: Any) -> RewardFunc:
    """
    A reward function by its name, or by its import path `package.module:function`.

    Args:
        spec (`str`): a name of this package's, or an import path.
        options: arguments of a named reward, such as the `url` of `"remote"`.

    Raises:
        [`ValueError`]: if there is no such function, or its weights cannot be loaded.
        [`ImportError`]: if the reward needs a package that is not installed; the message names the extra.
    """
    if spec in REWARDS:
        return reward_class(spec)(**options)
    module, colon, name = spec.partition(":")
    if not colon:
        raise ValueError(
            f"There is no reward {spec!r}. There are {', '.join(REWARDS)} (ocr needs `pip install "
            '"trl-diffusion-opd[ocr]"`, unifiedreward "trl-diffusion-opd[unifiedreward]"), and any function by its import '
            "path, package.module:function."
        )
    if options:
        raise ValueError(f"Reward {spec!r} is a function and takes no options, but {sorted(options)} are given.")
    try:
        found: Any = importlib.import_module(module)
        return functools.reduce(getattr, name.split("."), found)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"Reward {spec!r} cannot be imported: {error}") from error


def reward_class(name: str) -> Any:
    """The class of a named reward."""
    return getattr(importlib.import_module(f".{name}", __package__), REWARDS[name])
