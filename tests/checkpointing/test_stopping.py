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

"""Ctrl-C and SIGTERM: the update is finished, a checkpoint is written, and the run that goes on is the uninterrupted one."""

import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from helpers.opd_fixtures import make_dataset, make_trainer, snapshot
from transformers import TrainerCallback

from trl_diffusion_opd.checkpointing.checkpoint import last_complete
from trl_diffusion_opd.checkpointing.seal import seal
from trl_diffusion_opd.checkpointing.stopping import command_to_go_on
from trl_diffusion_opd.scripts.training import student_is_safe


OPTIONS = dict(
    max_steps=4,
    sampler="flow_sde",
    learning_rate=1e-2,
    ema_decay=0.9,
    save_strategy="no",
    gradient_accumulation_steps=4,
)


class Signal(TrainerCallback):
    """Sends this process a signal while update number 2 is computed, so many times."""

    def __init__(self, number, times=1):
        self.number, self.times = number, times

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 1 and self.times:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
            self.times = 0


class Afterwards(TrainerCallback):
    """Notes that what comes after a training did come."""

    def __init__(self):
        self.ended = False

    def on_train_end(self, args, state, control, **kwargs):
        self.ended = True


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stops_after_the_update_and_goes_on_bit_for_bit(tmp_path, teachers, number, status, capfd):
    afterwards = Afterwards()
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    stopped = make_trainer(tmp_path / "stopped", teachers, callbacks=[Signal(number), afterwards], **OPTIONS)
    with pytest.raises(SystemExit) as ended:
        stopped.train()
    assert ended.value.code == status and afterwards.ended
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert last_complete(tmp_path / "stopped") == tmp_path / "stopped" / "checkpoint-2"
    said = capfd.readouterr()
    assert "Ctrl-C again ends at once" in said.err
    assert f"Stopped after update 2, as asked ({signal.Signals(number).name})" in " ".join(said.out.split())
    assert "--resume_from_checkpoint True" in " ".join(said.out.split())

    second = make_trainer(tmp_path / "stopped", teachers, **OPTIONS)
    second.train(resume_from_checkpoint=True)
    through = make_trainer(tmp_path / "through", teachers, **OPTIONS)
    through.train()
    assert all(torch.equal(p, snapshot(through)[name]) for name, p in snapshot(second).items())


def test_a_better_checkpoint_does_not_take_its_place(tmp_path, teachers):
    # Trainer's own end would delete all but the best one.
    options = dict(eval_strategy="steps", eval_steps=1, num_eval_images=1, save_steps=1, save_total_limit=1)
    options |= dict(load_best_model_at_end=True, metric_for_best_model="loss", save_strategy="steps")
    options |= dict(eval_dataset=make_dataset(count=1, draw=1), greater_is_better=False)
    trainer = make_trainer(tmp_path, teachers, callbacks=[Signal(signal.SIGTERM)], **{**OPTIONS, **options})
    with pytest.raises(SystemExit):
        trainer.train()
    assert last_complete(tmp_path) == tmp_path / "checkpoint-2"


def handler():
    return signal.getsignal(signal.SIGINT)


def test_a_second_ctrl_c_ends_at_once(tmp_path, teachers):
    trainer, before = (
        make_trainer(tmp_path, teachers, callbacks=[Signal(signal.SIGINT, times=2)], **OPTIONS),
        handler(),
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert last_complete(tmp_path) is None
    assert handler() is before


def test_a_launchers_sigterm_after_ctrl_c_is_no_second_one(tmp_path, teachers):
    callbacks = [Signal(signal.SIGINT), Signal(signal.SIGTERM)]
    with pytest.raises(SystemExit) as ended:
        make_trainer(tmp_path, teachers, callbacks=callbacks, **OPTIONS).train()
    assert ended.value.code == 130 and last_complete(tmp_path) is not None


def test_in_another_thread_training_goes_without_signals(tmp_path, teachers):
    trainer = make_trainer(tmp_path, teachers, **OPTIONS)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 4


def train_with_workers(folder, teachers):
    def worker_gets_it(rows):
        # As a terminal sends a Ctrl-C: to all processes of the group.
        os.kill(os.getpid(), signal.SIGINT)
        return rows

    options = dict(dataloader_num_workers=1, callbacks=[Signal(signal.SIGINT)], **OPTIONS)
    trainer = make_trainer(folder, teachers, **options)
    trainer.data_collator = worker_gets_it
    trainer.train()


def test_workers_of_the_data_loader_go_on_until_the_update_is_finished(tmp_path, teachers, processes):
    (ended,) = processes.run(train_with_workers, tmp_path, teachers, world=1)
    assert ended.code == 130, ended.error[-2000:]
    assert last_complete(tmp_path) == tmp_path / "checkpoint-2"


def train_until_asked(folder, teachers):
    trainer = make_trainer(folder, teachers, per_device_train_batch_size=2, **OPTIONS)
    if trainer.accelerator.process_index == 1:  # a scheduler may reach one of them first
        trainer.add_callback(Signal(signal.SIGTERM))
    trainer.train()


def test_two_processes_stop_together(tmp_path, teachers, processes):
    ended = processes.run(train_until_asked, tmp_path, teachers)
    assert [one.code for one in ended] == [143, 143], ended[0].error[-2000:]
    assert last_complete(tmp_path) == tmp_path / "checkpoint-2"
    assert "as asked (SIGTERM)" in " ".join(ended[0].output.split())


def test_the_command_that_goes_on(monkeypatch):
    monkeypatch.setattr("sys.argv", ["examples/opd.py", "--config", "a b.yaml", "--resume_from_checkpoint", "False"])
    assert command_to_go_on() == "python examples/opd.py --config 'a b.yaml' --resume_from_checkpoint True"
    monkeypatch.setattr("sys.argv", ["trl-diffusion-opd", "opd", "--config", "tiny", "--resume_from_checkpoint=False"])
    assert command_to_go_on() == "trl-diffusion-opd opd --config tiny --resume_from_checkpoint True"
    monkeypatch.setattr("sys.argv", ["opd.py", "--resume_from_checkpoint=out/checkpoint-2"])
    assert command_to_go_on() == "python opd.py --resume_from_checkpoint True"


def test_after_a_stop_the_card_and_the_command_are_whole(tmp_path, teachers, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("sys.argv", ["trl-diffusion-opd", "opd", *(f"--option_{i}=value" for i in range(20))])
    folder = tmp_path / "out"
    with pytest.raises(SystemExit):
        make_trainer(folder, teachers, callbacks=[Signal(signal.SIGTERM)], **OPTIONS).train()
    assert f"\n  {command_to_go_on()}\n" in capsys.readouterr().out  # on one line, so that it can be pasted
    assert not (folder / "pytorch_lora_weights.safetensors").exists()
    card = (folder / "README.md").read_text()
    assert 'pipe.load_lora_weights("out/checkpoint-2")' in card and 'load_lora_weights("out")' not in card
    assert (folder / "checkpoint-2" / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_ctrl_c_after_the_training(tmp_path, monkeypatch, capsys, has_checkpoint):
    monkeypatch.setattr("sys.argv", ["trl-diffusion-opd", "opd", "--config", "tiny"])
    if has_checkpoint:
        (tmp_path / "checkpoint-2").mkdir()
        seal(tmp_path / "checkpoint-2", "a run", 2)
    trainer = SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path)), is_world_process_zero=lambda: True)
    with pytest.raises(SystemExit) as ended, student_is_safe(trainer):
        raise KeyboardInterrupt
    said = capsys.readouterr().out
    assert ended.value.code == 130 and f"The student is safe in {tmp_path}." in said
    command = "\n  trl-diffusion-opd opd --config tiny --resume_from_checkpoint True\n"
    assert (command in said) == has_checkpoint == ("`trl-diffusion-opd evaluate` makes" not in said)
