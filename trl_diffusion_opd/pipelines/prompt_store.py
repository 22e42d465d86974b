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

"""Keeps text embeddings on disk, in Arrow files that runs and processes share and read through a memory map."""

import json
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch import Tensor

from ..guards.files import JSON
from .fingerprints import bytes_of


logger = logging.getLogger(__name__)

Encoded = Any  # the return value of a pipeline's `encode_prompt`: tensors in nested lists and tuples
_Row = dict[str, Any]  # the columns of a row: texts, hashes, and the requested tensor

# A row is one call of `encode_prompt`. Tensors are named by the hash of their content, so that the empty prompt's
# embedding, which comes with every prompt under guidance, is written once.
_SCHEMA = pa.schema(
    {
        "key": pa.string(),  # JSON of the call's texts and options
        "value": pa.string(),  # JSON of what it returned, tensors by their hashes
        "checksum": pa.string(),  # of these two
        "hashes": pa.list_(pa.string()),  # of the tensors in this row
        "tensors": pa.list_(pa.large_binary()),  # their bytes: Arrow has no bfloat16
    }
)
_UNSEEN = 64 * 2**20  # maximum bytes that a process writes before it measures all files again
# Errors of pyarrow for a file that is truncated, of another kind or gone.
_UNREADABLE = (OSError, EOFError, ValueError, pa.ArrowException)


class PromptStore:
    """
    Keeps the return values of `encode_prompt` across runs, in a folder of Arrow files.

    Each process writes one file (in the stream format of `datasets`, which [`~datasets.Dataset.from_file`] opens) and
    reads the files of all processes, also rows that were just written. Each read opens and closes a memory map, so
    memory does not grow with the store. Everything that is read is checked by its hash. A damaged file is renamed to
    `.damaged` with a warning, and its prompts are encoded again. In a truncated file the complete rows are used.

    Args:
        folder (`str` or `Path`): the folder. It is created if needed.
        fingerprint (`str`): hash of everything that embeddings depend on besides the call, from
            [`~fingerprints.encoder_fingerprint`]. Embeddings with another fingerprint are ignored.
        max_bytes (`int`): maximum size of all files in `folder`, of any fingerprint. When it is reached, nothing more
            is written.

    Raises:
        [`ValueError`]: if the folder can't be created or written to.
    """

    def __init__(self, folder: str | Path, fingerprint: str, max_bytes: int):
        self.root = Path(folder).expanduser()
        self.folder = self.root / fingerprint
        self.max_bytes = max_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"prompt_cache_dir={str(folder)!r} can't be created: {error}") from error
        if not os.access(self.folder, os.W_OK):
            raise ValueError(f"prompt_cache_dir={str(folder)!r} is not writable. Name another folder.")
        self._own = self.folder / f"{uuid.uuid4().hex}.arrow"
        self._file: BinaryIO | None = None
        self._stopped = False
        self._free = 0  # bytes that may be written before the files are measured again
        self._rows: dict[bytes, tuple[Path, int]] = {}  # hash of a row's key -> where the row begins
        self._tensors: dict[str, tuple[Path, int]] = {}  # hash of a tensor -> where its row begins
        self._ends: dict[Path, int] = {}  # how far each file has been read
        self._refresh()
        for path, end in self._ends.items():
            if end < path.stat().st_size:
                logger.warning(
                    f"Prompt cache: {path.name} ends in the middle of a row: the run that wrote it was stopped, or is "
                    "still writing. Its complete rows are used; other prompts are encoded again."
                )

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, key: tuple) -> Encoded:
        """The value that was written for `key`, bit for bit, with tensors on the CPU; `None` if missing or damaged."""
        text = json.dumps(key)
        name = _hash(text.encode())
        if name not in self._rows:
            self._refresh()  # another process may have encoded it meanwhile
        if name not in self._rows:
            return None
        path, offset = self._rows[name]
        try:
            row = _read_row(path, offset)
            if row["key"] != text or row["checksum"] != _checksum(row["key"], row["value"]):
                raise pa.ArrowInvalid("the checksum of a row is wrong")
            return self._restore(json.loads(row["value"]))
        except _UNREADABLE as error:
            self._set_aside(path, error)
        except KeyError:  # one of its tensors was in a file that is gone
            self._rows.pop(name, None)
        return None

    def write(self, key: tuple, value: Encoded) -> bool:
        """
        Writes `value` for `key`: a tensor, a string or `None`, or nested tuples and lists of these.

        Returns:
            `bool`: whether it was written. `False` if the store or the disk is full, or if `value` has other parts.
        """
        if self._stopped or not _is_storable(value):
            return False
        tensors: dict[str, bytes] = {}
        text, content = json.dumps(key), json.dumps(_describe(value, tensors))
        new = {name: data for name, data in tensors.items() if name not in self._tensors}
        row = {
            "key": text,
            "value": content,
            "checksum": _checksum(text, content),
            "hashes": list(new),
            "tensors": list(new.values()),
        }
        message = pa.RecordBatch.from_pylist([row], schema=_SCHEMA).serialize()
        if not self._has_room(message.size):
            self._stop(f"is full ({self.max_bytes} bytes, prompt_cache_max_size)")
            return False
        try:
            if self._file is None:  # renamed into place, so that others never see a file without a header
                header = self._own.with_suffix(".new")
                header.write_bytes(_SCHEMA.serialize())
                header.replace(self._own)
                self._file = self._own.open("ab")
            offset = self._file.seek(0, os.SEEK_END)
            self._file.write(message)
            self._file.flush()
        except OSError as error:
            self._stop(f"can't be written to ({error})")
            return False
        self._rows[_hash(text.encode())] = self._own, offset
        self._tensors |= dict.fromkeys(new, (self._own, offset))
        return True

    def _has_room(self, size: int) -> bool:
        """Whether `size` bytes may be written. Measures the files only if the last measurement leaves that open."""
        if size > self._free:
            room = self.max_bytes - _size(self.root)
            if size > room:
                return False
            # A part of the room, since many other processes may write as much before the next measurement.
            self._free = max(size, min(room // 64, _UNSEEN))
        self._free -= size
        return True

    def _stop(self, why: str) -> None:
        # A half-written row must stay the end of this file.
        self._stopped = True
        logger.warning(f"Prompt cache: {self.root.name} {why}. Further prompts are encoded in every run.")

    def _refresh(self) -> None:
        """Reads the rows that any process has written since the last call."""
        for path in sorted(self.folder.glob("*.arrow")):
            if path == self._own:
                continue
            try:
                for start, end, row in _read_rows(path, self._ends.setdefault(path, 0)):
                    if row is not None:
                        self._rows[_hash(row["key"].encode())] = path, start
                        self._tensors |= dict.fromkeys(row["hashes"], (path, start))
                    self._ends[path] = end
            except _UNREADABLE as error:
                self._set_aside(path, error)

    def _set_aside(self, path: Path, error: BaseException) -> None:
        self._rows = {name: place for name, place in self._rows.items() if place[0] != path}
        self._tensors = {name: place for name, place in self._tensors.items() if place[0] != path}
        self._ends.pop(path, None)
        if path == self._own:
            self._own, self._file = self.folder / f"{uuid.uuid4().hex}.arrow", None
        if path.exists():
            path.replace(path.with_suffix(".damaged"))
            logger.warning(
                f"Prompt cache: {path.name} is damaged ({error}) and was renamed to .damaged. Its prompts are encoded "
                "again."
            )

    def _restore(self, content: JSON) -> Encoded:
        if isinstance(content, dict) and "tensor" in content:
            return self._read_tensor(content["tensor"], content["dtype"], content["shape"])
        if isinstance(content, dict):
            ((kind, items),) = content.items()
            return {"tuple": tuple, "list": list}[kind](self._restore(item) for item in items)
        return content

    def _read_tensor(self, name: str, dtype: str, shape: list[int]) -> Tensor:
        path, offset = self._tensors[name]
        try:
            row = _read_row(path, offset, name)
            if _tensor_hash(row["tensor"], dtype, shape) != name:
                raise pa.ArrowInvalid("the hash of a tensor is wrong")
        except _UNREADABLE as error:
            self._set_aside(path, error)
            raise KeyError(name) from error
        return row["tensor"].view(getattr(torch, dtype)).reshape(shape)


# Rows


def _read_rows(path: Path, start: int) -> Iterator[tuple[int, int, _Row | None]]:
    """
    Yields begin, end and content (without tensors; `None` for the header) of a file's complete rows, from `start` on.
    """
    if path.stat().st_size <= start:
        return
    with pa.memory_map(str(path)) as source:
        source.seek(start)
        while True:
            try:
                message = pa.ipc.read_message(source)
            except (OSError, EOFError, pa.ArrowInvalid):
                if start == 0:
                    raise
                return  # the end of the file, or a row that is unfinished or truncated
            row = None
            if start == 0:
                if not pa.ipc.read_schema(message).equals(_SCHEMA):
                    raise pa.ArrowInvalid("it has other columns")
            else:
                row = _content(message)
            yield start, source.tell(), row
            start = source.tell()


def _read_row(path: Path, offset: int, tensor: str | None = None) -> _Row:
    with pa.memory_map(str(path)) as source:
        source.seek(offset)
        return _content(pa.ipc.read_message(source), tensor)


def _content(message: pa.ipc.Message, tensor: str | None = None) -> _Row:
    """The columns of a row, and the bytes of one of its tensors, copied out of the memory map."""
    batch = pa.ipc.read_record_batch(message, _SCHEMA)
    batch.validate(full=True)  # otherwise damaged offsets could point anywhere
    if len(batch) != 1:
        raise pa.ArrowInvalid(f"a row consists of {len(batch)}")
    row: _Row = {name: batch[name][0].as_py() for name in ("key", "value", "checksum", "hashes")}
    if None in row.values() or len(row["hashes"]) != len(batch["tensors"][0]):
        raise pa.ArrowInvalid("a row is incomplete")
    if tensor is not None:
        buffer = batch["tensors"][0][row["hashes"].index(tensor)].as_buffer()
        row["tensor"] = torch.empty(buffer.size, dtype=torch.uint8)
        row["tensor"].numpy()[:] = np.frombuffer(buffer, dtype=np.uint8)
    return row


# Values


def _is_storable(value: Encoded) -> bool:
    if type(value) in (tuple, list):
        return all(_is_storable(item) for item in value)
    return value is None or type(value) in (Tensor, str)


def _describe(value: Encoded, tensors: dict[str, bytes]) -> JSON:
    """The value as JSON. Its tensors are replaced by their hashes and put into `tensors`."""
    if isinstance(value, Tensor):
        data = bytes_of(value)
        dtype, shape = str(value.dtype).removeprefix("torch."), list(value.shape)
        name = _tensor_hash(data, dtype, shape)
        tensors[name] = data.numpy().tobytes()
        return {"tensor": name, "dtype": dtype, "shape": shape}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [_describe(item, tensors) for item in value]}
    return value


def _tensor_hash(data: Tensor, dtype: str, shape: list[int]) -> str:
    digest = xxhash.xxh3_128(f"{dtype} {shape}".encode())
    digest.update(data.numpy().data)
    return digest.hexdigest()


def _hash(data: bytes) -> bytes:
    return xxhash.xxh3_128_digest(data)


def _checksum(key: str, value: str) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps([key, value]).encode())


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another process has renamed it
            total += path.stat().st_size if path.is_file() else 0
    return total
