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

"""Every method under FSDP2 gives what one process gives, and goes on from checkpoints of another number of processes."""

import json

import pytest
import torch
from diffusers import SD3Transformer2DModel
from helpers.opd_fixtures import StopAt, logged, make_trainer, relative_difference, train_losses
from helpers.split_runs import MAKE, RESUMED, STOP, UPDATES, state_of, trained_alone
from helpers.two_processes import fsdp_environment, reports_in, weights_in
from safetensors.torch import load_file

from trl_diffusion_opd.acceleration.sharding import load_whole_optimizer_state, whole_optimizer_state
from trl_diffusion_opd.checkpointing.checkpoint import optimizer_problems


HALF = ("half", "half_full")
EXACT = [name for name in MAKE if name not in HALF]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, teachers, processes):
    """What two processes wrote, and what one process left for them to resume."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "scenario.json").write_text(json.dumps(teachers))
    for name in RESUMED:
        MAKE[name](folder / "of_one" / name, teachers, per_device_train_batch_size=4, callbacks=[StopAt(STOP)]).train()
    processes.run_script("train_fsdp_runs.py", folder, environment=fsdp_environment())
    return folder


@pytest.fixture(scope="module")
def reports(folder):
    return reports_in(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, teachers):
    return trained_alone(tmp_path_factory.mktemp("alone"), teachers)


@pytest.mark.parametrize("name", EXACT)
def test_split_training_gives_what_one_process_gives(name, reports, folder, alone):
    trainer = alone(name)
    for report in reports:
        assert report[name]["split"]
        # To the end of the run, or to the checkpoint.
        updates = STOP if name in RESUMED or name == "dmd_full" else UPDATES
        for metric in ("loss", "grad_norm"):
            theirs = logged(trainer.state.log_history, metric)[:updates]
            assert len(theirs) == updates
            if report is reports[0]:
                assert logged(report[name]["log"], metric) == pytest.approx(theirs, rel=1e-5), metric
    weights = weights_in(folder, name)
    assert relative_difference(weights[0], state_of(trainer)) < 1e-5
    assert relative_difference(weights[1], weights[0]) == 0


@pytest.mark.parametrize("name", [*EXACT, *HALF])
def test_gradients_are_reduced_once_an_update(name, reports):
    for report in reports:
        least, counted = 4 * report[name]["trained_parameters"], report[name]["reduced_bytes"]
        if name == "dmd":  # and once in each of the fake's two updates; a fake of all weights is not split
            least *= 3
        assert counted.pop() == 0
        assert len(set(counted)) == 1
        # Gradients whose first dimension the processes don't divide are padded.
        assert least <= counted[0] < 1.01 * least


@pytest.mark.parametrize("name", RESUMED)
def test_from_one_process_to_two(name, reports, alone):
    # The weights that it ended with are compared above.
    losses = logged(reports[0][name]["resumed_log"], "loss")
    assert len(losses) == UPDATES
    assert losses == pytest.approx(train_losses(alone(name)), rel=1e-5)


@pytest.mark.parametrize("name", RESUMED)
def test_from_two_processes_to_one(name, folder, teachers, alone):
    trainer = MAKE[name](folder / "of_two" / name, teachers, per_device_train_batch_size=4)
    trainer.train(resume_from_checkpoint=True)
    assert len(train_losses(trainer)) == UPDATES
    assert train_losses(trainer) == pytest.approx(train_losses(alone(name)), rel=1e-5)
    assert relative_difference(state_of(trainer), state_of(alone(name))) < 1e-5


def test_a_fully_trained_student_is_saved_whole(folder, alone):
    # Its plugin said SHARDED_STATE_DICT.
    checkpoint = folder / "of_two" / "full" / f"checkpoint-{STOP}"
    saved = SD3Transformer2DModel.from_pretrained(checkpoint)
    assert json.loads((checkpoint / "config.json").read_text())["_class_name"] == "SD3Transformer2DModel"
    one = alone("full").student
    assert {name: p.shape for name, p in saved.named_parameters()} == {
        name: p.shape for name, p in one.named_parameters().items()
    }
    raw = load_file(checkpoint / "student_raw.safetensors")
    averaged = {name: p.detach() for name, p in saved.named_parameters()}
    assert 0 < relative_difference(averaged, raw) < 1e-2  # an average that is not yet far away


def test_precision_is_that_of_one_process(reports, alone):
    # accelerate's own policy would round the timesteps to bfloat16: 602.15 to 604.
    trainer = alone("half")
    levels = {round(1000 * float(t), 3) for t in trainer.velocity_field.levels[:-1]}
    for report in reports:
        assert {kind for kind, _ in report["half"]["levels"]} == {"torch.float32"}
        assert {round(t, 3) for _, t in report["half"]["levels"]} <= levels
    ours = logged(reports[0]["half"]["log"], "loss")
    assert len(ours) == UPDATES and ours == pytest.approx(train_losses(trainer), rel=1e-3)


def test_full_weights_in_half_precision_are_trained_in_float32(reports, alone):
    assert reports[0]["half_full"]["dtypes"] == ["torch.float32"]  # which is accelerate's doing
    assert alone("half_full").model.dtype == torch.bfloat16
    (ours,), (theirs,) = logged(reports[0]["half_full"]["log"], "loss"), train_losses(alone("half_full"))
    assert ours == pytest.approx(theirs, rel=2e-3)


def test_the_pipeline_is_refused(reports):
    for report in reports:
        assert "it is split among the processes. Call trainer.save_model(folder)" in report["pipeline"]


def test_an_optimizer_that_is_not_split_is_restored():
    def made():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model, optimizer):
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    (model, optimizer), (other, restored) = made(), made()
    step(model, optimizer)
    other.load_state_dict(model.state_dict())
    load_whole_optimizer_state(restored, whole_optimizer_state(optimizer))
    step(model, optimizer)
    step(other, restored)
    assert torch.equal(model.weight, other.weight)


def test_a_checkpoint_without_optimizer_is_refused(tmp_path, teachers):
    trainer = make_trainer(tmp_path, teachers, save_strategy="steps", save_steps=1, save_only_model=True)
    trainer.train()
    with pytest.raises(ValueError, match="it has no optimizer"):
        make_trainer(tmp_path, teachers).train(resume_from_checkpoint=True)
    (tmp_path / "optimizer.pt").touch()
    assert optimizer_problems(tmp_path) == []
