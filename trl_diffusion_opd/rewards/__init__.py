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
Reward functions in TRL's form: `f(prompts, images, completions, **columns, trainer_state) -> list[float | None]`.

They are called by keyword. `images` and `completions` are the same PIL images, so that functions written for TRL work.
A video is a list of its frames, which [`frames`] has any reward for images score.
`columns` are the dataset's other columns, each as a list. A score of `None` means that the reward does not apply to a
sample. A function's name is the name of its metric. Distillation only measures rewards; they never enter its loss.
"""

import importlib
from typing import Any

from .assignment import RewardFuncs, reward_data_problems, rewards_by_task
from .base import Reward, RewardFunc, Row, reward_fingerprint, reward_name
from .combined import CombinedReward, check_reward, load_reward

# At once, since the function has its module's name, which an import of the module would put in its place.
from .frames import frames
from .names import REWARDS, reward_class
from .scoring import Scorer, score


# Imported on first use: `evaluate` is slow to load, and the named rewards are listed in names.REWARDS.
_LAZY = {
    "RemoteRewardError": "server_calls",
    "RewardMetric": "metric",
    "VideoReward": "video",
    "as_metric": "metric",
    **{class_name: module for module, class_name in REWARDS.items()},
}

__all__ = [
    "REWARDS",
    "CombinedReward",
    "Reward",
    "RewardFunc",
    "RewardFuncs",
    "Row",
    "Scorer",
    "check_reward",
    "frames",
    "load_reward",
    "reward_class",
    "reward_data_problems",
    "reward_fingerprint",
    "reward_name",
    "rewards_by_task",
    "score",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
