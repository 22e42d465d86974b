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

"""DiffusionNFT: an update against the paper's, the old policy, what is learned, resumed and refused."""

import math
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers.grpo_fixtures import brightness
from helpers.nft_fixtures import Judge, PaperUpdate, copy_of_old_policy, make_trainer, move_old_policy
from helpers.opd_fixtures import (
    STATEFUL,
    Recorder,
    StopAt,
    make_dataset,
    relative_difference,
    snapshot,
    student_lora,
    train_losses,
)
from helpers.tiny_sd3 import make_pipeline, make_transformer
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import TrainerCallback

from trl_diffusion_opd import DiffusionNFTConfig, DiffusionNFTTrainer, DiffusionOPDConfig
from trl_diffusion_opd.checkpointing.seal import seal
from trl_diffusion_opd.hub.files import OLD_POLICY_FILE, PUSHED_FILES


pytestmark = pytest.mark.slow


# An update


CASES = {
    "ode": {},
    "groups_over_micro_batches": {"num_generations": 4, "gradient_accumulation_steps": 4, "nft_beta": 0.1},
    "dpm2m": {"sampler": "dpm2m", "num_inference_steps": 7, "num_trained_timesteps": 3},
    "flow_sde": {"sampler": "flow_sde", "task_weights": {"draw": 3.0}},
    "uniform_levels": {"timestep_sampling": "uniform", "num_trained_timesteps": 5, "loss_weighting": "velocity"},
    "base_and_guidance": {"beta": 0.5, "guidance_scale": 3.0, "advantage_clip": 0.4},
    "full_fine_tuning": {"peft_config": None, "beta": 0.5, "num_trained_timesteps": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_papers(case, tmp_path):
    recorder, judge = Recorder(), Judge()
    options = {"learning_rate": 0.0, "max_grad_norm": 0.0, "callbacks": [recorder], "reward_funcs": judge}
    trainer = make_trainer(tmp_path, **{**options, **CASES[case]})
    move_old_policy(trainer)
    old = copy_of_old_policy(trainer)
    trainer.train()
    (gradients,) = recorder.gradients
    rounds = judge.calls[len(trainer.tasks) :]  # the first calls try the reward, once a task
    expected = PaperUpdate(trainer, old, make_transformer(), rounds).gradients()
    assert relative_difference(gradients, expected) < 1e-5


@pytest.mark.slow
def test_with_checkpointing_the_backward_is_the_students(tmp_path):
    """Its second forward runs when the old policy has been active in between."""
    gradients = []
    for checkpointing in (False, True):
        recorder = Recorder()
        options = {"learning_rate": 0.0, "max_grad_norm": 0.0, "callbacks": [recorder], "reward_funcs": Judge()}
        trainer = make_trainer(tmp_path, gradient_checkpointing=checkpointing, **options)
        move_old_policy(trainer)
        trainer.train()
        gradients += recorder.gradients
    assert relative_difference(gradients[1], gradients[0]) < 1e-6


@pytest.mark.slow
def test_micro_batches_of_another_size_give_the_same(tmp_path):
    runs = []
    for size, accumulation in ((4, 4), (2, 8)):
        trainer = make_trainer(
            tmp_path,
            reward_funcs=Judge(),
            sampler="flow_sde",
            num_generations=4,
            num_trained_timesteps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
            learning_rate=1e-2,
        )
        trainer.train()
        runs.append(trainer)
    assert train_losses(runs[1]) == pytest.approx(train_losses(runs[0]), rel=1e-5)
    assert relative_difference(snapshot(runs[1]), snapshot(runs[0])) < 1e-5


@pytest.mark.slow
def test_forwards_of_an_update(tmp_path):
    trainer = make_trainer(tmp_path, num_trained_timesteps=3, beta=0.1, num_iterations=2, max_steps=2)
    layer = next(module for module in trainer.model.modules() if isinstance(module, LoraLayer))
    counts, per_update, field = Counter(), [], trainer.velocity_field

    def velocity(*inputs):
        counts["base" if layer.disable_adapters else layer.active_adapters[0]] += 1
        return field(*inputs)

    trainer.velocity_field = Mock(wraps=field, side_effect=velocity, levels=field.levels)
    trainer.add_callback(CountPerUpdate(counts, per_update))
    trainer.train()
    # Two tasks with a micro-batch each: four steps of the rollout in the first of two updates; then three levels.
    assert per_update == [{"old": 2 * (4 + 3), "default": 2 * 3, "base": 2 * 3}, {"old": 6, "default": 6, "base": 6}]


class CountPerUpdate(TrainerCallback):
    def __init__(self, counts, per_update):
        self.counts, self.per_update = counts, per_update

    def on_step_end(self, args, state, control, **kwargs):
        self.per_update.append(dict(self.counts))
        self.counts.clear()


# The old policy


def state_of(trainer):
    """Weights of student and old policy, and the optimizer, by name."""
    tensors = {f"weight {name}": p for name, p in snapshot(trainer).items()}
    tensors |= {f"old {name}": p.clone() for name, p in trainer.old_policy.named_parameters().items()}
    for i, entries in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer {i} {name}": torch.as_tensor(value) for name, value in entries.items()}
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("peft_config", ["lora", None])
def test_old_policy_follows_by_the_schedule(tmp_path, peft_config):
    recorder = Recorder()
    options = {} if peft_config == "lora" else {"peft_config": None}
    trainer = make_trainer(
        tmp_path,
        callbacks=[recorder],
        max_steps=6,
        num_iterations=2,
        learning_rate=1e-2,
        old_policy_decay_rate=0.2,
        old_policy_decay_max=0.5,
        old_policy_decay_start=2,
        **options,
    )
    old = {name: p.double() for name, p in snapshot(trainer).items()}
    assert relative_difference(trainer.old_policy.named_parameters(), old) == 0
    trainer.train()
    # After the rounds that end with updates 2, 4 and 6.
    for update, decay in ((2, 0.0), (4, 0.4), (6, 0.5)):
        old = {name: decay * old[name] + (1 - decay) * p.double() for name, p in recorder.weights[update - 1].items()}
    assert relative_difference(trainer.old_policy.named_parameters(), old) < 1e-6
    assert relative_difference(snapshot(trainer), old) > 1e-3
    logged = [entry["old_policy_decay"] for entry in trainer.state.log_history if "old_policy_decay" in entry]
    assert logged == pytest.approx([0.0, 0.4, 0.5])


@pytest.mark.slow
def test_old_policy_is_frozen_and_of_the_students_precision(tmp_path):
    trainer = make_trainer(tmp_path, pipeline=make_pipeline().to(torch.bfloat16), beta=0.1)
    old = list(trainer.old_policy.named_parameters().values())
    frozen = {
        n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad and ".old." not in n
    }
    trainer.train()
    assert {p.dtype for p in old} == {torch.float32} and {p.dtype for p in frozen.values()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in old) and all(p.grad is None for p in old)
    assert all(".default." in name for name in trainer.student.named_parameters())
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in trainer.student.parameters()}
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in frozen.items())
    assert all(math.isfinite(loss) for loss in train_losses(trainer))


def test_old_policy_is_in_checkpoints_alone(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    checkpoint = tmp_path / "checkpoint-1"
    assert (checkpoint / OLD_POLICY_FILE).exists()
    assert not (tmp_path / "saved" / OLD_POLICY_FILE).exists()
    for folder in (tmp_path / "saved", checkpoint):
        saved = load_file(folder / "adapter_model.safetensors")
        assert len(saved) == len(snapshot(trainer)) and not any(".old" in name for name in saved)
    assert not any(Path(OLD_POLICY_FILE).match(pattern) for pattern in PUSHED_FILES)
    card = (checkpoint.parent / "README.md").read_text()
    assert "DiffusionNFT" in card and "2509.16117" in card


# Learning


def test_a_toy_reward_rises(tmp_path):
    """The mean brightness of images, which are drawn without noise in the sampler."""
    trainer = make_trainer(
        tmp_path,
        train_dataset=make_dataset(draw=4),
        peft_config=student_lora(r=8, target_modules=["proj_out", "ff.net.2", "norm_out.linear"]),
        num_generations=8,
        per_device_train_batch_size=32,
        num_trained_timesteps=3,
        max_steps=12,
        learning_rate=2e-2,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    rewards = [entry["reward"] for entry in logs]
    # By more than one standard deviation of images, which is more than five of the mean of an update.
    assert np.mean(rewards[-3:]) - np.mean(rewards[:3]) > logs[0]["reward_std"]


def test_logged_metrics(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.1, max_steps=2, advantage_clip=0.1, learning_rate=1e-2)
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = {"kl", "kl/count", "kl/draw", "old_gap/count", "old_gap/draw", "signal", "clip_ratio", "old_policy_decay"}
    names |= {"reward", "rewards/brightness/mean", "grad_norm", "step_time"}
    assert names <= first.keys()
    assert first["old_gap/count"] < 1e-5  # the student is the old policy
    assert 0 < first["signal"] <= 1 and 0 < first["clip_ratio"] <= 1
    # Two updates later the two have parted; after the first, the old policy is the student but for a thousandth.
    assert first["old_policy_decay"] == 0.001 and second["old_gap/count"] > first["old_gap/count"]


# Resume


OPTIONS = dict(max_steps=6, num_iterations=2, gradient_accumulation_steps=4, old_policy_decay_rate=0.1, **STATEFUL)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("through"), **OPTIONS)
    trainer.train()
    return trainer


@pytest.mark.parametrize("stop", [2, 4])
def test_resumed_run_is_the_uninterrupted_run(stop, tmp_path, uninterrupted):
    first = make_trainer(tmp_path, callbacks=[StopAt(stop)], **OPTIONS)
    first.train()
    saved = load_file(tmp_path / f"checkpoint-{stop}" / OLD_POLICY_FILE)
    raw = load_file(tmp_path / f"checkpoint-{stop}" / "student_raw.safetensors")
    assert saved.keys() == raw.keys() and relative_difference(saved, raw) > 1e-4  # it did lag behind
    second = make_trainer(tmp_path, **OPTIONS)
    second.train(resume_from_checkpoint=True)
    ours, theirs = state_of(second), state_of(uninterrupted)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert train_losses(second) == train_losses(uninterrupted)


def test_a_checkpoint_without_old_policy_is_refused(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=1).train()
    (tmp_path / "checkpoint-1" / OLD_POLICY_FILE).unlink()
    seal(tmp_path / "checkpoint-1", "another trainer's", 1)
    trainer = make_trainer(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match="it has no old policy \\(old_policy.safetensors\\)"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# Refusals


def test_bad_settings(tmp_path):
    with pytest.raises(ValueError) as error:
        DiffusionNFTConfig(
            str(tmp_path),
            use_cpu=True,
            num_generations=1,
            nft_beta=0.0,
            beta=-1.0,
            advantage_clip=0.0,
            old_policy_decay_rate=-0.1,
            old_policy_decay_max=1.0,
            old_policy_decay_start=-1,
            loss_weighting="kl",
            timestep_sampling="logit",
            num_trained_timesteps=0,
        )
    lines = str(error.value).splitlines()
    assert lines[0] == "DiffusionNFTConfig:"
    for start in (
        "num_generations=1",
        "nft_beta=0.0: it must be positive",
        "beta=-1.0 is negative",
        "advantage_clip=0.0: it must be a positive number",
        "old_policy_decay_rate=-0.1 is negative",
        "old_policy_decay_max=1.0: it must be in [0, 1)",
        "old_policy_decay_start=-1 is negative",
        "loss_weighting='kl': it must be one of adaptive, velocity",
        "timestep_sampling='logit': it must be one of grid, uniform",
        "num_trained_timesteps=0: it must be at least 1",
    ):
        assert sum(line.startswith(f"- {start}") for line in lines) == 1, start
    assert len(lines) == 11
    with pytest.raises(ValueError, match="num_trained_timesteps=11: the grid has 10 levels"):
        DiffusionNFTConfig(str(tmp_path), use_cpu=True, num_trained_timesteps=11)
    DiffusionNFTConfig(str(tmp_path), use_cpu=True, num_trained_timesteps=11, timestep_sampling="uniform")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward_funcs": None}, "reward_funcs is missing"),
        ({"reward_funcs": {"count": brightness}}, "tasks ['draw'] have no reward"),
        ({"num_generations": 4}, "can't be split into groups of num_generations=4"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 values for 1 reward functions"),
    ],
)
def test_a_trainer_that_does_not_start_gives_the_pipeline_back(tmp_path, arguments, message):
    pipeline = make_pipeline()
    names = [name for name, _ in pipeline.transformer.named_parameters()]
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path, pipeline=pipeline, **arguments)
    assert str(error.value).startswith("DiffusionNFTTrainer cannot start:\n- ") and message in str(error.value)
    assert [name for name, _ in pipeline.transformer.named_parameters()] == names


def test_another_trainers_config_is_refused(tmp_path):
    args = DiffusionOPDConfig(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="args is a DiffusionOPDConfig, but DiffusionNFTTrainer takes"):
        DiffusionNFTTrainer(make_pipeline(), brightness, args=args, train_dataset=make_dataset())
