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

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from helpers.noise_grids import GRIDS, sd3_levels, uniform_levels, vp_levels, vp_scheduler

from trl_diffusion_opd.algorithms.rollout import sample_generators, walk
from trl_diffusion_opd.algorithms.samplers import SAMPLERS, STOCHASTIC_SAMPLERS, SamplerTable, sampler_table


ETAS = {"ode": [None], "dpm2m": [None], "flow_sde": [0.3, 0.7, 1.2], "dance_sde": [0.1, 0.7, 1.2]}
SAMPLER_ETAS = [(name, eta) for name in SAMPLERS for eta in ETAS.get(name, [0.0, 0.7, 1.0])]
EVERY_SAMPLER = pytest.mark.parametrize(("name", "eta"), SAMPLER_ETAS)
EVERY_GRID = pytest.mark.parametrize("levels", GRIDS.values(), ids=GRIDS.keys())


def row(table: SamplerTable, j: int) -> SamplerTable:
    """Step `j` alone, as a walk of one step."""
    columns = (column[j : j + 1] for column in (table.a, table.c, table.b, table.s))
    return SamplerTable(*columns, table.levels[j : j + 2], table.name)


def diffusion_sq(name: str, eta: float, levels: list[float], j: int) -> float:
    """Squared diffusion coefficient of the two SDEs, from their papers."""
    t = levels[j]
    length = t - levels[j + 1]
    if name == "flow_sde":
        capped = j == 0 and eta**2 * length >= 2 * (1 - t)
        return eta**2 * t / (1 - (levels[1] if capped else t))
    return 0.0 if eta**2 * length > 2 * t * (t + levels[j + 1]) else eta**2


def reference_step(name, eta, levels, j, x, v, previous_x0):
    """Mean and standard deviation of a step, written with the image, the noise, the score and log-SNRs."""
    t, t_next = levels[j], levels[j + 1]
    x0, eps = x - t * v, x + (1 - t) * v
    if name == "ode":
        return (1 - t_next) * x0 + t_next * eps, 0.0
    if name in ("flow_sde", "dance_sde"):
        g_sq = diffusion_sq(name, eta, levels, j)
        score = -eps / t
        return x - (t - t_next) * (v - g_sq / 2 * score), math.sqrt(g_sq * (t - t_next))
    if name == "cps":
        fresh = t_next * math.sin(eta * math.pi / 2)
        return (1 - t_next) * x0 + t_next * math.cos(eta * math.pi / 2) * eps, fresh
    if name == "ddim":
        # In the variance-preserving scale of the DDIM paper, with its cumulative alpha.
        scale = math.hypot(1 - t_next, t_next)
        alpha, alpha_next = (1 - t) ** 2 / ((1 - t) ** 2 + t**2), (1 - t_next) ** 2 / scale**2
        sigma = eta * math.sqrt((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next))
        kept = math.sqrt(max(1 - alpha_next - sigma**2, 0.0))
        return scale * (math.sqrt(alpha_next) * x0 + kept * eps), scale * sigma
    log_snr = [math.log((1 - level) / level) if 0 < level < 1 else math.inf * (0.5 - level) for level in levels]
    data = x0
    if j > 0 and t_next > 0 and levels[j - 1] < 1:
        h, h_previous = log_snr[j + 1] - log_snr[j], log_snr[j] - log_snr[j - 1]
        if h / h_previous <= 2:
            data = x0 + h / h_previous / 2 * (x0 - previous_x0)
    decay = math.exp(log_snr[j] - log_snr[j + 1])
    return t_next / t * x + (1 - t_next) * (1 - decay) * data, 0.0


@EVERY_SAMPLER
@EVERY_GRID
def test_steps_equal_the_direct_formulas(name, eta, levels):
    generator = torch.Generator().manual_seed(0)
    table = sampler_table(name, levels, eta)
    assert len(table) == len(levels) - 1
    assert table.a.dtype == table.c.dtype == table.b.dtype == table.s.dtype == table.levels.dtype == torch.float64
    for j in range(len(table)):
        x, v, previous_x0 = torch.randn(3, 5, generator=generator, dtype=torch.float64)
        mean, std = reference_step(name, eta, levels, j, x, v, previous_x0)
        torch.testing.assert_close(
            table.a[j] * x + table.c[j] * v + table.b[j] * previous_x0, mean, rtol=0, atol=1e-12
        )
        assert table.s[j].item() == pytest.approx(std, abs=1e-12)


@EVERY_SAMPLER
@EVERY_GRID
def test_image_part_is_scaled_exactly(name, eta, levels):
    table = sampler_table(name, levels, eta)
    t, t_next = table.levels[:-1], table.levels[1:]
    torch.testing.assert_close(table.a * (1 - t) - table.c + table.b, 1 - t_next, rtol=0, atol=1e-14)


@EVERY_SAMPLER
@EVERY_GRID
@pytest.mark.parametrize(("m", "sigma"), [(0.4, 0.0), (-1.3, 0.6), (2.0, 1.5)])
def test_marginal_after_one_step(name, eta, levels, m, sigma):
    """From the exact marginal of N(m, sigma²) data, with its exact velocity, one step has a known mean and variance."""
    table = sampler_table(name, levels, eta)
    for j in range(len(table)):
        if table.b[j] != 0:
            continue  # second order: not a function of the state alone
        t, t_next, dt = levels[j], levels[j + 1], levels[j + 1] - levels[j]
        variance = (1 - t) ** 2 * sigma**2 + t**2
        variance_next = (1 - t_next) ** 2 * sigma**2 + t_next**2

        drawn = []

        def velocity(_, x, z, t=t, variance=variance, drawn=drawn):
            drawn.append(z)
            # E[eps - x0 | x] for Gaussian data
            return (t - (1 - t) * sigma**2) / variance * (x - (1 - t) * m) - m

        start = torch.tensor([(1 - t) * m], dtype=torch.float64)
        ends = [
            walk(velocity, start + offset, row(table, j), sample_generators([seed], [0]))
            for offset, seed in ((0, 1), (0, 2), (1, 1))
        ]
        one, other = (0.0 if z is None else z.double() for z in drawn[:2])
        spread = (ends[0] - ends[1]) / (one - other) if table.s[j] > 0 else torch.zeros(1)
        mean, slope = ends[0] - spread * one, ends[2] - ends[0]

        if name in ("flow_sde", "dance_sde"):
            g_sq = diffusion_sq(name, eta, levels, j)
            e = g_sq * dt**2 / t * (1 + g_sq / (4 * t))
        else:
            e = 0.0
        expected = variance_next + e - table.c[j].item() ** 2 * sigma**2 / variance
        assert mean.item() == pytest.approx((1 - t_next) * m, abs=1e-12)
        assert (slope**2 * variance + spread**2).item() == pytest.approx(expected, abs=1e-12)


def final_variance(name: str, levels: list[float], sigma: float) -> float:
    """Variance at the end of a whole walk for N(0, sigma²) data with its exact velocity."""
    table, variance = sampler_table(name, levels), 1.0
    for j in range(len(table)):
        t = levels[j]
        slope = table.a[j] + table.c[j] * (t - (1 - t) * sigma**2) / ((1 - t) ** 2 * sigma**2 + t**2)
        variance = (slope**2 * variance + table.s[j] ** 2).item()
    return variance


def test_what_many_steps_converge_to():
    sigma = 0.6
    for name in ("ode", "ddim", "dance_sde"):
        coarse, fine = (abs(final_variance(name, uniform_levels(n), sigma) - sigma**2) for n in (1000, 2000))
        assert coarse < 0.02 and coarse / fine == pytest.approx(2, abs=0.1), name
    # CPS loses variance however many steps it takes.
    limit = sigma**2 * (1 + math.cos(0.7 * math.pi / 2)) / 2
    assert final_variance("cps", uniform_levels(4000), sigma) == pytest.approx(limit, abs=2e-3)


@pytest.mark.parametrize(
    ("name", "steps", "noise"),
    [
        ("flow_sde", 10, 0.249),
        ("flow_sde", 40, 0.057),
        ("dance_sde", 10, 0.467),
        ("cps", 10, 0.0089),
        ("ddim", 10, 0.0089),
    ],
)
def test_noise_left_where_the_model_is_told_almost_none(name, steps, noise):
    levels = sd3_levels(steps)
    assert levels[-2] == pytest.approx(0.0089, abs=1e-4)
    table, variance = sampler_table(name, levels).head(steps - 1), 1.0
    for a, c, s, t in zip(table.a, table.c, table.s, levels, strict=False):
        variance = (((a * t + c) / t) ** 2 * variance + s**2).item()  # data without spread: v = (x - m) / t - m
    assert math.sqrt(variance) == pytest.approx(noise, abs=5e-4)


def test_ddim_tends_to_flow_sde_of_a_larger_noise_level():
    levels = uniform_levels(2000)
    ddim, sde = sampler_table("ddim", levels, 0.5), sampler_table("flow_sde", levels, 0.5 * math.sqrt(2))
    middle = slice(200, 1800)
    torch.testing.assert_close(ddim.s[middle], sde.s[middle], rtol=1e-2, atol=0)
    torch.testing.assert_close(ddim.c[middle], sde.c[middle], rtol=1e-2, atol=0)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_ddim_equals_diffusers_on_the_grid_of_a_noise_model(eta, zero_snr):
    scheduler, table = vp_scheduler(zero_snr), sampler_table("ddim", vp_levels(zero_snr), eta)
    generator = torch.Generator().manual_seed(0)
    # In float32 its coefficient of the kept noise, the root of a difference, has three digits.
    squares = scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    for j, timestep in enumerate(scheduler.timesteps.tolist()):
        t, t_next = table.levels[j].item(), table.levels[j + 1].item()
        x0, eps, z = (torch.randn(1, 1, 2, 3, generator=generator, dtype=torch.float64) for _ in range(3))
        alpha, sigma = squares[timestep].sqrt(), (1 - squares[timestep]).sqrt()
        output = alpha * eps - sigma * x0  # the config's v prediction
        theirs = scheduler.step(output, timestep, alpha * x0 + sigma * eps, eta=eta, variance_noise=z).prev_sample
        ours = table.a[j] * ((1 - t) * x0 + t * eps) + table.c[j] * (eps - x0) + table.s[j] * z
        torch.testing.assert_close(ours, math.hypot(1 - t_next, t_next) * theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("levels", [GRIDS["uniform"], GRIDS["near_one"], GRIDS["middle"], sd3_levels(28)[:-2]])
def test_dpm2m_equals_diffusers(levels):
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)) / 2

    def velocity(t, x):
        return torch.tanh(x @ weight) + t * x.sin()

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, algorithm_type="dpmsolver++", solver_order=2
    )
    scheduler.set_timesteps(len(levels) - 1)
    scheduler.sigmas = torch.tensor(levels)
    if levels[-1] > 0:
        scheduler.register_to_config(final_sigmas_type="sigma_min", lower_order_final=False)
    x = start = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    for j, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(scheduler.sigmas[j], x), timestep, x).prev_sample
    table = sampler_table("dpm2m", levels)
    assert (table.b != 0).sum() >= 2
    walked = walk(lambda j, state, _: velocity(levels[j], state), start, table)
    torch.testing.assert_close(walked, x, rtol=0, atol=5e-6)
    euler = walk(lambda j, state, _: velocity(levels[j], state), start, sampler_table("ode", levels))
    assert (euler - x).abs().max() > 1e-2  # the comparison can tell the orders apart


def test_dpm2m_is_euler_where_second_order_has_nothing_to_go_by():
    levels = sd3_levels()
    dpm, ode = sampler_table("dpm2m", levels), sampler_table("ode", levels)
    # The first, the second after a start at 1, step 8 with its ratio of 4.6, and the last.
    assert (dpm.b == 0).nonzero().flatten().tolist() == [0, 1, 8, 9]
    for j in (0, 1, 8, 9):
        assert (dpm.a[j], dpm.c[j]) == (ode.a[j], ode.c[j])
    # A grid that starts below 1 has a finite first log-SNR, however close it is.
    assert sampler_table("dpm2m", [1 - 1e-9, *levels[1:]]).b[1] != 0
    assert sampler_table("dpm2m", [1.0, 0.5, 0.0]).b.tolist() == [0, 0]


def plain_sde(levels: list[float], g_sq_over_t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Euler-Maruyama's coefficients `a`, `c` and `s`, bit for bit as they are computed."""
    t = torch.tensor(levels[:-1], dtype=torch.float64)
    dt = torch.tensor(levels, dtype=torch.float64).diff()
    half = g_sq_over_t / 2
    return 1 + half * dt, dt * (1 + half * (1 - t)), (-dt * t * g_sq_over_t).sqrt()


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.2])
def test_flow_sde_caps_its_first_step_where_that_is_needed(eta):
    """At t = 1 whatever eta is; on a grid from .9 where `eta² * .2 >= 2 * .1`, which is from 1 on."""
    for levels, capped in ((sd3_levels(), True), (GRIDS["middle"], eta >= 1)):
        t = torch.tensor(levels[:-1], dtype=torch.float64)
        expected = plain_sde(levels, eta**2 / (1 - (t.clamp(max=levels[1]) if capped else t)))
        table = sampler_table("flow_sde", levels, eta)
        assert torch.equal(torch.stack([table.a, table.c, table.s]), torch.stack(expected))
        assert (table.a > 0).all()


def test_flow_sde_is_capped_from_the_border_on():
    """.7² * .06 = .029 is above 2 * .01, and .7² * .04 = .020 below 2 * .03."""
    for first, level in ((0.99, 0.93), (0.97, 0.97)):
        a = sampler_table("flow_sde", [first, 0.93, 0.5], 0.7).a[0].item()
        assert a == pytest.approx(1 - 0.49 * (first - 0.93) / 2 / (1 - level), abs=1e-12)


def test_flow_sde_caps_its_diffusion_on_the_first_step_only():
    eta, levels = 0.7, sd3_levels()
    table = sampler_table("flow_sde", levels, eta)
    dt = levels[1] - 1
    assert table.a[0].item() == pytest.approx(1 + dt * eta**2 / (2 * (1 - levels[1])), abs=1e-14)
    assert table.c[0].item() == pytest.approx(dt, abs=1e-14)
    steps = torch.tensor(levels, dtype=torch.float64).diff()
    torch.testing.assert_close(table.c[1:], steps[1:] * (1 + eta**2 / 2), rtol=0, atol=1e-14)
    # Close to 1 is close to 1: no jump, and nothing grows without bound.
    near = sampler_table("flow_sde", [0.9997, *levels[1:]], eta)
    for column in ("a", "c", "s"):
        torch.testing.assert_close(getattr(near, column), getattr(table, column), rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("levels", "eta", "unstable"),
    [
        (sd3_levels(), 0.13, []),
        (sd3_levels(), 0.7, [9]),
        (sd3_levels(), 0.76, [9]),
        (sd3_levels(), 0.78, [8, 9]),
        (sd3_levels(), 1.2, [8, 9]),
        (sd3_levels(28), 0.7, [26, 27]),
        (GRIDS["middle"], 1.2, []),
        (GRIDS["middle"], 2.1, [3]),
        (GRIDS["middle"], 2.4, [2, 3]),
    ],
)
def test_dance_sde_takes_every_unstable_step_as_an_ode_step(levels, eta, unstable):
    table, ode = sampler_table("dance_sde", levels, eta), sampler_table("ode", levels)
    a, c, s = plain_sde(levels, eta**2 / torch.tensor(levels[:-1], dtype=torch.float64))
    for j in range(len(table)):
        others = (ode.a[j], ode.c[j], ode.s[j]) if j in unstable else (a[j], c[j], s[j])
        assert (table.a[j], table.c[j], table.s[j]) == others, j
    # Of data without spread, whose velocity is (x - m) / t - m, a step keeps at most the noise that there was.
    t = table.levels[:-1]
    assert ((table.a + table.c / t).abs() <= 1).all()
    assert [j for j in range(len(table)) if abs(a[j] + c[j] / t[j]) > 1] == unstable


@pytest.mark.parametrize(("eta", "unstable"), [(1.24, []), (1.25, [8])])
def test_flow_sde_is_left_as_published_where_it_is_unstable(eta, unstable):
    table = sampler_table("flow_sde", sd3_levels(), eta)
    factors = table.a + table.c / table.levels[:-1]
    assert [j for j in range(10) if abs(factors[j]) > 1] == unstable
    assert (table.s[:-1] > 0).all()


def test_dance_sde_takes_an_unstable_last_step_as_an_ode_step():
    levels = sd3_levels()
    table = sampler_table("dance_sde", levels, 0.7)
    assert (table.a[-1], table.c[-1], table.s[-1]) == (1, -levels[-2], 0)
    assert (table.s[:-1] > 0).all() and not table.deterministic
    # 0.13² < 2 * 0.0089: stable
    assert sampler_table("dance_sde", levels, 0.13).s[-1].item() == pytest.approx(0.13 * math.sqrt(levels[-2]))


def test_noise_level_defaults_and_zero():
    for name in STOCHASTIC_SAMPLERS:
        assert torch.equal(sampler_table(name, GRIDS["sd3"]).s, sampler_table(name, GRIDS["sd3"], 0.7).s)
        still, ode = sampler_table(name, GRIDS["sd3"], 0.0), sampler_table("ode", GRIDS["sd3"])
        assert still.deterministic
        torch.testing.assert_close((still.a, still.c), (ode.a, ode.c), rtol=0, atol=1e-14)
    assert [name for name in SAMPLERS if sampler_table(name, GRIDS["sd3"]).deterministic] == ["ode", "dpm2m"]


def test_head():
    table = sampler_table("flow_sde", GRIDS["sd3"])
    head = table.head(4)
    assert len(head) == 4 and head.name == "flow_sde"
    assert torch.equal(head.levels, table.levels[:5]) and torch.equal(head.s, table.s[:4])
    assert len(table.head(0)) == 0 and len(table.head(10)) == 10
    for n in (-1, 11):
        with pytest.raises(ValueError, match=f"10 steps, so its first {n} cannot"):
            table.head(n)


def test_levels_may_be_a_float32_tensor_and_are_copied():
    levels = torch.tensor(GRIDS["sd3"])
    table = sampler_table("ode", levels)
    levels.zero_()
    assert table.levels[0] == 1 and table.levels.dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "levels", "eta", "message"),
    [
        ("euler", [1.0, 0.0], None, "Unknown sampler 'euler'. Choose one of ode, flow_sde"),
        ("ode", [1.0, 0.0], 0.7, "noise_level=0.7 with sampler='ode', which has no noise"),
        ("ode", [1.0, 0.0], 0.0, "noise_level=0.0 with sampler='ode', which has no noise"),
        (
            "dpm2m",
            [1.0, 0.0],
            0.7,
            "sampler='dpm2m', which has no noise: leave it unset or choose flow_sde, dance_sde, cps or ddim.",
        ),
        ("cps", [1.0, 0.0], 1.1, "noise_level=1.1: cps takes 0 to 1"),
        ("ddim", [1.0, 0.0], 1.1, "noise_level=1.1: ddim takes 0 to 1"),
        ("ddim", [1.0, 0.0], -0.1, "noise_level=-0.1: ddim takes 0 to 1"),
        ("flow_sde", [1.0, 0.0], -0.1, "noise_level=-0.1 is negative"),
        ("dance_sde", [1.0, 0.0], math.nan, "noise_level=nan: it must be a finite number"),
        ("flow_sde", [1.0, 0.0], math.inf, "noise_level=inf: it must be a finite number"),
        ("ode", [1.0], None, "two or more levels"),
        ("ode", [[1.0, 0.0]], None, "two or more levels"),
        ("ode", [1.0, 0.5, 0.5, 0.0], None, "decrease strictly"),
        ("ode", [0.0, 1.0], None, "decrease strictly"),
        ("ode", [1000.0, 500.0, 0.0], None, "not timesteps up to 1000"),
        ("ode", [1.0, -0.1], None, "decrease strictly"),
        ("ode", [1.0, math.nan, 0.0], None, "decrease strictly"),
    ],
)
def test_refuses(name, levels, eta, message):
    with pytest.raises(ValueError, match=message):
        sampler_table(name, levels, eta)
