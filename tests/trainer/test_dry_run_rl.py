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

"""The dry run of the trainers by reward: its round is training's first, its counts are training's, and nothing changes."""

import logging
import runpy
import sys
from pathlib import Path

import datasets
import pytest
import torch
from helpers import grpo_fixtures, nft_fixtures
from helpers.dry_runs import files
from helpers.grpo_fixtures import brightness
from helpers.opd_fixtures import first_pixel, relative_difference, snapshot
from helpers.tiny_sd3 import make_pipeline, make_transformer

from trl_diffusion_opd.trainer.dry_run_shared import counted


pytestmark = pytest.mark.slow


EXAMPLES = Path(__file__).parents[2] / "examples"
REWARDS = {"count": [brightness, first_pixel], "draw": [brightness]}
COMMON = dict(reward_funcs=REWARDS, num_generations=4, per_device_train_batch_size=4, learning_rate=1e-3)
CASES = {
    "grpo": (grpo_fixtures, {"beta": 0.1, "num_iterations": 2, "max_steps": 4, "gradient_accumulation_steps": 4}),
    "grpo, window, full": (grpo_fixtures, {"sde_window_size": 1, "peft_config": None, "beta": 0.1, "max_steps": 2}),
    "grpo, one pass": (
        grpo_fixtures,
        {"one_pass": True, "sde_window_size": 2, "beta": 0.1, "max_steps": 2, "gradient_checkpointing": True},
    ),
    "nft, guidance": (
        nft_fixtures,
        {"beta": 0.1, "num_trained_timesteps": 2, "max_steps": 2, "guidance_scale": 2.0},
    ),
    "nft, bfloat16": (nft_fixtures, {"bf16": True, "gradient_checkpointing": True, "max_steps": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_training_then_does_what_was_shown(case, tmp_path, capsys):
    fixtures, options = CASES[case]
    plain = fixtures.make_trainer(tmp_path / "plain", **COMMON, **options)
    plain.train()

    trainer = fixtures.make_trainer(tmp_path / "dry", **COMMON, **options)
    before, state = snapshot(trainer), torch.get_rng_state()
    required = [p.requires_grad for p in trainer.model.parameters()]
    report = trainer.dry_run()
    assert relative_difference(snapshot(trainer), before) == 0
    assert [p.requires_grad for p in trainer.model.parameters()] == required
    assert all(p.grad is None for p in trainer.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.state.global_step == 0 and trainer.state.log_history == [] and not trainer._metrics["train"]
    assert trainer.accelerator.gradient_state.sync_gradients
    folder = {f"dry_run/{task}_{name}.png" for task in trainer.tasks for name in ["student", *completions(4)]}
    assert files(tmp_path / "dry") == folder | {"dry_run/dry_run.png"}

    networks = [trainer.model, *trainer.frozen_networks()]
    with counted(networks) as count:
        trainer.train()
    assert (count.forwards, count.backwards) == (report["forwards"], report["backwards"])
    assert report["updates"] == trainer.state.global_step
    first = trainer.state.log_history[0]
    of_tasks = report["tasks"]
    for figure in ("mean", "std"):
        both = [of_tasks[task]["rewards"]["brightness"][figure] for task in trainer.tasks]
        assert sum(both) / 2 == pytest.approx(first[f"rewards/brightness/{figure}"], rel=1e-6)
        ours = of_tasks["count"]["rewards"]["first_pixel"][figure]
        assert ours == pytest.approx(first[f"rewards/first_pixel/{figure}"], rel=1e-6)
    assert list(of_tasks["draw"]["rewards"]) == ["brightness"]
    # Training is to the bit what it is without a dry run.
    assert relative_difference(snapshot(trainer), snapshot(plain)) == 0
    assert "What the first round gives" in capsys.readouterr().out


def completions(n: int) -> list[str]:
    return [f"completion_{i}" for i in range(1, n + 1)]


def test_forwards_are_those_of_the_settings(tmp_path):
    options = {"beta": 0.1, "num_iterations": 2, "max_steps": 4, "gradient_accumulation_steps": 4}
    report = grpo_fixtures.make_trainer(tmp_path, **COMMON, **options).dry_run()
    images, steps, trained = 16, 4, 3
    assert report["forwards_per_update"] == images * (steps / 2 + 2 * trained)  # student and base
    assert report["backwards_per_update"] == images * trained
    assert report["forwards"] == 4 * report["forwards_per_update"]
    assert report["seconds"] == pytest.approx(4 * report["seconds_per_update"]) and report["seconds"] > 0
    assert report["tasks"]["count"]["prompts"] == 2 and report["tasks"]["count"]["completions"] == 8


def test_memory_has_what_the_method_adds(tmp_path):
    memory = nft_fixtures.make_trainer(tmp_path, **COMMON).dry_run()["memory"]
    assert memory["old policy"]["bytes"] == memory["student"]["bytes"] > 0 and "frozen base" not in memory
    assert memory["round"]["bytes"] > 0
    full = grpo_fixtures.make_trainer(tmp_path, **COMMON, beta=0.1, peft_config=None).dry_run()["memory"]
    assert full["frozen base"]["bytes"] == full["student"]["bytes"]
    assert full["transformer"]["bytes"] == make_transformer().pos_embed.pos_embed.nbytes  # its weights are the student


def test_a_reward_without_signal_is_shown_and_training_warns_too(tmp_path, caplog, capsys):
    def always_one(images, **columns):
        return [1.0] * len(images)

    trainer = grpo_fixtures.make_trainer(tmp_path, {"count": always_one, "draw": brightness})
    with caplog.at_level(logging.WARNING):
        report = trainer.dry_run()
        assert report["warnings"] == ["always_one"]
        assert report["tasks"]["count"]["frac_reward_zero_std"] == 1
        assert report["tasks"]["draw"]["frac_reward_zero_std"] == 0
        assert caplog.text.count("every image of each prompt got the same reward from 'always_one'") == 1
        trainer.train()
        assert caplog.text.count("every image of each prompt got the same reward from 'always_one'") == 2
    assert "100%" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["grpo", "nft"])
def test_script(method, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    make_pipeline().save_pretrained("base")
    Path("a.txt").write_text("one cat\ntwo dogs\n")
    settings = {
        "model_name_or_path": "base",
        "prompts": "a/b=a.txt",
        "reward_funcs": "a/b=helpers.grpo_fixtures:brightness",
        "output_dir": "out",
        "height": 16,
        "width": 16,
        "max_sequence_length": 16,
        "guidance_scale": 1.0,
        "num_inference_steps": 3,
        "eval_num_inference_steps": 2,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "lora_r": 2,
        "push_to_hub": "true",  # would need a network
        "hub_model_id": "me/teacher",
        "report_to": "tensorboard",
        "use_cpu": "true",
        "dataloader_pin_memory": "false",
    }
    given = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    path = EXAMPLES / f"teacher_{method}_sd3.py"
    monkeypatch.setattr(sys, "argv", [str(path), *given, "--dry_run"])
    runpy.run_path(str(path), run_name="__main__")
    images = {f"dry_run/a%2Fb_{name}.png" for name in ["student", *completions(2)]}
    assert files(Path("out")) == images | {"dry_run/dry_run.png"}
    shown = capsys.readouterr().out
    for title in ("Tasks and rewards", "first round", "Seconds of the round", "Memory", "first prompts", "Time:"):
        assert title in shown
