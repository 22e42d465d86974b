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

"""Two processes that split the model between them (FSDP2) compute what one computes, and save adapters alone."""

import pytest
import torch
from helpers.opd_fixtures import (
    make_trainer,
    relative_difference,
    snapshot,
    student_lora,
)
from helpers.split_runs import TARGETS
from helpers.tiny_sd3 import make_pipeline
from helpers.two_processes import OPTIONS, SCORED, UPDATES, fsdp_environment, trained_by_two
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def two(tmp_path_factory, mixed_teachers, processes):
    """Reports and weights of both ranks, with two prompts each at a time and a task's teachers in one forward."""
    options = {**OPTIONS, "per_device_train_batch_size": 2, "batch_teachers": True}
    scenario = {"teachers": mixed_teachers, "options": options, "targets": TARGETS}
    folder = tmp_path_factory.mktemp("two")
    return trained_by_two(processes, folder, "train_fsdp.py", scenario, fsdp_environment())


@pytest.fixture(scope="module")
def one(tmp_path_factory, mixed_teachers):
    trainer = make_trainer(
        tmp_path_factory.mktemp("one"),
        mixed_teachers,
        **SCORED,
        peft_config=student_lora(target_modules=TARGETS),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=2,
        eval_strategy="steps",
        eval_steps=1,
        **OPTIONS,
    )
    trainer.train()
    return trainer


def test_split_training_gives_what_one_process_gives(two, one):
    reports, weights, _ = two
    assert [report["kind"] for report in reports] == ["DistributedType.FSDP"] * 2
    assert [report["split"] for report in reports] == [[True, True]] * 2
    for name in ("loss", "kl", "kl/count", "velocity_gap/draw", "grad_norm", "noise_floor"):
        ours, theirs = (
            [entry[name] for entry in log if "loss" in entry] for log in (reports[0]["log"], one.state.log_history)
        )
        tolerance = dict(rel=0.5) if name == "noise_floor" else dict(rel=1e-5)
        assert len(ours) == UPDATES and ours == pytest.approx(theirs, **tolerance), name
    assert relative_difference(weights[0], snapshot(one)) < 1e-5
    assert relative_difference(weights[1], weights[0]) == 0


def test_gradients_are_reduced_once_an_update(two):
    for report in two[0]:
        assert report["reduced_bytes"] == [4 * report["trained_parameters"]] * UPDATES + [0]


def test_evaluation_is_with_the_average_and_leaves_the_weights(two, one):
    reports = two[0]
    assert [report["evaluation_left_weights"] for report in reports] == [True, True]
    for name in ("eval_loss", "eval_kl/count", "eval_kl/draw", "eval_reward"):
        ours, theirs = (
            [entry[name] for entry in log if name in entry][:UPDATES]
            for log in (reports[0]["log"], one.state.log_history)
        )
        tolerance = dict(abs=0.5) if name == "eval_reward" else dict(rel=1e-5)
        assert len(ours) == UPDATES and ours == pytest.approx(theirs, **tolerance), name


def test_the_saved_lora_is_the_average_of_one_process(two, one, tmp_path):
    _, _, folder = two
    one.save_model(str(tmp_path))
    for file in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        assert relative_difference(load_file(folder / "through" / file), load_file(tmp_path / file)) < 1e-5
    images = []
    for saved in (folder / "through", tmp_path):
        pipe = make_pipeline()
        pipe.load_lora_weights(str(saved))
        generator = torch.Generator().manual_seed(0)
        images.append(
            pipe("count1", height=16, width=16, num_inference_steps=2, generator=generator, output_type="pt")
        )
    assert torch.allclose(images[0].images, images[1].images, atol=1e-4)


def test_checkpoints_hold_adapters_alone_and_resume_exactly(two, one):
    reports, _, folder = two
    assert [report["resumed_is_same"] for report in reports] == [True, True]
    checkpoint = folder / "stopped" / "checkpoint-2"
    trained = 4 * reports[0]["trained_parameters"]
    # The base and the teachers would be larger than the student.
    sizes = {path.name: path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()}
    frozen = 4 * sum(p.numel() for p in one.model.parameters()) - trained
    assert {"adapter_model.safetensors", "student_raw.safetensors", "complete"} <= sizes.keys()
    assert frozen > trained
    assert all(size < 2.5 * trained + 100_000 for name, size in sizes.items()), sizes
