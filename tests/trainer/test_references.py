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

"""Base and teachers are scored once on the evaluation's noise, and make rewards of different units comparable."""

import json

import pytest
from helpers.grpo_fixtures import make_trainer as grpo_trainer
from helpers.opd_fixtures import EVALUATED_AND_SAVED, make_dataset, make_trainer, student_lora
from helpers.stub_reward import brightness, redness

from trl_diffusion_opd import TeacherConfig
from trl_diffusion_opd.hub.files import REFERENCES_FILE
from trl_diffusion_opd.rewards import Reward
from trl_diffusion_opd.rewards.common_scale import Reference


MEASURED = dict(eval_base_and_teachers=True, num_eval_images=3)
UNTRAINED = student_lora(init_lora_weights=True)  # its effect is 0: the student is the base


def counted(calls):
    """A reward that counts the images that it scores."""

    def bright(images, **columns):
        calls.append(len(images))
        return brightness(images)

    return bright


class Pick(Reward):
    """Of PickScore's size. It falls a little with the updates."""

    name = "pickscore"

    def __call__(self, prompts, images, completions=None, trainer_state=None, **columns):
        return [22.6 - 0.3 * trainer_state.global_step] * len(images)


def spelled(images, trainer_state, **columns):
    """Of OCR's size. It rises from 0.1 to 0.3 to 0.5, less than PickScore falls."""
    return [0.2 * trainer_state.global_step - 0.1] * len(images)


def references(trainer):
    return trainer.base_and_teachers.of(trainer.eval_dataset, trainer.state, None)


def test_base_and_teacher_are_what_a_student_like_them_scores(tmp_path, teachers):
    """From the same noise: the scores of a student that is the base, or the teacher, are exactly theirs."""
    options = dict(reward_funcs=[brightness, redness], eval_dataset=make_dataset(count=3, draw=2), **MEASURED)
    base = make_trainer(tmp_path / "a", teachers, peft_config=UNTRAINED, **options)
    found, scores = references(base), base.evaluate()
    teacher = make_trainer(tmp_path / "b", teachers, peft_config=UNTRAINED, student_init=teachers["count"], **options)
    taught = teacher.evaluate()
    for name in ("brightness", "redness"):
        for task in ("count", "draw"):
            assert found[task][name].base == pytest.approx(scores[f"eval_{task}/{name}"], rel=1e-5)
        assert found["count"][name].teacher == pytest.approx(taught[f"eval_count/{name}"], rel=1e-5)
        assert abs(found["draw"][name].teacher - taught[f"eval_draw/{name}"]) > 1e-4  # another teacher's
    assert references(teacher) == found


def test_eval_reward_is_the_share_of_the_gain(tmp_path, teachers):
    trainer = make_trainer(
        tmp_path, teachers, reward_funcs=brightness, eval_dataset=make_dataset(count=3, draw=2), **MEASURED
    )
    known = {"count": {"brightness": Reference(0.2, 0.6, True)}, "draw": {"brightness": Reference(0.2, 0.6, False)}}
    trainer.base_and_teachers._known[trainer.base_and_teachers._key(trainer.eval_dataset)] = known
    scores = trainer.evaluate()
    shares = (scores["eval_count/brightness"] - 0.2) / 0.4, scores["eval_draw/brightness"]
    assert scores["eval_reward"] == pytest.approx(sum(shares) / 2)


def test_teachers_of_one_task_are_their_weighted_mean_and_the_base_is_not_drawn_twice(tmp_path, teachers):
    mixed = {"count": [TeacherConfig(teachers["count"], weight=0.0001), teachers["draw"]], "draw": "base"}
    trainer = make_trainer(
        tmp_path / "a", mixed, reward_funcs=brightness, eval_dataset=make_dataset(count=3, draw=2), **MEASURED
    )
    single = make_trainer(
        tmp_path / "b",
        {"count": teachers["draw"], "draw": "base"},
        reward_funcs=brightness,
        eval_dataset=make_dataset(count=3, draw=2),
        **MEASURED,
    )
    ours, theirs = references(trainer), references(single)
    assert ours["count"]["brightness"].teacher == pytest.approx(theirs["count"]["brightness"].teacher, abs=5e-3)
    assert ours["count"]["brightness"].teacher != theirs["count"]["brightness"].teacher
    assert ours["draw"]["brightness"].teacher is None


def test_once_a_run_and_not_again_at_a_resume(tmp_path, teachers, capsys):
    def run(calls, resume=None, **options):
        settings = {**MEASURED, **EVALUATED_AND_SAVED, "max_steps": 2, **options}
        evaluated = make_dataset(count=1, draw=1)
        trainer = make_trainer(tmp_path, teachers, reward_funcs=counted(calls), eval_dataset=evaluated, **settings)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    calls = []
    run(calls)
    assert sum(calls) == 2 * 2 + (2 + 2) * 6  # a trial a task; two evaluations, and once base and teachers
    printed = " ".join(capsys.readouterr().out.split())
    assert "Base and teachers are scored once on the evaluation's prompts: 12 images" in printed
    kept = json.loads((tmp_path / REFERENCES_FILE).read_text())
    calls.clear()
    run(calls, resume=True, max_steps=3)
    assert sum(calls) == 4 + 6
    assert json.loads((tmp_path / REFERENCES_FILE).read_text()) == kept
    # With other noise they are others; and a new run does not take those of an old one in its folder.
    for options in (dict(resume=True, max_steps=4, seed=5), dict()):
        calls.clear()
        run(calls, **options)
        assert sum(calls) == 4 + (12 if options else 24) + 6 * bool(options)


def test_without_rewards_or_if_turned_off_nothing_is_drawn(tmp_path, teachers):
    calls, evaluated = [], make_dataset(count=1, draw=1)
    options = {**MEASURED, "eval_base_and_teachers": False}
    make_trainer(tmp_path, teachers, reward_funcs=counted(calls), eval_dataset=evaluated, **options).evaluate()
    assert sum(calls) == 6
    trainer = make_trainer(tmp_path, teachers, eval_dataset=evaluated, **MEASURED)
    assert references(trainer) == {} and "eval_reward" not in trainer.evaluate()


def test_a_trainer_by_reward_has_the_base_alone(tmp_path):
    options = dict(eval_dataset=make_dataset(count=3, draw=2), peft_config=UNTRAINED, **MEASURED)
    trainer = grpo_trainer(tmp_path, brightness, **options)
    found, scores = references(trainer), trainer.evaluate()
    for task in ("count", "draw"):
        assert found[task]["brightness"] == Reference(pytest.approx(scores[f"eval_{task}/brightness"], rel=1e-5))


def test_the_large_reward_does_not_choose_the_best_checkpoint(tmp_path, teachers):
    trainer = make_trainer(
        tmp_path,
        teachers,
        reward_funcs={"count": Pick(), "draw": spelled},
        eval_dataset=make_dataset(count=1, draw=1),
        max_steps=3,
        metric_for_best_model="eval_reward",
        greater_is_better=True,
        **EVALUATED_AND_SAVED,
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    unscaled = [(entry["eval_count/pickscore"] + entry["eval_draw/spelled"]) / 2 for entry in log]
    assert unscaled.index(max(unscaled)) == 0  # PickScore alone would have decided
    assert trainer.state.best_global_step == 3
