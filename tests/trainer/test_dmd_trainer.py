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

"""Distribution matching: an update against the formulas in float64, what is trained, resumed, saved and refused."""

from types import SimpleNamespace

import pytest
import torch
from helpers.dmd_fixtures import FromTheFormulas, dmd_config, fake_weights, make_trainer, move_fake, state_of
from helpers.opd_fixtures import (
    AVERAGED,
    Recorder,
    StopAt,
    first_pixel,
    relative_difference,
    snapshot,
    student_lora,
    train_losses,
)
from safetensors.torch import load_file

from trl_diffusion_opd import DiffusionDMDConfig, TeacherConfig
from trl_diffusion_opd.hub.files import FAKE_OPTIMIZER_FILE, FAKE_SCORE_FILE, PUSHED_FILES


STILL = dict(learning_rate=0.0, fake_learning_rate=1e-30, max_grad_norm=0.0)  # nothing moves
LOSSES = ("dmd2", "tdm")


def keep_gradients(trainer):
    """Keeps the fake's gradient of each of its updates, as its optimizer gets it."""
    kept, step = [], trainer.fake.step

    def recording(max_norm):
        kept.append({name: p.grad.clone() for name, p in trainer.fake.named_parameters().items()})
        return step(max_norm)

    trainer.fake.step = recording
    return kept


CASES = {
    "dmd2": {"loss_type": "dmd2"},
    "tdm": {"loss_type": "tdm"},
    "dmd2, guided": {"loss_type": "dmd2", "guidance_scale": 2.0},
    "tdm, all weights": {"loss_type": "tdm", "peft_config": None},
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_formulas(case, tmp_path, teachers):
    recorder = Recorder()
    specs = {"count": TeacherConfig(teachers["count"], guidance_scale=1.0)}
    specs["draw"] = TeacherConfig(teachers["draw"], guidance_scale=3.0)
    trainer = make_trainer(tmp_path, specs, callbacks=[recorder], **STILL, **CASES[case])
    move_fake(trainer)
    student, fake, rows = snapshot(trainer), fake_weights(trainer), {}
    gradients, draw = keep_gradients(trainer), trainer.draw

    def drawing(number, of_batch):
        rows[of_batch[0]["task"]] = of_batch
        return draw(number, of_batch)

    trainer.draw = drawing
    trainer.train()
    expected = FromTheFormulas(trainer, student, fake, {**teachers, "draw": (teachers["draw"], 3.0)})
    loss, loss_of_fake = expected.losses(rows)
    (logged,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for ours, network, total in (
        (recorder.gradients[0], expected.student, loss),
        (gradients[0], expected.fake, loss_of_fake),
    ):
        weights = {name: p for name, p in network.named_parameters() if p.requires_grad}
        theirs = dict(zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True))
        assert relative_difference(ours, theirs) < 1e-4  # of a float32 network
    assert len(gradients) == 2 and relative_difference(*gradients) > 0.1  # each on fresh noise


@pytest.mark.parametrize(
    "start", [{"peft_config": student_lora(), "student_init": "merge"}, {"peft_config": None}], ids=["merge", "full"]
)
def test_what_an_update_trains(start, tmp_path, teachers):
    trainer = make_trainer(tmp_path, teachers, learning_rate=1e-3, max_steps=2, **AVERAGED, **start)
    before, fake = snapshot(trainer), fake_weights(trainer)
    assert relative_difference(fake, before) == 0  # it starts as a copy
    parts = trainer.frozen_parts()
    assert sum(p.numel() for p in parts["fake score"]) >= sum(p.numel() for p in before.values())
    frozen = {n: p.clone() for n, p in trainer.student.model.named_parameters() if n not in before and "fake" not in n}
    trainer.train()
    assert relative_difference(snapshot(trainer), before) > 1e-6
    assert relative_difference(fake_weights(trainer), fake) > 1e-6
    after = dict(trainer.student.model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in frozen.items())
    assert not any(p.requires_grad or p.grad is not None for p in trainer.fake.named_parameters().values())
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert {"fake_loss/count", "score_gap/draw", "loss/count", "fake_grad_norm", "time/fake"} <= entry.keys()
    trainer.save_model(str(tmp_path / "saved"))
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    assert not any("fake" in name for name in files)
    for name in files:
        if name.endswith(".safetensors"):
            assert not any("fake" in key for key in load_file(tmp_path / "saved" / name))


def test_with_checkpointing_the_backwards_are_the_same(tmp_path):
    """Blocks are computed again in the backward: the student's, and the fake's while the fake is active."""
    found = []
    for checkpointing in (False, True):
        recorder = Recorder()
        trainer = make_trainer(tmp_path, callbacks=[recorder], gradient_checkpointing=checkpointing, **STILL)
        move_fake(trainer)
        fake = keep_gradients(trainer)
        trainer.train()
        found.append((recorder.gradients[0], fake[0]))
    for ours, theirs in zip(*found, strict=True):
        assert relative_difference(ours, theirs) < 1e-6


STATEFUL = dict(learning_rate=1e-2, fake_learning_rate=1e-2, lr_scheduler_type="cosine", **AVERAGED)


@pytest.mark.parametrize("options", [dict(loss_type="dmd2", sampler="cps"), dict(loss_type="tdm", peft_config=None)])
def test_a_resumed_run_equals_the_whole_one_to_the_bit(options, tmp_path, teachers):
    options = {**STATEFUL, **options, "max_steps": 4}
    whole = make_trainer(tmp_path / "whole", teachers, **options)
    whole.train()
    first = make_trainer(tmp_path / "two", teachers, callbacks=[StopAt(2)], **options)
    first.train()
    second = make_trainer(tmp_path / "two", teachers, **options)
    second.train(resume_from_checkpoint=True)
    assert train_losses(second) == train_losses(whole)
    ours, theirs = state_of(second), state_of(whole)
    assert ours.keys() == theirs.keys() and any(name.startswith("fake 0 exp_avg") for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_micro_batches_of_another_size_give_the_same(tmp_path, teachers):
    runs = []
    for size, accumulation in ((4, 2), (2, 4)):
        options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=3)
        trainer = make_trainer(tmp_path, teachers, learning_rate=1e-3, sampler="cps", **options)
        trainer.train()
        runs.append(trainer)
    assert train_losses(runs[1]) == pytest.approx(train_losses(runs[0]), rel=1e-4)
    assert relative_difference(state_of(runs[1]), state_of(runs[0])) < 1e-4


def test_a_new_fake_learning_rate_takes_effect_on_resume(tmp_path):
    make_trainer(tmp_path, callbacks=[StopAt(1)], max_steps=2).train()
    checkpoint = tmp_path / "checkpoint-1"
    assert {FAKE_SCORE_FILE, FAKE_OPTIMIZER_FILE} <= {path.name for path in checkpoint.iterdir()}
    assert not {FAKE_SCORE_FILE, FAKE_OPTIMIZER_FILE} & set(PUSHED_FILES)
    trainer = make_trainer(tmp_path, max_steps=2, fake_learning_rate=0.5)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.fake.optimizer.param_groups[0]["lr"] == 0.5
    (changed,) = trainer.changes
    assert changed["name"] == "fake_learning_rate"


def test_a_checkpoint_without_fake_is_refused(tmp_path):
    make_trainer(tmp_path, callbacks=[StopAt(1)], max_steps=2, save_only_model=True).train()
    with pytest.raises(
        ValueError, match=f"it has no {FAKE_OPTIMIZER_FILE}: it was not saved by a DiffusionDMDTrainer"
    ):
        make_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=True)


def test_a_fake_that_is_not_finite_stops_the_run(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    next(iter(trainer.fake.named_parameters().values())).data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="The loss of task 'count' is not finite in update 1"):
        trainer.train()
    with pytest.raises(FloatingPointError, match=r"such as .*\(fake score\)"):
        trainer.save_model(str(tmp_path / "saved"))


# Refused


def test_samplers_that_end_with_noise_and_missing_teachers_are_refused_together(tmp_path):
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path, None, sampler="flow_sde")
    assert "sampler='flow_sde' leaves noise in its last state (standard deviation" in str(error.value)
    assert "Use ode, dpm2m, cps or ddim." in str(error.value)
    assert "teachers=None: name a teacher for every task" in str(error.value)


REFUSED = {
    "no learning": ({"fake_learning_rate": 0.0}, "fake_learning_rate=0.0: it must be positive."),
    "negative": ({"fake_learning_rate": -1e-5}, "fake_learning_rate=-1e-05: it must be positive."),
    "no student's rate": ({"learning_rate": 0.0}, "fake_learning_rate=0.0: it must be positive."),
    "no update": ({"fake_updates": 0}, "fake_updates=0: it must be at least 1"),
    "betas": ({"fake_adam_beta2": 1.0}, "fake_adam_beta2=1.0: it must be in [0, 1)."),
    "levels": ({"min_renoise_level": 0.9, "max_renoise_level": 0.5}, "they must be in [0, 1], the first below"),
    "level out of range": ({"max_renoise_level": 1.5}, "max_renoise_level=1.5: they must be in [0, 1]"),
    "no noise": ({"min_renoise_level": 0.0, "loss_type": "tdm"}, "min_renoise_level=0 with loss_type='tdm'"),
    "loss": ({"loss_type": "dmd"}, "loss_type='dmd': it must be one of dmd2, tdm."),
    "huber": ({"huber_c": -1.0, "loss_type": "tdm"}, "huber_c=-1.0: it must not be negative"),
    "huber of dmd2": ({"huber_c": 0.0}, "huber_c=0.0 has no effect with loss_type='dmd2'"),
    "guidance": ({"teacher_guidance_scale": 0.5}, "teacher_guidance_scale=0.5: it must be at least 1.0."),
}


@pytest.mark.parametrize("label", REFUSED)
def test_config_refuses(label):
    given, message = REFUSED[label]
    with pytest.raises(ValueError) as error:
        DiffusionDMDConfig("out", **given)
    (problem,) = str(error.value).splitlines()[1:]
    assert message in problem


def test_deepspeed_is_refused(tmp_path):
    config = dmd_config(tmp_path)
    assert config._problems() == []
    config.deepspeed_plugin = SimpleNamespace()
    (problem,) = config._problems()
    assert problem.startswith("DeepSpeed has one optimizer, but student and fake score have one each.")


def test_defaults_are_those_of_the_loss():
    one, two = DiffusionDMDConfig("out"), DiffusionDMDConfig("out", loss_type="tdm", num_inference_steps=4)
    assert (one.fake_updates, one.fake_learning_rate, one.eval_num_inference_steps) == (5, 5e-5, 10)
    assert (two.fake_updates, two.fake_learning_rate, two.eval_num_inference_steps) == (1, 5e-4, 4)
    assert (two.fake_adam_beta1, two.fake_adam_beta2) == (0.0, 0.95)


# Before the run


def test_a_dry_run_shows_the_first_update_and_changes_nothing(tmp_path, teachers, capsys):
    trainer = make_trainer(tmp_path, teachers, loss_type="tdm", reward_funcs=first_pixel, **STILL)
    before, state = {**snapshot(trainer), **fake_weights(trainer)}, torch.get_rng_state()
    report = trainer.dry_run()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in {**snapshot(trainer), **fake_weights(trainer)}.items())
    assert not any(p.requires_grad for p in trainer.fake.named_parameters().values())
    shown = capsys.readouterr().out
    assert "score gap" in shown and "second optimizer" in shown
    trained = sum(p.nbytes for p in trainer.student.parameters())
    rows = report["memory"]
    assert rows["fake score"]["bytes"] == trained
    assert rows["second optimizer"]["bytes"] == rows["optimizer"]["bytes"] == pytest.approx(2 * trained, rel=1e-2)
    assert report["seconds_per_update"] > 0 and set(report["tasks"]["draw"]["rewards"]) >= {
        "base, CFG 1",
        "student, CFG 1",
    }
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    for task in trainer.tasks:
        assert report["tasks"][task]["score_gap"] == pytest.approx(entry[f"score_gap/{task}"], rel=1e-5)
