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

"""What each model reads of a row."""

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from trl_diffusion_opd.data.readers import Readers, Texts, teacher_prompt_problems, template_problems
from trl_diffusion_opd.data.tasks import task_rows


TEMPLATES = {"night": "{prompt}, night", "twice": "{prompt}! a {look} of {prompt}"}


def test_texts():
    rows = [{"prompt": "a cat", "teacher_prompt": "a grey cat"}, {"prompt": "a {prompt}", "teacher_prompt": None}]
    texts = Readers(TEMPLATES).texts("night", rows)
    assert texts == Texts(["a cat", "a {prompt}"], ["a cat, night", "a {prompt}, night"], ["a grey cat", "a {prompt}"])
    assert Readers(TEMPLATES).texts("day", [{"prompt": "a cat"}]) == Texts(["a cat"], ["a cat"], ["a cat"])
    assert Readers(TEMPLATES).student("twice", "dog") == "dog! a {look} of dog"


@pytest.mark.parametrize("task", ["night", "twice", "day"])
def test_a_column_is_read_as_its_rows(task):
    prompts = ["a cat", "été", "a {prompt}"]
    column = Readers(TEMPLATES).student_column(task, pa.chunked_array([prompts[:1], prompts[1:]]))
    assert column.to_pylist() == [Readers(TEMPLATES).student(task, prompt) for prompt in prompts]


def test_companies():
    columns = {"prompt": ["a", "b", "a"], "task": ["night"] * 3}
    assert Readers().companies(columns, "task") == [["a", "b"]]
    asked = columns | {"teacher_prompt": ["A", "b", "a"]}
    assert Readers(TEMPLATES).companies(asked, "task") == [["a, night", "b, night"], ["A", "b", "a"], ["a", "b"]]


def test_problems_of_teacher_prompts():
    tasks = ["one", "two", "one", "three", "two", "two"]
    given = ["x", "y", " ", None, None, None]
    dataset = Dataset.from_dict({"prompt": list("abcdef"), "task": tasks, "teacher_prompt": given})
    # A task without any reads its prompts.
    one, two = teacher_prompt_problems(dataset, task_rows(dataset, "task"), "train_dataset")
    assert one.startswith("train_dataset has 1 of 2 rows of task 'one' without a teacher_prompt, the first is row 2.")
    assert two.startswith("train_dataset has 2 of 3 rows of task 'two' without a teacher_prompt, the first is row 4.")
    numbers = Dataset.from_dict({"prompt": ["a", "b"], "teacher_prompt": [1, 2]})
    (problem,) = teacher_prompt_problems(numbers, {"default": np.arange(2)}, "train_dataset")
    assert problem == "train_dataset has 2 teacher_prompt(s) that are not text, the first in row 0: 1."


def test_problems_of_templates():
    good = {"a": "{prompt}", "b": "{prompt} {}..", "c": "{'x'} {prompt}"}
    assert template_problems({"a": good["a"], "c": good["c"]}, ["a", "c"]) == []
    bad = {"a": 3, "b": "night", "c": "{prompt} by {artist}", "d": good["b"], "e": "{prompt}"}
    number, plain, field, blank, unknown = template_problems(bad, ["a", "b", "c", "d"])
    assert number.startswith("prompt_templates: that of task 'a' is 3, which is no text.")
    assert plain.startswith("prompt_templates: that of task 'b' is 'night', which has no {prompt}")
    assert field.startswith("prompt_templates: that of task 'c' is '{prompt} by {artist}', with {artist}: only")
    assert "with {}: only" in blank
    assert unknown == (
        "prompt_templates has a template for task 'e', but no prompt has that task. Tasks found: ['a', 'b', 'c', 'd']."
    )
