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

"""The loss of DiffusionNFT against the paper's equations, on a small flow in float64, and what it has its optimum at."""

import copy

import numpy as np
import pytest
import torch
from helpers.noise_grids import sd3_levels
from torch import nn

from trl_diffusion_opd.algorithms.flow import noised
from trl_diffusion_opd.algorithms.nft import (
    draw_levels,
    implicit_velocities,
    nft_loss,
    old_policy_decay,
    optimality,
)


class Flow(nn.Module):
    """A velocity in 6 dimensions, (2, 3) a sample."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 6)).double()

    def forward(self, x, t):
        inputs = torch.cat([x.flatten(1), torch.full((len(x), 1), t, dtype=x.dtype)], 1)
        return self.layers(inputs).view(x.shape)


def sample(seed=0, size=5):
    """Images, noise and optimality."""
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, size, 2, 3, generator=generator, dtype=torch.float64)
    return x0, eps, torch.rand(size, generator=generator, dtype=torch.float64)


def paper_loss(student, old, x0, eps, t, r, beta, adaptive):
    """Algorithm 1 sample by sample, in images where the weights are adaptive and in velocities where there are none."""
    total = 0.0
    for i in range(len(x0)):
        x_t = (1 - t) * x0[i] + t * eps[i]
        v = eps[i] - x0[i]
        v_theta = student(x_t[None], t)[0]
        with torch.no_grad():
            v_old = old(x_t[None], t)[0]
        for weight, policy in (
            (r[i], (1 - beta) * v_old + beta * v_theta),
            (1 - r[i], (1 + beta) * v_old - beta * v_theta),
        ):
            if adaptive:
                x_theta = x_t - t * policy
                with torch.no_grad():
                    normaliser = (x_theta - x0[i]).abs().mean()
                total = total + weight * ((x_theta - x0[i]) ** 2).mean() / normaliser
            else:
                total = total + weight * ((policy - v) ** 2).mean()
    return total / len(x0)


def our_loss(student, old, x0, eps, t, r, beta, weighting):
    x_t = noised(x0, eps, t)
    return nft_loss(student(x_t, t), old(x_t, t), eps - x0, t, r, beta, weighting).mean()


def gradients(loss, model):
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("weighting", ["adaptive", "velocity"])
@pytest.mark.parametrize("beta", [0.1, 1.0, 1.7])
@pytest.mark.parametrize("t", [1.0, 0.6, 0.009])
def test_loss_and_gradients_are_the_papers(weighting, beta, t):
    student, old = Flow(1), Flow(2)
    x0, eps, r = sample()
    ours = our_loss(student, old, x0, eps, t, r, beta, weighting)
    theirs = paper_loss(student, old, x0, eps, t, r, beta, weighting == "adaptive")
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    expected = gradients(theirs, student)
    assert float((gradients(ours, student) - expected).norm() / expected.norm()) < 1e-6
    # Nothing of it reaches the old policy.
    assert all(p.grad is None for p in old.parameters())


@pytest.mark.parametrize("weighting", ["adaptive", "velocity"])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_at_the_old_policy_the_gradient_is_reward_weighted_flow_matching(weighting, beta):
    student = Flow(1)
    old = copy.deepcopy(student)
    x0, eps, r = sample()
    t = 0.7
    ours = gradients(our_loss(student, old, x0, eps, t, r, beta, weighting), student)
    x_t = noised(x0, eps, t)
    error = (student(x_t, t) - (eps - x0)).flatten(1)
    normaliser = t / error.detach().abs().mean(1) if weighting == "adaptive" else 1.0
    flow_matching = (beta * (2 * r - 1) * normaliser * error.square().mean(1)).mean()
    torch.testing.assert_close(ours, gradients(flow_matching, student), rtol=1e-9, atol=1e-14)
    # Images as good as their group's mean say nothing.
    half = torch.full_like(r, 0.5)
    assert float(gradients(our_loss(student, old, x0, eps, t, half, beta, weighting), student).norm()) < 1e-14


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_the_optimum_is_the_old_policy_with_reinforcement_guidance(beta):
    """Theorem 3.2 at one noisy state that several images of the old policy lead to."""
    generator = torch.Generator().manual_seed(3)
    n, t = 7, 0.4
    x0 = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    r, prior = torch.rand(2, n, generator=generator, dtype=torch.float64)
    x_t = torch.randn(4, generator=generator, dtype=torch.float64)
    log_likelihood = -((x_t - (1 - t) * x0).square().sum(1)) / (2 * t**2)
    posterior = torch.softmax(prior.log() + log_likelihood, 0)
    target = (x_t - x0) / t  # eps - x0 with the eps that leads from x0 to x_t
    v_old = posterior @ target
    alpha = posterior @ r
    v_good = (posterior * r) @ target / alpha
    v_bad = (posterior * (1 - r)) @ target / (1 - alpha)
    delta = alpha * (v_good - v_old)
    torch.testing.assert_close(delta, (1 - alpha) * (v_old - v_bad))  # Theorem 3.1

    def expected_loss(v):
        losses = nft_loss(v.expand(n, 4), v_old.expand(n, 4), target, t, r, beta, "velocity")
        return posterior @ losses

    optimum = (v_old + 2 / beta * delta).requires_grad_()
    (gradient,) = torch.autograd.grad(expected_loss(optimum), optimum)
    start = v_old.clone().requires_grad_()
    (at_old,) = torch.autograd.grad(expected_loss(start), start)
    assert float(gradient.norm()) < 1e-12 * float(at_old.norm())
    # Downhill from the old policy is toward the good images.
    assert float(-(at_old @ delta)) > 0


def test_implicit_policies_mirror_each_other():
    student, old = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positive, negative = implicit_velocities(student, old, 0.3)
    torch.testing.assert_close(positive, 0.7 * old + 0.3 * student)
    torch.testing.assert_close(negative, 1.3 * old - 0.3 * student)
    assert torch.equal(implicit_velocities(student, student, 0.3)[0], student)
    torch.testing.assert_close(implicit_velocities(student, old, 1.0)[0], student)


def test_half_precision_is_widened_before_the_subtraction():
    generator = torch.Generator().manual_seed(0)
    v_old, target = torch.randn(2, 3, 4, 8, generator=generator)
    v_student = v_old + 0.01 * torch.randn(3, 4, 8, generator=generator)
    narrow = [v.bfloat16() for v in (v_student, v_old)]
    r = torch.tensor([0.0, 0.3, 1.0])
    loss = nft_loss(*narrow, target, 0.5, r, 1.0)
    expected = nft_loss(*(v.double() for v in narrow), target.double(), 0.5, r, 1.0)
    assert loss.dtype == torch.float32 and expected.dtype == torch.float64
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_perfect_prediction_is_finite():
    target = torch.ones(2, 3)
    student = target.clone().requires_grad_()
    loss = nft_loss(student, target, target, 0.5, torch.tensor([1.0, 0.0]), 1.0)
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(2)) and torch.equal(student.grad, torch.zeros(2, 3))


def test_optimality():
    rewards = torch.tensor([[0.0, 1.0, 2.0, 9.0], [3.0, 3.0, 3.0, 3.0]], dtype=torch.float64)
    z = 4.0
    advantages = rewards - rewards.mean(1, keepdim=True)
    expected = [[0.5 - 3 / 8, 0.5 - 2 / 8, 0.5 - 1 / 8, 1.0], [0.5] * 4]
    torch.testing.assert_close(optimality(advantages, z), torch.tensor(expected, dtype=torch.float64))
    # In units of a deviation, Z is so many of them.
    torch.testing.assert_close(optimality(advantages / 0.8, z / 0.8), optimality(advantages, z))
    assert float(optimality(torch.tensor(-1e9), 5.0)) == 0.0


def test_decay_of_the_old_policy():
    # The schedules of the paper's Appendix C and of its experiment with text.
    assert [old_policy_decay(i, 0.001, 0.5) for i in (0, 1, 100, 500, 9999)] == [0.0, 0.001, 0.1, 0.5, 0.5]
    late = [old_policy_decay(i, 0.0075, 0.999, start=75) for i in (0, 75, 76, 1000)]
    assert late == pytest.approx([0.0, 0.0, 0.0075, 0.999])


def test_levels_of_the_grid():
    grid = sd3_levels(10)
    generator = np.random.default_rng(0)
    draws = [draw_levels(grid, 3, "grid", generator) for _ in range(4000)]
    counts = {level: sum(level in drawn for drawn in draws) for level in grid}
    assert all(drawn == sorted(set(drawn), reverse=True) and len(drawn) == 3 for drawn in draws)
    assert counts.pop(0.0) == 0
    # 4000 draws of probability 0.3: a standard deviation is 29.
    assert all(abs(count - 1200) < 5 * 29 for count in counts.values())
    assert draw_levels(grid, 10, "grid", generator) == grid[:-1]
    assert draw_levels(grid, 3, "grid", np.random.default_rng(7)) == draw_levels(
        grid, 3, "grid", np.random.default_rng(7)
    )


def test_levels_between_those_of_the_grid():
    generator = np.random.default_rng(0)
    draws = np.array([draw_levels(sd3_levels(4), 5, "uniform", generator) for _ in range(2000)])
    assert draws.shape == (2000, 5)  # more than the grid has
    strata = [((5 - j) / 5, (4 - j) / 5) for j in range(5)]
    for column, (high, low) in zip(draws.T, strata, strict=True):
        assert low <= column.min() < low + 0.01 and high - 0.01 < column.max() <= high
        assert abs(column.mean() - (high + low) / 2) < 5 * 0.2 / 12**0.5 / 2000**0.5
    assert draws.min() > 0 and draws.max() <= 1


def test_refusals():
    v = torch.zeros(2, 3)
    r = torch.zeros(2)
    with pytest.raises(ValueError, match="beta=0: it must be positive"):
        nft_loss(v, v, v, 0.5, r, 0)
    with pytest.raises(ValueError, match="Unknown loss weighting 'kl'. Choose one of adaptive, velocity"):
        nft_loss(v, v, v, 0.5, r, 1.0, "kl")
    with pytest.raises(ValueError, match=r"don't fit together: shapes \[\(2, 3\), \(2, 3\), \(2, 3\), \(3,\)\]"):
        nft_loss(v, v, v, 0.5, torch.zeros(3), 1.0)
    with pytest.raises(ValueError, match="clipped at 0"):
        optimality(r, 0.0)
    with pytest.raises(ValueError, match="11 noise levels can't be drawn from a grid of 10 steps"):
        draw_levels(sd3_levels(10), 11, "grid", np.random.default_rng(0))
    with pytest.raises(ValueError, match="Unknown sampling of noise levels 'logit'"):
        draw_levels(sd3_levels(10), 1, "logit", np.random.default_rng(0))
