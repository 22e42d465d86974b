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

"""
What each model reads of a row: the student its prompt in the task's template, teachers the column `teacher_prompt`, the
base and the rewards the prompt itself; all of them with the row's pictures, the column `source_images`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..guards.redaction import shown
from .pictured_prompt import SOURCE_IMAGES, PicturedPrompt, with_pictures
from .tasks import SINGLE_TASK, task_of


# The column with what teachers read. Without it, or in a task without a value in it, they read the prompt.
TEACHER_PROMPT = "teacher_prompt"
# What a template has in the prompt's place.
PLACE = "{prompt}"
_FIELD = re.compile(r"\{\w*\}")

Reader = Literal["student", "teacher", "prompt"]  # "prompt": who reads the prompt itself


@dataclass(frozen=True)
class Texts:
    """
    What each model reads for the same B samples, in their order.

    Attributes:
        prompt (`list[str]`): the prompts themselves, which the base reads.
        student (`list[str]`): the prompts in their task's template.
        teacher (`list[str]`): what the task's teachers read.
    """

    prompt: list[str]
    student: list[str]
    teacher: list[str]

    def of(self, reader: Reader) -> list[str]:
        return {"prompt": self.prompt, "student": self.student, "teacher": self.teacher}[reader]


@dataclass(frozen=True)
class Readers:
    """
    Decides what each model reads.

    Args:
        templates (`dict[str, str]`, *optional*):
            For each task the text that the student reads, with `{prompt}` in the prompt's place. In a task without a
            template it reads the prompt.
    """

    templates: Mapping[str, str] = field(default_factory=dict)

    def texts(self, task: str, rows: Iterable[Mapping[str, object]]) -> Texts:
        """What each model reads of rows of one task."""
        found = list(rows)
        columns = {
            "prompt": [row["prompt"] for row in found],
            TEACHER_PROMPT: [row.get(TEACHER_PROMPT) for row in found],
            SOURCE_IMAGES: [row.get(SOURCE_IMAGES) for row in found],
        }
        return self.texts_of(task, columns)

    def texts_of(self, task: str, columns: Mapping[str, Sequence[object]]) -> Texts:
        """The same of rows that are given as columns."""
        prompts = [str(prompt) for prompt in columns["prompt"]]
        others = columns.get(TEACHER_PROMPT) or [None] * len(prompts)
        teacher = [prompt if _is_empty(other) else str(other) for prompt, other in zip(prompts, others, strict=True)]
        student = [self.student(task, prompt) for prompt in prompts]
        if not any(pictures := columns.get(SOURCE_IMAGES) or []):
            return Texts(prompts, student, teacher)
        pictured = [with_pictures(text, of_row) for text, of_row in zip(prompts, pictures, strict=True)]  # type: ignore[arg-type]
        student, teacher = (
            [
                one.with_text(text) if isinstance(one, PicturedPrompt) else text
                for one, text in zip(pictured, texts, strict=True)
            ]
            for texts in (student, teacher)
        )
        return Texts(pictured, student, teacher)

    def student(self, task: str, prompt: str) -> str:
        """What the student reads of a prompt."""
        # Not str.format: a prompt or a template may have other braces.
        return self.templates[task].replace(PLACE, prompt) if task in self.templates else prompt

    def lines(self, dataset: Dataset, rows: Mapping[str, np.ndarray]) -> list[str]:
        """Says who reads something else than the prompt, for the start of a run. `rows` are those of each task."""
        others = [task for task, numbers in rows.items() if has_teacher_prompts(dataset, numbers)]
        said = [f"The student reads {text!r} in {task}." for task, text in self.templates.items()]
        return said + ([f"Teachers read {TEACHER_PROMPT} in {', '.join(others)}."] if others else [])

    def student_column(self, task: str, prompts: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
        """What the student reads of a column of prompts. It makes no Python objects of them."""
        parts = self.templates.get(task, PLACE).split(PLACE)
        if parts == ["", ""]:
            return prompts
        pieces = [piece for part in parts for piece in (part, prompts)][:-1]
        return pc.binary_join_element_wise(*pieces, "")

    def companies(self, columns: Mapping[str, Sequence[object]], task_column: str) -> list[list[str]]:
        """
        The different texts of rows of one task, in groups of one reader each. A group that another one equals is left
        out, so where all read the prompt there is one.
        """
        task = task_of({name: values[0] for name, values in columns.items()}, task_column)
        # Encoders that read pictures take one prompt at a time.
        texts = self.texts_of(task, {name: values for name, values in columns.items() if name != SOURCE_IMAGES})
        groups = [list(dict.fromkeys(texts.of(reader))) for reader in ("student", "teacher", "prompt")]
        return [group for i, group in enumerate(groups) if group not in groups[:i]]


def rows_of(columns: Mapping[str, Sequence[object]]) -> list[dict[str, object]]:
    """Rows that are given as columns."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def read_columns(dataset: Dataset, of_teachers: bool = True) -> list[str]:
    """The columns of a dataset that models read: all of them, or without those that only teachers read."""
    return [
        name
        for name in ("prompt", TEACHER_PROMPT, SOURCE_IMAGES)
        if name in dataset.column_names and (of_teachers or name != TEACHER_PROMPT)
    ]


def has_teacher_prompts(dataset: Dataset, rows: np.ndarray) -> bool:
    """Whether teachers read something else than the prompt in any of these rows, which are of one task."""
    return TEACHER_PROMPT in dataset.column_names and not all(
        _is_empty(text)
        for batch in dataset.select(rows).select_columns([TEACHER_PROMPT]).with_format(None).iter(10_000)
        for text in batch[TEACHER_PROMPT]
    )


def teacher_prompt_problems(dataset: Dataset, rows: Mapping[str, np.ndarray], name: str) -> list[str]:
    """
    Says what is wrong with the column `teacher_prompt` of a dataset, one sentence each.

    Args:
        dataset ([`~datasets.Dataset`]), name (`str`): the dataset, and how messages call it.
        rows (`dict[str, np.ndarray]`): the rows of each task.
    """
    problems: list[str] = []
    if TEACHER_PROMPT not in dataset.column_names:
        return problems
    for task, numbers in rows.items():
        empty, unfit = [], []
        texts = dataset.select(numbers).select_columns([TEACHER_PROMPT]).with_format(None)
        for row, text in zip(
            numbers.tolist(), (t for b in texts.iter(10_000) for t in b[TEACHER_PROMPT]), strict=True
        ):
            if _is_empty(text):
                empty.append(row)
            elif not isinstance(text, str):
                unfit.append((row, text))
        of_task = "" if task == SINGLE_TASK and len(rows) == 1 else f" of task {task!r}"
        if unfit:
            row, text = unfit[0]
            problems.append(
                f"{name} has {len(unfit)} {TEACHER_PROMPT}(s){of_task} that are not text, the first in row {row}: "
                f"{shown(repr(text), 80)}."
            )
        if 0 < len(empty) < len(numbers):
            problems.append(
                f"{name} has {len(empty)} of {len(numbers)} rows{of_task} without a {TEACHER_PROMPT}, the first is row "
                f"{empty[0]}. Give every row of the task one (the prompt, where its teachers should read that), or none."
            )
    return problems


def template_problems(templates: Mapping[str, object], tasks: Sequence[str] | None = None) -> list[str]:
    """
    Says what is wrong with templates, one sentence each.

    Args:
        templates (`dict`): as a user gave them, by task.
        tasks (`list[str]`, *optional*): the tasks that there are. By default they are not checked.
    """
    problems = []
    for task, template in templates.items():
        called = f"prompt_templates: that of task {task!r} is {shown(repr(template), 80)}"
        if not isinstance(template, str):
            problems.append(f"{called}, which is no text. Write one with {PLACE}, such as '{PLACE}, {task}'.")
        elif PLACE not in template:
            problems.append(
                f"{called}, which has no {PLACE}: every prompt would be the same. Write {PLACE} where it belongs."
            )
        elif others := _fields(template):
            problems.append(f"{called}, with {', '.join(others)}: only {PLACE} is filled in. Leave the others out.")
    unknown = [] if tasks is None else [task for task in templates if task not in tasks]
    if unknown:
        problems.append(
            f"prompt_templates has a template for {', '.join(f'task {task!r}' for task in unknown)}, but no prompt has "
            f"that task. Tasks found: {[*(tasks or [])]}."
        )
    return problems


def _fields(template: str) -> list[str]:
    """The other fields `{name}` of a template, which a user may expect to be filled in."""
    return [field for field in dict.fromkeys(_FIELD.findall(template)) if field != PLACE]


def _is_empty(text: object) -> bool:
    return text is None or (isinstance(text, str) and not text.strip())
