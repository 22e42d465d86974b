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

import weakref

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers.noise_grids import GRIDS, sd3_levels

from trl_diffusion_opd.algorithms import rollout
from trl_diffusion_opd.algorithms.rollout import gaussian, sample_generators, walk
from trl_diffusion_opd.algorithms.samplers import SAMPLERS, sampler_table


LEVELS = sd3_levels()


def velocity(j, x, z=None):
    return torch.tanh(2 * x.roll(1, -1)) - LEVELS[j] * x


def start(dtype=torch.float32):
    return torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=dtype)


def generators():
    return sample_generators([5], range(3))


def noise_of(table, x):
    """The noise that a walk with `generators()` adds to `x` at each step."""
    drawn = generators()
    return [gaussian(drawn, x) if s > 0 else torch.zeros_like(x) for s in table.s]


def test_ode_walk_is_the_euler_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    x = start()
    for j, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(j, x), timestep, x, return_dict=False)[0]
    walked = walk(velocity, start(), sampler_table("ode", scheduler.sigmas))
    assert walked.dtype == torch.float32
    torch.testing.assert_close(walked, x, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_walk_applies_the_table(name):
    table, x = sampler_table(name, LEVELS), start(torch.float64)
    noise = noise_of(table, x)
    walked = walk(velocity, x, table, generators())
    previous_x0 = torch.zeros_like(x)
    for j in range(10):
        v = velocity(j, x)
        x, previous_x0 = (
            table.a[j] * x + table.c[j] * v + table.b[j] * previous_x0 + table.s[j] * noise[j],
            x - LEVELS[j] * v,
        )
    torch.testing.assert_close(walked, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_head_stops_where_the_whole_walk_passes(name):
    table, x = sampler_table(name, LEVELS), start()
    seen = []

    def spy(j, state, z):
        seen.append(state)
        return velocity(j, state)

    walk(spy, x, table, generators())
    whole = list(seen)
    seen.clear()
    end = walk(spy, x, table.head(6), generators())
    assert len(seen) == 6 and torch.equal(end, whole[6])
    assert walk(spy, x, table.head(0), generators()) is x


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_is_drawn_once_a_noisy_step_before_the_velocity(name):
    table, given, states = sampler_table(name, LEVELS), generators(), []
    seen = []

    def spy(j, x, z):
        seen.append(z)
        states.append([generator.get_state() for generator in given])
        return velocity(j, x)

    walk(spy, start(), table, given)
    for j, (z, noise) in enumerate(zip(seen, noise_of(table, start()), strict=True)):
        assert (z is None) == (table.s[j] == 0)
        assert z is None or torch.equal(z, noise)
    assert all(map(torch.equal, states[-1], (generator.get_state() for generator in given)))  # nothing after it


def test_refuses_to_leave_out_the_noise():
    with pytest.raises(ValueError, match="'flow_sde' adds noise, so `walk` needs `noise`"):
        walk(velocity, start(), sampler_table("flow_sde", LEVELS))


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_state_outlives_its_step(name):
    alive, x = [], start()

    def spy(j, state, z):
        assert sum(ref() is not None for ref in alive) <= 1  # the caller's own start
        if state is not x:
            alive.append(weakref.ref(state))
        return velocity(j, state)

    end = walk(spy, x, sampler_table(name, LEVELS), generators())
    assert len(alive) == 9 and all(ref() is None for ref in alive)
    assert not torch.equal(end, x) and torch.equal(x, start())  # the caller's tensor is not written to


def test_gradients_exist_inside_a_step_and_nowhere_else():
    scale = torch.tensor(1.0, requires_grad=True)

    def trained(j, x, z):
        assert not x.requires_grad and torch.is_grad_enabled()
        v = scale * velocity(j, x)
        v.square().mean().backward()
        return v  # not detached: the walk must not build on its graph all the same

    end = walk(trained, start(), sampler_table("dpm2m", LEVELS))
    assert not end.requires_grad and scale.grad > 0
    with torch.no_grad():
        walk(lambda j, x, _: torch.full_like(x, float(torch.is_grad_enabled())), start(), sampler_table("ode", LEVELS))
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_a_float32_walk_stays_float32_and_close_to_float64():
    for name in SAMPLERS:
        for levels in GRIDS.values():
            table = sampler_table(name, levels)

            def field(j, x, z):
                return torch.tanh(2 * x.roll(1, -1)) - x

            single = walk(field, start(torch.float64).float(), table, generators())
            double = walk(field, start(torch.float64), table, generators())
            assert single.dtype == torch.float32
            torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)


def test_noise_belongs_to_the_sample():
    x = torch.empty(6, 4, 8, 8)
    whole = sample_generators([7, 100, 2], range(6))
    first, second = gaussian(whole, x), gaussian(whole, x)
    assert first.dtype == torch.float32 and first.shape == x.shape
    assert not torch.equal(first, second)  # a generator moves on from step to step
    # Any split over processes and micro-batches, in any order, gives the rows of the whole.
    for part in ([0], [1, 2], [5, 3, 4]):
        generators = sample_generators([7, 100, 2], part)
        assert torch.equal(gaussian(generators, x[: len(part)]), first[part])
        assert torch.equal(gaussian(generators, x[: len(part)]), second[part])
    assert first.mean().abs() < 0.1 and first.std().item() == pytest.approx(1, abs=0.1)


def test_no_two_samples_share_noise():
    coordinates = [(seed, step, task) for seed in (0, 1, 42) for step in (0, 1, 2**33) for task in range(3)]
    rows = [gaussian(sample_generators(entropy, range(4)), torch.empty(4, 20)) for entropy in coordinates]
    assert len(torch.cat(rows).unique(dim=0)) == 4 * len(coordinates)


def test_noise_ignores_and_leaves_alone_the_global_generator():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = gaussian(sample_generators([0, 0, 0], range(2)), torch.empty(2, 20))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(gaussian(sample_generators([0, 0, 0], range(2)), torch.empty(2, 20)), first)


def test_noise_is_float32_for_half_precision_states_and_needs_a_generator_a_row():
    generators = sample_generators([0], range(3))
    assert gaussian(generators, torch.empty(3, 2, dtype=torch.bfloat16)).dtype == torch.float32
    for rows in (2, 4):
        with pytest.raises(ValueError, match=f"{rows} samples need as many generators, got 3"):
            gaussian(generators, torch.empty(rows, 2))
    with pytest.raises(ValueError, match="non-negative"):
        sample_generators([-1], [0])


def test_no_two_draws_of_a_run_share_their_numbers():
    seed, update, task, sample = 42, 3, 1, 0
    both = [
        (seed, update, task, sample),
        (rollout.DRAWING, seed, task, sample),
        (seed, 0, rollout.TASKS_DRAW, sample),
    ]
    of_method = {
        "opd": [(seed, update, rollout.STEP_DRAW), (seed, rollout.STEP_DRAW, task, sample)],
        "grpo": [(seed, update, rollout.WINDOW_DRAW)],
        "nft": [(seed, update, task, rollout.FORWARD_NOISE, sample), (seed, update, rollout.LEVEL_DRAW)],
        "dmd": [(seed, update, task, rollout.RENOISE_DRAW, sample), (seed, update, task, rollout.FAKE_DRAW, sample)],
        "sft": [(seed, rollout.CACHE_DRAW, task, sample), (seed, rollout.EVAL_DRAW, task, sample)],
    }
    for words in of_method.values():
        numbers = [np.random.SeedSequence(one).generate_state(2).tolist() for one in both + words]
        assert len({*map(tuple, numbers)}) == len(numbers)
