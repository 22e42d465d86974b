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
import os
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError


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


def load_source(option: str, source: str) -> Dataset:
    """
    Loads the prompts of a file, or of a dataset on the Hub (`owner/name[:split]`). A column `text` becomes `prompt` if
    there is none. Messages name the command line option `option`.

    Raises:
        [`ValueError`]: if a file is missing, of an unknown kind, empty, not in UTF-8, or broken. The message says
        where.
    """
    problem = source_problem(option, source)
    if problem is not None:
        raise ValueError(problem)
    suffix = _suffix(source)
    if suffix in _FORMATS:
        part = _load_file(option, source, *_FORMATS[suffix])
    else:
        name, _, split = source.partition(":")
        part = load_dataset(name, split=split or "train")
    if "prompt" not in part.column_names and "text" in part.column_names:
        part = part.rename_column("text", "prompt")
    # CSV and parquet files may hold large strings, which are a different type to `datasets`.
    text = {name: Value("string") for name, kind in part.features.items() if kind == Value("large_string")}
    return part.cast(Features({**part.features, **text}))


def _suffix(source: str) -> str:
    return Path(source).suffix.lower()


def _load_file(option: str, path: str, file_format: str, options: Mapping[str, str]) -> Dataset:
    if os.path.getsize(path) == 0:
        raise ValueError(f"--{option}: the file {path!r} is empty.")
    if file_format != "parquet":
        _check_utf8(option, path)
    # `datasets` infers types from the first chunk, so one chunk must be the whole file: in GenEval's metadata some
    # rows have lists of a text and a number, or fields that most rows lack.
    whole = {"chunksize": os.path.getsize(path)} if file_format == "json" else {}
    try:
        return load_dataset(file_format, data_files=path, split="train", **options, **whole)
    except (DatasetGenerationError, pa.ArrowInvalid, StopIteration) as error:
        cause = error.__cause__ or error
        raise ValueError(f"--{option}: the file {path!r} cannot be read as {file_format}: {cause}") from error


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
                raise ValueError(
                    f"--{option}: the file {path!r} is not in UTF-8: byte {start - pending + error.start}, in line "
                    f"{lines + place.count(10)}, is 0x{error.object[error.start]:02x}. Save it as UTF-8; if it is in "
                    f"{kind}: iconv -f {kind} -t UTF-8."
                ) from error
            if not block:
                return
            start += len(block)
            lines += block.count(b"\n")
