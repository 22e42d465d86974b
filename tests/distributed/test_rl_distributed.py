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

"""Two processes that share groups of completions train by reward what one process trains."""

import pytest
from helpers import grpo_fixtures, nft_fixtures
from helpers.opd_fixtures import first_pixel, logged, relative_difference, snapshot
from helpers.two_processes import on_two_processes


# A group of 4 lies on both processes.
SHARED = dict(max_steps=4, num_iterations=2, num_generations=4, gradient_accumulation_steps=4, learning_rate=1e-3)
# Fixtures, further options, metrics and how near they must be.
METHODS = {
    "grpo": (
        grpo_fixtures,
        dict(beta=0.1),
        ("reward", "rewards/first_pixel/std", "frac_reward_zero_std", "kl"),
        dict(rel=1e-3, abs=1e-8),
    ),
    # With several graphs alive, and blocks that are computed again in the backward.
    "grpo, one pass": (
        grpo_fixtures,
        dict(beta=0.1, one_pass=True, num_iterations=1, max_steps=2, sde_window_size=2, gradient_checkpointing=True),
        ("reward", "kl", "grad_norm"),
        dict(rel=1e-3, abs=1e-8),
    ),
    "nft": (
        nft_fixtures,
        dict(num_trained_timesteps=2, old_policy_decay_rate=0.1),
        ("loss", "reward", "signal", "clip_ratio", "grad_norm"),
        dict(rel=1e-3),
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_give_what_one_gives(method, processes, tmp_path):
    fixtures, options, metrics, tolerance = METHODS[method]
    options = {**SHARED, **options}
    logs, weights = on_two_processes(
        processes, tmp_path, fixtures.__name__, {**options, "per_device_train_batch_size": 2}
    )
    alone = fixtures.make_trainer(
        tmp_path / "alone", reward_funcs=first_pixel, per_device_train_batch_size=4, **options
    )
    alone.train()
    for name in metrics:
        assert logged(logs[0], name) == pytest.approx(logged(alone.state.log_history, name), **tolerance), name
    assert relative_difference(weights[0], snapshot(alone)) < 1e-4
    assert relative_difference(weights[1], weights[0]) == 0
