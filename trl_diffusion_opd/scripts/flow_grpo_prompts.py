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
The prompts of the paper's setting: where [Flow-GRPO](https://huggingface.co/papers/2505.05470)'s repository has them,
and how its lines become rows with the columns that this package's rewards read.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import httpx2

from ..guards.files import JSON
from ..guards.redaction import shown
from ..problems import Refusal
from ..rewards.bounded_client import BoundedClient, RefusedAnswerError
from ..rewards.geneval_rules import MetadataError, parse_metadata
from ..rewards.quoted_text import why_no_target
from ..rewards.server_calls import status_shown, url_problems


REPOSITORY = "https://github.com/yifan123/flow_grpo"
COMMIT = "879042cf5707f8b90daa98d147d7deac2317c5da"
RAW_FILES = f"https://raw.githubusercontent.com/yifan123/flow_grpo/{COMMIT}"
SPLITS = ("train", "test")
# For a file, in bytes and seconds. The largest one, GenEval's training prompts, has some megabytes.
_MOST_BYTES, _MOST_SECONDS = 64 * 2**20, 300.0
_GENEVAL_COLUMNS = ("tag", "include", "exclude")
_PAGE = re.compile(r"\s*<(!doctype|html)", re.IGNORECASE)

Row = dict[str, JSON]


class LineError(ValueError):
    """A line is none of its file's form. The message says why."""


class PromptSet(NamedTuple):
    """
    A set of prompts in the repository.

    Args:
        task (`str`): what the column `task` says.
        path (`str`): path in the repository; `{split}` stands for `train` or `test`.
        read (`Callable`): makes a row of a line, without the task. Raises [`LineError`].
        why_not (`Callable`): says why the reward of the task cannot score a row; `None` if it can.
    """

    task: str
    path: str
    read: Callable[[str], Row]
    why_not: Callable[[Row], str | None]


@dataclass(frozen=True)
class Prompts:
    """
    The prompts of a file.

    Attributes:
        rows (`list[dict]`): `prompt`, `task` and the columns of the task's reward.
        left_out (`list[str]`): for each line whose prompt the reward cannot score, why, with the line.
    """

    rows: list[Row]
    left_out: list[str]


def _text_row(line: str) -> Row:
    return {"prompt": line.strip()}


def _geneval_row(line: str) -> Row:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise LineError(f"it is not JSON ({error})") from error
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise LineError("it is no JSON object with a text 'prompt'")
    return {"prompt": prompt, **{name: row[name] for name in _GENEVAL_COLUMNS if name in row}}


def _geneval_problem(row: Row) -> str | None:
    try:
        parse_metadata(row)
    except MetadataError as error:
        return str(error)
    return None


SETS = {
    "geneval": PromptSet("geneval", "dataset/geneval/{split}_metadata.jsonl", _geneval_row, _geneval_problem),
    "ocr": PromptSet("ocr", "dataset/ocr/{split}.txt", _text_row, lambda row: why_no_target(row["prompt"])),
    "pickscore": PromptSet("pickscore", "dataset/pickscore/{split}.txt", _text_row, lambda row: None),
    "pickscore_sfw": PromptSet("pickscore", "dataset/pickscore_sfw/{split}.txt", _text_row, lambda row: None),
}


def load_prompts(source: str, wanted: Iterable[tuple[str, str]]) -> list[Prompts]:
    """
    Reads files of sets.

    Args:
        source (`str`): address of the repository's files, or a local folder with the repository.
        wanted: for each file one of [`SETS`] and one of [`SPLITS`].

    Raises:
        [`Refusal`]: if a file can't be had, is too large, or is none of its form. The message says where and what to
            do.
    """
    found = []
    with BoundedClient(_MOST_SECONDS, _MOST_BYTES) as client:
        for name, split in wanted:
            path = SETS[name].path.format(split=split)
            if Path(source).is_dir():
                where = str(Path(source, path))
                content = _local(where)
            else:
                where = f"{source.rstrip('/')}/{path}"
                content = _fetched(client, where)
            found.append(_parsed(SETS[name], where, content))
    return found


def source_problems(source: str) -> list[str]:
    """Says what is wrong with a `--source`, without asking for anything."""
    if Path(source).is_dir():
        return []
    if "://" not in source:
        return [
            f"--source {source!r} is no folder here, and no address of the form http://host:port/path. Name a folder "
            f"with {REPOSITORY}, or a mirror of its files."
        ]
    return url_problems("--source", source)


def _local(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise Refusal(
            f"{path} cannot be read: {error.strerror}. --source must name the top folder of a copy of {REPOSITORY}."
        ) from error
    if len(content) > _MOST_BYTES:
        raise Refusal(f"{path} has more than {_MOST_BYTES:,} bytes, so it is no file of these prompts.")
    return content


def _fetched(client: BoundedClient, url: str) -> bytes:
    elsewhere = f"Or get {REPOSITORY} another way, and name its folder with --source."
    try:
        response = client.get(url)
    except httpx2.TransportError as error:
        raise Refusal(
            f"{url} cannot be fetched: {error}. Check the connection, and behind a firewall the proxy (HTTPS_PROXY). "
            f"{elsewhere}"
        ) from error
    except RefusedAnswerError as error:
        raise Refusal(f"{url} gave {error}, so it is no file of these prompts. {elsewhere}") from error
    if response.status_code != 200:
        raise Refusal(f"{url} {status_shown(response)}. Check the address and the proxy. {elsewhere}")
    return response.content


def _parsed(chosen: PromptSet, where: str, content: bytes) -> Prompts:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = content.count(b"\n", 0, error.start) + 1
        raise Refusal(f"{where}, line {place}: it is not in UTF-8, so it is no file of these prompts.") from error
    if _PAGE.match(text):
        raise Refusal(
            f"{where} is a web page and not the file: '{shown(text, 80)}'. A proxy or a page for signing in may stand "
            f"before it; {RAW_FILES} has the files without pages."
        )
    prompts = Prompts([], [])
    # Not `splitlines`, which also ends a line where a prompt has a separator of its own.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = chosen.read(line)
        except LineError as error:
            raise Refusal(f"{where}, line {number}: {error}: '{shown(line, 80)}'. Nothing was written.") from error
        if (reason := chosen.why_not(row)) is not None:
            prompts.left_out.append(f"line {number}: {reason}")
        else:
            prompts.rows.append({"prompt": row["prompt"], "task": chosen.task, **row})
    if not prompts.rows:
        reason = f": {prompts.left_out[0]}" if prompts.left_out else ""
        raise Refusal(f"{where} has no prompt that can be used{reason}. Nothing was written.")
    return prompts
