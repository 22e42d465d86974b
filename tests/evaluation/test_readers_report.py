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

"""The retention report where students and teachers read something else than the prompt."""

import json

import numpy as np
import pytest
from datasets import Dataset
from evaluation.test_evaluation import OPTIONS, own_images
from helpers.tiny_sd3 import make_lora, make_pipeline

from trl_diffusion_opd.evaluation import evaluate_retention
from trl_diffusion_opd.scripts import evaluate
from trl_diffusion_opd.scripts.parser import parse


TEMPLATES = {"warm": "{prompt} at noon"}
READ = {  # what base, teachers and students read
    "cold": [["a red fox", "two cats"], ["a red fox in snow", "two cats in snow"], ["a red fox", "two cats"]],
    "warm": [["the moon", "rain"], ["the moon", "rain"], ["the moon at noon", "rain at noon"]],
}
ROWS = [
    {"prompt": prompt, "task": task, "teacher_prompt": long if task == "cold" else None}
    for task, (prompts, others, _) in READ.items()
    for prompt, long in zip(prompts, others, strict=True)
]


def test_images_are_those_of_what_each_model_reads(tmp_path):
    pipeline, seen = make_pipeline(), []

    def red(prompts, images, **columns):
        seen.extend(prompts)
        return [float(np.asarray(image)[..., 0].mean() / 255) for image in images]

    teachers = {"cold": "student", "warm": "base"}
    options = {**OPTIONS, "guidance_scale": 20.0, "output_dir": tmp_path, "num_samples": 0}
    report = evaluate_retention(
        pipeline, teachers, "base", red, Dataset.from_list(ROWS), prompt_templates=TEMPLATES, **options
    )
    for index, (task, texts) in enumerate(READ.items()):
        expected = [red([], own_images(pipeline, of_model, index, 20.0)) for of_model in texts]
        assert abs(np.mean(expected[0]) - np.mean(expected[1 if task == "cold" else 2])) > 1e-3
        for model, scores in zip(("base", f"teacher/{task}", "student"), expected, strict=True):
            assert report["scores"][model][task]["red"] == pytest.approx(np.mean(scores), abs=2e-4)
    assert set(seen) == {prompt for prompts, _, _ in READ.values() for prompt in prompts}  # rewards read the prompt
    # Without the template the student is the base, whose images are there.
    again = evaluate_retention(
        pipeline, teachers, "base", red, Dataset.from_list(ROWS), prompt_templates={}, **options
    )
    assert again["scores"]["student"]["warm"] == again["scores"]["base"]["warm"] == report["scores"]["base"]["warm"]


def test_templates_are_those_of_the_training(tmp_path):
    pipeline, folder = make_pipeline(), tmp_path / "student"
    make_lora(pipeline, folder, seed=3)
    trained = {"eval_num_inference_steps": 3, "guidance_scale": 1.0, "height": 16, "width": 16}
    (folder / "training_args.json").write_text(
        json.dumps({**trained, "prompt_templates": {**TEMPLATES, "other": "{prompt}"}})
    )
    asked = (pipeline, {"cold": "base", "warm": "base"}, str(folder), "jpeg_compressibility", Dataset.from_list(ROWS))
    report = evaluate_retention(*asked, max_sequence_length=16)
    assert report["settings"]["prompt_templates"]["value"]["warm"] == "{prompt} at noon"
    assert report["settings"]["prompt_templates"]["source"] == "student 'student'"
    with pytest.raises(ValueError, match="has a template for task 'x', but no prompt has that task") as error:
        partly = Dataset.from_list(
            [row | {"teacher_prompt": row["teacher_prompt"] and row["prompt"][5:]} for row in ROWS]
        )
        evaluate_retention(
            *asked[:-1], partly.select([0, 1, 2]).add_column("n", [0, 1, 2]), prompt_templates={"x": "y"}
        )
    assert "which has no {prompt}" in str(error.value)
    given = "--base a --teachers a=base --student b --reward_funcs a=ocr --dataset a=b.txt --prompt_templates"
    (arguments,) = parse(evaluate.ARGUMENTS, [*given.split(), json.dumps(TEMPLATES)])
    assert arguments.prompt_templates == TEMPLATES
