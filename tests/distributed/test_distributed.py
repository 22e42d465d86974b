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

"""Two processes compute what one does, reduce every gradient once an update, and stop together."""

import pytest
import torch
from helpers.opd_fixtures import (
    first_pixel,
    make_trainer,
    relative_difference,
    snapshot,
    train_losses,
)
from helpers.sft_fixtures import sft_trainer
from helpers.two_processes import OPTIONS, SCORED, UPDATES, losses, trained_by_two
from safetensors.torch import load_file


TUNING = dict(max_steps=2, gradient_accumulation_steps=4, learning_rate=1e-2, num_images_per_prompt=2)


@pytest.fixture(scope="module")
def two(tmp_path_factory, mixed_teachers, processes):
    """Reports and tensors of both ranks, with two prompts each at a time and a task's teachers in one forward."""
    options = {**OPTIONS, "per_device_train_batch_size": 2, "batch_teachers": True}
    scenario = {"teachers": mixed_teachers, "options": options, "tuning": TUNING}
    return trained_by_two(processes, tmp_path_factory.mktemp("two"), "train.py", scenario)


def run_alone(folder, teachers, batch_size, accumulation):
    """The same prompts an update on one process, and the latents that it starts from."""
    options = {**OPTIONS, "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    trainer, latents = make_trainer(folder, teachers, reward_funcs=first_pixel, **options), []
    draw = trainer.velocity_field.initial_latents
    trainer.velocity_field.initial_latents = lambda *inputs: latents.append(draw(*inputs)) or latents[-1]
    trainer.train()
    return trainer, torch.cat(latents)


@pytest.fixture(scope="module")
def one(tmp_path_factory, mixed_teachers):
    return run_alone(tmp_path_factory.mktemp("one"), mixed_teachers, batch_size=4, accumulation=4)


def test_two_processes_give_what_one_gives(two, one):
    reports, tensors, _ = two
    trainer, _ = one
    assert [report["world_size"] for report in reports] == [2, 2]
    assert len(losses(reports[0])) == UPDATES
    assert losses(reports[0]) == pytest.approx(train_losses(trainer), rel=1e-5)
    for name in ("kl", "kl/count", "velocity_gap/draw", "grad_norm"):
        ours = [entry[name] for entry in reports[0]["log"] if "loss" in entry]
        assert ours == pytest.approx([e[name] for e in trainer.state.log_history if "loss" in e], rel=1e-5), name
    weights = [{name: p for name, p in rank.items() if name != "drawn"} for rank in tensors]
    assert relative_difference(weights[0], snapshot(trainer)) < 1e-5
    assert relative_difference(weights[1], weights[0]) == 0


def test_micro_batches_of_another_size_give_the_same(one, tmp_path, mixed_teachers):
    trainer, _ = run_alone(tmp_path, mixed_teachers, batch_size=2, accumulation=8)
    assert train_losses(trainer) == pytest.approx(train_losses(one[0]), rel=1e-5)
    assert relative_difference(snapshot(trainer), snapshot(one[0])) < 1e-5


def test_every_sample_has_its_own_noise(two, one):
    _, tensors, _ = two
    rows = torch.cat([rank["drawn"].flatten(0, 1) for rank in tensors]).flatten(1)
    assert len(rows) == UPDATES * 4 * 4
    assert len(torch.unique(rows, dim=0)) == len(rows)
    # And it is the noise that the sample has on one process.
    assert torch.equal(torch.unique(rows, dim=0), torch.unique(one[1].flatten(1), dim=0))


def test_gradients_are_reduced_once_an_update(two):
    for report in two[0]:
        assert report["reduced_bytes"] == [4 * report["trained_parameters"]] * UPDATES + [0]
        assert report["tuning_reduced_bytes"] == [4 * report["trained_parameters"]] * TUNING["max_steps"] + [0]


def test_evaluation_is_the_same(two, one):
    reports = two[0]
    metrics = one[0].evaluate(SCORED["eval_dataset"])
    for name in ("eval_count/first_pixel", "eval_draw/first_pixel", "eval_reward"):
        values = [report["metrics"][name] for report in reports]
        assert values[0] == values[1] == pytest.approx(metrics[name], abs=0.5)


def test_two_processes_resume_exactly(two):
    reports, _, folder = two
    assert [report["resumed_is_same"] for report in reports] == [True, True]
    files = {path.name for path in (folder / "stopped" / "checkpoint-2").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "complete"} <= files


def test_fine_tuning_on_images_of_teachers_is_the_same(two, tmp_path, mixed_teachers):
    reports, _, folder = two
    options = {**TUNING, "per_device_train_batch_size": 4, "teacher_cache_dir": str(tmp_path / "images")}
    trainer = sft_trainer(tmp_path / "out", mixed_teachers, **options)
    trainer.train()
    for name in ("loss", "loss/draw", "grad_norm"):
        ours, theirs = (
            [entry[name] for entry in log if name in entry]
            for log in (reports[0]["tuning_log"], trainer.state.log_history)
        )
        assert len(ours) == 2 and ours == pytest.approx(theirs, rel=1e-4), name
    for file in (tmp_path / "images").glob("*.safetensors"):
        one, other = load_file(file)["latents"], load_file(folder / "images" / file.name)["latents"]
        assert torch.allclose(one, other, atol=1e-6)


def test_nan_of_one_process_stops_both(two):
    for report in two[0]:
        assert "The loss of task 'count' is not finite at step 0 (noise level 1.000) of update 1." in report["error"]
        assert report["updates_before_error"] == 0
