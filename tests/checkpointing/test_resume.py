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

"""A run that was stopped and resumed is the run that went through; what does not fit is refused."""

import json
import logging
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers.opd_fixtures import STATEFUL, StopAt, make_trainer, snapshot, student_lora, train_losses
from safetensors.torch import load_file, save_file

from trl_diffusion_opd.checkpointing import checkpoint
from trl_diffusion_opd.models.student import Student


# Epochs of two updates (6 prompts, 4 an update), so that stops at 2 and 3 are at the end and in the middle of one.
UPDATES = 5
OPTIONS = dict(max_steps=UPDATES, gradient_accumulation_steps=4, **STATEFUL)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, teachers):
    trainer = make_trainer(tmp_path_factory.mktemp("through"), teachers, **OPTIONS)
    seen, step = [], trainer.training_step
    trainer.training_step = lambda model, rows, n: seen.append([row["prompt"] for row in rows]) or step(model, rows, n)
    trainer.train()
    return trainer, seen


@pytest.mark.slow
def test_every_epoch_has_its_own_order(uninterrupted):
    _, seen = uninterrupted
    of_count = [sum(seen[first : first + 8 : 2], []) for first in (0, 8)]  # two updates of 4 micro-batches
    assert len(set(of_count[0])) == len(set(of_count[1])) == 6
    assert of_count[0] != of_count[1]


def state_of(trainer):
    """Weights, average and optimizer, by name."""
    tensors = {f"weight {name}": p for name, p in snapshot(trainer).items()}
    tensors |= {f"average {i}": p.clone() for i, p in enumerate(trainer.student.ema.shadow_params)}
    for i, entries in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer {i} {name}": torch.as_tensor(value) for name, value in entries.items()}
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 3])
def test_resumed_run_is_the_uninterrupted_run(stop, tmp_path, teachers, uninterrupted):
    first = make_trainer(tmp_path, teachers, callbacks=[StopAt(stop)], **OPTIONS)
    first.train()
    assert first.state.global_step == stop
    assert (tmp_path / f"checkpoint-{stop}" / "complete").exists()
    second = make_trainer(tmp_path, teachers, **OPTIONS)
    second.train(resume_from_checkpoint=True)
    through, _ = uninterrupted
    ours, theirs = state_of(second), state_of(through)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert any(name.startswith("optimizer") and "exp_avg" in name for name in ours)
    assert train_losses(second) == train_losses(through)
    assert second.state.epoch == through.state.epoch == UPDATES / 2
    # It did go on, from weights that are not their average.
    halfway = state_of(first)
    assert any(not torch.equal(ours[name], halfway[name]) for name in ours)
    raw = load_file(tmp_path / f"checkpoint-{stop}" / "student_raw.safetensors")
    average = load_file(tmp_path / f"checkpoint-{stop}" / "adapter_model.safetensors")
    assert any(not torch.equal(p, average[name.replace(".default", "")]) for name, p in raw.items())


@pytest.mark.slow
def test_a_run_resumed_at_its_end_has_ended(tmp_path, teachers, uninterrupted):
    make_trainer(tmp_path, teachers, save_strategy="steps", save_steps=UPDATES, **OPTIONS).train()
    trainer = make_trainer(tmp_path, teachers, **OPTIONS)
    trainer.train(resume_from_checkpoint=True)
    through, _ = uninterrupted
    assert trainer.state.global_step == UPDATES  # in the middle of an epoch
    assert all(torch.equal(p, snapshot(through)[name]) for name, p in snapshot(trainer).items())


def killed_in_its_second_save(folder, teachers):
    save_state, saves = Student.save_state, []

    def killed(self, folder, *rest):
        saves.append(folder)
        if len(saves) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        save_state(self, folder, *rest)

    Student.save_state = killed
    make_trainer(folder, teachers, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1).train()


def test_killed_during_a_save(tmp_path, teachers, caplog, processes):
    (ended,) = processes.run(killed_in_its_second_save, tmp_path, teachers, world=1)
    assert ended.code == -signal.SIGKILL, ended.error
    # The half-written one has what Trainer writes, and the older one was not rotated away for it.
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()
    assert not (tmp_path / "checkpoint-2" / "complete").exists()
    assert (tmp_path / "checkpoint-1" / "complete").exists()

    trainer = make_trainer(tmp_path, teachers, max_steps=3, save_strategy="steps", save_steps=1)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-2 was not saved to its end" in caplog.text
    assert "set aside as incomplete-checkpoint-2" in caplog.text
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == [
        *(f"checkpoint-{i}" for i in (1, 2, 3)),
        "incomplete-checkpoint-2",
    ]
    through = make_trainer(tmp_path / "through", teachers, max_steps=3)
    through.train()
    assert all(torch.equal(p, snapshot(through)[name]) for name, p in snapshot(trainer).items())
    assert train_losses(trainer) == train_losses(through)


def test_killed_twice_at_the_same_update(tmp_path, teachers, caplog):
    trainer = make_trainer(tmp_path, teachers)
    for name in ("incomplete-checkpoint-2", "checkpoint-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "optimizer.pt").touch()
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ValueError, match="holds no complete checkpoint. Leave it out to begin a new run."),
    ):
        trainer.train(resume_from_checkpoint=True)
    assert "set aside as incomplete-checkpoint-2-again" in caplog.text
    assert not (tmp_path / "checkpoint-2").exists()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, teachers):
    folder = tmp_path_factory.mktemp("stopped")
    make_trainer(folder, teachers, max_steps=2, callbacks=[StopAt(1)]).train()
    return folder


def refused(folder, teachers, named=None, **options):
    trainer = make_trainer(folder, teachers, max_steps=2, **options)
    before = snapshot(trainer)
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=named or str(folder / "checkpoint-1"))
    assert all(torch.equal(p, before[name]) for name, p in snapshot(trainer).items())
    return str(error.value)


def test_another_noise_grid_is_refused(stopped, teachers):
    message = refused(stopped, teachers, num_inference_steps=5)
    assert "Can't resume from checkpoint-1" in message
    assert "num_inference_steps was 4, is 5: it was trained on another noise grid." in message


def test_changed_teacher_is_refused(stopped, teachers, tmp_path):
    file = Path(teachers["draw"]) / "adapter_model.safetensors"
    original = file.read_bytes()
    weights = load_file(file)
    next(iter(weights.values()))[0, 0] += 1e-3
    save_file(weights, file)
    try:
        message = refused(stopped, teachers)
        assert "the teacher of task 'draw' has changed: the checkpoint was trained with draw@" in message
        assert "'count'" not in message
        # Named in the arguments, the checkpoint is compared before anything is loaded into the student.
        refusal = "draw: not the teacher that the checkpoint was trained with"
        with pytest.raises(ValueError, match=refusal):
            make_trainer(tmp_path, teachers, resume_from_checkpoint=str(stopped / "checkpoint-1"))
        # The last one of the run, not named but asked for.
        assert refused(stopped, teachers, named=True) == message
        with pytest.raises(ValueError, match=refusal):
            make_trainer(stopped, teachers, resume_from_checkpoint=True)
        with pytest.raises(ValueError, match=refusal):  # as a command line gives it
            make_trainer(stopped, teachers, resume_from_checkpoint="True")
        make_trainer(tmp_path, teachers, resume_from_checkpoint=True)  # there is none here
    finally:
        file.write_bytes(original)


def test_other_teachers_are_refused(stopped, teachers):
    message = refused(stopped, {**teachers, "draw": "base"})
    assert "the teacher of task 'draw' has changed" in message


def test_another_student_is_refused(stopped, teachers):
    message = refused(stopped, teachers, peft_config=student_lora(r=2))
    assert "peft_config.r was 4 and is 2: the saved matrices would have another effect." in message
    assert "Resume with the peft_config that the run was started with." in message
    message = refused(stopped, teachers, peft_config=student_lora(target_modules=["attn.to_q"]))
    assert "add_k_proj.lora_A.default.weight" in message


def test_everything_that_does_not_fit_is_told_at_once(stopped, teachers):
    message = refused(stopped, {**teachers, "draw": "base"}, num_inference_steps=5)
    assert message.count("\n- ") == 2


def test_a_folder_that_is_no_checkpoint(stopped, teachers, tmp_path):
    trainer = make_trainer(tmp_path / "out", teachers, max_steps=2)
    (tmp_path / "empty").mkdir()
    for folder, advice in (
        (tmp_path / "empty", "Name a folder checkpoint-… of a run's output folder."),
        (stopped, f"The last one in it: resume_from_checkpoint={str(stopped / 'checkpoint-1')!r}."),
    ):
        with pytest.raises(ValueError) as error:
            trainer.train(resume_from_checkpoint=str(folder))
        (said,) = str(error.value).splitlines()[1:]
        assert said == f"- {str(folder)!r} is not a checkpoint (it has no trainer_state.json). {advice}"


def test_incomplete_checkpoint_is_refused(stopped, teachers):
    (stopped / "checkpoint-1" / "complete").rename(stopped / "complete")
    trainer = make_trainer(stopped / "elsewhere", teachers, max_steps=2)
    try:
        with pytest.raises(
            ValueError, match="checkpoint-1:\n- it was not saved to its end. There is no older complete checkpoint."
        ):
            trainer.train(resume_from_checkpoint=str(stopped / "checkpoint-1"))
    finally:
        (stopped / "complete").rename(stopped / "checkpoint-1" / "complete")


@pytest.mark.slow
def test_older_checkpoints_go_when_the_new_one_is_complete(tmp_path, teachers, monkeypatch):
    seen, rotate = [], checkpoint.rotate_checkpoints

    def watch(output_dir, save_total_limit, **options):
        before = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
        complete = [name for name in before if (tmp_path / name / "complete").exists()]
        seen.append((before, complete == before))
        rotate(output_dir=output_dir, save_total_limit=save_total_limit, **options)

    monkeypatch.setattr(checkpoint, "rotate_checkpoints", watch)
    make_trainer(tmp_path, teachers, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2).train()
    names = [f"checkpoint-{i}" for i in (1, 2, 3, 4)]
    assert seen == [(names[:1], True), (names[:2], True), (names[:3], True), (names[1:], True)]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == names[2:]
    arguments = json.loads((tmp_path / "checkpoint-4" / "training_args.json").read_text())
    assert arguments["save_total_limit"] == 2 and list(arguments) == sorted(arguments)
