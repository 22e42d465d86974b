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

"""A resume with another evaluation: the changes are told, and what is best is counted anew."""

import json

import pytest
from helpers.opd_fixtures import make_dataset, make_trainer

from trl_diffusion_opd.checkpointing.resume import comparable_after


SCORES = {"count": 0.9}


def red(images, **columns):
    return [SCORES["count"]] * len(images)


OPTIONS = dict(
    save_strategy="steps",
    save_steps=1,
    eval_strategy="steps",
    eval_steps=1,
    metric_for_best_model="reward",
    learning_rate=1e-2,
    reward_funcs=red,
)


def begun(folder, teachers, score, **options):
    SCORES["count"] = score
    dataset = options.pop("eval_dataset", make_dataset(count=2, draw=2))
    return make_trainer(folder, teachers, eval_dataset=dataset, **OPTIONS | options)


def _other_prompts():
    return make_dataset(count=2, draw=2).map(lambda row: {"prompt": f"other {row['prompt']}"})


@pytest.mark.parametrize("changed", ["prompts", "images", "steps", "guidance", "seed", "nothing"])
def test_best_begins_anew_where_the_evaluation_is_another(tmp_path, teachers, capsys, changed):
    begun(tmp_path, teachers, 0.9, max_steps=2).train()
    options = {
        "prompts": {"eval_dataset": _other_prompts()},
        "images": {"num_eval_images": 3},
        "steps": {"eval_num_inference_steps": 2},
        "guidance": {"eval_guidance_scale": 2.0},
        "seed": {"seed": 7},
        "nothing": {},
    }[changed]
    capsys.readouterr()
    trainer = begun(tmp_path, teachers, 0.5, max_steps=3, **options)
    trainer.train(resume_from_checkpoint=True)
    said = capsys.readouterr().out
    is_new = changed != "nothing"
    assert ("Evaluations now measure something else: the best so far begins anew." in said) == is_new
    table = said[said.index("at update 3") :]
    assert ("0.900 (1)" in table) != is_new and ("0.500 (3)" in table) == is_new
    assert trainer.state.best_metric == pytest.approx(0.5 if is_new else 0.9)
    assert trainer.state.best_global_step == (3 if is_new else 1)
    row = {
        "prompts": "evaluation: prompts of count",
        "images": "evaluation: num_eval_images",
        "steps": "evaluation: eval_num_inference_steps",
        "guidance": "evaluation: guidance",
        "seed": "seed",
    }
    recorded = json.loads((tmp_path / "checkpoint-3" / "changes.json").read_text()) if is_new else []
    if is_new:
        assert any(change["name"] == row[changed] and change["after"] == 2 for change in recorded)
    assert comparable_after(recorded) == (2 if is_new else -1)


def test_it_is_remembered_by_the_next_resume(tmp_path, teachers, capsys):
    begun(tmp_path, teachers, 0.9, max_steps=1).train()
    begun(tmp_path, teachers, 0.5, max_steps=2, num_eval_images=3).train(resume_from_checkpoint=True)
    trainer = begun(tmp_path, teachers, 0.4, max_steps=3, num_eval_images=3)
    capsys.readouterr()
    trainer.train(resume_from_checkpoint=True)
    said = capsys.readouterr().out
    assert "begins anew" not in said and "0.500 (2)" in said and "0.900" not in said
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (2, pytest.approx(0.5))


def test_other_prompts_of_the_same_number_are_told_apart(tmp_path, teachers, capsys):
    begun(tmp_path, teachers, 0.9, max_steps=1).train()
    capsys.readouterr()
    begun(tmp_path, teachers, 0.9, max_steps=2, eval_dataset=_other_prompts(), train_dataset=_other_prompts()).train(
        resume_from_checkpoint=True
    )
    rows = [
        [cell.strip() for cell in line.split("│")[1:4]] for line in capsys.readouterr().out.splitlines() if "│" in line
    ]
    (row,) = [row for row in rows if row[0] == "evaluation: prompts of draw"]
    assert row[1] != row[2] and row[1].startswith("2 (hash ") and row[2].startswith("2 (hash ")
    (row,) = [row for row in rows if row[0] == "prompts of draw"]
    assert row[1].startswith("4 (hash ") and row[2].startswith("2 (hash ")
