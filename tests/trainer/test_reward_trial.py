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

"""Rewards are tried before the first update, and prompts that nothing evaluates are told."""

import logging
import time

import pytest
from helpers.grpo_fixtures import make_trainer as grpo_trainer
from helpers.opd_fixtures import make_dataset, make_trainer

from trl_diffusion_opd.problems import Refusal


EVALUATED = dict(eval_strategy="steps", eval_steps=4, max_steps=4)


def make_rewards(calls):
    def counted(prompts, images, trainer_state, **columns):
        calls.append((trainer_state.global_step, tuple(prompts), [image.size for image in images]))
        return [0.5] * len(images)

    def short(images, **columns):
        return [1.0]

    def broken(images, **columns):
        raise KeyError("label")

    return counted, short, broken


def test_all_that_fail_are_told_before_the_first_update(tmp_path):
    calls = []
    counted, short, broken = make_rewards(calls)
    rewards = {"count": [counted, short], "draw": [broken, counted]}
    evaluated = make_dataset(count=3, draw=1)
    trainer = make_trainer(tmp_path, "base", reward_funcs=rewards, eval_dataset=evaluated, **EVALUATED)
    with pytest.raises(Refusal) as error:
        trainer.train()
    header, one, two = str(error.value).split("\n")
    assert header == "Training cannot start: every reward was tried on two images of its tasks:"
    assert one == (
        "- reward 'short' can't score an image of task 'count', for the prompt 'count0': ValueError: Reward function "
        "'short' returned 1 values for 2 images. It must return one value for each image, None where it does not apply."
    )
    assert two.startswith(
        "- reward 'broken' can't score an image of task 'draw', for the prompt 'draw0': KeyError: 'lab"
    )
    assert two.endswith(f" (test_reward_trial.py, line {broken.__code__.co_firstlineno + 1}).")
    size = [(16, 16)] * 2
    assert calls == [(0, ("count0", "count1"), size), (0, ("draw0", "draw0"), size)]
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("options", "is_tried"),
    [
        ({}, False),  # nothing calls the rewards
        ({"eval_on_start": True}, True),
        ({"log_completions": True}, True),
    ],
)
def test_only_what_will_be_called_is_tried(tmp_path, options, is_tried):
    *_, broken = make_rewards([])
    trainer = make_trainer(tmp_path, "base", reward_funcs=broken, eval_dataset=make_dataset(), **options)
    if is_tried:
        with pytest.raises(Refusal, match="reward 'broken' can't score"):
            trainer.train()
    else:
        trainer.train()
        assert trainer.state.global_step == 1


def test_what_is_trained_on_is_tried_on_the_prompts_of_training(tmp_path):
    _, short, _ = make_rewards([])
    with pytest.raises(Refusal, match="'short' can't score an image of task 'count'.* 1 values for 2 images"):
        grpo_trainer(tmp_path, short).train()


def test_a_reward_that_hangs_in_evaluations_is_only_told(tmp_path, caplog):
    """As in the evaluation itself."""

    def slow(images, **columns):
        time.sleep(0.3)
        return [0.0] * len(images)

    options = dict(reward_funcs=slow, eval_dataset=make_dataset(), reward_timeout=0.05, eval_on_start=True)
    trainer = make_trainer(tmp_path, "base", **options)
    trainer.train()
    assert trainer.state.global_step == 1 and "given no scores for 2 images" in caplog.text


@pytest.mark.parametrize(
    ("options", "is_told"),
    [
        ({"eval_dataset": make_dataset()}, True),
        ({"eval_dataset": make_dataset(), "eval_strategy": "steps", "eval_steps": 1}, False),
        ({"eval_dataset": make_dataset(), "eval_on_start": True}, False),
        ({}, False),
    ],
)
def test_prompts_that_nothing_evaluates(tmp_path, caplog, options, is_told):
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, "base", **options)
    assert ("eval_strategy is 'no': nothing is evaluated during training." in caplog.text) == is_told
