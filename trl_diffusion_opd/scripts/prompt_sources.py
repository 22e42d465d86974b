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

"""Loads the prompts that `task=source` names, all files and options together, and says what is wrong with them."""

import os
from collections.abc import Iterable, Mapping, Sequence

from datasets import Dataset, concatenate_datasets

from ..data.pictured_prompt import SOURCE_IMAGES
from ..data.prompt_files import Source, load_source, source_problem
from ..data.tasks import plain_dataset
from ..problems import Problems, Refusal
from .values import OfTasks, by_task, packaged, single


def source_problems(option: str, values: OfTasks | None, prompt_column: str | None) -> list[str]:
    """Lists what is wrong with prompt sources: local files are read, datasets of the Hub are not asked for."""
    problems = Problems()
    with problems.collect():
        for of_task in by_task(option, values).values():
            for source in map(packaged, of_task):
                if (problem := source_problem(option, source)) is not None:
                    problems.append(problem)
                elif os.path.exists(source):
                    with problems.collect():
                        load_source(option, source, prompt_column)
    return problems


def load_datasets(
    given: Mapping[str, OfTasks | None],
    task_column: str,
    prompt_column: str | None = None,
    problems: Problems | None = None,
    pictures_column: str = SOURCE_IMAGES,
) -> dict[str, Dataset | None]:
    """
    Loads the prompts of several options. Prints which column is taken as the prompt where that is not obvious.

    Args:
        given (`dict`): the values of each option, `task=source`.
        task_column (`str`): the column that gets the task's name.
        prompt_column (`str`, *optional*): the sources' column with the prompts. By default `prompt`, else `caption`,
            else `text`.
        problems ([`Problems`], *optional*): what else the message lists, if anything is wrong.
        pictures_column (`str`, *optional*): the sources' column with pictures.

    Returns:
        `dict[str, Dataset]`: for each option a dataset with the column `prompt`; `None` for one without values.

    Raises:
        [`Refusal`]: if anything cannot be used. One message lists everything.
    """
    problems = Problems() if problems is None else problems
    found: dict[str, list[tuple[str, Source]]] = {}
    for option, values in given.items():
        with problems.collect():
            for task, sources in by_task(option, values).items():
                for source in map(packaged, sources):
                    with problems.collect():
                        loaded = load_source(option, source, prompt_column, pictures_column)
                        found.setdefault(option, []).append((task, loaded))
    problems += _column_problems(prompt_column, [source for parts in found.values() for _, source in parts])
    datasets: dict[str, Dataset | None] = dict.fromkeys(given)
    for option, parts in found.items():
        with problems.collect():
            datasets[option] = _joined(option, parts, task_column)
    if problems:
        raise Refusal("\n".join(dict.fromkeys(problems)))
    _tell(source for parts in found.values() for _, source in parts)
    return datasets


def load_prompts(
    option: str,
    values: OfTasks | None,
    task_column: str,
    prompt_column: str | None = None,
    pictures_column: str = SOURCE_IMAGES,
) -> Dataset | None:
    """Loads the prompts of one option, as [`load_datasets`]."""
    return load_datasets({option: values}, task_column, prompt_column, pictures_column=pictures_column)[option]


def load_tasks(
    option: str,
    values: OfTasks,
    task_column: str,
    prompt_column: str | None = None,
    pictures_column: str = SOURCE_IMAGES,
) -> Dataset:
    """Loads prompts as [`load_prompts`], or from one source that has a column with the task's name."""
    of_all = single(values)
    if of_all is None or "=" in of_all:
        dataset = load_prompts(option, values, task_column, prompt_column, pictures_column)
        assert dataset is not None
        return dataset
    source = load_source(option, packaged(of_all), prompt_column, pictures_column)
    problems = _column_problems(prompt_column, [source])
    if task_column not in source.dataset.column_names:
        problems.append(
            f"--{option}: {of_all!r} has no column {task_column!r} that names the tasks; it has "
            f"{source.dataset.column_names}. Name the column with --task_column, or give task=source."
        )
    if problems:
        raise Refusal("\n".join(problems))
    _tell([source])
    return plain_dataset(source.dataset, task_column)


def _joined(option: str, parts: Sequence[tuple[str, Source]], task_column: str) -> Dataset:
    named = []
    for task, source in parts:
        part = source.dataset
        if task_column in part.column_names:  # the command line says which task it is
            part = part.remove_columns(task_column)
        named.append(part.add_column(task_column, [task] * len(part)))
    try:
        return concatenate_datasets(named)
    except ValueError as error:
        raise Refusal(f"--{option}: a column has different types in different sources. {error}") from error


def _column_problems(prompt_column: str | None, sources: Sequence[Source]) -> list[str]:
    """Refuses a `--prompt_column` that no source has."""
    names = dict.fromkeys(name for source in sources for name in source.columns)
    if prompt_column is None or not sources or prompt_column in names:
        return []
    have = f"they have {', '.join(names)}" if names else "text files have none"
    return [f"--prompt_column: no source has a column {prompt_column!r}; {have}."]


def _tell(sources: Iterable[Source]) -> None:
    """Prints the notes of sources, each once, on one process of those that a launcher has started."""
    if os.environ.get("RANK", "0") == "0":
        for note in dict.fromkeys(source.note for source in sources if source.note is not None):
            print(note)
