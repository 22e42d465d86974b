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

"""The student as its own teacher."""

import pytest
import torch
from datasets import Dataset
from helpers.opd_fixtures import AVERAGED, Recorder, make_trainer, relative_difference
from helpers.sft_fixtures import sft_trainer
from helpers.three_pass import MicroBatch, Role, load_teacher, three_pass

from trl_diffusion_opd import TeacherConfig
from trl_diffusion_opd.models.teacher_config import normalize_teachers


def refusal(call) -> str:
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


def dataset(**changes):
    rows = [{"prompt": f"word{i}", "task": task} for task in ("count", "draw") for i in range(3)]
    return Dataset.from_list([row | {"teacher_prompt": f"{row['prompt']} blue"} | changes for row in rows])


def test_the_gradient_is_that_of_the_student_on_the_other_prompt(tmp_path, teachers):
    recorder, batches = Recorder(), []
    options = {"learning_rate": 0.0, "max_grad_norm": 0.0, **AVERAGED}
    specs = {"count": "student", "draw": [TeacherConfig("student", weight=3.0), teachers["draw"]]}
    trainer = make_trainer(tmp_path, specs, train_dataset=dataset(), callbacks=[recorder], **options)
    step = trainer.training_step

    def training_step(model, inputs, *args):
        prompts = [row["prompt"] for row in inputs]
        batches.append(MicroBatch(inputs[0]["task"], prompts, [0, 1], [f"{prompt} blue" for prompt in prompts]))
        return step(model, inputs, *args)

    trainer.training_step = training_step
    trainer.train()
    own = Role(trainer.model, 3.0)
    roles = {"count": [own], "draw": [own, Role(load_teacher(teachers["draw"]))]}
    expected = three_pass(trainer, teachers, roles=roles).gradients(trainer.model, batches)
    assert relative_difference(recorder.gradients[0], expected) < 1e-5


CASES = {"lora": {}, "full": {"peft_config": None, "learning_rate": 1e-3}}


@pytest.mark.parametrize("average", [AVERAGED, {"ema_decay": None}], ids=["average", "none"])
@pytest.mark.parametrize("case", CASES)
def test_the_average_teaches_where_one_is_kept(case, average, tmp_path):
    options = {"train_dataset": dataset(), "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    options |= {**CASES[case], **average}
    trainer = make_trainer(tmp_path, "student", max_steps=2, **options)
    trainer.train()

    def agree(trainer):
        field, texts = trainer.velocity_field, ["word1 blue", "word2 blue"]
        x = field.initial_latents(texts, [torch.Generator().manual_seed(seed) for seed in (1, 2)])
        with torch.no_grad():
            taught = trainer.bank.mean_velocity(field, trainer.bank.teachers["count"], x, 0.9, texts)
            now = field(x, 0.9, texts, 1.0, trainer.student.model)
            with trainer.student.ema_weights():
                kept = field(x, 0.9, texts, 1.0, trainer.student.model)
        assert torch.allclose(taught, kept, atol=1e-6)
        assert torch.allclose(taught, now, atol=1e-6) == (trainer.student.ema is None)

    agree(trainer)
    resumed = make_trainer(tmp_path, "student", max_steps=3, **options)
    resumed._load_state(tmp_path / "checkpoint-2")
    agree(resumed)
    (row,) = trainer.bank.manifest()["count"]
    assert (row["kind"], row["source"], row["sha256"]) == ("student", "student", None)


def test_what_is_refused(tmp_path, teachers):
    message = refusal(lambda: make_trainer(tmp_path, "student", student_init="merge"))
    for task in ("count", "draw"):
        assert (
            f"teachers: the teacher of task '{task}' is \"student\", but its rows in train_dataset have no" in message
        )
    partly = (
        dataset()
        .add_column("number", range(6))
        .map(lambda row: {"teacher_prompt": None if row["number"] in (1, 4, 5) else row["teacher_prompt"]})
    )
    mixed = {"count": "student", "draw": teachers["draw"]}
    message = refusal(lambda: make_trainer(tmp_path, mixed, train_dataset=partly, prompt_templates={"x": "{prompt}"}))
    assert "train_dataset has 1 of 3 rows of task 'count' without a teacher_prompt, the first is row 1." in message
    assert "train_dataset has 2 of 3 rows of task 'draw' without a teacher_prompt, the first is row 4." in message
    assert "prompt_templates has a template for task 'x'" in message
    message = refusal(lambda: make_trainer(tmp_path, mixed, train_dataset=dataset(), eval_dataset=partly.select([1])))
    assert "its rows in eval_dataset have no teacher_prompt" in message
    kept = {"teacher_cache_dir": str(tmp_path / "kept"), "train_dataset": dataset()}
    assert "change as it learns" in refusal(lambda: sft_trainer(tmp_path, "student", **kept))
    with pytest.raises(ValueError, match="takes no lora_scale"):
        normalize_teachers(TeacherConfig("student", lora_scale=2.0), ["count"])
