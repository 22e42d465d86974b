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

"""Text embeddings on disk: Arrow files in a folder, read through a memory map, shared by runs and processes."""

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

Encoded = Any  # what an `encode_prompt` returns: tensors, and lists and tuples of them, as the family has it
_Row = dict[str, Any]  # columns of a row: its texts and hashes, and the tensor that was asked for

# A row is one call of `encode_prompt`. Tensors go by the hash of their content: with guidance the empty prompt's
# embedding comes with every prompt, and is written once.
_SCHEMA = pa.schema(
    {
        "key": pa.string(),  # JSON of the call's texts and options
        "value": pa.string(),  # JSON of what it returned, tensors by their hashes
        "checksum": pa.string(),  # of these two
        "hashes": pa.list_(pa.string()),  # of the tensors that this row brings
        "tensors": pa.list_(pa.large_binary()),  # their bytes: Arrow has no bfloat16
    }
)
_UNSEEN = 64 * 2**20  # bytes that a process writes at most before it looks at everybody's files again
# What pyarrow raises for a file that is cut off, of another kind or gone.
_UNREADABLE = (OSError, EOFError, ValueError, pa.ArrowException)


class PromptStore:
    """
    What `encode_prompt` returned, kept across runs in a folder of Arrow files.

    A process writes a file of its own (the stream format of `datasets`, which [`~datasets.Dataset.from_file`] opens) and
    reads everybody's, also rows that another process has just written. A row is read through a memory map that is closed
    again, so that memory does not grow with the store. Hashes of all that is read are checked: a damaged file is renamed
    to `.damaged` with a warning, and its prompts are encoded anew. Of a file that was cut off the whole rows are used.

    Args:
        folder (`str` or `Path`): made where it does not exist.
        fingerprint (`str`): of all that the embeddings depend on besides the call: see [`~fingerprints.encoder_fingerprint`]. Embeddings
            of another fingerprint are not seen.
        max_bytes (`int`): bound of all files in `folder`, whatever their fingerprint. Beyond it nothing more is written.

    Raises:
        [`ValueError`]: if the folder can't be written to.
    """

    def __init__(self, folder: str | Path, fingerprint: str, max_bytes: int):
        self.root = Path(folder).expanduser()
        self.folder = self.root / fingerprint
        self.max_bytes = max_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"prompt_cache_dir={str(folder)!r} is no folder that can be made: {error}") from error
        if not os.access(self.folder, os.W_OK):
            raise ValueError(f"prompt_cache_dir={str(folder)!r} is not writable. Name another folder.")
        self._own = self.folder / f"{uuid.uuid4().hex}.arrow"
        self._file: BinaryIO | None = None
        self._stopped = False
        self._free = 0  # bytes that may be written without another look at the files
        self._rows: dict[bytes, tuple[Path, int]] = {}  # where a row begins, by its key's hash
        self._tensors: dict[str, tuple[Path, int]] = {}  # the row that brings a tensor
        self._ends: dict[Path, int] = {}  # how far a file is known
        self._refresh()
        for path, end in self._ends.items():
            if end < path.stat().st_size:
                logger.warning(
                    f"Prompt cache: {path.name} ends in the middle of a row: the run that wrote it was stopped, or is "
                    "writing it. Its whole rows are used; other prompts are encoded anew."
                )

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, key: tuple) -> Encoded:
        """What was written for `key`, tensors on the CPU, bit for bit; `None` if nothing was, or if it is damaged."""
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
        except KeyError:  # it has a tensor of a file that is gone
            self._rows.pop(name, None)
        return None

    def write(self, key: tuple, value: Encoded) -> bool:
        """
        Keeps `value`: a tensor, string or `None`, or tuples and lists of them.

        Returns:
            `bool`: whether it was written. Not where the store is full, the disk is, or `value` has other parts.
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
            if self._file is None:  # others see it with its header or not at all
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
        """Whether `size` bytes may be written. It looks at the files where what it saw of them last leaves it in doubt."""
        if size > self._free:
            room = self.max_bytes - _size(self.root)
            if size > room:
                return False
            # The rest of it as long as others, who may be many, write as much.
            self._free = max(size, min(room // 64, _UNSEEN))
        self._free -= size
        return True

    def _stop(self, why: str) -> None:
        # What was half written is the end of this file, and nothing may follow it.
        self._stopped = True
        logger.warning(f"Prompt cache: {self.root.name} {why}. Further prompts are encoded in every run.")

    def _refresh(self) -> None:
        """Takes up rows that were written since the last time, by any process."""
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
                f"Prompt cache: {path.name} is damaged ({error}) and was renamed to .damaged. Its prompts are encoded anew."
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
    """Begin, end and content (no tensors; none for the header) of the whole rows of a file from `start` on."""
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
                return  # its end, or a row that is being written or was cut off
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
    """Columns of a row, and the bytes of one of its tensors, copied out of the map."""
    batch = pa.ipc.read_record_batch(message, _SCHEMA)
    batch.validate(full=True)  # Arrow follows offsets wherever they point
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
    """The value as JSON, with its tensors put into `tensors` by their hashes."""
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
