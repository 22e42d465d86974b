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

"""The dry run: what it shows is what training then does, and training is not touched by it."""

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.dry_runs import files
from helpers.example_script import run_opd
from helpers.opd_fixtures import (
    Recorder,
    first_pixel,
    make_dataset,
    make_trainer,
    relative_difference,
    snapshot,
)
from helpers.tiny_sd3 import SIZE, make_lora, make_pipeline, make_transformer
from PIL import Image
from safetensors.torch import load_file, save_file

from trl_diffusion_opd import TeacherConfig, estimate_memory
from trl_diffusion_opd.algorithms.rollout import sample_generators
from trl_diffusion_opd.pipelines.drawing import DRAWING
from trl_diffusion_opd.trainer.dry_run import update_seconds


pytestmark = pytest.mark.slow


def pixels(image) -> np.ndarray:
    return np.asarray(Image.open(image) if isinstance(image, Path) else image).astype(int)


OPTIONS = {
    "lora": {},
    "full": {"peft_config": None, "learning_rate": 1e-4},
    "guidance and a stochastic walk": {"teacher_guidance_scale": 3.0, "guidance_scale": 2.0, "sampler": "flow_sde"},
    "off-policy, checkpointing": {"on_policy": False, "gradient_checkpointing": True},
    "beyond the teachers": {"teacher_extrapolation": 1.5, "guidance_scale": 2.0, "guidance_branch_weight": 1.0},
    "bfloat16": {"bf16": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_then_does_what_was_shown(options, tmp_path, teachers, capsys):
    plain = make_trainer(tmp_path / "plain", teachers, max_steps=2, **options)
    plain.train()

    recorder = Recorder()
    trainer = make_trainer(tmp_path / "dry", teachers, max_steps=2, callbacks=[recorder], **options)
    before, frozen = snapshot(trainer), [p.detach().clone() for p in trainer.bank.backbone.parameters()]
    required = [p.requires_grad for p in trainer.model.parameters()]
    state = torch.get_rng_state()
    report = trainer.dry_run()
    assert relative_difference(snapshot(trainer), before) == 0
    assert all(torch.equal(p, q) for p, q in zip(trainer.bank.backbone.parameters(), frozen, strict=True))
    assert [p.requires_grad for p in trainer.model.parameters()] == required
    assert all(p.grad is None for p in trainer.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.state.global_step == 0 and trainer.state.log_history == []

    trainer.train()
    first = trainer.state.log_history[0]
    for task in trainer.tasks:
        for name in ("kl", "velocity_gap"):
            assert report["tasks"][task][name] == pytest.approx(first[f"{name}/{task}"], rel=1e-5)
    # Training is to the bit what it is without a dry run.
    assert relative_difference(snapshot(trainer), snapshot(plain)) == 0
    assert "What the first update sees" in capsys.readouterr().out


def test_pictures(tmp_path, teachers, capsys):
    specs = {
        "count": [TeacherConfig(teachers["count"], guidance_scale=4.0), teachers["draw"]],
        "draw": teachers["draw"],
    }
    trainer = make_trainer(
        tmp_path / "out",
        specs,
        guidance_scale=2.0,
        reward_funcs={"count": first_pixel},
        train_dataset=make_dataset(count=2, draw=2),
        eval_dataset=make_dataset(count=1),
    )
    report = trainer.dry_run()
    folder = tmp_path / "out" / "dry_run"
    names = ["count_base", "count_student", "count_teacher_1", "count_teacher_2", "draw_base", "draw_student"]
    assert files(tmp_path / "out") == {f"dry_run/{name}.png" for name in [*names, "draw_teacher", "dry_run"]}

    # Each is what its pipeline draws itself from the same noise.
    def own_image(transformer, task, scale):
        pipeline = make_pipeline()
        pipeline.transformer = transformer or pipeline.transformer
        index = trainer.tasks.index(task)
        generators = sample_generators([DRAWING, trainer.args.seed, index], [0])
        options = dict(**SIZE, num_inference_steps=3)
        return pipeline(f"{task}0", generator=generators, guidance_scale=scale, **options).images[0]

    loras = {task: make_lora(make_pipeline(), tmp_path / task, seed) for seed, task in enumerate(("count", "draw"), 1)}
    models = {
        "count_base": (None, 2.0),
        "count_teacher_1": (loras["count"], 4.0),
        "count_teacher_2": (loras["draw"], 2.0),
        "draw_base": (None, 2.0),
        "draw_teacher": (loras["draw"], 2.0),
    }
    drawn = {name: pixels(folder / f"{name}.png") for name in names + ["draw_teacher"]}
    for name, (transformer, scale) in models.items():
        assert np.abs(drawn[name] - pixels(own_image(transformer, name.split("_")[0], scale))).max() <= 1, name
    assert all(np.abs(drawn[a] - drawn[b]).max() > 3 for a in drawn for b in drawn if a < b and a[:4] == b[:4])
    # And the student's is the first of those that training logs.
    ((_, image),) = trainer.evaluator.draw(trainer.eval_dataset, "count", [0])
    assert (drawn["count_student"] == pixels(image)).all()

    captions = ["base, CFG 2", "teacher 1, CFG 4", "teacher 2, CFG 2", "student, CFG 2"]
    rewards = {
        caption: {"first_pixel": float(drawn[name][0, 0, 0])}
        for caption, name in zip(
            captions, ["count_base", "count_teacher_1", "count_teacher_2", "count_student"], strict=True
        )
    }
    assert report["tasks"]["count"]["rewards"] == rewards
    shown = capsys.readouterr().out
    assert all(f"{scores['first_pixel']:.3f}" in shown for scores in rewards.values())
    assert Image.open(folder / "dry_run.png").width > 400


def test_teachers_that_are_the_base(tmp_path, teachers, caplog):
    hardly = tmp_path / "hardly"
    make_lora(make_pipeline(), hardly, seed=1)
    weights = load_file(hardly / "adapter_model.safetensors")
    save_file(
        {k: w * (1e-7 if "lora_B" in k else 1) for k, w in weights.items()}, hardly / "adapter_model.safetensors"
    )
    make_transformer(0).save_pretrained(tmp_path / "copy")
    make_transformer(1).save_pretrained(tmp_path / "other")
    names = {"a": hardly, "b": tmp_path / "copy", "c": tmp_path / "other", "d": teachers["draw"], "e": "base"}
    trainer = make_trainer(
        tmp_path / "out",
        {task: str(name) for task, name in names.items()},
        train_dataset=make_dataset(**dict.fromkeys(names, 1)),
        per_device_train_batch_size=1,
        eval_num_inference_steps=1,
    )
    with caplog.at_level(logging.WARNING):
        report = trainer.dry_run()
    assert len(report["warnings"]) == 2
    for warning, task, name in zip(report["warnings"], "ab", ("hardly", "copy"), strict=True):
        assert f"The teacher {name} of task '{task}' does not differ from the base" in warning
        assert warning in caplog.text and str(tmp_path) not in warning
    gaps = {task: figures["teachers"][0]["gap_to_base"] for task, figures in report["tasks"].items()}
    assert gaps["a"] < 4e-7 and gaps["b"] < 4e-7 and gaps["c"] > 0.1 and gaps["d"] > 0.1 and gaps["e"] == 0
    # The same for the same network at another precision: the noise floor is that of half precision.
    kl, rounding = report["tasks"]["d"]["kl"], report["tasks"]["d"]["teachers"][0]["rounding"]
    assert 1e-8 < rounding < 1e-5 and report["tasks"]["d"]["noise_floor"] < 1e-8 * kl


@pytest.mark.gpu
def test_memory_on_a_gpu(tmp_path, teachers):
    small, large = (
        make_trainer(tmp_path, teachers, use_cpu=False, per_device_train_batch_size=n).dry_run()["memory"]
        for n in (1, 8)
    )
    for name in ("activations", "activations, measured"):
        assert large[name]["bytes"] > small[name]["bytes"] > 0


def test_memory_is_the_estimate(tmp_path, teachers, capsys):
    trainer = make_trainer(tmp_path, teachers)
    assert trainer.dry_run()["memory"] == estimate_memory(trainer)
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "from shapes: forward and backward" in words and "estimate: at the student's" in words


@pytest.mark.parametrize("extrapolation", [1.0, 1.25])
def test_time_is_that_of_an_updates_forwards(extrapolation, tmp_path, teachers):
    """Against counting what the updates of a training evaluate."""
    updates = 20
    trainer = make_trainer(
        tmp_path,
        teachers,
        num_inference_steps=6,
        num_trained_timesteps=2,
        beta=0.1,
        teacher_extrapolation=extrapolation,
        gradient_accumulation_steps=4,
        per_device_train_batch_size=1,
        max_steps=updates,
        logging_steps=1000,
    )
    trainer._measure_noise_floor = lambda *inputs: None
    counts = {"student": 0, "target": 0, "update": 0, "base": 0}
    field = trainer.velocity_field

    class Counting:
        initial_latents, levels, encode_together = field.initial_latents, field.levels, field.encode_together

        def __call__(self, *inputs):
            frozen = {None: "base", "default": "student"}.get(trainer.bank.backbone.active, "target")
            counts["update" if torch.is_grad_enabled() else frozen] += 1
            return field(*inputs)

    trainer.velocity_field = Counting()
    trainer.train()
    for name, count in counts.items():
        cost = {**dict.fromkeys(counts, 0.0), name: 1.0}
        # Only how far a walk goes is drawn.
        tolerance = 0.15 if name == "student" else 0
        assert update_seconds(trainer.args, trainer.plan, trainer.rounds.micro_batches, [cost, cost]) == pytest.approx(
            count / updates, rel=tolerance
        ), name
    assert counts["student"] > updates


def test_time_of_the_run(tmp_path, teachers, capsys):
    trainer = make_trainer(tmp_path, teachers, max_steps=-1, num_train_epochs=2.5)
    report = trainer.dry_run()
    assert report["updates"] == math.ceil(2.5 * 3)  # six prompts of the largest task, two at a time
    assert report["seconds"] == pytest.approx(8 * report["seconds_per_update"]) and report["seconds"] > 0
    assert "8 updates" in " ".join(capsys.readouterr().out.split())
    trainer.train()
    assert trainer.state.global_step == 8


def test_script(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    make_pipeline().save_pretrained("base")
    make_lora(make_pipeline(), "teacher", seed=0)
    Path("a.txt").write_text("one cat\ntwo dogs\n")
    run_opd(
        monkeypatch,
        tmp_path / "base",
        *("--teachers", "a/b=teacher", "c=base", "--prompts", "a/b=a.txt", "c=a.txt", "--dry_run"),
        *("--reward_funcs", "c=helpers.stub_reward:brightness"),
        push_to_hub="true",  # would need a network
        hub_model_id="me/student",
        report_to="tensorboard",
        save_strategy="steps",
        resume_from_checkpoint="true",
    )
    models = ("base", "teacher", "student")
    assert files(Path("out")) == {
        "dry_run/dry_run.png",
        *(f"dry_run/{t}_{m}.png" for t in ("a%2Fb", "c") for m in models),
    }
    shown = capsys.readouterr().out
    for title in ("Tasks and teachers", "Steps of ode", "first update", "Memory", "One image of each model", "Time:"):
        assert title in shown
