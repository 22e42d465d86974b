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

import pytest
import torch
from datasets import Dataset
from helpers.opd_fixtures import Recorder, make_trainer, relative_difference
from helpers.sft_fixtures import sft_trainer
from helpers.three_pass import MicroBatch, three_pass
from helpers.tiny_sd3 import make_transformer


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
    plain = trainer._teacher_latents(
        "count", trainer.texts("count", [{"prompt": "word1"}]), [torch.Generator().manual_seed(0)]
    )
    assert not torch.allclose(drawn["fresh"], plain, atol=1e-4)
