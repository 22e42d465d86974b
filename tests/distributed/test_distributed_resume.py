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

"""A run that is resumed on another number of processes is the run that went through."""

import json

import pytest
from helpers.opd_fixtures import AVERAGED, STATEFUL, StopAt, make_trainer, relative_difference, snapshot, train_losses
from helpers.two_processes import losses
from safetensors.torch import load_file


# Epochs of two updates, and a stop in the middle of the second: an order that has to be found again.
UPDATES, STOP = 5, 3
OPTIONS = dict(
    max_steps=UPDATES,
    gradient_accumulation_steps=4,
    **{**STATEFUL, **AVERAGED},
)
ONE, TWO = ({**OPTIONS, "per_device_train_batch_size": size} for size in (4, 2))  # the same prompts an update


@pytest.fixture(scope="module")
def through(tmp_path_factory, teachers):
    trainer = make_trainer(tmp_path_factory.mktemp("through"), teachers, **ONE)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def two(tmp_path_factory, teachers, processes):
    """A folder with what two processes made of a checkpoint of one, and a checkpoint of two."""
    folder = tmp_path_factory.mktemp("two")
    make_trainer(folder / "of_one", teachers, callbacks=[StopAt(STOP)], **ONE).train()
    scenario = {"teachers": teachers, "options": TWO, "stop": STOP}
    (folder / "scenario.json").write_text(json.dumps(scenario))
    processes.run_script("train_resume.py", folder)
    return folder


def state_of(trainer):
    return snapshot(trainer) | {f"average {i}": p for i, p in enumerate(trainer.student.ema.shadow_params)}


def test_from_one_process_to_two(two, through):
    for rank in (0, 1):
        report = json.loads((two / f"rank_{rank}.json").read_text())
        assert report["kind"] == "DistributedType.MULTI_CPU"
        assert relative_difference(load_file(two / f"rank_{rank}.safetensors"), state_of(through)) < 1e-5
        if rank == 0:
            assert len(losses(report)) == UPDATES
            assert losses(report) == pytest.approx(train_losses(through), rel=1e-5)


def test_from_two_processes_to_one(two, teachers, through):
    trainer = make_trainer(two / "of_two", teachers, **ONE)
    trainer.train(resume_from_checkpoint=True)
    assert len(train_losses(trainer)) == UPDATES
    assert train_losses(trainer) == pytest.approx(train_losses(through), rel=1e-5)
    assert relative_difference(state_of(trainer), state_of(through)) < 1e-5
