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

"""One of two processes is killed, raises or cannot write: the other stops too, says so, and the run can go on."""

import json
import signal
import time

import pytest
from helpers import two_processes
from helpers.launching import TESTS, as_script, launched
from helpers.opd_fixtures import make_trainer, relative_difference, snapshot, train_losses
from safetensors.torch import load_file


OPTIONS = {
    **two_processes.OPTIONS,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 1,
}
LOST = "Process 0 of 2 lost another process in update "
GO_ON = "checkpoint-2 is complete: start again with resume_from_checkpoint=True to go on from there."


@pytest.fixture
def folder(tmp_path, teachers):
    scenario = {"teachers": teachers, "options": {**OPTIONS, "per_device_train_batch_size": 2}}
    (tmp_path / "scenario.json").write_text(json.dumps(scenario))
    return tmp_path


@pytest.fixture
def alone(processes, folder):
    """Runs both processes without a launcher that ends the one when the other has gone, as several machines are started."""
    script = TESTS / "distributed" / "train_faults.py"
    return lambda fault: processes.run(as_script, script, str(folder), fault)


def test_killed_in_an_update_and_gone_on_with(folder, teachers, processes):
    result = launched("train_faults.py", folder, "killed")
    assert time.time() - float((folder / "killed_at").read_text()) < 60
    assert result.returncode != 0
    assert LOST + "3" in result.stderr and GO_ON in result.stderr
    assert f"exitcode  : -{signal.SIGKILL:d}" in result.stderr  # the launcher says which process it was

    processes.run_script("train_faults.py", folder, "none")
    through = make_trainer(folder / "through", teachers, **OPTIONS, per_device_train_batch_size=4)
    through.train()
    for rank in (0, 1):
        assert relative_difference(load_file(folder / f"rank_{rank}.safetensors"), snapshot(through)) < 1e-5
    ours = two_processes.losses(json.loads((folder / "rank_0.json").read_text()))
    assert len(ours) == 4 and ours == pytest.approx(train_losses(through), rel=1e-5)


def test_killed_without_a_launcher(folder, alone):
    (code, _, survivor), (killed, *_) = alone("killed")
    assert time.time() - float((folder / "killed_at").read_text()) < 60
    assert (code, killed) == (1, -signal.SIGKILL)
    assert LOST + "3" in survivor and GO_ON in survivor


def test_one_cannot_read_its_data(alone):
    (code, _, other), (its_code, _, failed) = alone("raises")
    assert (code, its_code) == (1, 1)
    assert "ValueError: a row that cannot be read" in failed
    assert LOST in other


def test_one_cannot_write_a_checkpoint(folder, alone):
    (its_code, _, failed), (code, _, other) = alone("disk")
    assert (its_code, code) == (1, 1)
    assert f"OSError: checkpoint-3 could not be saved in {folder / 'run'} (" in failed and GO_ON in failed
    assert "Process 1 of 2 lost another process in update 4" in other and GO_ON in other
    assert sorted(path.name for path in (folder / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
