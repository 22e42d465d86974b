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
from helpers.noise_grids import GRIDS, sd3_levels
from torch.distributions import Normal, kl_divergence

from trl_diffusion_opd.algorithms.flow import velocity_gap_sq
from trl_diffusion_opd.algorithms.opd import (
    WEIGHTINGS,
    StepPlan,
    beta_density,
    branch_gap_sq,
    dominant_step,
    extrapolated_target,
    inclusion_probabilities,
    policy_gradient_loss,
    step_weights,
    systematic_sample,
    trained_steps,
)
from trl_diffusion_opd.algorithms.samplers import SAMPLERS, STOCHASTIC_SAMPLERS, default_skip_last_steps, sampler_table


def weights_of(name, weighting, levels=None, eta=None):
    levels = levels or sd3_levels()
    return step_weights(sampler_table(name, levels, eta), levels, weighting)


def states(seed, shape=(3, 4, 2, 2)):
    generator = torch.Generator().manual_seed(seed)
    x, v_student, v_teacher, z = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    return x, v_student.requires_grad_(), v_teacher, z


# The closed form


@pytest.mark.parametrize("levels", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("name", SAMPLERS)
def test_closed_form_is_the_kl_of_the_transitions(name, levels):
    table = sampler_table(name, levels)
    weights = step_weights(table, levels, "kl")
    for j in range(len(table)):
        x, v_student, v_teacher, _ = states(j)
        std = table.s[j] if name in STOCHASTIC_SAMPLERS else torch.tensor(1.0, dtype=torch.float64)  # Eq. 12
        if std == 0:
            assert weights[j] == math.inf
            continue
        student = Normal(table.a[j] * x + table.c[j] * v_student, std)
        teacher = Normal(table.a[j] * x + table.c[j] * v_teacher, std)
        expected = kl_divergence(student, teacher).flatten(1).mean(1)
        loss = weights[j] * velocity_gap_sq(v_student, v_teacher)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        (expected_grad,) = torch.autograd.grad(expected.sum(), v_student)
        (grad,) = torch.autograd.grad(loss.sum(), v_student)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-7, atol=1e-12)


def test_released_weighting_lacks_the_step_length():
    eta, levels = 0.7, torch.tensor(sd3_levels(), dtype=torch.float64)
    t = levels[:-1]
    g_sq = eta**2 * t / (1 - torch.minimum(t, levels[1]))
    c = sampler_table("flow_sde", levels, eta).c
    released = weights_of("flow_sde", "released", eta=eta)
    torch.testing.assert_close(released, c**2 / (2 * g_sq), rtol=1e-12, atol=0)
    ratio = weights_of("flow_sde", "kl", eta=eta) / released
    assert ratio[0].item() == pytest.approx(25.1, abs=0.1) and ratio[8].item() == pytest.approx(3.7, abs=0.1)
    for name in set(SAMPLERS) - {"flow_sde"}:
        assert torch.equal(weights_of(name, "released"), weights_of(name, "kl"))


@pytest.mark.parametrize("name", SAMPLERS)
def test_velocity_and_x0_weightings(name):
    assert weights_of(name, "velocity").tolist() == [1.0] * 10
    x, v_student, v_teacher, _ = states(0)
    for weight, t in zip(weights_of(name, "x0"), sd3_levels()[:-1], strict=True):
        gap = ((x - t * v_student) - (x - t * v_teacher)).square().flatten(1).mean(1)
        torch.testing.assert_close(weight * velocity_gap_sq(v_student, v_teacher), gap)


@pytest.mark.parametrize(
    ("name", "weighting", "skip", "step", "share"),
    [
        ("ode", "kl", 1, 8, 0.466),
        ("flow_sde", "kl", 1, 8, 0.641),
        ("flow_sde", "released", 1, 8, 0.757),
        ("flow_sde", "kl", 0, 9, 0.476),
        ("dance_sde", "kl", 1, 8, 0.436),
        ("cps", "kl", 1, 8, 0.998),
        ("ddim", "kl", 1, 8, 0.999),
        ("cps", "kl", 2, 7, 0.662),
        ("ddim", "kl", 2, 7, 0.686),
        ("dpm2m", "kl", 1, 7, 0.369),
        ("ode", "x0", 1, 0, 0.190),
    ],
)
def test_shares_on_the_grid_of_sd3(name, weighting, skip, step, share):
    weights = weights_of(name, weighting)
    steps = trained_steps(weights, skip)
    assert len(steps) == 10 - skip
    assert dominant_step(weights[: len(steps)]) == (step, pytest.approx(share, abs=6e-4))


def test_steps_without_noise_are_refused():
    assert [default_skip_last_steps(name) for name in SAMPLERS] == [1, 1, 1, 2, 2, 1]
    for name in SAMPLERS:
        for weighting in WEIGHTINGS:
            weights = weights_of(name, weighting)
            assert trained_steps(weights, default_skip_last_steps(name)) == range(10 - default_skip_last_steps(name))
    for name in ("cps", "ddim", "dance_sde"):
        with pytest.raises(ValueError, match=r"Steps \[9\] of 10 .* would be trained but add no noise"):
            trained_steps(weights_of(name, "kl"), 0)
        assert trained_steps(weights_of(name, "velocity"), 0) == range(10)
    with pytest.raises(ValueError, match=r"Steps \[0, 1, .*or `noise_level`, if it is 0"):
        trained_steps(weights_of("flow_sde", "kl", eta=0.0), 1)


def test_refuses():
    table, levels = sampler_table("ode", sd3_levels()), sd3_levels()
    with pytest.raises(ValueError, match="Unknown loss weighting 'eq11'. Choose one of kl, released, velocity, x0"):
        step_weights(table, levels, "eq11")
    for weighting in WEIGHTINGS:
        with pytest.raises(ValueError, match=r"4 steps need 5 noise levels, got shape \(11,\)"):
            step_weights(table.head(4), levels, weighting)
    with pytest.raises(ValueError, match="Unknown sampler 'euler'"):
        default_skip_last_steps("euler")
    for skip in (-1, 10, 11):
        with pytest.raises(ValueError, match=f"`skip_last_steps={skip}` must be at least 0 and leave one of the 10"):
            trained_steps(torch.ones(10), skip)
    with pytest.raises(ValueError, match=r"velocity has shape \(2, 3\), the teacher's \(1, 3\)"):
        velocity_gap_sq(torch.ones(2, 3), torch.ones(1, 3))


def test_velocities_are_subtracted_in_float32():
    generator = torch.Generator().manual_seed(0)
    v_teacher = torch.randn(2, 500, generator=generator).bfloat16()
    v_student = v_teacher.float() * 1.003  # less than half a unit in the last place of bfloat16 for many entries
    exact = (v_student.double() - v_teacher.double()).square().mean(1)
    gap = velocity_gap_sq(v_student, v_teacher)
    assert gap.dtype == torch.float32
    torch.testing.assert_close(gap.double(), exact, rtol=1e-4, atol=0)
    assert velocity_gap_sq(v_teacher, v_teacher).dtype == torch.float32
    assert velocity_gap_sq(v_teacher.double(), v_teacher.double()).dtype == torch.float64


# The policy gradient

TRANSITIONS = [("flow_sde", 2, "kl"), ("flow_sde", 8, "released"), ("cps", 4, "velocity"), ("dance_sde", 6, "x0")]


def transition(name, j, weighting, d):
    """One state's row and weight, the student's and the teacher's velocity, and the gradient of the closed form."""
    table = sampler_table(name, sd3_levels())
    weight = step_weights(table, sd3_levels(), weighting)[j].item()
    _, v_student, v_teacher, _ = states(j, shape=(1, d))
    v_teacher = v_student.detach() + 0.01 * v_teacher
    (grad,) = torch.autograd.grad(weight * velocity_gap_sq(v_student, v_teacher).sum(), v_student)
    return table.c[j].item(), table.s[j].item(), weight, v_student.detach(), v_teacher, grad[0]


def gradients(loss, v_student, v_teacher, z):
    """The gradient of `loss(v_student, v_teacher, z)` for each row of noise, at one and the same state."""
    student = v_student.expand_as(z).clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(student, v_teacher.expand_as(z), z).sum(), student)
    return grad


@pytest.mark.parametrize(("name", "j", "weighting"), TRANSITIONS)
def test_policy_gradient_is_the_log_ratio_form(name, j, weighting):
    """Sample by sample: equal to REINFORCE written with log-probabilities of the action that was taken."""
    c, s, weight, v_student, v_teacher, _ = transition(name, j, weighting, d=12)
    z = torch.randn(5, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def reinforce(student, teacher, z):
        action = (c * student + s * z).detach()
        policy, target = Normal(c * student, s), Normal(c * teacher, s)
        log_prob = policy.log_prob(action).sum(1)
        advantage = log_prob - target.log_prob(action).sum(1) - kl_divergence(policy, target).sum(1)
        return 2 * s**2 * weight / c**2 * advantage.detach() * log_prob / 12

    expected = gradients(reinforce, v_student, v_teacher, z)
    grad = gradients(lambda *args: policy_gradient_loss(*args, c, s, weight), v_student, v_teacher, z)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-12 * weight)


@pytest.mark.parametrize(("name", "j", "weighting"), TRANSITIONS)
def test_policy_gradient_has_the_mean_of_the_closed_form(name, j, weighting):
    d = 16
    c, s, weight, v_student, v_teacher, exact = transition(name, j, weighting, d)

    def loss(*args):
        return policy_gradient_loss(*args, c, s, weight)

    # 2 d points with the mean and covariance of Gaussian noise: the exact expectation of what is quadratic in it.
    points = math.sqrt(d) * torch.cat([torch.eye(d), -torch.eye(d)]).double()
    torch.testing.assert_close(gradients(loss, v_student, v_teacher, points).mean(0), exact, rtol=1e-9, atol=1e-15)
    # Gaussian noise: the error of the mean of n is sqrt((d + 1) / n) of the gradient's norm, .9% here.
    z = torch.randn(200_000, d, generator=torch.Generator().manual_seed(j), dtype=torch.float64)
    mean = gradients(loss, v_student, v_teacher, z).mean(0)
    assert torch.cosine_similarity(mean, exact, dim=0) > 0.9995
    assert (mean.norm() / exact.norm()).item() == pytest.approx(1, abs=0.02)


def noise_to_signal(grad, exact):
    return ((grad - exact).square().sum(1).mean() / exact.square().sum()).item()


@pytest.mark.parametrize("d", [8, 64])
@pytest.mark.parametrize(("name", "j", "weighting"), TRANSITIONS[:3])
def test_policy_gradient_variance(name, j, weighting, d):
    c, s, weight, v_student, v_teacher, exact = transition(name, j, weighting, d)
    z = torch.randn(100_000, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    grad = gradients(lambda *args: policy_gradient_loss(*args, c, s, weight), v_student, v_teacher, z)
    assert noise_to_signal(grad, exact) == pytest.approx(d + 1, rel=0.03)


def far_transition(d):
    """As `transition`, with a teacher that is a hundred times as far from the student."""
    c, s, weight, v_student, v_teacher, exact = transition("flow_sde", 6, "kl", d)
    return c, s, weight, v_student, v_student + 100 * (v_teacher - v_student), 100 * exact


def test_the_baseline_is_what_keeps_the_variance_from_growing_with_the_kl():
    d = 8
    c, s, weight, v_student, v_teacher, exact = far_transition(d)
    kl = d * (weight * velocity_gap_sq(v_student, v_teacher)).item()
    assert kl > 0.5

    def without_baseline(student, teacher, z):
        log_ratio = kl + c / s * ((student - teacher) * z).sum(1)
        return log_ratio.detach() * c / s * (z * student).mean(1)

    z = torch.randn(200_000, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grad = gradients(without_baseline, v_student, v_teacher, z)
    assert torch.cosine_similarity(grad.mean(0), exact, dim=0) > 0.999
    assert noise_to_signal(grad, exact) == pytest.approx(d * kl / 2 + d + 1, rel=0.03)
    grad = gradients(lambda *args: policy_gradient_loss(*args, c, s, weight), v_student, v_teacher, z)
    assert noise_to_signal(grad, exact) == pytest.approx(d + 1, rel=0.03)


def test_a_detached_kl_as_advantage_teaches_nothing():
    """Why `loss_type` has no such form: the KL of a state does not depend on the action, so it moves no probability."""
    d = 16
    c, s, weight, v_student, v_teacher, exact = far_transition(d)

    def detached(student, teacher, z):
        kl = (weight * velocity_gap_sq(student, teacher)).detach()
        log_prob = Normal(c * student, s).log_prob((c * student + s * z).detach()).mean(1)
        return kl * log_prob.exp() / log_prob.exp().detach()

    z = torch.randn(100_000, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grad = gradients(detached, v_student, v_teacher, torch.cat([z, -z]))
    assert grad.norm(dim=1).mean() > 0.1 * exact.norm()  # each sample pushes somewhere
    assert grad.mean(0).norm() < 1e-12 * exact.norm()  # and all of them nowhere


def test_policy_gradient_refuses():
    v = torch.ones(2, 3)
    with pytest.raises(ValueError, match="without noise .* has no policy gradient"):
        policy_gradient_loss(v, v, v, -0.1, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"Noise has shape \(1, 3\) and the student's velocity \(2, 3\)"):
        policy_gradient_loss(v, v, v[:1], -0.1, 0.1, 1.0)
    with pytest.raises(ValueError, match=r"the teacher's \(1, 3\)"):
        policy_gradient_loss(v, v[:1], v, -0.1, 0.1, 1.0)


def test_policy_gradient_leaves_the_teacher_alone():
    _, v_student, v_teacher, z = states(0)
    v_teacher.requires_grad_()
    loss = policy_gradient_loss(v_student, v_teacher, z, -0.1, 0.2, 1.0)
    assert loss.shape == (3,)
    loss.sum().backward()
    assert v_teacher.grad is None and v_student.grad is not None


# Which steps to train

WEIGHT_LISTS = [
    weights_of("ode", "kl")[:9],
    weights_of("flow_sde", "released")[:9],
    weights_of("ddim", "kl")[:9],  # one step holds 99.9%
    torch.ones(7),
    torch.tensor([0.0, 3.0, 0.0, 1.0, 1.0, 0.0]),
    torch.tensor([1.0, 1e-14]),
    torch.rand(23, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
]


@pytest.mark.parametrize("weights", WEIGHT_LISTS)
def test_systematic_sampling_is_unbiased(weights):
    """Exact enumeration: between two neighbouring fractional parts of the cumulative sum, all `u` draw the same steps."""
    positive = int((weights > 0).sum())
    for k in range(1, positive + 1):
        pi = inclusion_probabilities(weights, k)
        assert pi.sum().item() == pytest.approx(k, abs=1e-9)
        assert ((pi > 0) == (weights > 0)).all() or pi.min() < 1e-9
        assert (pi <= 1).all()
        free = (pi < 1) & (pi > 0)
        alpha = pi[free] / weights[free]
        assert not free.any() or (alpha.max() / alpha.min()).item() == pytest.approx(1, abs=1e-9)
        assert not free.any() or (alpha.max() * weights[pi == 1] >= 1 - 1e-9).all()

        cuts = sorted({0.0, 1.0, *(round(c % 1, 12) for c in pi.cumsum(0).tolist())})
        drawn = torch.zeros(len(weights), dtype=torch.float64)
        loss = 0.0  # of velocity gaps 1, 2, 3, ...
        for low, high in zip(cuts, cuts[1:], strict=False):
            steps = systematic_sample(pi, (low + high) / 2)
            assert len(set(steps)) == len(steps) == k and steps == sorted(steps)
            drawn[steps] += high - low
            loss += (high - low) * sum((weights[j] / pi[j] * (j + 1)).item() for j in steps)
        torch.testing.assert_close(drawn, pi, rtol=0, atol=1e-9)
        full = sum((weight * (j + 1)).item() for j, weight in enumerate(weights))
        assert loss == pytest.approx(full, rel=1e-9)
    assert systematic_sample(inclusion_probabilities(weights, positive), 0.3) == weights.nonzero().flatten().tolist()


@pytest.mark.parametrize("weights", WEIGHT_LISTS)
def test_systematic_sampling_at_the_edges_of_rounding(weights):
    positive = int((weights > 0).sum())
    for k in range(1, positive + 1):
        pi = inclusion_probabilities(weights, k)
        edges = [
            cut for c in pi.cumsum(0).tolist() for cut in (c % 1, math.nextafter(c % 1, 0), math.nextafter(c % 1, 1))
        ]
        for u in [0.0, 5e-324, math.nextafter(1, 0), *(u for u in edges if u < 1)]:
            steps = systematic_sample(pi, u)
            assert len(set(steps)) == k and (weights[steps] > 0).all()


def test_full_training_keeps_the_weights():
    weights = weights_of("ode", "kl")[:9]
    pi = inclusion_probabilities(weights, 9)
    assert pi.tolist() == [1.0] * 9
    assert systematic_sample(pi, 0.99) == list(range(9))


def test_sampling_refuses():
    for k in (0, 3):
        with pytest.raises(ValueError, match=f"Cannot train {k} steps of 3: 2 of them have a positive weight"):
            inclusion_probabilities(torch.tensor([1.0, 0.0, 2.0]), k)
    for bad in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="finite and not negative"):
            inclusion_probabilities(torch.tensor([1.0, bad]), 1)
    for u in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
            systematic_sample(torch.tensor([0.5, 0.5]), u)
    with pytest.raises(ValueError, match="must sum to the number of steps to draw, got 1.25"):
        systematic_sample(torch.tensor([0.5, 0.75]), 0.1)


def test_a_plan_trains_what_its_weights_say():
    table = sampler_table("flow_sde", sd3_levels())
    plan = StepPlan.of(table, "released", skip_last_steps=2)
    assert len(plan) == len(table) - 2 == len(plan.walked) and plan.steps == range(len(plan))
    torch.testing.assert_close(plan.weights, step_weights(table, sd3_levels(), "released")[:-2], rtol=0, atol=0)
    torch.testing.assert_close(plan.kl_weights, step_weights(table, sd3_levels(), "kl")[:-2], rtol=0, atol=0)
    gaps = torch.linspace(1, 2, len(plan), dtype=torch.float64)
    every = plan.draw(None, [0])
    assert every == dict.fromkeys(plan.steps, 1.0)
    torch.testing.assert_close(plan.loss(gaps, every), (plan.weights * gaps).mean())
    assert plan.expected_steps(None) == (len(plan), len(plan))


def test_steps_drawn_from_a_beta_distribution():
    table = sampler_table("ode", sd3_levels())
    n = len(table)
    middles = torch.tensor([1 - (j + 0.5) / n for j in range(n)], dtype=torch.float64)
    pdf = torch.distributions.Beta(torch.tensor(5.0).double(), torch.tensor(2.0).double()).log_prob(middles).exp()
    density = beta_density(n, 5, 2)
    torch.testing.assert_close(density / density.sum(), pdf / pdf.sum(), rtol=1e-9, atol=0)

    plan = StepPlan.of(table, "velocity", 1, (5, 2))
    pi = inclusion_probabilities(pdf[:-1], 2)
    for update in range(50):
        assert plan.draw(2, [7, update]) == pytest.approx(
            {j: 1 / float(pi[j]) for j in plan.draw(2, [7, update])}, rel=1e-9
        )

    plan = StepPlan.of(table, "velocity", 1, (5, 2), unbiased=False)
    gaps = torch.linspace(1, 2, len(plan), dtype=torch.float64)
    draws = [plan.draw(1, [7, update]) for update in range(4000)]
    # Each drawn step counts the same, so steps count in the mean as often as they are drawn.
    expected = float((pdf[:-1] / pdf[:-1].sum() * gaps).sum())
    mean = sum(float(plan.loss(gaps[[*drawn]], drawn)) for drawn in draws) / len(draws)
    assert mean == pytest.approx(expected, rel=5e-3) and abs(float(plan.loss(gaps)) - expected) > 0.05


def test_drawn_steps_estimate_the_mean_of_all():
    plan = StepPlan.of(sampler_table("ode", sd3_levels()), "kl", skip_last_steps=1)
    gaps = torch.linspace(1, 2, len(plan), dtype=torch.float64)
    draws = [plan.draw(3, [7, update]) for update in range(4000)]
    assert plan.draw(3, [7, 5]) == draws[5] and draws[5] != draws[6]
    mean = sum(float(plan.loss(gaps[[*drawn]], drawn)) for drawn in draws) / len(draws)
    assert mean == pytest.approx(float(plan.loss(gaps)), rel=0.02)
    walked, trained = plan.expected_steps(3)
    assert trained == 3 and walked == pytest.approx(sum(max(drawn) + 1 for drawn in draws) / len(draws), rel=0.02)


# Beyond one teacher's guided velocity


@pytest.mark.parametrize("extrapolation", [0.0, 1.0, 1.25, 3.0])
@pytest.mark.parametrize("name", ["flow_sde", "cps"])
def test_the_extrapolated_target_is_that_of_the_product_of_steps(name, extrapolation):
    """By autograd through the KL to the normalised product p_T^k p_R^(1-k), whose log-densities are summed."""
    levels = sd3_levels()
    table, weights = sampler_table(name, levels), weights_of(name, "kl", levels)
    for j in (2, 5):
        x, v_student, v_teacher, v_base = states(j)
        a, c, s = table.a[j], table.c[j], table.s[j]
        draws = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(j), dtype=torch.float64)

        def log_product(at, x=x, a=a, c=c, s=s, teacher=v_teacher, base=v_base):
            of_teacher, of_base = (Normal(a * x + c * v, s).log_prob(at) for v in (teacher, base))
            return extrapolation * of_teacher + (1 - extrapolation) * of_base

        # Of Gaussians of one variance the difference of log-densities is linear: two mirrored draws give its mean.
        ours = a * x + c * v_student
        mirrored = [ours + sign * s * z for z in draws for sign in (1, -1)]
        kl = sum((Normal(ours, s).log_prob(at) - log_product(at)).mean() for at in mirrored) / len(mirrored)
        (expected,) = torch.autograd.grad(kl, v_student, retain_graph=True)
        target = extrapolated_target(v_teacher, v_base, extrapolation)
        loss = weights[j] * velocity_gap_sq(v_student, target).mean()
        (gradient,) = torch.autograd.grad(loss, v_student)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-12)
    assert torch.equal(extrapolated_target(v_teacher, v_base, 0.0), v_base)


def test_branch_loss_is_its_closed_form():
    generator = torch.Generator().manual_seed(0)
    factor, teacher = torch.randn(2, 2, 3, 4, 2, 2, generator=generator, dtype=torch.float64)
    theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    unconditional, conditional = theta * factor  # of a student with one weight
    of_teacher = [teacher[1] - teacher[0], teacher[1]]

    def stacked(u, c, scale):
        return torch.stack([u + scale * (c - u), c, c - u])

    gap = branch_gap_sq(stacked(unconditional, conditional, 4.5), stacked(*teacher, 4.5), 0.3)
    assert gap.shape == (3,)
    off = [conditional - of_teacher[1], conditional - unconditional - of_teacher[0]]
    expected = off[0].square().flatten(1).mean(1) + 0.3 * off[1].square().flatten(1).mean(1)
    torch.testing.assert_close(gap, expected, rtol=1e-6, atol=0)
    (by_autograd,) = torch.autograd.grad(gap.sum(), theta, retain_graph=True)
    slope = (off[0] * factor[1] + 0.3 * off[1] * (factor[1] - factor[0])).flatten(1).mean(1).sum()
    torch.testing.assert_close(by_autograd, 2 * slope, rtol=1e-6, atol=0)
    # 0 exactly where both branches agree. A guided velocity alone can agree by accident: here both are off by equal parts.
    assert branch_gap_sq(stacked(*teacher, 4.5), stacked(*teacher, 2.0), 0.3).tolist() == [0.0] * 3
    shifted = [teacher[0] + 4.5 * factor[0], teacher[1] + 3.5 * factor[0]]
    torch.testing.assert_close(stacked(*shifted, 4.5)[0], stacked(*teacher, 4.5)[0])
    assert bool((branch_gap_sq(stacked(*shifted, 4.5), stacked(*teacher, 4.5), 0.3) > 0.1).all())
