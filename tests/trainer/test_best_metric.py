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

"""A metric that no evaluation will have is refused before the first step, and every one that there will be is let through."""

import pytest
from helpers.grpo_fixtures import make_trainer as grpo_trainer
from helpers.opd_fixtures import make_config, make_dataset, make_trainer
from helpers.sft_fixtures import image_dataset, sft_trainer

from trl_diffusion_opd.rewards import CombinedReward
from trl_diffusion_opd.trainer.best_metric import _names, metric_problems


EVALUATED = dict(eval_strategy="steps", eval_steps=1, num_eval_images=1)


def red(images, **columns):
    return [0.5] * len(images)


def logging_reward(images, log_metric, **columns):
    log_metric("sharpness", 1.0)
    return [0.5] * len(images)


def named(trainer, dataset) -> set[str]:
    of_method = trainer.method_metrics(dataset, trainer.args, trainer.bank is not None)
    return set(_names(dataset, trainer.args.task_column, trainer.reward_funcs, of_method))


@pytest.mark.parametrize("method", ["opd", "sft", "grpo"])
def test_the_names_are_those_of_an_evaluation(method, teachers, tmp_path):
    rewards = {"count": [CombinedReward({"jpeg_compressibility": 0.5}), red], "draw": red}
    dataset = make_dataset(count=1, draw=1)
    if method == "sft":
        trainer = sft_trainer(tmp_path, reward_funcs=rewards, eval_dataset=image_dataset())
        dataset = trainer.eval_dataset.select([0, 9])
    elif method == "grpo":
        trainer = grpo_trainer(tmp_path, rewards, eval_dataset=dataset)
    else:
        trainer = make_trainer(tmp_path, teachers, reward_funcs=rewards, eval_dataset=dataset)
    prefix, part = ("eval_part", dataset.select([0])) if method == "grpo" else ("eval", dataset)
    found = trainer.evaluate({"part": part} if method == "grpo" else part)
    assert {f"{prefix}_{name}" for name in named(trainer, part)} == found.keys() - {"epoch"}
    assert {"count/combined/jpeg_compressibility", "count/red", "reward", "runtime"} <= named(trainer, dataset)
    assert ("loss" in named(trainer, dataset)) == (method != "grpo")
    # Of prompts without images there is no loss.
    assert method != "sft" or "loss" not in named(trainer, make_dataset())


def test_a_typo_is_in_the_one_message(teachers, tmp_path):
    with pytest.raises(ValueError, match="cannot start") as caught:
        make_trainer(
            tmp_path,
            teachers,
            reward_funcs=red,
            eval_dataset=make_dataset(count=1, draw=1),
            metric_for_best_model="eval_rewrd",
            task_weights={"nowhere": 1.0},
            **EVALUATED,
        )
    message = str(caught.value)
    assert (
        "metric_for_best_model='eval_rewrd': no evaluation of this run will have it. Did you mean 'eval_reward'?"
        in message
    )
    assert (
        "There will be eval_reward, eval_count/red, eval_draw/red, eval_loss, eval_kl/count, eval_kl/draw, " in message
    )
    assert "task_weights has a weight for task 'nowhere'" in message and message.count("\n") == 2


class TestProblems:
    def problems(self, metric, folder, eval_dataset=None, functions=None, of_method=(), **options):
        eval_dataset = make_dataset(count=1, draw=1) if eval_dataset is None else eval_dataset
        functions = {"count": [red], "draw": [red]} if functions is None else functions
        args = make_config(folder, metric_for_best_model=metric, **{**EVALUATED, **options})
        return metric_problems(args, eval_dataset, functions, lambda dataset: list(of_method))

    def test_with_and_without_prefix(self, tmp_path):
        for name in ("reward", "eval_reward", "count/red", "eval_draw/red", "reward_time/red", "runtime", None):
            assert self.problems(name, tmp_path) == []
        for name in ("eval_count/blue", "Reward", "train_reward", "loss"):
            assert len(self.problems(name, tmp_path)) == 1

    def test_a_dict_of_datasets(self, tmp_path):
        parts = {"a": make_dataset(count=1), "b": make_dataset(draw=1)}
        assert self.problems("eval_a_reward", tmp_path, parts) == self.problems("b_draw/red", tmp_path, parts) == []
        assert "Did you mean 'eval_a_reward'" in self.problems("a_rewardd", tmp_path, parts)[0]
        assert len(self.problems("eval_reward", tmp_path, parts)) == 1

    def test_what_nobody_gave(self, tmp_path):
        options = dict(load_best_model_at_end=True, save_strategy="steps", save_steps=1)
        (problem,) = self.problems(None, tmp_path, **options)
        assert problem.startswith("metric_for_best_model='loss' (the default if load_best_model_at_end or")
        assert self.problems(None, tmp_path, of_method=["loss"], **options) == []

    def test_what_is_not_known_or_not_looked_at(self, tmp_path):
        assert self.problems("eval_sharpness", tmp_path, functions={"count": [logging_reward], "draw": [red]}) == []
        assert self.problems("eval_sharpness", tmp_path, eval_strategy="no") == []
        assert metric_problems(make_config(tmp_path, metric_for_best_model="x"), None, {}, lambda dataset: []) == []

    def test_the_message_is_short(self, tmp_path):
        functions = {f"task{i}": [red] for i in range(20)}
        dataset = make_dataset(**dict.fromkeys(functions, 1))
        (problem,) = self.problems("x\x1b" * 10**5, tmp_path, dataset, functions)
        assert len(problem) < 700 and "and 13 more" in problem and "\x1b" not in problem
