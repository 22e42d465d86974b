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

"""The statistics of sampled gradients against distributions whose signal and noise are known."""

import math
import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "claims"))

from gradient_statistics import Moments, against, corrected_cosine, cosine  # noqa: E402
from gradients import FORMS, over_seeds, predicted, velocity_gradients  # noqa: E402


P, N = 400, 20


def moments(mean, noise, n, generator):
    """Moments of n samples of total variance `noise`."""
    sums = Moments()
    spread = math.sqrt(noise / len(mean))
    for rows in (mean + spread * torch.randn(n, len(mean), generator=generator)).split(7):
        sums.add(rows)
    return sums


def directions(angle_cosine, generator):
    """Two unit vectors with a known cosine."""
    a, b = torch.linalg.qr(torch.randn(P, 2, generator=generator)).Q.T
    return a, angle_cosine * a + math.sqrt(1 - angle_cosine**2) * b


def test_signal_noise_and_reliability():
    generator = torch.Generator().manual_seed(0)
    mean, _ = directions(0.0, generator)
    trials = [moments(mean, 30.0, N, generator) for _ in range(100)]

    def average(name):
        return sum(getattr(trial, name) for trial in trials) / len(trials)

    assert average("noise") == pytest.approx(30.0, rel=0.01)
    assert average("signal") == pytest.approx(1.0, rel=0.03)
    assert average("reliability") == pytest.approx(1 / (1 + 30.0 / N), rel=0.03)
    # The length of the mean itself is that of the noise, mostly.
    assert float(trials[0].mean.square().sum()) == pytest.approx(2.5, rel=0.3)


def test_reliability_is_the_split_half_cosine_stepped_up():
    generator = torch.Generator().manual_seed(1)
    mean, _ = directions(0.0, generator)
    halves, stepped = [], []
    for _ in range(200):
        one, two = (moments(mean, 30.0, N // 2, generator) for _ in range(2))
        halves.append(cosine(one.mean, two.mean))
        whole = Moments()
        whole.n, whole.total = one.n + two.n, one.total + two.total
        whole.sum_of_squares = one.sum_of_squares + two.sum_of_squares
        stepped.append(whole.reliability)
    r = sum(halves) / len(halves)
    assert sum(stepped) / len(stepped) == pytest.approx(2 * r / (1 + r), abs=0.02)


@pytest.mark.parametrize("truth", [-0.5, 0.0, 0.8])
def test_corrected_cosine_takes_the_noise_out(truth):
    generator = torch.Generator().manual_seed(2)
    a, b = directions(truth, generator)
    raw, corrected = [], []
    for _ in range(100):
        one, two = moments(a, 30.0, N, generator), moments(3 * b, 90.0, N, generator)
        raw.append(cosine(one.mean, two.mean))
        corrected.append(corrected_cosine(one, two))
    attenuation = math.sqrt(1 / (1 + 30 / N) * 9 / (9 + 90 / N))
    assert sum(raw) / 100 == pytest.approx(attenuation * truth, abs=0.02)
    assert sum(corrected) / 100 == pytest.approx(truth, abs=0.03)


def test_a_mean_of_noise_has_no_corrected_cosine():
    a, b = Moments(), Moments()
    a.add(torch.tensor([[1.0, 0.0], [-1.0, 0.1]]))
    b.add(torch.tensor([[1.0, 0.0], [1.0, 0.1]]))
    assert a.reliability < 0 < b.reliability
    assert corrected_cosine(a, b) is None
    seeds = over_seeds([{"corrected": {"x": None}}, {"corrected": {"x": 0.5}}])
    assert seeds == {"corrected": {"x": {"mean": None, "seeds": [None, 0.5]}}}


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_against_the_exact_gradient(scale):
    generator = torch.Generator().manual_seed(3)
    exact, _ = directions(0.0, generator)
    figures = against(moments(scale * exact, 40 * scale**2, 4000, generator), exact, scale)
    assert figures["nsr"] == pytest.approx(40, rel=0.01)
    assert figures["norm_ratio"] == pytest.approx(scale, rel=0.02)
    assert figures["cosine"] == pytest.approx(1 / math.sqrt(1 + 40 / 4000), abs=1e-3)
    assert figures["corrected"] == pytest.approx(1, abs=1e-3)


def test_forms_have_the_predicted_noise_and_mean():
    generator = torch.Generator().manual_seed(4)
    d, c, s = 16, -0.2, 0.3
    v = torch.randn(1, 4, 2, 2, generator=generator)
    target = v + 2 * torch.randn(v.shape, generator=generator)
    z = torch.randn(200_000, 4, 2, 2, generator=generator)
    exact = velocity_gradients("closed_form", v, target, z[:1], c, s).flatten()
    kl = float((c * (v - target) / s).square().sum() / 2)
    assert 1 < kl < 100
    expected = predicted(kl, d, rho=d)
    assert expected.keys() == FORMS.keys()
    for form in FORMS:
        sums, scale = Moments(), 1 / d if form == "log_ratio_baseline_mean" else 1.0
        sums.add(velocity_gradients(form, v, target, z, c, s).flatten(1))
        figures = against(sums, exact, scale)
        assert figures["nsr"] == pytest.approx(expected[form], rel=0.03, abs=1e-6), form
        assert figures["norm_ratio"] == pytest.approx(scale, rel=0.05), form
        assert figures["corrected"] == pytest.approx(1, abs=0.01), form
