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

"""GRPO's losses against the papers' equations, in float64, on a small flow whose velocity is an MLP."""

import math

import pytest
import torch
from helpers.noise_grids import sd3_levels
from torch import nn
from torch.distributions import Normal, kl_divergence

from trl_diffusion_opd.algorithms.grpo import (
    clipped_surrogate,
    grpo_loss,
    is_clipped,
    is_masked,
    log_ratio,
    masked_surrogate,
    normalized_log_ratio,
    transition_kl,
)
from trl_diffusion_opd.algorithms.rollout import gaussian, sample_generators, walk
from trl_diffusion_opd.algorithms.samplers import sampler_table, sde_window


LEVELS = [0.97, 0.86, 0.7, 0.45, 0.2, 0.0]
SAMPLES, DIMENSIONS, ETA, BETA, THRESHOLD = 6, 5, 0.6, 0.3, 1e-3
ADVANTAGES = torch.tensor([1.2, -0.7, 0.4, -1.5, 0.9, 0.0], dtype=torch.float64)


class Flow(nn.Module):
    """A velocity of `DIMENSIONS` dimensions."""

    def __init__(self, seed, dtype=torch.float64):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(DIMENSIONS + 1, 16), nn.Tanh(), nn.Linear(16, DIMENSIONS))
        self.to(dtype)

    def forward(self, x, t):
        return self.layers(torch.cat([x, torch.full_like(x[:, :1], t)], dim=1))


def nearby(flow, seed, distance):
    """The flow a few updates later."""
    other = Flow(0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), flow.parameters(), strict=True):
            mine.copy_(theirs + distance * torch.randn(theirs.shape, generator=generator, dtype=torch.float64))
    return other


def papers_step(sampler, v, x, j):
    """Mean and standard deviation of the step from level j, as the sampler's paper writes it."""
    t, t_next = LEVELS[j], LEVELS[j + 1]
    dt = t_next - t
    x0, x1 = x - t * v, x + (1 - t) * v
    if sampler == "cps":
        mean = (1 - t_next) * x0 + t_next * math.cos(ETA * math.pi / 2) * x1
        return mean, t_next * math.sin(ETA * math.pi / 2)
    if sampler == "flow_sde":  # sigma_t = a sqrt(t / (1 - t)), which this grid is far enough from 1 for
        sigma = ETA * math.sqrt(t / (1 - t))
    else:
        sigma = ETA
    return x + (v + sigma**2 / (2 * t) * x1) * dt, sigma * math.sqrt(-dt)


def papers_loss(loss_type, sampler, window, policy, old, base, start, epsilon):
    """Rollout, ratios of probabilities, clipping and KL, step by step as in the papers."""
    x, losses, generators = start, [], noise_of_samples()
    for j in range(len(LEVELS) - 1):
        if j not in window:
            x = (x + (LEVELS[j + 1] - LEVELS[j]) * old(x, LEVELS[j])).detach()
            continue
        mean_old, s = papers_step(sampler, old(x, LEVELS[j]).detach(), x, j)
        x_next = mean_old + s * gaussian(generators, x)
        mean, _ = papers_step(sampler, policy(x, LEVELS[j]), x, j)
        mean_base, _ = papers_step(sampler, base(x, LEVELS[j]).detach(), x, j)
        log_r = (Normal(mean, s).log_prob(x_next) - Normal(mean_old, s).log_prob(x_next)).mean(1)
        factor = 1.0
        if loss_type == "grpo_guard":
            log_r = s * (log_r + ((mean - mean_old) ** 2).mean(1) / (2 * s**2))
            factor = 1 / (LEVELS[j] - LEVELS[j + 1])
        r = log_r.exp()
        surrogate = torch.stack([r * ADVANTAGES, r.clip(1 - epsilon, 1 + epsilon) * ADVANTAGES]).min(0).values
        if loss_type == "dppo":
            apart = kl_divergence(Normal(mean, s), Normal(mean_old, s)).mean(1) > THRESHOLD
            outward = ((ADVANTAGES > 0) & (r > 1)) | ((ADVANTAGES < 0) & (r < 1))
            surrogate = (~(apart & outward)).double() * r * ADVANTAGES
        kl = kl_divergence(Normal(mean, s), Normal(mean_base, s)).mean(1)
        losses.append((-factor * surrogate + BETA * kl).mean())
        x = x_next
    return sum(losses) / len(losses)


def our_loss(loss_type, sampler, window, policy, old, base, start, epsilon):
    table = sde_window(sampler_table(sampler, LEVELS, ETA), window)
    states = {}

    def velocity(j, x, z):
        with torch.no_grad():
            states[j] = (x, old(x, LEVELS[j]), z)
        return states[j][1]

    walk(velocity, start, table, noise_of_samples())
    losses = []
    for j in window:
        x, v_old, z = states[j]
        c, s = float(table.c[j]), float(table.s[j])
        v = policy(x, LEVELS[j])
        loss, *_ = grpo_loss(
            loss_type,
            v,
            v_old,
            z,
            ADVANTAGES.to(x.dtype),
            c=c,
            s=s,
            dt=LEVELS[j + 1] - LEVELS[j],
            epsilon=epsilon,
            divergence_threshold=THRESHOLD,
        )
        losses.append((loss + BETA * transition_kl(v, base(x, LEVELS[j]).detach(), c, s)).mean())
    return sum(losses) / len(losses)


def noise_of_samples():
    return sample_generators([5, 1], range(SAMPLES))


def start_of_walk():
    return torch.randn(SAMPLES, DIMENSIONS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def gradient(loss, flow):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(flow.parameters()))])


@pytest.mark.parametrize("epsilon", [0.02, 0.9])
@pytest.mark.parametrize("sampler", ["flow_sde", "dance_sde", "cps"])
@pytest.mark.parametrize("loss_type", ["flow_grpo", "grpo_guard", "dppo"])
def test_gradients_are_those_of_the_papers(loss_type, sampler, epsilon):
    old = Flow(1)
    policy, base = nearby(old, 2, 0.05), nearby(old, 3, 0.1)
    for window in (range(4), range(1, 3)):
        inputs = (loss_type, sampler, window, policy, old, base, start_of_walk(), epsilon)
        theirs, ours = papers_loss(*inputs), our_loss(*inputs)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
        expected = gradient(theirs, policy)
        assert expected.norm() > 1e-3
        assert (gradient(ours, policy) - expected).norm() / expected.norm() < 1e-9


def test_gradients_in_float32_are_near_those_of_the_papers():
    old = Flow(1)
    policy, base = nearby(old, 2, 0.05), nearby(old, 3, 0.1)
    for loss_type in ("flow_grpo", "grpo_guard", "dppo"):
        inputs = (loss_type, "flow_sde", range(4))
        expected = gradient(papers_loss(*inputs, policy, old, base, start_of_walk(), 0.5), policy)
        copies = [nearby(flow, 0, 0.0).float() for flow in (policy, old, base)]
        ours = gradient(our_loss(*inputs, *copies, start_of_walk().float(), 0.5), copies[0]).double()
        assert (ours - expected).norm() / expected.norm() < 1e-6


def test_clipping_takes_part_in_the_compared_losses():
    old = Flow(1)
    policy = nearby(old, 2, 0.05)
    losses = [
        our_loss("flow_grpo", "flow_sde", range(4), policy, old, old, start_of_walk(), epsilon).item()
        for epsilon in (0.02, 0.9)
    ]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss_type", ["flow_grpo", "grpo_guard", "dppo"])
def test_equal_velocities_have_ratio_one_and_the_policy_gradient(loss_type, dtype):
    generator = torch.Generator().manual_seed(0)
    v = (1e3 * torch.randn(SAMPLES, 4, 8, 8, generator=generator)).to(dtype).requires_grad_()
    z = torch.randn(v.shape, generator=generator)
    advantages = ADVANTAGES.float()
    c, s, dt = -0.11, 0.2, -0.1
    loss, ratio, removed = grpo_loss(loss_type, v, v.detach(), z, advantages, c=c, s=s, dt=dt, epsilon=1e-6)
    assert torch.equal(ratio, torch.ones(SAMPLES)) and not removed.any()
    loss.sum().backward()
    scale = c / abs(dt) if loss_type == "grpo_guard" else c / s
    expected = -scale * advantages.view(-1, 1, 1, 1) * z / z[0].numel()
    assert torch.allclose(v.grad, expected.to(dtype), rtol=1e-5, atol=1e-9)


def test_normalised_ratios_have_mean_zero_and_one_spread():
    generator = torch.Generator().manual_seed(0)
    v, v_old = torch.randn(2, 1, 16, generator=generator, dtype=torch.float64)
    z = torch.randn(40_000, 16, generator=generator, dtype=torch.float64)
    v, v_old = v.expand_as(z), v_old.expand_as(z)
    c = -0.3
    shift = c**2 * (v - v_old)[0].square().mean()
    for s in (0.1, 1.0):
        raw, normalised = log_ratio(v, v_old, z, c, s), normalized_log_ratio(v, v_old, z, c)
        assert raw.mean().item() == pytest.approx(-shift.item() / (2 * s**2), rel=0.05)
        assert normalised.mean().abs() < 0.01 * shift.sqrt()
        assert normalised.std().item() == pytest.approx(math.sqrt(shift / 16), rel=0.02)
        assert torch.allclose(normalised, s * (raw + shift / (2 * s**2)))


@pytest.mark.parametrize(("steps", "factor"), [(10, 4.388), (20, 8.597), (28, 11.904), (40, 16.810)])
def test_a_published_beta_is_weaker_by_the_lengths_of_the_steps(steps, factor):
    """
    Flow-GRPO's code divides the squared distance of its means by `2 std_dev_t ** 2`, in which the length of the step is not.
    The figures are those of the trainer's page, with velocities that differ equally at every trained step.
    """
    levels = sd3_levels(steps)
    table = sampler_table("flow_sde", levels, 0.7)
    x, v, v_base = torch.randn(3, 1, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = [], []
    for j in range(steps - 1):
        sigma, dt = levels[j], levels[j + 1] - levels[j]
        std_dev_t = math.sqrt(sigma / (1 - (levels[1] if sigma == 1 else sigma))) * 0.7
        mean, mean_base = (
            x * (1 + std_dev_t**2 / (2 * sigma) * dt) + u * (1 + std_dev_t**2 * (1 - sigma) / (2 * sigma)) * dt
            for u in (v, v_base)
        )
        theirs.append(((mean - mean_base) ** 2).mean() / (2 * std_dev_t**2))
        ours.append(transition_kl(v, v_base, float(table.c[j]), float(table.s[j])).mean())
        assert ours[j] / theirs[j] == pytest.approx(-1 / dt, rel=1e-6)
    assert sum(ours) / sum(theirs) == pytest.approx(factor, abs=1e-3)


def test_published_log_ratios_of_cps_lack_the_variance():
    """`log_prob = -((prev_sample - prev_sample_mean) ** 2)` there, so a clip there is another here, step by step."""
    levels = sd3_levels()
    table = sampler_table("cps", levels, 0.8)
    x, v, v_old, z = torch.randn(4, 1, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factors = []
    for j in range(8):
        sigma, sigma_prev = levels[j], levels[j + 1]
        std_dev_t = sigma_prev * math.sin(0.8 * math.pi / 2)
        mean, mean_old = (
            (x - sigma * u) * (1 - sigma_prev) + (x + u * (1 - sigma)) * math.sqrt(sigma_prev**2 - std_dev_t**2)
            for u in (v, v_old)
        )
        sample = mean_old + std_dev_t * z
        theirs = (-((sample - mean) ** 2)).mean() + ((sample - mean_old) ** 2).mean()
        factors.append(float(theirs / log_ratio(v, v_old, z, float(table.c[j]), float(table.s[j]))))
        assert factors[j] == pytest.approx(2 * std_dev_t**2, rel=1e-6)
    # As the trainer's page says.
    assert [round(factors[j], 2) for j in (0, 5, 7)] == [1.67, 0.66, 0.14]


def test_clipped_surrogate():
    ratio = torch.tensor([0.5, 0.5, 1.0, 1.5, 1.5], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 2.0, 1.0, -1.0])
    loss = clipped_surrogate(ratio, advantages, 0.2)
    assert loss.tolist() == pytest.approx([-0.5, 0.8, -2.0, -1.2, 1.5])
    loss.sum().backward()
    clipped = is_clipped(ratio.detach(), advantages, 0.2)
    assert clipped.tolist() == [False, True, False, True, False]
    assert torch.equal(ratio.grad == 0, clipped)


def test_masked_surrogate():
    """Only samples that are too far away and would go further are left out, however far the ratio is from 1."""
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.5, 1.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 2.0])
    divergence = torch.tensor([2e-5, 2e-5, 2e-5, 2e-5, 1e-5, 1.0])
    masked = is_masked(ratio.detach(), advantages, divergence, 1e-5)
    assert masked.tolist() == [True, False, False, True, False, False]
    loss = masked_surrogate(ratio, advantages, divergence, 1e-5)
    assert loss.tolist() == [0.0, 1.5, -0.5, 0.0, -1.5, -2.0]
    loss.sum().backward()
    assert torch.equal(ratio.grad, -advantages * ~masked)


def test_masked_loss_is_that_of_the_policy_within_its_threshold_and_lowers_no_divergence_beyond_it():
    generator = torch.Generator().manual_seed(1)
    v_old, z = torch.randn(2, 4000, 16, generator=generator, dtype=torch.float64)
    v = (v_old + 0.1 * torch.randn(v_old.shape, generator=generator, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(len(v), generator=generator, dtype=torch.float64)
    step = dict(c=-0.1, s=0.2, dt=-0.1, epsilon=1e-9)
    free, *_, none = grpo_loss("dppo", v, v_old, z, advantages, **step, divergence_threshold=1.0)
    assert not none.any()
    plain = -(log_ratio(v, v_old, z, -0.1, 0.2).exp() * advantages)
    assert torch.equal(free, plain)
    divergence = transition_kl(v.detach(), v_old, -0.1, 0.2)
    threshold = divergence.median().item()
    loss, ratio, removed = grpo_loss("dppo", v, v_old, z, advantages, **step, divergence_threshold=threshold)
    assert not removed[divergence <= threshold].any() and 0.4 < removed[divergence > threshold].double().mean() < 0.6
    (ours,) = torch.autograd.grad(loss.sum(), v, retain_graph=True)
    (theirs,) = torch.autograd.grad(plain.sum(), v)
    assert torch.equal(ours[~removed], theirs[~removed]) and not ours[removed].any()
    # What is kept beyond the threshold brings the ratio back to 1.
    kept = (divergence > threshold) & ~removed
    assert ((ratio - 1)[kept] * advantages[kept] <= 0).all()


def test_refusals():
    v = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="adds no noise|without noise"):
        log_ratio(v, v, v, -0.1, 0.0)
    with pytest.raises(ValueError, match=r"Noise has shape \(2, 4\) and the velocities \(2, 3\)"):
        log_ratio(v, v, torch.zeros(2, 4), -0.1, 0.1)
    with pytest.raises(ValueError, match="Unknown loss type 'ppo'. Choose one of flow_grpo, grpo_guard, dppo"):
        grpo_loss("ppo", v, v, v, torch.zeros(2), c=-0.1, s=0.1, dt=-0.1, epsilon=0.1)


def test_window_is_noise_between_ode_steps():
    table = sampler_table("cps", LEVELS, ETA)
    windowed, ode = sde_window(table, range(1, 3)), sampler_table("ode", LEVELS)
    for name in ("a", "c", "b", "s"):
        inside, outside = getattr(table, name), getattr(ode, name)
        expected = [inside[j] if j in (1, 2) else outside[j] for j in range(5)]
        assert getattr(windowed, name).tolist() == expected
    assert windowed.levels.tolist() == LEVELS


@pytest.mark.parametrize("window", [range(0), range(2, 6), range(-1, 2)])
def test_windows_outside_the_walk_are_refused(window):
    with pytest.raises(ValueError, match="are not a window of a walk of 5 steps"):
        sde_window(sampler_table("flow_sde", LEVELS), window)


def test_window_over_a_step_without_noise_is_refused():
    with pytest.raises(ValueError, match=r"Steps \[4\] of the sampler 'cps' .* add no noise"):
        sde_window(sampler_table("cps", LEVELS), range(3, 5))
