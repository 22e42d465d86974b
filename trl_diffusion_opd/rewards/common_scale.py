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

"""Brings rewards of different units to a common scale, so that none drowns the others in a mean."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .base import RewardFunc
from .combined import scale_of


@dataclass(frozen=True)
class Reference:
    """
    Means of one reward on one task's evaluation, on the same prompts and noise as the student's.

    Attributes:
        base (`float`, *optional*): the base's.
        teacher (`float`, *optional*): the task's teachers'. `None` without teachers.
        gains (`bool`): whether the teacher is better than the base by more than chance.
    """

    base: float | None = None
    teacher: float | None = None
    gains: bool = False


def is_gain(base: Sequence[float | None], teacher: Sequence[float | None]) -> bool:
    """
    Whether a teacher's scores are better than the base's by more than twice the standard error of the difference.

    Args:
        base, teacher (`list[float | None]`): scores of the same prompts, from the same noise; `None` where the reward
            does not apply.
    """
    pairs = zip(base, teacher, strict=True)
    gains = [other - one for one, other in pairs if one is not None and other is not None]
    if len(gains) < 2:
        return False
    mean = sum(gains) / len(gains)
    variance = sum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1)
    return mean > 0 and mean > 2 * math.sqrt(variance / len(gains))


def on_common_scale(function: RewardFunc, value: float, reference: Reference | None = None) -> float:
    """
    A reward's mean on a scale that all rewards share.

    Where the teacher gains on the base it is the share of that gain, as in the retention report: 0 is the base and 1
    the teacher. Elsewhere it is the reward divided by its scale in [`CombinedReward`].
    """
    if reference is not None and reference.gains and reference.base is not None and reference.teacher is not None:
        return (value - reference.base) / (reference.teacher - reference.base)
    return value / scale_of(function)
