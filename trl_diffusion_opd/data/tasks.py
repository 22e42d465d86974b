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

"""Which prompts make up an update: every task has the same number of them, whatever the sizes of the prompt sets."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Value
from torch.utils.data import Sampler

from ..guards.files import JSON
from ..guards.redaction import shown


# The one task of a dataset without a task column.
SINGLE_TASK = "default"
# Prompts that an encoder gets at a time.
COMPANY = 8
# Characters of a task's name.
LONGEST_TASK = 200
# Rows that are Python objects at a time: whole columns of a million prompts would fill the memory.
BATCH = 10_000


def column_batches(dataset: Dataset, column: str) -> Iterator[pa.Array]:
    """A column's values in order, some thousand at a time, as Arrow has them."""
    for table in dataset.select_columns([column]).with_format("arrow").iter(BATCH):
        yield table[column].combine_chunks()


def task_rows(dataset: Dataset, task_column: str) -> dict[str, np.ndarray]:
    """
    Rows of each task.

    Returns:
        `dict[str, np.ndarray]`: indices into `dataset`, tasks in order of their names, the same on every process.
    """
    if task_column not in dataset.column_names:
        return {SINGLE_TASK: np.arange(len(dataset))}
    # Python sees each batch's different names alone: a million rows one by one take longer than loading the model.
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
    """The task of a row of such a dataset, as [`task_rows`] names it."""
    return str(row[task_column]) if task_column in row else SINGLE_TASK


def dataset_problems(dataset: Dataset, task_column: str, name: str) -> list[str]:
    """What keeps `dataset` from being used as prompts, a sentence each."""
    columns = dataset.column_names
    if "prompt" not in columns:
        return [f"{name} has no column 'prompt'; its columns are {columns}. Rename yours with rename_column."]
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
        problems.append(f"{name} has {len(empty)} empty prompt(s), the first in row {empty[0]}. Remove them.")
    if unfit:
        row, prompt = unfit[0]
        problems.append(
            f"{name} has {len(unfit)} prompt(s) that are no text, the first in row {row}: {_no_text(prompt)}"
        )
    if task_column in columns:
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
                f"{name} has {len(long)} row(s) whose task's name has more than {LONGEST_TASK} characters, the first in row {row}: "
                f"'{shown(task, 80)}'. It stands in logs, files and cards: give the task a shorter one."
            )
        if bad:
            problems.append(
                f"{name} has {len(bad)} row(s) without a task in '{task_column}', the first is row {bad[0]}."
            )
        if others:
            row, task = others[0]
            problems.append(
                f"{name} has {len(others)} task(s) in '{task_column}' that are no names, the first in row {row}: {task!r:.80}. "
                f"A task's name is text: dataset.cast_column('{task_column}', Value('string'))."
            )
    return problems


def _no_text(prompt: object) -> str:
    """What a prompt is that is no text, and what to do."""
    if _is_conversation(prompt):
        roles = ", ".join(str(message.get("role")) for message in prompt)
        return (
            f"a conversation ({roles}). Of a conversation the text of a single user message is taken; this is not one. Write "
            "what is to be drawn into 'prompt'."
        )
    if isinstance(prompt, list):
        return f"a list, {prompt!r:.80}. A row has one prompt: make a row of each."
    kind = "a number" if isinstance(prompt, int | float) else f"a {type(prompt).__name__}"
    return f"{kind}, {prompt!r:.80}. If another column has the texts, rename it with rename_column."


def _is_conversation(prompt: object) -> TypeGuard[list[dict[str, JSON]]]:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) and "role" in m for m in prompt)


def _plain_text(prompt: object) -> str | None:
    """A prompt's text: its own, or of a conversation that is one message of the user that of the message. `None` for others."""
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
    A dataset, or a dict of them, with prompts and tasks as text where it is clear which: TRL's datasets have conversations, of
    which a single user message is a prompt, and a column of class labels has names. All else is given back as it is.
    """
    if isinstance(dataset, dict):
        return {name: plain_dataset(part, task_column) for name, part in dataset.items()}
    if not isinstance(dataset, Dataset):
        return dataset
    prompts, labels = dataset.features.get("prompt"), dataset.features.get(task_column)
    if prompts is not None and not _is_text(prompts):
        texts = [_plain_text(prompt) for prompt in _values(dataset, "prompt")]
        if None not in texts:
            dataset = _with_column(dataset, "prompt", texts)
    if isinstance(labels, ClassLabel):
        numbers = _values(dataset, task_column)
        names = [labels.names[n] if n is not None and n >= 0 else None for n in numbers]
        dataset = _with_column(dataset, task_column, names)
    return dataset


def _is_text(feature: object) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _with_column(dataset: Dataset, name: str, values: list[str | None]) -> Dataset:
    columns, other = dataset.column_names, "".join(dataset.column_names) + "_"
    # First added: a dataset without any column has no rows.
    added = dataset.add_column(other, pa.array(values, pa.string())).remove_columns(name)
    return added.rename_column(other, name).select_columns(columns)


def _values(dataset: Dataset, column: str) -> Iterator[JSON]:
    if _is_text(dataset.features[column]):
        for batch in column_batches(dataset, column):
            yield from batch.to_pylist()
    else:  # rows of several kinds are JSON to Arrow, which datasets decodes
        for part in dataset.select_columns([column]).with_format(None).iter(BATCH):
            yield from part[column]


class TaskSampler(Sampler[int]):
    """
    Indices in rounds: a round is one update, and every task has an equal part of it.

    A round consists of micro-batches, each of one task and of `batch_size` prompts over all processes, in the order task
    0, task 1, …, task 0, task 1, …, until every task has `rounds_of_tasks`. An epoch is one pass over the largest
    task; smaller ones start over as often as it takes. Its length is a whole number of rounds.

    For groups of completions a prompt is repeated within its round, one copy after another, so that a group may lie in
    several micro-batches and on several processes. For several updates on the same completions a round is repeated as a
    whole.

    Args:
        rows (`list[np.ndarray]`): rows of each task.
        batch_size (`int`): samples of a micro-batch over all processes.
        micro_batches (`int`): micro-batches of each task in a round.
        seed (`int`)
        repeats (`int`, *optional*, defaults to `1`): samples of each prompt in a round, a divisor of the task's samples in
            it.
        passes (`int`, *optional*, defaults to `1`): how often a round comes, one time after another.
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
        Rows whose prompts are encoded together, of all that are in a round of this epoch: at most [`COMPANY`], which follow
        each other in their task's first pass of the first epoch.

        They hang on data and seed alone. In the first pass an update's prompts are new and come in as few groups as can be;
        later they are in the groups of then, and known.

        Args:
            number (`int`): of the round in its epoch.
        """
        size = self.batch_size * self.micro_batches // self.repeats
        for order, (first, place) in zip(self._orders(), self._placed_firsts(), strict=True):
            of_round = order[number * size : (number + 1) * size]
            groups = place[np.searchsorted(first, of_round, sorter=place)] // COMPANY
            for group in np.unique(groups):
                yield first[group * COMPANY : (group + 1) * COMPANY]

    def first_companies(self, rows: int) -> list[list[np.ndarray]]:
        """
        Of each task, the companies of the rows that come first in its first epoch, a random part of them: at most `rows`, or
        a company more.
        """
        return [
            [first[start : start + COMPANY] for start in range(0, min(rows, len(first)), COMPANY)]
            for first, _ in self._placed_firsts()
        ]

    def _placed_firsts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each task's rows in the order of its first pass, and what sorts them."""
        if self._first_passes is None:
            firsts = [self._order(task, 0, len(rows)) for task, rows in enumerate(self.rows)]
            self._first_passes = [(first, np.argsort(first)) for first in firsts]
        return self._first_passes

    def _rounds(self, order: list[np.ndarray]) -> Iterator[int]:
        for i in range(self.rounds):  # an epoch of a million prompts as one list takes more memory than the prompts
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
