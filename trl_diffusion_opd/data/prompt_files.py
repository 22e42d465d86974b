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

"""Loads prompts from files and from datasets on the Hub. Its errors name the file and the place in it."""

import codecs
import csv
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from datasets import Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub.errors import HfHubHTTPError

from ..guards.redaction import shown
from ..problems import Refusal
from .source_images import SOURCE_IMAGES, beside
from .tasks import PROMPT_COLUMNS, plain_prompts, prompt_problems


# Suffix of a file -> the loader of `datasets` and its arguments. utf-8-sig drops a byte order mark before the first
# prompt.
_FORMATS: dict[str, tuple[str, dict[str, str]]] = {
    ".txt": ("text", {"encoding": "utf-8-sig"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
}
_BLOCK = 1 << 20


class Source(NamedTuple):
    """
    The prompts of a source.

    Args:
        dataset ([`~datasets.Dataset`]): with the column `prompt`.
        columns (`tuple[str, ...]`): the columns that the source has; none for a text file.
        note (`str`, *optional*): says which column is taken as the prompt, where a user may not expect it.
    """

    dataset: Dataset
    columns: tuple[str, ...]
    note: str | None = None


def source_problem(option: str, source: str) -> str | None:
    """Says what is wrong with a source of prompts, without reading it; `None` if nothing is found."""
    is_known, is_there = _suffix(source) in _FORMATS, os.path.exists(source)
    if is_known and not is_there:
        return f"--{option}: there is no file {source!r}."
    if is_there and os.path.isdir(source):
        return f"--{option}: {source!r} is a folder. Name a file in it: one of {', '.join(_FORMATS)}."
    if is_there and not is_known:
        return f"--{option}: {source!r} has none of the endings {', '.join(_FORMATS)}."
    return None


def load_source(
    option: str, source: str, prompt_column: str | None = None, pictures_column: str = SOURCE_IMAGES
) -> Source:
    """
    Loads the prompts of a file, or of a dataset on the Hub (`owner/name[:split]`). Messages name the command line
    option `option`.

    The prompts are the column `prompt_column` if the source has it, else the first of [`PROMPT_COLUMNS`] that it has.
    It is then called `prompt`. Blank lines of a text file are left out. Names of files in the column `pictures_column` are
    relative to the file with the prompts.

    Raises:
        [`Refusal`]: if a file is missing, of an unknown kind, empty, not in UTF-8, or broken, or if a prompt is missing
            or is no text. The message says where.
    """
    problem = source_problem(option, source)
    if problem is not None:
        raise Refusal(problem)
    suffix = _suffix(source)
    if suffix not in _FORMATS:
        return _with_prompts(option, source, _of_hub(option, source), prompt_column)
    with _no_progress():
        part = _load_file(option, source, *_FORMATS[suffix])
        # CSV and parquet files may hold large strings, which are a different type to `datasets`.
        text = {name: Value("string") for name, kind in part.features.items() if kind == Value("large_string")}
        part = part.cast(Features({**part.features, **text}))
        part = beside(part, Path(source).parent, pictures_column)
    if suffix == ".txt":
        return Source(_without_blanks(option, source, part), ())
    return _with_prompts(option, source, part, prompt_column)


def _with_prompts(option: str, source: str, part: Dataset, prompt_column: str | None) -> Source:
    """Calls the column with the prompts `prompt`, and checks them."""
    columns = tuple(part.column_names)
    named = dict.fromkeys(name for name in (prompt_column, *PROMPT_COLUMNS) if name in columns)
    if not named:
        likely = _likely_column(part)
        advice = (
            "; rename the one with the prompts, or name it with --prompt_column"
            if likely is None
            else f"; rename it or give --prompt_column {likely}"
        )
        raise Refusal(f"--{option}: {source} has no column 'prompt' (it has {', '.join(columns)}){advice}.")
    taken, *others = named
    note = None
    if taken != prompt_column and (others or taken != "prompt"):
        also = f"; it also has {' and '.join(map(repr, others))}" if others else ""
        note = f"{source}: column {taken!r} is taken as the prompt{also}"
    if taken != "prompt":
        if "prompt" in columns:
            part = part.remove_columns("prompt")
        part = part.rename_column(taken, "prompt")
    part = plain_prompts(part)
    problems = prompt_problems(part, source, lambda row: _place(source, row), "give --prompt_column")
    if problems:
        raise Refusal("\n".join(f"--{option}: {problem}" for problem in problems))
    return Source(part, columns, note)


def _likely_column(part: Dataset) -> str | None:
    """
    The column that most likely holds the prompts: that of text with the most words. `None` if no column has two words
    a row, since single words may as well be names of files.
    """
    head = part.select(range(min(len(part), 100)))
    words = {
        name: sum(len(text.split()) for text in head[name] if text)
        for name, kind in part.features.items()
        if kind == Value("string")
    }
    likely = max(words, key=lambda name: words[name], default=None)
    return likely if likely is not None and words[likely] >= 2 * len(head) else None


def _without_blanks(option: str, path: str, lines: Dataset) -> Dataset:
    texts = [line for line in lines["text"] if line and line.strip()]
    if not texts:
        raise Refusal(f"--{option}: the file {path!r} has only blank lines.")
    return Dataset.from_dict({"prompt": texts})


def _place(source: str, row: int) -> str:
    """Where a row is in its file: its line, where rows have lines."""
    suffix = _suffix(source)
    if suffix in (".csv", ".tsv"):
        with open(source, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if suffix == ".tsv" else ",")
            full = (reader.line_num for cells in reader if cells)
            return f"line {next(islice(full, row + 1, None))}"  # the first names the columns
    if suffix in (".json", ".jsonl"):
        with open(source, encoding="utf-8-sig") as file:
            lines = [number for number, line in enumerate(file, start=1) if line.strip()]
            file.seek(0)
            if not file.read(1_000).lstrip("\ufeff \n\r\t").startswith("["):
                return f"line {lines[row]}"
    return f"row {row}"


def _of_hub(option: str, source: str) -> Dataset:
    name, _, split = source.partition(":")
    try:
        return load_dataset(name, split=split or "train")
    except (DatasetNotFoundError, HfHubHTTPError, ConnectionError, ValueError) as error:
        raise Refusal(
            f"--{option}: {source!r} is no file here, and no dataset of the Hub can be loaded by that name: "
            f"{shown(error, 500)}"
        ) from error


@contextmanager
def _no_progress() -> Iterator[None]:
    """Context without the progress bars of `datasets`: a local file is read at once."""
    hidden = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            enable_progress_bars()


def _suffix(source: str) -> str:
    return Path(source).suffix.lower()


def _load_file(option: str, path: str, file_format: str, options: Mapping[str, str]) -> Dataset:
    if os.path.getsize(path) == 0:
        raise Refusal(f"--{option}: the file {path!r} is empty.")
    if file_format != "parquet":
        _check_utf8(option, path)
    # `datasets` infers types from the first chunk, so one chunk must be the whole file: in GenEval's metadata some
    # rows have lists of a text and a number, or fields that most rows lack.
    whole = {"chunksize": os.path.getsize(path)} if file_format == "json" else {}
    try:
        return load_dataset(file_format, data_files=path, split="train", **options, **whole)
    except (DatasetGenerationError, pa.ArrowInvalid, StopIteration) as error:
        cause = (file_format == "json" and _broken_line(path)) or error.__cause__ or error
        raise Refusal(f"--{option}: the file {path!r} cannot be read as {file_format}: {cause}") from error


def _broken_line(path: str) -> str | None:
    """What is wrong with the first line of a jsonl file that is not JSON; `None` if each line is, or with one value."""
    with open(path, encoding="utf-8-sig") as file:
        if file.read(1_000).lstrip().startswith("["):
            return None
        file.seek(0)
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    json.loads(line)
            except json.JSONDecodeError as error:
                return f"line {number}, column {error.colno}: {error.msg}."
    return None


def _check_utf8(option: str, path: str) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = 1
    with open(path, "rb") as file:
        start = 0
        while True:
            block = file.read(_BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                place = error.object[: error.start]
                kind = (
                    "UTF-16"
                    if start == 0 and block[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
                    else "ISO-8859-1"
                )
                raise Refusal(
                    f"--{option}: the file {path!r} is not in UTF-8: byte {start - pending + error.start}, in line "
                    f"{lines + place.count(10)}, is 0x{error.object[error.start]:02x}. Save it as UTF-8; if it is in "
                    f"{kind}: iconv -f {kind} -t UTF-8."
                ) from error
            if not block:
                return
            start += len(block)
            lines += block.count(b"\n")
