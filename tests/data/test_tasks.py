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

import itertools
import json
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value, load_dataset

from trl_diffusion_opd.data.tasks import (
    BATCH,
    COMPANY,
    SINGLE_TASK,
    TaskSampler,
    dataset_problems,
    plain_dataset,
    task_rows,
)


SIZES = (23, 7, 10)


def make_rows(sizes=SIZES):
    bounds = np.cumsum([0, *sizes])
    return [np.arange(start, end) for start, end in itertools.pairwise(bounds)]


def make_sampler(batch_size=4, micro_batches=2, seed=0, sizes=SIZES):
    return TaskSampler(make_rows(sizes), batch_size, micro_batches, seed)


def micro_batches(sampler):
    """The epoch as `[micro-batch, sample]`."""
    return np.array(list(sampler)).reshape(-1, sampler.batch_size)


def tasks_of(indices):
    return np.searchsorted(np.cumsum(SIZES), indices, side="right")


@pytest.mark.parametrize(("batch_size", "micro"), [(1, 1), (4, 2), (3, 5), (23, 1), (64, 2)])
def test_an_epoch_is_whole_rounds_with_equal_shares(batch_size, micro):
    sampler = make_sampler(batch_size, micro)
    batches = micro_batches(sampler)
    per_round = micro * len(SIZES)
    assert len(sampler) == batches.size and len(batches) % per_round == 0
    # A micro-batch is of one task, and the tasks take turns.
    tasks = tasks_of(batches)
    assert (tasks == tasks[:, :1]).all()
    assert (tasks[:, 0] == np.arange(len(batches)) % len(SIZES)).all()
    for start in range(0, len(batches), per_round):
        counts = Counter(tasks[start : start + per_round].ravel().tolist())
        assert counts == dict.fromkeys(range(len(SIZES)), batch_size * micro)


def test_an_epoch_is_one_pass_over_the_largest_task_and_smaller_ones_cycle():
    sampler = make_sampler(batch_size=4, micro_batches=1)
    batches = micro_batches(sampler)
    assert sampler.rounds == 6  # 23 rows in batches of 4
    largest, small, middle = (batches[task::3].ravel() for task in range(3))
    assert sorted(largest[:23]) == list(range(23)) and len(largest) == 24
    # 24 samples of 7 rows are three passes and 3 more, of 10 rows two and 4: no row is used up before the others.
    assert sorted(Counter(small.tolist()).values()) == [3] * 4 + [4] * 3
    assert sorted(Counter(middle.tolist()).values()) == [2] * 6 + [3] * 4
    assert sorted(small[:7]) == sorted(small[7:14]) == list(range(23, 30))


def test_the_order_is_that_of_seed_and_epoch():
    first, again, other_seed = make_sampler(), make_sampler(), make_sampler(seed=1)
    epoch_0 = list(first)
    assert list(first) == epoch_0 and list(again) == epoch_0
    assert list(other_seed) != epoch_0
    for sampler in (first, again):
        sampler.set_epoch(1)
    epoch_1 = list(first)
    assert epoch_1 != epoch_0 and list(again) == epoch_1
    # A second pass over a small task is in another order, too.
    small = micro_batches(make_sampler(batch_size=7, micro_batches=1))[1::3]
    assert sorted(small[0]) == sorted(small[1]) and small[0].tolist() != small[1].tolist()


@pytest.mark.parametrize(("processes", "size"), [(1, 12), (2, 6), (3, 4), (12, 1)])
def test_a_global_batch_is_the_same_however_it_is_split(processes, size):
    whole = list(make_sampler(batch_size=12))
    sampler = make_sampler(batch_size=processes * size)
    parts = np.array(list(sampler)).reshape(-1, processes, size)  # as accelerate hands a batch to the processes
    assert parts.reshape(-1).tolist() == whole


def test_more_micro_batches_draw_the_same_samples_for_every_round():
    whole = np.array(list(make_sampler(batch_size=8, micro_batches=1))).reshape(-1, 1, len(SIZES), 8)
    parts = np.array(list(make_sampler(batch_size=2, micro_batches=4))).reshape(-1, 4, len(SIZES), 2)
    for task in range(len(SIZES)):
        assert whole[:, :, task].reshape(len(whole), -1).tolist() == parts[:, :, task].reshape(len(parts), -1).tolist()


def companies_of(sampler):
    """Of every round of the epoch, as sorted tuples."""
    return [[tuple(sorted(rows.tolist())) for rows in sampler.companies(i)] for i in range(sampler.rounds)]


@pytest.mark.parametrize("repeats", [1, 2])
def test_companies_are_the_same_however_rounds_are_split_and_in_every_epoch(repeats):
    found = {}
    for batch_size, micro in ((8, 1), (4, 2), (2, 4), (6, 3), (8, 1)):
        sampler = TaskSampler(make_rows(SIZES), batch_size, micro, seed=0, repeats=repeats)
        for epoch in (batch_size % 3, 0, 1, 2):  # a resumed run begins in any
            sampler.set_epoch(epoch)
            order = np.array(list(sampler)).reshape(sampler.rounds, -1)
            for of_round, companies in zip(order, companies_of(sampler), strict=True):
                assert len(companies) == len(set(companies))
                for row in set(of_round.tolist()):  # all of a round are in one of its companies, and in one alone
                    (company,) = [one for one in companies if row in one]
                    assert found.setdefault(row, company) == company and len(company) <= COMPANY
                assert all(set(company) & set(of_round.tolist()) for company in companies)
    assert sorted(row for company in set(found.values()) for row in company) == list(range(sum(SIZES)))
    assert Counter(map(len, set(found.values()))) == {8: 3, 7: 2, 2: 1}  # of 23, 7 and 10 rows


def test_a_rounds_prompts_come_in_few_companies_at_first():
    sampler = make_sampler(batch_size=8, micro_batches=1, sizes=[64, 64])
    assert [len(companies) for companies in companies_of(sampler)] == [2] * 8
    other = make_sampler(batch_size=8, micro_batches=1, sizes=[64, 64], seed=1)
    assert companies_of(other) != companies_of(sampler)


def test_task_rows():
    dataset = Dataset.from_dict({"prompt": list("abcde"), "task": ["ocr", "style", "ocr", "count", "style"]})
    rows = task_rows(dataset, "task")
    assert {task: of_task.tolist() for task, of_task in rows.items()} == {"count": [3], "ocr": [0, 2], "style": [1, 4]}
    assert list(rows) == [
        "count",
        "ocr",
        "style",
    ]  # by name: the order of the rows may differ between processes' files
    assert task_rows(dataset, "skill")[SINGLE_TASK].tolist() == [0, 1, 2, 3, 4]


def test_task_rows_reads_a_long_column_once(monkeypatch):
    # A row at a time, a million prompts take minutes.
    dataset = Dataset.from_dict({"task": ["ocr", "style"] * 500_000, "prompt": ["a"] * 1_000_000})
    reads = []
    getitem = Dataset.__getitem__
    monkeypatch.setattr(Dataset, "__getitem__", lambda self, key: reads.append(key) or getitem(self, key))
    rows = task_rows(dataset, "task")
    assert len(reads) <= 2 and not any(isinstance(key, int) for key in reads)
    assert np.array_equal(rows["ocr"], np.arange(0, 1_000_000, 2))
    assert np.array_equal(rows["style"], np.arange(1, 1_000_000, 2))


PROBLEMS = {
    "no prompt": (
        {"caption": ["a"], "task": ["ocr"]},
        "data has no column 'prompt'; its columns are ['caption', 'task']. Use rename_column('caption', 'prompt').",
    ),
    "empty": ({"prompt": [], "task": []}, "data is empty."),
    "empty prompts": (
        {"prompt": ["a", "", " \n", None], "task": ["ocr"] * 4},
        "data has 3 empty prompt(s), the first in row 1. Remove them.",
    ),
    "lists": (
        {"prompt": [["a", "b"], ["c"]], "task": ["ocr"] * 2},
        "data has 2 prompt(s) that are not text, the first in row 0: a list, ['a', 'b']. A row has one prompt: make one row for each.",
    ),
    "numbers": (
        {"prompt": [7, 8], "task": ["ocr"] * 2},
        "data has 2 prompt(s) that are not text, the first in row 0: a number, 7. If another column has the texts, rename it",
    ),
    "conversations": (
        {"prompt": [[{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]]},
        "data has 1 prompt(s) that are not text, the first in row 0: a conversation (system, user). A conversation can only be "
        "used if it is one user message with one text.",
    ),
    "tasks by number": (
        {"prompt": ["a", "b"], "task": [3, 4]},
        "data has 2 task(s) in 'task' that are not text, the first in row 0: 3. Convert them: dataset.cast_column('task',",
    ),
    "empty tasks": (
        {"prompt": ["a", "b", "c"], "task": ["ocr", None, ""]},
        "data has 2 row(s) without a task in 'task', the first is row 1.",
    ),
}


@pytest.mark.parametrize("label", PROBLEMS)
def test_dataset_problems(label):
    columns, message = PROBLEMS[label]
    (problem,) = dataset_problems(Dataset.from_dict(columns), "task", "data")
    assert problem.startswith(message)


def test_a_good_dataset_has_no_problems():
    assert dataset_problems(Dataset.from_dict({"prompt": ["a"], "task": ["ocr"], "x": [None]}), "task", "data") == []
    assert dataset_problems(Dataset.from_dict({"prompt": ["a"]}), "task", "data") == []


USER = {"role": "user", "content": "a cat"}
PLAIN = {
    "one message": ([[USER]], ["a cat"]),
    "parts": ([[{"role": "user", "content": [{"type": "text", "text": "a cat"}]}]], ["a cat"]),
    "two messages": ([[USER, USER]], None),
    "an answer": ([[{"role": "assistant", "content": "a cat"}]], None),
    "two parts": ([[{"role": "user", "content": [{"type": "text", "text": text} for text in "ab"]}]], None),
    "numbers": ([1], None),
    "text": (["a cat"], ["a cat"]),
}


@pytest.mark.parametrize("label", PLAIN)
def test_conversations_of_one_message_are_prompts(label):
    prompts, texts = PLAIN[label]
    dataset = Dataset.from_dict({"prompt": prompts, "x": [1]})
    plain = plain_dataset(dataset, "task")
    assert plain["prompt"][:] == (prompts if texts is None else texts) and plain.column_names == ["prompt", "x"]
    assert bool(dataset_problems(plain, "task", "data")) == (texts is None)


def test_texts_and_conversations_in_one_file(tmp_path):
    # Rows of several types are JSON to datasets, whose text is no prompt.
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in ("a dog", [USER])))
    mixed = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path))
    assert plain_dataset(mixed, "task")["prompt"][:] == ["a dog", "a cat"]
    path.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in ("a dog", [USER, USER])))
    mixed = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path))
    (problem,) = dataset_problems(plain_dataset(mixed, "task"), "task", "data")
    assert "1 prompt(s) that are not text, the first in row 1: a conversation (user, user)." in problem


def test_class_labels_are_names():
    features = Features({"prompt": Value("string"), "task": ClassLabel(names=["ocr", "count"])})
    dataset = Dataset.from_dict({"prompt": ["a", "b", "c"], "task": [1, 0, -1]}, features=features).select([1, 0, 2])
    plain = plain_dataset({"x": dataset}, "task")["x"]
    assert plain["task"][:] == ["ocr", "count", None] and plain["prompt"][:] == ["b", "a", "c"]
    assert dataset_problems(plain, "task", "data") == [
        "data has 1 row(s) without a task in 'task', the first is row 2."
    ]
    assert list(task_rows(plain.select([0, 1]), "task")) == ["count", "ocr"]


def shuffled(n):
    """Rows in an order of their own, as `shuffle` and `select` leave them, in several batches of reading."""
    rng = np.random.default_rng(0)
    tasks = rng.choice(["ocr", "count", "Ü", "a b"], n).tolist()
    dataset = Dataset.from_dict({"prompt": [f"p{i}" for i in range(n)], "task": tasks})
    return dataset.select(rng.permutation(n))


def test_task_rows_of_many_batches_are_those_of_the_whole_column():
    dataset = shuffled(2 * BATCH + 17)
    column = np.array(dataset["task"][:])
    rows = task_rows(dataset, "task")
    assert list(rows) == sorted(set(column.tolist()))
    for task, of_task in rows.items():
        assert of_task.tolist() == np.flatnonzero(column == task).tolist()


def test_problems_are_found_in_every_batch():
    n = 2 * BATCH + 17
    prompts, tasks = ["a"] * n, ["ocr"] * n
    for row in (BATCH, n - 1):
        prompts[row], tasks[row] = "\u3000\x1c ", None
    problems = dataset_problems(Dataset.from_dict({"prompt": prompts, "task": tasks}), "task", "data")
    assert problems == [
        f"data has 2 empty prompt(s), the first in row {BATCH}. Remove them.",
        f"data has 2 row(s) without a task in 'task', the first is row {BATCH}.",
    ]


# fmt: off
EPOCH_0 = [1, 3, 5, 7, 1, 3, 5, 7, 4, 0, 6, 6, 4, 0, 6, 6, 2, 4, 7, 5, 2, 4, 7, 5]
EPOCH_3 = [0, 2, 5, 7, 0, 2, 5, 7, 3, 4, 6, 6, 3, 4, 6, 6, 1, 4, 5, 7, 1, 4, 5, 7]
# fmt: on


def test_the_order_of_an_epoch():
    # Whatever it is made with: a resumed run depends on it.
    sampler = TaskSampler(make_rows((5, 3)), 2, 1, seed=7, repeats=1, passes=2)
    assert list(sampler) == EPOCH_0
    sampler.set_epoch(3)
    assert list(sampler) == EPOCH_3


def test_the_epoch_of_an_iterator_is_that_of_its_beginning():
    sampler = make_sampler()
    expected = list(sampler)
    iterator = iter(sampler)
    sampler.set_epoch(1)
    assert list(iterator) == expected


def test_a_million_prompts_take_no_list_of_them():
    rows = make_rows((1_000_000, 10, 1000))
    tracemalloc.start()
    try:
        iterator = iter(TaskSampler(rows, batch_size=8, micro_batches=1, seed=0))
        next(iterator)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # An order of 8 bytes a sample of each task, twice while it is made. As a list it would be another 36 bytes.
    assert peak < 2.2 * 3 * 8 * 1_000_000
