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

"""A disk that is full, and teachers that change: what is lost, and what is said."""

import hashlib
import logging
import re
from pathlib import Path

import pytest
import torch
from helpers.opd_fixtures import make_trainer, snapshot, train_losses
from safetensors.torch import load_file
from transformers import TrainerCallback


pytestmark = pytest.mark.slow


OPTIONS = dict(
    max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1, ema_decay=0.9, ema_update_interval=1
)
# What stands where a file is to be written. Writers that replace what they find don't replace a folder.
FULL, FOLDER, NOWHERE = "/dev/full", None, "/nowhere/at/all"
FILES = {
    "../README.md": FOLDER,
    "adapter_config.json": FULL,
    "adapter_model.safetensors": FOLDER,
    "pytorch_lora_weights.safetensors": FOLDER,
    "training_args.json": FOLDER,
    "teacher_manifest.json": FOLDER,
    "optimizer.pt": FULL,
    "scheduler.pt": FULL,
    "rng_state.pth": FULL,
    "trainer_state.json": FULL,
    "student_raw.safetensors": FOLDER,
    "noise_grid.json": FOLDER,
    "prompts.json": FOLDER,
    "evaluation.json": FOLDER,
    "complete.part": FULL,
}


@pytest.fixture(scope="module")
def through(tmp_path_factory, teachers):
    folder = tmp_path_factory.mktemp("through")
    trainer = make_trainer(folder, teachers, **OPTIONS)
    trainer.train()
    return trainer, folder / "checkpoint-3"


class FullDisk(TrainerCallback):
    """From an update on, a file of its checkpoint cannot be written."""

    def __init__(self, name, update=2):
        self.name, self.update = name, update

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.update:
            folder = Path(args.output_dir) / f"checkpoint-{self.update}"
            folder.mkdir()
            path = folder / self.name
            path.unlink(missing_ok=True)
            path.mkdir() if FILES[self.name] is FOLDER else path.symlink_to(FILES[self.name])


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_every_file_of_a_checkpoint_is_tried(through):
    _, folder = through
    assert {path.name for path in folder.iterdir()} == FILES.keys() - {"../README.md", "complete.part"} | {"complete"}


@pytest.mark.parametrize("name", FILES)
def test_full_disk(name, tmp_path, teachers, through, caplog):
    trainer = make_trainer(tmp_path, teachers, callbacks=[FullDisk(name)], **OPTIONS)
    save, kept = trainer._save_checkpoint, {}

    def watched(model, trial):
        kept.update(contents(tmp_path / "checkpoint-1") if trainer.state.global_step == 2 else {})
        save(model, trial)

    trainer._save_checkpoint = watched
    message = (
        rf"checkpoint-2 could not be saved in {re.escape(str(tmp_path))} \(.+\). A checkpoint of this run takes about "
    )
    with pytest.raises(
        OSError, match=message + r"[\d.]+ [MG]B; [\d.]+ [MG]B are free there. .*checkpoint-1 is complete"
    ):
        trainer.train()
    assert kept and contents(tmp_path / "checkpoint-1") == kept
    assert not (tmp_path / "checkpoint-2" / "complete").exists()

    if name == "../README.md":
        (tmp_path / "README.md").rmdir()  # space again
    again = make_trainer(tmp_path, teachers, **OPTIONS)
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=True)
    assert "checkpoint-2 was not saved to its end" in caplog.text
    assert (tmp_path / "incomplete-checkpoint-2").is_dir()
    assert all(torch.equal(p, snapshot(through[0])[n]) for n, p in snapshot(again).items())
    assert train_losses(again) == train_losses(through[0])


@pytest.mark.parametrize("update", [1, 2])
def test_the_space_that_a_checkpoint_takes(update, tmp_path, teachers, through):
    trainer = make_trainer(tmp_path, teachers, callbacks=[FullDisk("noise_grid.json", update)], **OPTIONS)
    with pytest.raises(OSError) as error:
        trainer.train()
    told = float(re.search(r"takes about ([\d.]+) MB", str(error.value))[1]) * 1e6
    takes = sum(path.stat().st_size for path in through[1].iterdir())
    # Of the first checkpoint only the tensors are counted; headers, which are most of a tiny one, are not.
    weights = load_file(through[1] / "student_raw.safetensors").values()
    tensors = 5 * sum(4 * p.numel() for p in weights)
    # Two digits are told.
    assert told == pytest.approx(tensors if update == 1 else takes, rel=0.05)
    assert ("There is no complete checkpoint. Start again" in str(error.value)) == (update == 1)
