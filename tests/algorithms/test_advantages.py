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

"""Advantages against loops over groups in plain Python."""

import math
import statistics

import pytest
import torch

from trl_diffusion_opd.algorithms.advantages import constant_groups, group_advantages, weighted_rewards


NAN = math.nan
# Two rewards of three prompts with four completions each: None in some, one completion that none applies to.
REWARDS = torch.tensor(
    [
        *([0.1, 5.0], [0.4, NAN], [0.9, 7.5], [0.2, 6.0]),
        *([0.3, 1.0], [NAN, NAN], [0.5, NAN], [NAN, 2.0]),
        *([0.6, 3.0], [0.6, 3.0], [0.6, 3.0], [0.6, 3.0]),
    ],
    dtype=torch.float64,
)
WEIGHTS = torch.tensor([2.0, 0.5])


def std(values):
    return statistics.stdev(values) if len(values) > 1 else None


def total(row):
    applicable = [(value, weight) for value, weight in zip(row, [2.0, 0.5], strict=True) if not math.isnan(value)]
    return sum(value * weight for value, weight in applicable) if applicable else None


def known(values):
    return [value for value in values if value is not None]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_sums_are_normalised(scale):
    totals = [total(row) for row in REWARDS.tolist()]
    expected = []
    for start in range(0, 12, 4):
        group = totals[start : start + 4]
        divisor = {"group": std(known(group)), "batch": std(known(totals)), "none": None}[scale]
        divisor = 1.0 if divisor is None else divisor + 1e-4
        mean = statistics.mean(known(group))
        expected += [0.0 if value is None else (value - mean) / divisor for value in group]
    ours = group_advantages(REWARDS, WEIGHTS, 4, scale)
    assert ours.dtype == torch.float64
    assert ours.tolist() == pytest.approx(expected, abs=1e-12)
    assert ours[5] == 0 and ours[8:].tolist() == pytest.approx([0] * 4, abs=1e-9)


def test_each_reward_is_normalised_before_the_sum():
    summed = []
    for start in range(0, 12, 4):
        group = REWARDS[start : start + 4].tolist()
        for row in group:
            parts = []
            for k, weight in enumerate([2.0, 0.5]):
                column = [other[k] for other in group if not math.isnan(other[k])]
                if not math.isnan(row[k]) and len(column) > 1:
                    parts.append(weight * (row[k] - statistics.mean(column)) / (std(column) + 1e-4))
            summed.append(None if all(map(math.isnan, row)) else sum(parts))
    mean, spread = statistics.mean(known(summed)), std(known(summed))
    expected = [0.0 if value is None else (value - mean) / (spread + 1e-4) for value in summed]
    ours = group_advantages(REWARDS, WEIGHTS, 4, aggregation="normalize_then_sum")
    assert ours.tolist() == pytest.approx(expected, abs=1e-12)


def test_normalising_first_makes_the_scale_of_a_reward_irrelevant():
    scaled = REWARDS * torch.tensor([1.0, 1000.0])
    first, second = (group_advantages(r, WEIGHTS, 4, aggregation="normalize_then_sum") for r in (REWARDS, scaled))
    assert torch.allclose(first, second, atol=1e-3)
    assert not torch.allclose(group_advantages(REWARDS, WEIGHTS, 4), group_advantages(scaled, WEIGHTS, 4), atol=1e-2)


def test_a_completion_alone_with_a_reward_has_no_advantage():
    rewards = torch.tensor([[3.0], [NAN], [NAN], [1.0], [2.0], [NAN]])
    assert group_advantages(rewards, torch.ones(1), 3)[:3].tolist() == [0, 0, 0]
    assert group_advantages(rewards, torch.ones(1), 3)[3:].tolist() == pytest.approx([-0.70701, 0.70701, 0], abs=1e-4)


@pytest.mark.parametrize(("scale", "aggregation"), [("batch", "sum_then_normalize"), ("group", "normalize_then_sum")])
def test_rare_successes_are_clipped(scale, aggregation):
    """One image in 1,152 has what is asked for: 48 prompts of 24 images."""
    rewards = torch.zeros(1152, 1)
    rewards[30] = 1.0
    whole = group_advantages(rewards, torch.ones(1), 24, scale, aggregation)
    clipped = group_advantages(rewards, torch.ones(1), 24, scale, aggregation, clip=5.0)
    if scale == "batch":
        assert whole.max() == pytest.approx(23 / 24 / (1152**-0.5 + 1e-4), rel=1e-6) and whole.max() > 32
    assert whole.max() > 5 and clipped.max() == 5.0
    others = torch.arange(1152) != 30
    assert torch.equal(clipped[others], whole[others]) and clipped[others].abs().max() < 5
    assert torch.equal(group_advantages(-rewards, torch.ones(1), 24, scale, aggregation, clip=5.0), -clipped)


def test_groups_of_26_reach_no_clip_of_5():
    rewards = torch.zeros(27, 1)
    rewards[0] = 1.0
    assert (
        group_advantages(rewards[:26], torch.ones(1), 26).max()
        < 5
        < group_advantages(rewards * 1e9, torch.ones(1), 27).max()
    )


def test_weighted_rewards():
    values = weighted_rewards(REWARDS, WEIGHTS).tolist()
    assert values[0] == pytest.approx(2.7) and values[1] == pytest.approx(0.8) and values[7] == pytest.approx(1.0)
    assert math.isnan(values[5])


def test_constant_groups():
    assert constant_groups(REWARDS, 4).tolist() == [[False, False], [False, False], [True, True]]
    assert constant_groups(REWARDS[:, 0], 4).tolist() == [False, False, True]
    # A mean of equal numbers need not be that number.
    assert constant_groups(torch.full((7, 1), 0.1), 7).tolist() == [[True]]
    assert constant_groups(torch.tensor([1.0, NAN, NAN, NAN]), 2).tolist() == [True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 5}, "12 completions are not whole groups of 5"),
        ({"num_generations": 4, "scale_rewards": "std"}, "Unknown scaling 'std'"),
        ({"num_generations": 4, "aggregation": "sum"}, "Unknown aggregation 'sum'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(REWARDS, WEIGHTS, **options)
