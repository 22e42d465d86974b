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

"""A checkpoint that is damaged or another run's, and what has changed since it was saved."""

import json
import os
import shutil

import pytest
import torch
from helpers.opd_fixtures import (
    StopAt,
    make_dataset,
    make_trainer,
    snapshot,
    student_lora,
    train_losses,
)
from safetensors.torch import load_file, save_file

from trl_diffusion_opd.checkpointing.checkpoint import checkpoints
from trl_diffusion_opd.checkpointing.seal import damage, is_sealed, run_of, seal, update_of
from trl_diffusion_opd.problems import Refusal


OPTIONS = dict(max_steps=3, save_strategy="steps", save_steps=1, learning_rate=1e-2)


@pytest.fixture(scope="module")
def run(tmp_path_factory, teachers):
    """A run that was stopped after two of three updates."""
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, teachers, callbacks=[StopAt(2)], **OPTIONS).train()
    return folder


@pytest.fixture
def copied(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


# The seal


def test_a_seal_tells_of_every_bit(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "weights").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "empty").touch()
    assert not is_sealed(tmp_path)
    seal(tmp_path, "a run", 7)
    assert is_sealed(tmp_path) and damage(tmp_path) == []
    assert (run_of(tmp_path), update_of(tmp_path)) == ("a run", 7)
    data = bytearray((tmp_path / "in" / "weights").read_bytes())
    for position in (0, 2_500, 5_119):
        data[position] ^= 1
        (tmp_path / "in" / "weights").write_bytes(data)
        assert damage(tmp_path) == ["in/weights is damaged: its content has changed since it was saved."]
        assert damage(tmp_path, ["empty"]) == []
        data[position] ^= 1
    (tmp_path / "in" / "weights").write_bytes(data)
    (tmp_path / "empty").unlink()
    assert damage(tmp_path) == ["empty is missing."]
    (tmp_path / "complete").write_text("")
    assert damage(tmp_path) == ["complete, which holds the hashes of the other files, is damaged."]
    assert run_of(tmp_path) is None


def test_a_flipped_bit_in_any_file_is_named(copied, teachers):
    folder = copied / "checkpoint-2"
    trainer = make_trainer(copied, teachers, **OPTIONS)
    before = snapshot(trainer)
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "complete"):
        kept = path.read_bytes()
        path.write_bytes(kept[: len(kept) // 2] + bytes([kept[len(kept) // 2] ^ 16]) + kept[len(kept) // 2 + 1 :])
        with pytest.raises(ValueError) as error:
            trainer.train(resume_from_checkpoint=True)
        assert str(error.value).splitlines() == [
            "Can't resume from checkpoint-2:",
            f"- {path.name} is damaged: its content has changed since it was saved.",
            f"- Go on from the older checkpoint-1: resume_from_checkpoint={str(copied / 'checkpoint-1')!r}.",
        ]
        path.write_bytes(kept)
    assert all(torch.equal(p, before[name]) for name, p in snapshot(trainer).items())


def test_a_damaged_manifest_is_named_before_the_teachers_are_loaded(copied, teachers):
    path = copied / "checkpoint-2" / "teacher_manifest.json"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError) as error:
        make_trainer(copied, teachers, resume_from_checkpoint=True, **OPTIONS)
    assert "- checkpoint-2: teacher_manifest.json is damaged: its content has changed since it was saved." in str(
        error.value
    )
    assert "Go on from the older checkpoint-1" in str(error.value)


# Whose folder it is


def test_rotation_goes_by_update_and_not_by_time(copied, teachers):
    ahead = 2_000_000_000
    for folder in checkpoints(copied):
        os.utime(folder, (ahead, ahead))
    make_trainer(copied, teachers, save_total_limit=2, **OPTIONS).train(resume_from_checkpoint=True)
    assert [folder.name for folder in checkpoints(copied)] == ["checkpoint-2", "checkpoint-3"]


def test_a_new_run_sets_aside_what_another_has_left(copied, teachers, caplog):
    left = run_of(copied / "checkpoint-2")
    make_trainer(copied, teachers, **{**OPTIONS, "max_steps": 1}).train()
    assert [folder.name for folder in checkpoints(copied)] == ["checkpoint-1"]
    assert run_of(copied / "checkpoint-1") != left
    aside = copied / "earlier-run-1"
    assert {run_of(folder) for folder in checkpoints(aside)} == {left} and len(checkpoints(aside)) == 2
    assert "(checkpoint-1, checkpoint-2). They were moved to earlier-run-1, with" in caplog.text
    # It can still be gone on with, and what lies in the folder now is not this run's either.
    trainer = make_trainer(copied, teachers, **OPTIONS)
    trainer.train(resume_from_checkpoint=str(aside / "checkpoint-2"))
    assert run_of(copied / "checkpoint-3") == left
    assert [folder.name for folder in checkpoints(copied / "earlier-run-2")] == ["checkpoint-1"]


def test_to_go_back_sets_aside_what_came_after(copied, teachers):
    trainer = make_trainer(copied, teachers, **OPTIONS)
    trainer.train(resume_from_checkpoint=str(copied / "checkpoint-1"))
    assert [folder.name for folder in checkpoints(copied / "earlier-run-1")] == ["checkpoint-2"]
    assert [folder.name for folder in checkpoints(copied)] == [f"checkpoint-{i}" for i in (1, 2, 3)]


def test_two_runs_at_once(tmp_path, teachers):
    first, second = (make_trainer(tmp_path, teachers, **OPTIONS) for _ in range(2))
    told = []

    class Intruder(StopAt):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                with pytest.raises(Refusal) as error:
                    second.train()
                told.append(str(error.value))

    first.add_callback(Intruder(2))
    first.train()
    assert len(told) == 1 and told[0].startswith(f"Another run is training into {tmp_path}")
    assert [folder.name for folder in checkpoints(tmp_path)] == [f"checkpoint-{i}" for i in (1, 2, 3)]
    second.train()  # it is free now


def test_a_folder_that_cannot_be_written_is_told_with_all_else(tmp_path, teachers):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path / "file" / "out", teachers, num_trained_timesteps=9)
    assert "cannot be written to (Not a directory). Choose another folder." in str(error.value)
    assert "num_trained_timesteps=9" in str(error.value)


# What has changed since


def test_a_resume_says_what_has_changed_and_it_takes_effect(copied, teachers, capsys):
    make_trainer(copied, teachers, **OPTIONS).train(resume_from_checkpoint=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "Resuming after update 2 from checkpoint-2." in said and "Changed since" not in said

    shutil.rmtree(copied / "checkpoint-3")
    changed = {**OPTIONS, "learning_rate": 1e-3, "weight_decay": 0.5, "guidance_scale": 2.0, "adam_beta2": 0.9}
    trainer = make_trainer(copied, teachers, **changed)
    trainer.train(resume_from_checkpoint=True)
    said = capsys.readouterr().out
    assert "Changed since update 2, with effect from update 3 on" in " ".join(said.split())
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in said.splitlines() if "│" in line]
    for row in (["learning_rate", "0.01", "0.001"], ["guidance_scale", "1.0", "2.0"], ["adam_beta2", "0.999", "0.9"]):
        assert row in rows
    groups = trainer.optimizer.param_groups
    assert {(group["lr"], group["betas"][1]) for group in groups} == {(1e-3, 0.9)}
    assert 0.5 in {group["weight_decay"] for group in groups}
    (logged,) = [e["learning_rate"] for e in trainer.state.log_history if e["step"] == 3 and "learning_rate" in e]
    assert logged == 1e-3
    card = (copied / "README.md").read_text()
    assert "| 2 | learning_rate | 0.01 | 0.001 |" in card and "| 2 | guidance_scale | 1.0 | 2.0 |" in card
    recorded = json.loads((copied / "checkpoint-3" / "changes.json").read_text())
    assert {"after": 2, "name": "learning_rate", "then": 0.01, "now": 0.001} in recorded


def test_the_schedule_goes_on_from_the_new_rate(copied, teachers):
    schedule = {"lr_scheduler_type": "linear", "max_steps": 4, "learning_rate": 2e-2}
    trainer = make_trainer(copied, teachers, **{**OPTIONS, **schedule})
    trainer.train(resume_from_checkpoint=True)
    rates = {e["step"]: e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e}
    assert rates[3] == pytest.approx(2e-2 * 2 / 4) and rates[4] == pytest.approx(2e-2 * 1 / 4)


def test_prompts_that_are_others_are_told(copied, teachers, capsys):
    make_trainer(copied, teachers, train_dataset=make_dataset(count=7, draw=4), **OPTIONS).train(
        resume_from_checkpoint=True
    )
    assert "prompts of count" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"optim": "sgd"},
            "optim was 'adamw_torch_fused' and is 'sgd': another optimizer cannot use the saved state.",
        ),
        ({"peft_config": student_lora(lora_alpha=32)}, "and is 32: the saved matrices would have another effect."),
    ],
)
def test_what_would_mean_something_else_is_refused(copied, teachers, changed, message):
    trainer = make_trainer(copied, teachers, **OPTIONS, **changed)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert [folder.name for folder in checkpoints(copied)] == ["checkpoint-1", "checkpoint-2"]


def test_a_finished_run_says_so_and_can_be_extended(copied, teachers, caplog):
    make_trainer(copied, teachers, **{**OPTIONS, "max_steps": 2}).train(resume_from_checkpoint=True)
    assert "This run is finished: 2 of 2 updates are done. To extend it, set a larger max_steps" in caplog.text
    caplog.clear()
    trainer = make_trainer(copied, teachers, **{**OPTIONS, "max_steps": 3})
    trainer.train(resume_from_checkpoint=True)
    assert "finished" not in caplog.text and len(train_losses(trainer)) == 3


def test_a_finished_run_that_is_resumed_keeps_its_card_and_its_record(copied, teachers, capsys):
    make_trainer(copied, teachers, **OPTIONS).train(resume_from_checkpoint=True)
    capsys.readouterr()
    again = make_trainer(copied, teachers, **{**OPTIONS, "learning_rate": 3e-4})
    again.train(resume_from_checkpoint=True)
    assert "learning_rate" not in capsys.readouterr().out and again.changes == []
    again.save_model()
    again.create_model_card()
    card = (copied / "README.md").read_text()
    assert "| learning rate | 0.01, " in card and "0.0003" not in card and "when the training was resumed" not in card
    assert f'load_lora_weights("{copied.name}")' in card  # now the student is in the folder itself


def test_fewer_updates_than_are_done(copied, teachers, caplog):
    make_trainer(copied, teachers, **{**OPTIONS, "max_steps": 1}).train(resume_from_checkpoint=True)
    assert "This run has done 2 updates, more than the 1 asked for. Nothing is trained" in caplog.text


def test_a_resume_takes_its_own_intervals(copied, teachers, caplog):
    trainer = make_trainer(copied, teachers, **{**OPTIONS, "max_steps": 6, "save_steps": 3, "logging_steps": 2})
    trainer.train(resume_from_checkpoint=True)
    assert {"checkpoint-3", "checkpoint-6"} <= {folder.name for folder in checkpoints(copied)}
    assert not (copied / "checkpoint-5").exists() and "do not match the ones in" not in caplog.text
    assert [e["step"] for e in trainer.state.log_history if "loss" in e] == [1, 2, 4, 6]


def test_weights_of_a_run_without_an_average_can_go_on_with_one(tmp_path, teachers, capsys):
    make_trainer(tmp_path, teachers, callbacks=[StopAt(2)], **OPTIONS).train()
    trainer = make_trainer(tmp_path, teachers, ema_decay=0.9, **OPTIONS)
    trainer.train(resume_from_checkpoint=True)
    assert "ema_decay" in capsys.readouterr().out
    saved = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    raw = load_file(tmp_path / "checkpoint-3" / "student_raw.safetensors")
    assert any(not torch.equal(p, saved[name.replace(".default", "")]) for name, p in raw.items())


def test_equal_saves_are_equal_files(tmp_path, teachers):
    trainer = make_trainer(tmp_path, teachers, ema_decay=0.9, **OPTIONS)
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        trainer.save_model(str(folder))
    names = {path.name for path in folders[0].iterdir()}
    assert {"pytorch_lora_weights.safetensors", "adapter_model.safetensors"} <= names
    assert [n for n in names if (folders[0] / n).read_bytes() != (folders[1] / n).read_bytes()] == []


def test_weights_of_another_run_with_the_same_names(copied, teachers):
    """A forger can write a seal: it is against damage. What it says is still what is loaded."""
    folder = copied / "checkpoint-2"
    weights = load_file(folder / "student_raw.safetensors")
    save_file(
        {name: w * 2 for name, w in weights.items()}, folder / "student_raw.safetensors", metadata={"format": "pt"}
    )
    seal(folder, "another", 2)
    trainer = make_trainer(copied, teachers, **{**OPTIONS, "max_steps": 2})
    trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(p, 2 * weights[name]) for name, p in snapshot(trainer).items())


def test_a_folder_that_is_not_there_is_named(tmp_path, teachers):
    trainer = make_trainer(tmp_path, teachers, **OPTIONS)
    with pytest.raises(ValueError, match="Can't resume from checkpoint-9:\n- there is no folder '.*checkpoint-9'."):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
