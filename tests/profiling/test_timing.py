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

"""Seconds by part, with a clock that goes on by one second whenever it is looked at."""

import itertools

import pytest
import torch
from helpers.grpo_fixtures import make_trainer as make_grpo_trainer
from helpers.nft_fixtures import make_trainer as make_nft_trainer
from helpers.opd_fixtures import StopAt, first_pixel, make_dataset, make_trainer
from helpers.sft_fixtures import sft_trainer
from torch.utils.flop_counter import FlopCounterMode

from trl_diffusion_opd.profiling import timing
from trl_diffusion_opd.profiling.timing import UpdateClock


pytestmark = pytest.mark.slow


CPU = torch.device("cpu")


@pytest.fixture
def ticks(monkeypatch):
    """Every look at the clock takes a second, so times count how often a part was entered."""
    seconds = itertools.count()
    monkeypatch.setattr(timing, "instant", lambda device: next(seconds))
    return seconds


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def times(entry):
    return {name.removeprefix("time/"): value for name, value in entry.items() if name.startswith("time/")}


def test_inner_parts_are_not_counted_twice(monkeypatch):
    moments = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0])
    monkeypatch.setattr(timing, "instant", lambda device: next(moments))
    clock = UpdateClock(("a", "b", "c"), CPU)
    clock.start()  # 0
    with clock("a"):  # 1
        with clock("b"):  # 3
            pass  # 6
        pass  # until 10
    clock.go_on_with("c")  # 15
    clock.stop()  # 21
    (update,) = clock.updates()
    assert update.seconds == {"a": 2.0 + 4.0, "b": 3.0, "c": 6.0, "other": 1.0 + 5.0}
    assert update.total == 21.0
    assert update.calls == {"a": 1, "b": 1, "c": 1}
    assert clock.updates() == []


def test_errors_and_unfinished_updates(ticks):
    clock = UpdateClock(("a", "b"), CPU)
    with clock("a"):  # evaluation, say
        pass
    clock.stop()
    assert clock.updates() == [] and next(ticks) == 0
    clock.start()
    with pytest.raises(KeyError), clock("a"):
        raise KeyError
    clock.start()  # the one before is forgotten
    with pytest.raises(KeyError), clock("a"), clock("b"):
        raise KeyError
    with clock("b"):
        pass
    clock.stop()
    (update,) = clock.updates()
    assert update.seconds == {"a": 2, "b": 2, "other": 3}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_parts_of_an_opd_update(tmp_path, teachers, ticks, micro_batches):
    accumulation = 2 * micro_batches
    trainer = make_trainer(
        tmp_path, teachers, max_steps=2, beta=0.5, num_trained_timesteps=2, gradient_accumulation_steps=accumulation
    )
    drawn, draw = [], trainer._drawn_steps
    trainer._drawn_steps = lambda: drawn.append(draw()) or drawn[-1]
    trainer.train()
    for update, entry in enumerate(logged(trainer)):
        steps = drawn[update * accumulation]
        seconds = times(entry)
        # Whatever asks the network also asks for its prompts, which is a part of its own in its middle. `encoding` is
        # asked for the first noise too, and begins with who is encoded together.
        walked_only = max(steps) + 1 - len(steps)
        calls = {"rollout": walked_only * accumulation}
        calls |= dict.fromkeys(("teacher", "student", "reference"), 2 * accumulation)
        assert {part: seconds[part] for part in calls} == {part: 2 * n for part, n in calls.items()}
        assert seconds["backward"] == 2 * accumulation
        assert seconds["data"] == seconds["optimizer"] == 1
        assert seconds["noise_floor"] == 3  # two forwards, once a log
        assert seconds["encoding"] == 1 + sum(calls.values()) + accumulation + 2
        assert sum(seconds.values()) == entry["step_time"]
        assert entry["samples_per_second"] == 2 * accumulation / entry["step_time"]
        assert set(seconds) == {*trainer.timed_parts, "other"}
        assert 0.01 < entry["peak_memory_gib"] < 64
        assert "mfu" not in entry  # nothing to compare with


def test_means_over_updates(tmp_path, teachers, ticks):
    every, mean = (make_trainer(tmp_path / str(n), teachers, max_steps=4, logging_steps=n) for n in (1, 4))
    for trainer in (every, mean):
        trainer.train()
    (entry,) = logged(mean)
    for name, value in entry.items():
        if name.startswith("time/") and name not in ("time/noise_floor", "time/encoding", "time/other"):
            assert value == sum(other[name] for other in logged(every)) / 4, name
    # Measured once a log.
    assert entry["time/noise_floor"] == 3 / 4
    assert sum(times(entry).values()) == entry["step_time"]


def test_resumed_run_has_the_same_times(tmp_path, teachers, ticks):
    options = {"max_steps": 4, "num_trained_timesteps": 2, "num_inference_steps": 7}
    whole = make_trainer(tmp_path / "whole", teachers, **options)
    whole.train()
    make_trainer(tmp_path / "half", teachers, callbacks=[StopAt(2)], **options).train()
    resumed = make_trainer(tmp_path / "half", teachers, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    assert [times(entry) for entry in logged(resumed)[2:]] == [times(entry) for entry in logged(whole)[2:]]


def test_evaluation_is_not_of_an_update(tmp_path, teachers, ticks):
    options = {"max_steps": 2, "logging_steps": 2}
    without = make_trainer(tmp_path / "a", teachers, **options)
    evaluated = make_trainer(
        tmp_path / "b",
        teachers,
        eval_dataset=make_dataset(),
        reward_funcs=first_pixel,
        eval_strategy="steps",
        eval_steps=1,
        **options,
    )
    for trainer in (without, evaluated):
        trainer.train()
    assert times(logged(evaluated)[0]) == times(logged(without)[0])


def test_parts_of_a_grpo_update(tmp_path, ticks):
    trainer = make_grpo_trainer(tmp_path, max_steps=2, beta=0.1, num_iterations=2)
    trainer.train()
    first, second = logged(trainer)
    tasks, trained, walked = len(trainer.tasks), trainer.window_size, len(trainer.table)
    batches = trainer.args.gradient_accumulation_steps
    for entry in (first, second):
        seconds = times(entry)
        assert set(seconds) == {*trainer.timed_parts, "other"}
        assert sum(seconds.values()) == entry["step_time"]
        assert seconds["backward"] == batches * trained
        assert seconds["student"] == seconds["reference"] == 2 * batches * trained
    # The second update trains on the round of the first.
    assert times(first)["rollout"] == 2 * batches * walked and times(second)["rollout"] == 0
    assert times(first)["rewards"] == batches + tasks and times(second)["rewards"] == 0
    assert times(first)["decoding"] >= batches and times(second)["decoding"] == 0


def test_parts_of_an_nft_update(tmp_path, ticks):
    trainer = make_nft_trainer(tmp_path, max_steps=1, beta=0.1)
    trainer.train()
    (entry,) = logged(trainer)
    seconds, batches, levels = times(entry), trainer.args.gradient_accumulation_steps, len(trainer._drawn_levels())
    assert set(seconds) == {*trainer.timed_parts, "other"}
    assert sum(seconds.values()) == entry["step_time"]
    assert seconds["rollout"] == 2 * batches * len(trainer.table)
    assert seconds["backward"] == batches * levels and seconds["student"] == 2 * batches * levels
    assert seconds["reference"] == 4 * batches * levels  # the old policy and the base
    assert seconds["rewards"] > 0 and seconds["decoding"] > 0


def test_parts_of_an_sft_update(tmp_path, teachers, ticks):
    trainer = sft_trainer(tmp_path, teachers=teachers)
    trainer.train()
    entry = logged(trainer)[0]
    seconds = times(entry)
    assert set(seconds) == {*trainer.timed_parts, "other"}
    assert sum(seconds.values()) == entry["step_time"]
    assert seconds["backward"] == 2 and seconds["teacher"] == 2 * 2 * len(trainer.table)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_utilisation_is_that_of_the_networks_operations(tmp_path, teachers, ticks, checkpointing):
    trainer = make_trainer(
        tmp_path, teachers, max_steps=4, logging_steps=1, gradient_checkpointing=checkpointing, guidance_scale=2.0
    )
    trainer._begin_costs = lambda: trainer._cost.begin(1e9, 1)  # as if the device made so many a second
    counted, step = [], trainer.training_step

    def training_step(*args):
        if trainer.state.global_step < 3:  # in the second epoch no prompt is new
            return step(*args)
        with FlopCounterMode(display=False) as counter:
            loss = step(*args)
        counted.append(counter.get_total_flops())
        return loss

    trainer.training_step = training_step
    trainer._measure_noise_floor = lambda *args: None
    trainer.train()
    entries = logged(trainer)
    assert "mfu" not in entries[0]  # counted in the second update
    flops = [entry["mfu"] * entry["step_time"] * 1e9 for entry in entries[1:]]
    assert flops == pytest.approx([flops[0]] * 3, rel=1e-9)
    if checkpointing:
        # What the backward repeats is no more work done. The embedding and the projection are not repeated.
        plain = make_trainer(tmp_path / "plain", teachers, max_steps=2, guidance_scale=2.0)
        plain._begin_costs = lambda: plain._cost.begin(1e9, 1)
        plain.train()
        last = logged(plain)[-1]
        assert flops[0] == pytest.approx(last["mfu"] * last["step_time"] * 1e9, rel=0.03)
        assert sum(counted) > 1.15 * flops[0]
    else:
        assert flops[0] == pytest.approx(sum(counted), rel=1e-9)
