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

"""Rewards of different units on one scale."""

import pytest
from helpers.stub_reward import brightness

from trl_diffusion_opd.rewards import CombinedReward, Reward
from trl_diffusion_opd.rewards.combined import scale_of
from trl_diffusion_opd.rewards.common_scale import Reference, is_gain, on_common_scale


class Pick(Reward):
    name = "pickscore"
    bounds = (None, None)

    def __call__(self, prompts, images, completions=None, trainer_state=None, **columns):
        return [22.0] * len(images)


def pickscore(images, **columns):  # a user's own function of the name has a unit that nobody knows
    return [0.5] * len(images)


def test_scales_are_those_of_a_sum():
    assert (scale_of(Pick()), scale_of(pickscore), scale_of(brightness)) == (26.0, 1.0, 1.0)
    assert CombinedReward({Pick(): 1, brightness: 1}).scales == {"pickscore": 26.0, "brightness": 1.0}
    assert scale_of(CombinedReward({Pick(): 1})) == 1.0  # it is scaled already


def test_the_share_of_the_teachers_gain_where_there_is_one():
    assert on_common_scale(Pick(), 22.5, Reference(21.0, 24.0, True)) == 0.5
    assert on_common_scale(brightness, 0.1, Reference(0.2, 0.4, True)) == pytest.approx(-0.5)  # not clipped
    for reference in (None, Reference(21.0), Reference(21.0, 24.0, False), Reference(None, None, True)):
        assert on_common_scale(Pick(), 13.0, reference) == 0.5


def test_a_gain_is_more_than_chance():
    base = [0.1, 0.5, 0.3, 0.2]
    assert is_gain(base, [score + gain for score, gain in zip(base, (0.1, 0.3, 0.2, 0.2), strict=True)])
    # The same mean gain, from one image alone; a loss; one image; where the reward does not apply.
    assert not is_gain(base, [base[0] + 0.8, *base[1:]])
    assert not is_gain(base, [score - 0.2 for score in base])
    assert not is_gain([0.0], [1.0])
    assert not is_gain([0.0, None, 0.0], [1.0, 1.0, None])
    assert is_gain([0.0, 0.0, None], [1.0, 1.0, 0.0])
