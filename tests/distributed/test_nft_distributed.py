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
"""Two processes train by DiffusionNFT what one trains."""

import pytest
from helpers.grpo_fixtures import logged
from helpers.nft_fixtures import make_trainer
from helpers.opd_fixtures import first_pixel, relative_difference, snapshot
from helpers.two_processes import on_two_processes


# A group of 4 lies on both processes.
OPTIONS = dict(
    max_steps=4,
    num_iterations=2,
    num_generations=4,
    gradient_accumulation_steps=4,
    num_trained_timesteps=2,
    learning_rate=1e-3,
    old_policy_decay_rate=0.1,
)


def test_two_processes_give_what_one_gives(processes, tmp_path):
    logs, weights = on_two_processes(
        processes, tmp_path, "helpers.nft_fixtures", {**OPTIONS, "per_device_train_batch_size": 2}
    )
    alone = make_trainer(tmp_path / "alone", reward_funcs=first_pixel, per_device_train_batch_size=4, **OPTIONS)
    alone.train()
    for name in ("loss", "reward", "signal", "clip_ratio", "grad_norm"):
        ours = [entry[name] for entry in logs[0] if "loss" in entry and name in entry]
        assert ours == pytest.approx(logged(alone, name), rel=1e-3), name
    assert relative_difference(weights[0], snapshot(alone)) < 1e-4
    assert relative_difference(weights[1], weights[0]) == 0
