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
Checks datasets of prompts, and chooses the prompts of each update: the same number for every task, however many
prompts a task has.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Value
from torch.utils.data import Sampler

from ..guards.files import JSON
from ..guards.redaction import shown


# The one task of a dataset without a task column.
SINGLE_TASK = "default"
# The columns that commands take as the prompt: the first of them that a source has.
PROMPT_COLUMNS = ("prompt", "caption", "text")
# Number of prompts that are encoded together (a "company").
COMPANY = 8
# Maximum number of characters in a task's name.
LONGEST_TASK = 200
# Rows that are converted to Python objects at a time: a whole column of a million prompts would fill the memory.
BATCH = 10_000


def column_batches(dataset: Dataset, column: str) -> Iterator[pa.Array]:
    """Yields a column's values in order, in Arrow arrays of [`BATCH`] rows."""
    for table in dataset.select_columns([column]).with_format("arrow").iter(BATCH):
        yield table[column].combine_chunks()


def task_rows(dataset: Dataset, task_column: str) -> dict[str, np.ndarray]:
    """
    Finds the rows of each task. Without a task column, all rows belong to the task `"default"`.

    Returns:
        `dict[str, np.ndarray]`: each task's indices into `dataset`. Tasks are sorted by name on every process.
    """
    if task_column not in dataset.column_names:
        return {SINGLE_TASK: np.arange(len(dataset))}
    # Only each batch's different names become Python objects: looping over a million rows takes longer than loading
    # the model.
    rows: dict[str, list[np.ndarray]] = {}
    start = 0
    for values in column_batches(dataset, task_column):
        encoded = values.dictionary_encode(null_encoding="encode")
        codes = encoded.indices.to_numpy()
        order = np.argsort(codes, kind="stable") + start
        parts = np.split(order, np.cumsum(np.bincount(codes))[:-1])
        for name, part in zip(encoded.dictionary.to_pylist(), parts, strict=True):
            rows.setdefault(str(name), []).append(part)
        start += len(values)
    return {name: np.concatenate(rows[name]) for name in sorted(rows)}


def task_of(row: Mapping[str, object], task_column: str) -> str:
    """The task of a row, named as in [`task_rows`]."""
    return str(row[task_column]) if task_column in row else SINGLE_TASK


def dataset_problems(dataset: Dataset, task_column: str, name: str) -> list[str]:
    """Says what is wrong with a dataset of prompts, one sentence each. `name` is how messages call it."""
    columns = dataset.column_names
    if "prompt" not in columns:
        likely = next((one for one in PROMPT_COLUMNS if one in columns), None)
        remedy = "Rename yours with rename_column." if likely is None else f"Use rename_column({likely!r}, 'prompt')."
        return [f"{name} has no column 'prompt'; its columns are {columns}. {remedy}"]
    problems = prompt_problems(dataset, name, "row {}".format, "rename it with rename_column")
    if task_column in columns:
        problems += _task_problems(dataset, task_column, name)
    return problems


def prompt_problems(dataset: Dataset, name: str, place: Callable[[int], str], remedy: str) -> list[str]:
    """
    Says what is wrong with the column `prompt` of a dataset, one sentence each.

    Args:
        dataset ([`~datasets.Dataset`]), name (`str`): the dataset, and how messages call it.
        place (`Callable`): returns where a row is, by its number.
        remedy (`str`): what to do if another column has the prompts.
    """
    problems = []
    empty, unfit = [], []
    for row, prompt in enumerate(_values(dataset, "prompt")):
        if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
            empty.append(row)
        elif not isinstance(prompt, str):
            unfit.append((row, prompt))
    if len(dataset) == 0:
        problems.append(f"{name} is empty.")
    if empty:
        problems.append(f"{name} has {len(empty)} empty prompt(s), the first in {place(empty[0])}. Remove them.")
    if unfit:
        row, prompt = unfit[0]
        problems.append(
            f"{name} has {len(unfit)} prompt(s) that are not text, the first in {place(row)}: "
            f"{_no_text(prompt, remedy)}"
        )
    return problems


def _task_problems(dataset: Dataset, task_column: str, name: str) -> list[str]:
    problems = []
    bad, others, long = [], [], []
    for row, task in enumerate(_values(dataset, task_column)):
        if task is None or task == "":
            bad.append(row)
        elif not isinstance(task, str):
            others.append((row, task))
        elif len(task) > LONGEST_TASK:
            long.append((row, task))
    if long:
        row, task = long[0]
        problems.append(
            f"{name} has {len(long)} row(s) with a task name of more than {LONGEST_TASK} characters, the first in "
            f"row {row}: '{shown(task, 80)}'. Names of tasks appear in logs, files and cards: choose a shorter one."
        )
    if bad:
        problems.append(f"{name} has {len(bad)} row(s) without a task in '{task_column}', the first is row {bad[0]}.")
    if others:
        row, task = others[0]
        problems.append(
            f"{name} has {len(others)} task(s) in '{task_column}' that are not text, the first in row {row}: "
            f"{task!r:.80}. Convert them: dataset.cast_column('{task_column}', Value('string'))."
        )
    return problems


def _no_text(prompt: object, remedy: str) -> str:
    """Says what a prompt that is not text is instead, and what to do."""
    if _is_conversation(prompt):
        roles = ", ".join(str(message.get("role")) for message in prompt)
        return (
            f"a conversation ({roles}). A conversation can only be used if it is one user message with one text. "
            "Write the text to draw into 'prompt'."
        )
    if isinstance(prompt, list):
        return f"a list, {prompt!r:.80}. A row has one prompt: make one row for each."
    kind = "a number" if isinstance(prompt, int | float) else f"a {type(prompt).__name__}"
    return f"{kind}, {prompt!r:.80}. If another column has the texts, {remedy}."


def _is_conversation(prompt: object) -> TypeGuard[list[dict[str, JSON]]]:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) and "role" in m for m in prompt)


def _plain_text(prompt: object) -> str | None:
    """The text of a prompt that is a string, or a conversation of one user message; `None` for others."""
    if isinstance(prompt, str):
        return prompt
    if not _is_conversation(prompt) or len(prompt) != 1 or prompt[0]["role"] != "user":
        return None
    content = prompt[0].get("content")
    if (
        isinstance(content, list)
        and len(content) == 1
        and isinstance(content[0], dict)
        and content[0].get("type") == "text"
    ):
        content = content[0].get("text")
    return content if isinstance(content, str) else None


def plain_dataset(dataset: Any, task_column: str) -> Any:
    """
    Converts the prompts and tasks of a dataset (or of a dict of datasets) to text where that is unambiguous: prompts
    as [`plain_prompts`], class labels to their names. Everything else is returned unchanged.
    """
    if isinstance(dataset, dict):
        return {name: plain_dataset(part, task_column) for name, part in dataset.items()}
    if not isinstance(dataset, Dataset):
        return dataset
    dataset, labels = plain_prompts(dataset), dataset.features.get(task_column)
    if isinstance(labels, ClassLabel):
        numbers = _values(dataset, task_column)
        names = [labels.names[n] if n is not None and n >= 0 else None for n in numbers]
        dataset = _with_column(dataset, task_column, names)
    return dataset


def plain_prompts(dataset: Dataset) -> Dataset:
    """
    Converts prompts to text where that is unambiguous. TRL's datasets may hold conversations: one with a single user
    message becomes that message's text.
    """
    prompts = dataset.features.get("prompt")
    if prompts is not None and not _is_text(prompts):
        texts = [_plain_text(prompt) for prompt in _values(dataset, "prompt")]
        if None not in texts:
            return _with_column(dataset, "prompt", texts)
    return dataset


def _is_text(feature: object) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _with_column(dataset: Dataset, name: str, values: list[str | None]) -> Dataset:
    columns, other = dataset.column_names, "".join(dataset.column_names) + "_"
    # Added before the old column is removed: a dataset without columns would have no rows.
    added = dataset.add_column(other, pa.array(values, pa.string())).remove_columns(name)
    return added.rename_column(other, name).select_columns(columns)


def _values(dataset: Dataset, column: str) -> Iterator[JSON]:
    if _is_text(dataset.features[column]):
        for batch in column_batches(dataset, column):
            yield from batch.to_pylist()
    else:  # Arrow holds rows of mixed types as JSON, which `datasets` decodes
        for part in dataset.select_columns([column]).with_format(None).iter(BATCH):
            yield from part[column]


class TaskSampler(Sampler[int]):
    """
    Samples indices of prompts in rounds. A round is one update, and every task has an equal part of it.

    A round consists of micro-batches. Each has `batch_size` prompts of one task over all processes, and the tasks take
    turns: task 0, task 1, …, task 0, task 1, …, until every task had `micro_batches`. An epoch is one pass over the
    largest task, rounded up to whole rounds. Smaller tasks start over as often as needed.

    For groups of completions, a prompt is repeated within its round, one copy after another, so that a group may span
    several micro-batches and processes. For several updates on the same completions, the whole round is repeated.

    Args:
        rows (`list[np.ndarray]`): rows of each task, from [`task_rows`].
        batch_size (`int`): samples of a micro-batch over all processes.
        micro_batches (`int`): micro-batches of each task in a round.
        seed (`int`): seed of the order of prompts.
        repeats (`int`, *optional*, defaults to `1`): samples of each prompt in a round. Must divide the number of a
            task's samples in a round.
        passes (`int`, *optional*, defaults to `1`): how many times in a row each round is repeated.
    """

    def __init__(
        self,
        rows: Sequence[np.ndarray],
        batch_size: int,
        micro_batches: int,
        seed: int,
        repeats: int = 1,
        passes: int = 1,
    ):
        self.rows = list(rows)
        self.batch_size = batch_size
        self.micro_batches = micro_batches
        self.seed = seed
        self.repeats = repeats
        self.passes = passes
        self.epoch = 0
        self._known_orders: tuple[int, list[np.ndarray]] | None = None
        self._first_passes: list[tuple[np.ndarray, np.ndarray]] | None = None
        per_round = batch_size * micro_batches // repeats
        self.rounds = -(-max(len(task) for task in self.rows) // per_round)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rounds * self.passes * self.micro_batches * len(self.rows) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        shape = (self.rounds, self.micro_batches, self.batch_size)
        return self._rounds([order.repeat(self.repeats).reshape(shape) for order in self._orders()])

    def companies(self, number: int) -> Iterator[np.ndarray]:
        """
        Yields the groups of rows ("companies") whose prompts are encoded together, for all prompts of a round of this
        epoch. A company has at most [`COMPANY`] rows, which are neighbours in their task's first pass.

        Companies depend only on data and seed. In the first pass over a task, a round's prompts are new and fill the
        fewest possible companies. Later they keep their companies, which have been encoded already.

        Args:
            number (`int`): number of the round in its epoch.
        """
        size = self.batch_size * self.micro_batches // self.repeats
        for order, (first, place) in zip(self._orders(), self._placed_firsts(), strict=True):
            of_round = order[number * size : (number + 1) * size]
            groups = place[np.searchsorted(first, of_round, sorter=place)] // COMPANY
            for group in np.unique(groups):
                yield first[group * COMPANY : (group + 1) * COMPANY]

    def first_companies(self, rows: int) -> list[list[np.ndarray]]:
        """
        For each task, the companies of the first `rows` rows of its first pass (a random part of the task). The last
        company may go beyond `rows`.
        """
        return [
            [first[start : start + COMPANY] for start in range(0, min(rows, len(first)), COMPANY)]
            for first, _ in self._placed_firsts()
        ]

    def _placed_firsts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each task's rows in the order of its first pass, and the indices that sort them."""
        if self._first_passes is None:
            firsts = [self._order(task, 0, len(rows)) for task, rows in enumerate(self.rows)]
            self._first_passes = [(first, np.argsort(first)) for first in firsts]
        return self._first_passes

    def _rounds(self, order: list[np.ndarray]) -> Iterator[int]:
        for i in range(self.rounds):  # round by round: a list of a whole epoch could take more memory than the prompts
            # [micro-batch, task, sample]
            indices = np.stack([of_task[i] for of_task in order], axis=1).reshape(-1).tolist()
            for _ in range(self.passes):
                yield from indices

    def _orders(self) -> list[np.ndarray]:
        """The prompts of each task in this epoch, in order."""
        if self._known_orders is None or self._known_orders[0] != self.epoch:
            length = self.rounds * self.micro_batches * self.batch_size // self.repeats
            orders = [self._order(task, self.epoch, length) for task in range(len(self.rows))]
            self._known_orders = self.epoch, orders
        return self._known_orders[1]

    def _order(self, task: int, epoch: int, length: int) -> np.ndarray:
        rows = self.rows[task]
        generator = np.random.default_rng(np.random.SeedSequence([self.seed, epoch, task, 1]))
        passes = [generator.permutation(rows) for _ in range(-(-length // len(rows)))]
        return np.concatenate(passes)[:length]
