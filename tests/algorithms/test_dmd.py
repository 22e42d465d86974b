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

"""DMD2 and TDM: gradients against the papers' formulas in float64, levels and noise against closed forms."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from trl_diffusion_opd import sampler_table
from trl_diffusion_opd.algorithms.dmd import (
    fake_loss,
    image_of,
    noise_left,
    noise_of,
    noised_further,
    renoise_levels,
    student_loss,
)
from trl_diffusion_opd.algorithms.flow import noised
from trl_diffusion_opd.algorithms.samplers import SAMPLERS, STOCHASTIC_SAMPLERS


B, D = 5, 6


class Flow(nn.Module):
    """A small network for velocities."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(D + 1, 16), nn.Tanh(), nn.Linear(16, D)).double()

    def forward(self, x, t):
        return self.layers(torch.cat([x, t.reshape(-1, 1)], dim=1))


def gradient(loss, network):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


@pytest.fixture
def world():
    """Networks, and the states, levels and noise of a stage."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda: torch.randn(B, D, generator=generator, dtype=torch.float64)  # noqa: E731
    student, real, fake = (Flow(seed) for seed in range(3))
    start = torch.tensor([1.0, 0.9, 0.7, 0.9, 0.4], dtype=torch.float64)
    middle = torch.tensor([0.9, 0.7, 0.4, 0.7, 0.0], dtype=torch.float64)
    t = torch.tensor([0.95, 0.8, 0.55, 0.71, 0.3], dtype=torch.float64)
    return student, real, fake, draw(), start, middle, t, draw()


def test_gradients_of_dmd2(world):
    student, real, fake, x, start, _, t, eps = world
    c = (slice(None), None)
    # The paper: a target from which the gradient is cut, weighed by the teacher's own error.
    x0 = x - start[c] * student(x, start)
    x_t = (1 - t[c]) * x0.detach() + t[c] * eps
    x_r, x_f = (x_t - t[c] * net(x_t, t) for net in (real, fake))
    g = (x_f - x_r) / (x0 - x_r).abs().mean(1, keepdim=True)
    wanted = 0.5 * ((x0 - (x0 - g).detach()) ** 2).mean()
    wanted_fake = ((fake(x_t, t) - (eps - x0.detach())) ** 2).mean()

    image = image_of(x, student(x, start), start)
    noisy = noised_further(image.detach(), eps, torch.zeros(B, dtype=torch.float64), t)
    assert torch.allclose(noisy, noised(image.detach(), eps, t), atol=1e-14)
    ours = student_loss(image, noisy, t, real(noisy, t), fake(noisy, t), "dmd2").mean()
    ours_fake = fake_loss(fake(noisy, t), noisy, t, image.detach(), eps, "dmd2").mean()
    for mine, theirs, network in ((ours, wanted, student), (ours_fake, wanted_fake, fake)):
        assert mine.item() == pytest.approx(theirs.item(), rel=1e-10)
        a, b = gradient(mine, network), gradient(theirs, network)
        assert float((a - b).norm() / b.norm()) < 1e-6


@pytest.mark.parametrize("huber_c", [1e-3, 0.3, 0.0])
def test_gradients_of_tdm(world, huber_c):
    student, real, fake, x, start, middle, t, z = world
    c = (slice(None), None)
    v = student(x, start)
    x0, eps = x - start[c] * v, x + (1 - start[c]) * v
    r = (1 - t) / (1 - middle)
    beta = (t**2 - (r * middle) ** 2).sqrt()
    mixed = (((r * middle)[c] * eps + beta[c] * z) / t[c]).detach()
    x_t = (1 - t[c]) * x0.detach() + t[c] * mixed
    x_r, x_f = (x_t - t[c] * net(x_t, t) for net in (real, fake))
    e = x0 - (x0 + x_r - x_f).detach()
    size = e**2 if huber_c == 0 else (e**2 + huber_c**2).sqrt() - huber_c
    wanted = (size / (x0 - x_r).abs().mean(1, keepdim=True).detach()).mean()
    snr = ((1 - t) / t) ** 2
    wanted_fake = (snr.clamp(max=5) * ((x_f - x0.detach()) ** 2).mean(1)).mean()

    v = student(x, start)
    image = image_of(x, v, start)
    assert torch.allclose(noise_of(x, v, start), image + v, atol=1e-14)
    end = (1 - middle[c]) * image + middle[c] * noise_of(x, v, start)  # where the stage ends
    noisy = noised_further(end.detach(), z, middle, t)
    ours = student_loss(image, noisy, t, real(noisy, t), fake(noisy, t), "tdm", huber_c).mean()
    ours_fake = fake_loss(fake(noisy, t), noisy, t, image.detach(), z, "tdm").mean()
    for mine, theirs, network in ((ours, wanted, student), (ours_fake, wanted_fake, fake)):
        assert mine.item() == pytest.approx(theirs.item(), rel=1e-8)
        a, b = gradient(mine, network), gradient(theirs, network)
        assert float((a - b).norm() / b.norm()) < 1e-6


def test_further_noise_has_the_variance_of_its_level():
    x0, spread = 2.0, 0.5
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 200_000, generator=generator, dtype=torch.float64)
    t_from = torch.tensor([0.0, 0.3, 0.6], dtype=torch.float64)
    t = torch.tensor([0.4, 0.9, 0.6], dtype=torch.float64)
    x = (1 - t_from[:, None]) * (x0 + spread * z[1]) + t_from[:, None] * z[0]
    out = noised_further(x, z[2].expand(3, -1), t_from, t)
    assert torch.allclose(out.mean(1), (1 - t) * x0, atol=5e-3)
    assert torch.allclose(out.var(1), ((1 - t) * spread) ** 2 + t**2, rtol=1e-2)
    assert torch.equal(out[2], x[2])  # to the same level


def test_levels_are_shifted_and_stay_in_their_stage():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(1000)
    levels = scheduler.sigmas.double()
    q = torch.linspace(0, 1 - 1e-9, 101, dtype=torch.float64)
    whole = renoise_levels(q, [(0.0, 1.0)] * 101, levels, 0.02, 0.98)
    # The shift of a uniform timestep u is 3 u / (1 + 2 u); the grid's last step is its own.
    u = 0.98 - 0.96 * q
    assert float((whole - 3 * u / (1 + 2 * u)).abs().max()) < 1e-2
    stage = renoise_levels(q, [(0.4, 0.7)] * 101, levels, 0.02, 0.98)
    assert float(stage[0]) == pytest.approx(0.7) and float(stage[-1]) == pytest.approx(0.4, abs=1e-6)
    ends = [3 * t / (1 + 2 * t) for t in (0.98, 0.02)]
    for stage in ((0.9, 1.0), (0.0, 0.5)):  # cut at the limits
        found = renoise_levels(q, [stage] * 101, levels, 0.02, 0.98)
        assert float(found.max()) <= max(ends) + 1e-3 and float(found.min()) >= min(ends) - 1e-3
    beyond = renoise_levels(q, [(0.995, 1.0)] * 101, levels, 0.02, 0.98)
    assert float(beyond.min()) > 0.994  # a stage outside of them keeps its own


def test_noise_that_a_walk_ends_with():
    levels = [1.0, 0.86, 0.65, 0.3, 0.0]
    left = {name: noise_left(sampler_table(name, levels)) for name in SAMPLERS}
    assert {name for name, noise in left.items() if noise > 0} == {"flow_sde", "dance_sde"}
    # Data without spread, walked with its exact velocity (x - x0) / t: the last state is x0 and this noise.
    for name in STOCHASTIC_SAMPLERS:
        table = sampler_table(name, levels)
        a, c, s, t = (float(column[-1]) for column in (table.a, table.c, table.s, table.levels[:-1]))
        variance = (a + c / t) ** 2 * t**2 + s**2
        assert np.sqrt(variance) == pytest.approx(left[name], abs=1e-6)
    assert noise_left(sampler_table("flow_sde", levels, 0.0)) == 0


@pytest.mark.parametrize("call", [student_loss, fake_loss])
def test_unknown_losses_are_refused(call):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="Unknown loss 'dmd'. Choose one of dmd2, tdm."):
        call(x, x, torch.ones(2), x, x, "dmd")


def test_equal_scores_leave_the_student_alone():
    x0 = torch.randn(2, 3, requires_grad=True)
    v = torch.randn(2, 3)
    for loss_type in ("dmd2", "tdm"):
        loss = student_loss(x0, x0.detach(), torch.full((2,), 0.5), v, v, loss_type)
        (gradient,) = torch.autograd.grad(loss.sum(), x0)
        assert not loss.any() and not gradient.any()
