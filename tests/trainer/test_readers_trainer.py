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

"""Training where the student and its teachers read different texts."""

import json

import pytest
import torch
from datasets import Dataset
from helpers.opd_fixtures import Recorder, make_trainer, relative_difference
from helpers.sft_fixtures import sft_trainer
from helpers.three_pass import MicroBatch, three_pass
from helpers.tiny_sd3 import make_transformer

from trl_diffusion_opd import DiffusionOPDConfig
from trl_diffusion_opd.scripts import opd
from trl_diffusion_opd.scripts.parser import parse
from trl_diffusion_opd.trainer import image_evaluator


TEMPLATES = {"draw": "{prompt} red"}


def dataset(**changes):
    """Two tasks with the same prompts. Teachers of `count` read more of them, and the student's `draw` has a template."""
    rows = [
        {"prompt": f"word{i}", "task": task, "teacher_prompt": f"word{i} blue" if task == "count" else None}
        for task in ("count", "draw")
        for i in range(4)
    ]
    return Dataset.from_list([row | changes for row in rows])


def read(task, prompts):
    """What student, teachers and base read, by this test."""
    if task == "count":
        return prompts, [f"{prompt} blue" for prompt in prompts], prompts
    return [f"{prompt} red" for prompt in prompts], prompts, prompts


def record_batches(trainer):
    batches, step = [], trainer.training_step

    def training_step(model, inputs, *args):
        task, prompts = inputs[0]["task"], [row["prompt"] for row in inputs]
        student, teachers, base = read(task, prompts)
        batches.append(MicroBatch(task, student, [0, 1], teachers, base))
        return step(model, inputs, *args)

    trainer.training_step = training_step
    return batches


@pytest.mark.parametrize("offload", [False, True])
def test_gradients_are_those_of_the_texts_that_each_model_reads(offload, tmp_path, teachers):
    recorder, asked = Recorder(), []
    options = {"beta": 0.5, "prompt_templates": TEMPLATES, "offload_encoders": offload}
    trainer = make_trainer(
        tmp_path,
        teachers,
        train_dataset=dataset(),
        callbacks=[recorder],
        learning_rate=0.0,
        max_grad_norm=0.0,
        **options,
    )
    batches = record_batches(trainer)
    encode, step = trainer.base_pipeline.encode_prompt, trainer.training_step

    def encode_prompt(*args, **kwargs):
        asked.append(kwargs.get("prompt"))
        return encode(*args, **kwargs)

    def training_step(*args):
        before = len(asked)
        loss = step(*args)
        assert not offload or len(asked) == before, "an update needs no encoder: all was encoded ahead"
        return loss

    trainer.training_step = training_step
    trainer.train()
    reference = three_pass(trainer, teachers, beta=0.5, base=make_transformer())
    (gradients,) = recorder.gradients
    assert {batch.task for batch in batches} == {"count", "draw"}
    assert relative_difference(gradients, reference.gradients(trainer.model, batches)) < 1e-5


def test_evaluation_completions_and_card(tmp_path, teachers, monkeypatch):
    drawn, scored, draw_with = [], [], image_evaluator.draw_with

    def recorded(field, velocity, prompts, **options):
        drawn.append(tuple(prompts))
        return draw_with(field, velocity, prompts, **options)

    def reward(prompts, images, **columns):
        scored.extend(prompts)
        return [float(i) for i, _ in enumerate(images)]

    monkeypatch.setattr(image_evaluator, "draw_with", recorded)
    rows = dataset().select([0, 4])
    options = {"log_completions": True, "eval_base_and_teachers": True, "prompt_templates": TEMPLATES}
    trainer = make_trainer(
        tmp_path, teachers, train_dataset=dataset(), eval_dataset=rows, reward_funcs=reward, **options
    )
    references = trainer.evaluate()
    assert drawn[:4] == [("word0",), ("word0 blue",), ("word0",), ("word0",)]  # base and teacher of both tasks
    assert drawn[4:6] == [("word0",), ("word0 red",)]  # the student
    assert set(scored) == {"word0"} and references["eval_count/reward"] == 0.0
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "| draw | {prompt} red |" in card and "| draw | word0 red |" in card and "| count | word0 |" in card
    (table,) = (tmp_path / "completions").glob("*.parquet")
    logged = {row["task"]: row for row in Dataset.from_parquet(str(table))}
    assert logged["draw"]["prompt"] == "word0" and logged["draw"]["student_prompt"] == "word0 red"
    assert logged["count"]["student_prompt"] is None
    samples = json.loads((tmp_path / "completions" / "last.json").read_text())["samples"]
    assert [sample["prompt"] for sample in samples] == ["word0", "word0 red"]


def test_the_settings_of_the_command_line(tmp_path):
    settings = tmp_path / "run.yaml"
    settings.write_text("prompt_templates:\n  draw: '{prompt} red'\n")
    base = ["--model_name_or_path", "a", "--teachers", "draw=b", "--prompts", "draw=c.txt", "--output_dir", "out"]
    for given in (["--config", str(settings)], ["--prompt_templates", json.dumps(TEMPLATES)]):
        assert parse(opd.ARGUMENTS, [*base, *given])[1].prompt_templates == TEMPLATES
    with pytest.raises(ValueError, match="'draw' is 'red', which has no {prompt}.*\n.*is 3, which is no text"):
        DiffusionOPDConfig("out", prompt_templates={"draw": "red", "count": 3})


def test_sft_learns_the_pictures_that_teachers_drew_from_their_prompts(tmp_path, teachers):
    drawn = {}
    for name, folder in (("fresh", None), ("kept", str(tmp_path / "kept"))):
        trainer = sft_trainer(
            tmp_path / name,
            teachers=teachers,
            train_dataset=dataset(),
            prompt_templates=TEMPLATES,
            teacher_cache_dir=folder,
        )
        seen, velocity = [], trainer._student_velocity

        def student_velocity(model, x, t, prompts, velocity=velocity, seen=seen, **options):
            seen.append(prompts)
            return velocity(model, x, t, prompts, **options)

        trainer._student_velocity = student_velocity
        trainer.train()
        assert {text.split()[-1] for texts in seen for text in texts if text.endswith("red")} == {"red"}
        assert not any("blue" in text for texts in seen for text in texts)
        rows = [{"prompt": "word1", "teacher_prompt": "word1 blue"}]
        texts = trainer.texts("count", rows)
        drawn[name] = trainer._latents("count", rows, texts, [torch.Generator().manual_seed(0)])
        assert trainer.cache is None or trainer.cache.prompts["count"] == [f"word{i} blue" for i in range(4)]
    plain = trainer._teacher_latents("count", ["word1"], [torch.Generator().manual_seed(0)])
    assert not torch.allclose(drawn["fresh"], plain, atol=1e-4)
