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

"""How far back the moving average of the weights reaches, and what is said of it."""

import math

import pytest
import torch
from torch import nn

from trl_diffusion_opd.models.average import (
    MEAN_AGE,
    average_in_words,
    average_line,
    lag_problem,
    mean_age,
    moving_average,
    step_number,
)
from trl_diffusion_opd.models.student import Student


def averaged(decay, interval, weights):
    """The average after every weight of `weights` was the trained one for an update, the first being that of the start."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor(weights[0], dtype=torch.float64))
    student = Student(model, None, decay, interval)
    for update, value in enumerate(weights[1:], start=1):
        with torch.no_grad():
            model.weight.fill_(value)
        student.update_ema(update)
    (shadow,) = student.ema.shadow_params
    return float(shadow)


def test_weights_count_by_a_power_of_their_update():
    # The closed form of the recurrence a_n = n' / (n' + γ) a_{n-1} + γ / (n' + γ) w_n, where n' = n - 1 as diffusers counts.
    gamma, n = 1 / MEAN_AGE, 40
    shares = []
    for i in range(1, n + 1):
        share = gamma / (i - 1 + gamma)
        for j in range(i + 1, n + 1):
            share *= (j - 1) / (j - 1 + gamma)
        shares.append(share)
    assert sum(shares) == pytest.approx(1.0, abs=1e-12)  # nothing of the start is left
    for i in (1, 20, 39, 40):
        indicator = [0.0] * (n + 1)
        indicator[i] = 1.0
        assert averaged("auto", 1, indicator) == pytest.approx(shares[i - 1], abs=1e-12)
    # In proportion to Γ(i + γ - 1) / Γ(i), which for i beyond γ² is i^(γ - 1): Karras et al., Eq. 7.
    powers = [math.exp(math.lgamma(i + gamma - 1) - math.lgamma(i) - math.lgamma(n + gamma)) for i in range(1, n + 1)]
    assert shares == pytest.approx([power / sum(powers) for power in powers], rel=1e-9)


@pytest.mark.parametrize("updates", [10, 30, 60, 300, 3000])
def test_the_horizon_is_a_share_of_the_run(updates):
    assert mean_age("auto", updates, 1) / updates == pytest.approx(MEAN_AGE, rel=0.15)


@pytest.mark.parametrize(("decay", "interval"), [("auto", 1), ("auto", 7), (0.9, 8), (0.9, 1), (0.5, 3)])
def test_mean_age_is_how_far_a_ramp_lags(decay, interval):
    # Weights that grow by one an update: the average is as many updates behind as it is old.
    updates = 190
    lag = updates - averaged(decay, interval, [float(i) for i in range(updates + 1)])
    assert mean_age(decay, updates, interval) == pytest.approx(lag, abs=1e-9)


def test_what_lags_is_said():
    assert lag_problem("auto", 60, 1) is None
    assert lag_problem(0.9, 3000, 8) is None
    assert lag_problem(None, 60, 8) is None
    said = lag_problem(0.9, 60, 8)
    assert said is not None and "ema_decay=0.9 every 8 updates" in said and "30 updates old after 60" in said
    assert "0.3 updates old in the mean at the end of these 60 updates (0.5% of the run)" in average_line(
        "auto", 60, 1
    )
    assert average_line(0, 60, 1) == "Evaluated and saved: the weights as they are (no moving average)."
    assert average_in_words(0.9, 8) == "0.9 every 8 updates"
    assert average_in_words("auto", 1) == "follows the run (mean age 0.5% of the updates), every update"
    assert average_in_words(0, 1) == "none"


def test_steps_are_counted_where_the_average_follows_the_run():
    assert [step_number("auto", update, 8) for update in (8, 16)] == [1, 2]
    assert [step_number(0.9, update, 8) for update in (8, 16)] == [8, 16]
    assert moving_average([], None) is None and moving_average([], 0) is None
