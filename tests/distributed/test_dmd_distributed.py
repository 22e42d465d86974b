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

"""Two processes match distributions as one does: DDP does not see the fake score, whose gradients are averaged apart."""

import pytest
from helpers import dmd_fixtures
from helpers.opd_fixtures import logged, relative_difference, snapshot
from helpers.two_processes import on_two_processes


OPTIONS = dict(
    loss_type="tdm", sampler="cps", max_steps=3, gradient_accumulation_steps=4, learning_rate=1e-3, fake_updates=2
)


def test_two_processes_give_what_one_gives(processes, tmp_path):
    logs, weights = on_two_processes(
        processes, tmp_path, dmd_fixtures.__name__, {**OPTIONS, "per_device_train_batch_size": 2}
    )
    alone = dmd_fixtures.make_trainer(tmp_path / "alone", per_device_train_batch_size=4, **OPTIONS)
    alone.train()
    for name in ("loss", "grad_norm", "fake_loss/count", "fake_grad_norm", "score_gap/draw"):
        assert logged(logs[0], name) == pytest.approx(logged(alone.state.log_history, name), rel=1e-5), name
    assert relative_difference(weights[0], snapshot(alone)) < 1e-5
    assert relative_difference(weights[1], weights[0]) == 0
