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

"""Prompt files as they are: which column is the prompt, and where an empty one is."""

from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from trl_diffusion_opd.data import prompt_files
from trl_diffusion_opd.data.prompt_files import load_source
from trl_diffusion_opd.problems import Refusal
from trl_diffusion_opd.scripts.prompt_sources import load_datasets, load_tasks, source_problems


@pytest.fixture(autouse=True)
def work_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


COLUMNS = {
    "prompt": ("prompt,size\na,1\n", None, None),
    "caption": ("file_name,caption\nx.png,a\n", None, "column 'caption' is taken as the prompt"),
    "text": ("text\na\n", None, "column 'text' is taken as the prompt"),
    "caption before text": (
        "text,caption\nx,a\n",
        None,
        "column 'caption' is taken as the prompt; it also has 'text'",
    ),
    "prompt before both": (
        "text,caption,prompt\nx,y,a\n",
        None,
        "column 'prompt' is taken as the prompt; it also has 'caption' and 'text'",
    ),
    "a name": ("prompt,title\nx,a\n", "title", None),
    "a name that another file has": (
        "caption\na\n",
        "title",
        "column 'caption' is taken as the prompt",
    ),
}


@pytest.mark.parametrize("label", COLUMNS)
def test_the_column_of_the_prompts(label):
    content, prompt_column, note = COLUMNS[label]
    Path("a.csv").write_text(content)
    source = load_source("prompts", "a.csv", prompt_column)
    assert source.dataset["prompt"][:] == ["a"]
    assert source.note == (None if note is None else f"a.csv: {note}")


def test_blank_lines_of_text_are_left_out():
    Path("a.txt").write_bytes("a cat\r\n\r\n  \r\n\u3000\na dog\r\n\n".encode())
    assert load_source("prompts", "a.txt").dataset["prompt"][:] == ["a cat", "a dog"]


REFUSED = {
    "no column": (
        {"a.csv": "file_name,title\na.png,a red cat\n"},
        "--prompts: a.csv has no column 'prompt' (it has file_name, title); rename it or give --prompt_column title.",
    ),
    "no text at all": (
        {"a.csv": "x,y\n1,2\n"},
        "--prompts: a.csv has no column 'prompt' (it has x, y); rename the one with the prompts, or "
        "name it with --prompt_column.",
    ),
    "names of files": (
        {"a.csv": "file_name,title\na.png,cat\n"},
        "--prompts: a.csv has no column 'prompt' (it has file_name, title); rename the one with the prompts, or name "
        "it with --prompt_column.",
    ),
    "blank lines": ({"a.txt": "\n \n"}, "--prompts: the file 'a.txt' has only blank lines."),
    "a line of a csv": (
        {"a.csv": 'prompt,x\n"a\ncat",1\n\n,2\n'},
        "--prompts: a.csv has 1 empty prompt(s), the first in line 5. Remove them.",
    ),
    "a line of a tsv": (
        {"a.tsv": "x\tcaption\n1\ta, b\n2\t \n"},
        "--prompts: a.tsv has 1 empty prompt(s), the first in line 3. Remove them.",
    ),
    "a line of a jsonl": (
        {"a.jsonl": '{"prompt": "a"}\n\n{"prompt": null}\n{"prompt": ""}\n'},
        "--prompts: a.jsonl has 2 empty prompt(s), the first in line 3. Remove them.",
    ),
    "a row of a list": (
        {"a.json": '[{"prompt": "a"},\n\n {"prompt": ""}]\n'},
        "--prompts: a.json has 1 empty prompt(s), the first in row 1. Remove them.",
    ),
    "numbers": (
        {"a.csv": "prompt,words\n1,a cat\n"},
        "--prompts: a.csv has 1 prompt(s) that are not text, the first in line 2: a number, 1. If another column has the "
        "texts, give --prompt_column.",
    ),
}


@pytest.mark.parametrize("label", REFUSED)
def test_what_is_refused(label):
    files, message = REFUSED[label]
    for name, content in files.items():
        Path(name).write_text(content)
    with pytest.raises(Refusal) as error:
        load_datasets({"prompts": [f"task={name}" for name in files]}, "task")
    assert str(error.value) == message
    assert source_problems("prompts", [f"task={name}" for name in files], None) == [message]


def test_one_message_for_all_files_and_options():
    Path("a.txt").write_text("\n")
    Path("b.csv").write_text("x\na b\n")
    Path("good.csv").write_text("caption\na\n")
    given = {
        "prompts": ["one=a.txt", "two=b.csv", "three=c.tsv"],
        "eval_prompts": ["one=missing.txt"],
        "test_prompts": None,
    }
    with pytest.raises(Refusal) as error:
        load_datasets(given, "task")
    starts = (
        "--prompts: the file 'a.txt'",
        "--prompts: b.csv has no",
        "--prompts: there",
        "--eval_prompts: there",
    )
    lines = str(error.value).splitlines()
    assert sorted(line.partition(" ")[0] for line in lines) == sorted(start.partition(" ")[0] for start in starts)
    assert all(any(line.startswith(start) for line in lines) for start in starts)
    with pytest.raises(Refusal, match="--prompt_column: no source has a column 'tilte'; they have caption."):
        load_tasks("dataset", ["one=good.csv"], "task", "tilte")
    with pytest.raises(Refusal, match="--prompt_column: no source has a column 'x'; text files have none."):
        Path("a.txt").write_text("a\n")
        load_datasets({"prompts": ["one=a.txt"]}, "task", "x")


def test_notes_are_printed_once_and_by_one_process(capsys, monkeypatch):
    Path("a.csv").write_text("caption\na\n")
    given = {"prompts": ["one=a.csv"], "eval_prompts": ["one=a.csv"]}
    load_datasets(given, "task")
    assert capsys.readouterr().out == "a.csv: column 'caption' is taken as the prompt\n"
    monkeypatch.setenv("RANK", "1")
    load_datasets(given, "task")
    assert capsys.readouterr().out == ""


def test_a_source_with_its_own_tasks():
    Path("a.csv").write_text("caption,skill\na,one\nb,two\n")
    dataset = load_tasks("dataset", ["a.csv"], "skill")
    assert dataset.to_dict() == {"prompt": ["a", "b"], "skill": ["one", "two"]}


def test_columns_of_the_hub(monkeypatch):
    monkeypatch.setattr(
        prompt_files, "load_dataset", lambda name, split: Dataset.from_dict({"title": ["a cat here", ""]})
    )
    with pytest.raises(Refusal, match=r"--prompts: me/set has no column 'prompt' \(it has title\); rename "):
        load_datasets({"prompts": ["one=me/set"]}, "task")
    with pytest.raises(Refusal, match=r"--prompts: me/set has 1 empty prompt\(s\), the first in row 1"):
        load_datasets({"prompts": ["one=me/set"]}, "task", "title")


def test_a_dataset_that_the_hub_lacks(monkeypatch):
    def refuse(name, split):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")

    monkeypatch.setattr(prompt_files, "load_dataset", refuse)
    with pytest.raises(
        Refusal, match="--prompts: 'anime' is no file here, and no dataset of the Hub can be loaded by"
    ):
        load_datasets({"prompts": ["one=anime"]}, "task")
