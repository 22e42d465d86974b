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

"""A cache for a pipeline's own `encode_prompt`, so that each prompt is encoded once."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .nested import nbytes, on_device
from .prompt_store import Encoded, PromptStore


# Two prompts of different length, for trials: they show whether the embeddings of a batch are those of its prompts put
# together.
_PROBES = ("a", "a b c")
# Keys of the trials' results in a store.
_LAYOUT, _AXES, _PARTS, _SHORT = "layout", "axes", "parts", "short"
# The pipelines' argument that asks for the negative prompts' embeddings as well.
_GUIDED, _BATCH = "do_classifier_free_guidance", "batch_size"
# Enough for all calls of student and teachers, with and without guidance, on one micro-batch.
_RECENT_BATCHES = 8

_Layout = str | tuple["_Layout", ...] | None  # how a batch's embeddings are made up of its prompts'


class PromptCache:
    """
    Remembers the return values of `encode_prompt`, one entry a prompt. Beyond `max_bytes` it drops the entry that was
    used longest ago.

    Prompts are encoded one at a time, or in the groups ("companies") of [`set_companies`]. An embedding then depends
    only on its prompt and its company, not on the batch, the number of processes or earlier calls, so a resumed run
    repeats an uninterrupted one to the bit. Some encoders return values that are not one row a prompt (position ids,
    layers first), or pad to the longest prompt of the batch. A trial at the first call detects this. Their batches are
    then encoded and kept as a whole, with repeated prompts only once.

    With guidance, an encoder also returns the embedding of the negative (often empty) prompt. Another trial finds out
    which part that is, so that it is encoded once and prompts share their embeddings with calls without guidance.

    Args:
        max_bytes (`int`, *optional*, defaults to 2 GiB):
            Maximum size of the embeddings in host memory.
        store ([`PromptStore`], *optional*):
            Keeps embeddings on disk across runs, and is searched first. Its embeddings take no host memory.

    Attributes:
        reads_pictures (`bool`): whether an encoder has been given pictures beside its prompts.
    """

    reads_pictures = False

    def __init__(self, max_bytes: int = 2 * 1024**3, store: PromptStore | None = None):
        self.max_bytes = max_bytes
        self._store = store
        self._entries: OrderedDict[tuple, Encoded] = OrderedDict()
        self._recent: OrderedDict[tuple, Encoded] = OrderedDict()
        self._trials: dict[tuple, Any] = {}
        self._companies: dict[str, tuple[str, ...]] = {}
        self._unasked: set[tuple] = set()  # entries that were encoded only because a prompt of their company was
        self._bytes = 0

    def set_companies(self, companies: Iterable[Sequence[str]]) -> None:
        """
        Sets which prompts are encoded together from now on. All others are encoded alone.

        An encoder may round a prompt's embedding differently in another batch, so the company is part of an
        embedding's key. Companies should depend only on the data.

        Args:
            companies (`Iterable[Sequence[str]]`): groups of different prompts. A prompt in several groups belongs to
                the first.
        """
        self._recent.clear()
        self._companies = {}
        for company in companies:
            for prompt in company:
                self._companies.setdefault(prompt, tuple(company))

    @torch.no_grad()
    def encode(
        self, encode_prompt: Callable[..., Encoded], *args: object, beside: str = "", **kwargs: object
    ) -> Encoded:
        """
        Returns `encode_prompt(*args, **kwargs)`, from memory or the store if possible. `beside` stands for pictures
        that the prompts come with: encoders that read them have an entry for each.
        """
        call = _Call(encode_prompt, _bind(encode_prompt, args, kwargs), beside)
        self.reads_pictures |= bool(beside) and not call.keyed
        device = call.arguments.get("device")
        key = (call.key, str(device))
        if key not in self._recent:
            self._recent[key] = on_device(self._encode(call), device)
            if len(self._recent) > _RECENT_BATCHES:
                self._recent.popitem(last=False)
        self._recent.move_to_end(key)
        return self._recent[key]

    def _encode(self, call: "_Call") -> Encoded:
        if call.arguments.get(_GUIDED) is True and call.keyed:
            parts = self._trial(_PARTS, call, _try_parts)
            if parts is not None:
                prompts, negatives = (self._encode_batch(one) for one in _apart(call))
                return tuple(
                    prompt if part == "prompt" else negative
                    for prompt, negative, part in zip(prompts, negatives, parts, strict=True)
                )
        return self._encode_batch(call)

    def _encode_batch(self, call: "_Call") -> Encoded:
        size = call.size
        # One prompt needs no trial, and a pipeline that edits images may refuse a second prompt for its one image.
        layout = None
        if size > 1 or call.keyed and any(text in self._companies for text in call.texts.get("prompt", [])):
            layout = self._trial(_LAYOUT, call, _try_layout)
        rows = [self._row(call.row(i), layout) for i in range(size if layout is not None else 0)]
        # CogView4 pads to a multiple of 16 tokens: prompts are rows only if all of a batch need the same multiple.
        if layout is not None and _fit(rows, layout):
            return _join(rows, layout)
        distinct = list(dict.fromkeys(zip(*call.texts.values(), strict=True))) if size > 1 else []
        if 0 < len(distinct) < size:
            axes = self._trial(_AXES, call, _try_axes)
            if axes is not None:
                once = dict(zip(call.texts, map(list, zip(*distinct, strict=True)), strict=True))
                encoded = self._encode_batch(call.with_arguments(once))
                if _as_tried(encoded, axes):
                    return _take(
                        encoded, axes, [distinct.index(row) for row in zip(*call.texts.values(), strict=True)]
                    )
        return self._remember(call)

    def _row(self, call: "_Call", layout: "_Layout") -> Encoded:
        """The embedding of a call with one prompt, encoded alone or in its company."""
        company = self._companies.get(call.texts.get("prompt", [""])[0]) if call.keyed else None
        if company is None or len(company) == 1:
            return self._remember(call)
        together = ("together", company)
        key = (*call.key, together)
        row = self._find(key, call)
        if row is None:
            encoded = on_device(call.with_prompts(company)(), "cpu")
            keys = [(*call.with_prompts([prompt]).key, together) for prompt in company]
            rows = dict(zip(keys, _split(encoded, layout, len(company)), strict=True))
            row = self._keep(key, rows.pop(key), call)
            for other, value in rows.items():
                self._hold(other, value)
            self._unasked.update(other for other in rows if other in self._entries)
        elif key in self._unasked and key in self._entries and self._store is not None:
            # A process writes only the prompts that it was asked for; other processes write the rest.
            held, kept = self._drop(key), self._store.read(key)
            row = self._keep(key, held, call) if kept is None else kept
        self._unasked.discard(key)
        # If the longest prompt of a company sets the length of the others, their embeddings differ from those encoded
        # alone.
        short = self._trial(_SHORT, call, lambda call: on_device(call.with_prompts(_PROBES[:1])(), "cpu"))
        return row if _same_shapes(short, row, layout) else self._remember(call)

    def _trial(self, kind: str, call: "_Call", run: Callable[["_Call"], Encoded]) -> Encoded:
        """The result of a trial for this kind of call: from memory, from the store, or by running it."""
        pattern = (kind, *call.options, *call.texts)
        if pattern not in self._trials:
            store = self._store if call.keyed else None
            kept = None if store is None else store.read(pattern)
            self._trials[pattern] = kept[0] if kept is not None else run(call)
            if store is not None and kept is None:
                store.write(pattern, (self._trials[pattern],))
        return self._trials[pattern]

    def _remember(self, call: "_Call") -> Encoded:
        found = self._find(call.key, call)
        return self._keep(call.key, on_device(call(), "cpu"), call) if found is None else found

    def _find(self, key: tuple, call: "_Call") -> Encoded:
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        return self._store.read(key) if self._store is not None and call.keyed else None

    def _keep(self, key: tuple, value: Encoded, call: "_Call") -> Encoded:
        if self._store is not None and call.keyed and self._store.write(key, value):
            return value
        return self._hold(key, value)

    def _hold(self, key: tuple, value: Encoded) -> Encoded:
        if key in self._entries:
            self._drop(key)
        last = next(reversed(self._entries.values())) if self._entries else None
        # Some families return the empty prompt's embedding with every prompt: keep one copy of it.
        self._entries[key] = value = _share(value, last)
        self._bytes += nbytes(value)
        while self._bytes > self.max_bytes and len(self._entries) > 1:
            self._drop(next(iter(self._entries)))
        return value

    def _drop(self, key: tuple) -> Encoded:
        value = self._entries.pop(key)
        self._unasked.discard(key)
        self._bytes -= nbytes(value)
        return value


class _Call:
    """
    A call of `encode_prompt`.

    Attributes:
        texts (`dict[str, list[str]]`): the arguments that are lists of texts, one for each prompt.
        options (`tuple`): the arguments that are plain values.
        beside (`str`): stands for the pictures of the prompts.
        keyed (`bool`): whether texts and options are all arguments. They are not where an encoder reads pictures.
        key (`tuple`): the key of the call's entry.
        size (`int`): the number of prompts.
    """

    def __init__(self, function: Callable[..., Encoded], arguments: dict[str, Any], beside: str = ""):
        self.function, self.arguments, self.beside = function, arguments, beside
        self.texts = {name: value for name, value in arguments.items() if _is_texts(value)}
        plain = [name for name, value in arguments.items() if _is_option(name, value)]
        self.options = tuple((name, str(arguments[name])) for name in plain)
        self.keyed = all(name in self.texts or name == "device" or name in plain for name in arguments)
        self.key: tuple = (*self.options, *((name, _key_of(value)) for name, value in self.texts.items()))
        if not self.keyed:
            self.key = (*self.key, beside)
        sizes = {len(value) for value in self.texts.values()}
        self.size = sizes.pop() if len(sizes) == 1 else 1

    def __call__(self) -> Encoded:
        copies = {name: list(value) for name, value in self.texts.items()}  # Z-Image changes the list in place
        return self.function(**{**self.arguments, **copies})

    def with_arguments(self, changes: Mapping[str, object]) -> "_Call":
        new = _Call(self.function, {**self.arguments, **changes}, self.beside)
        if self.arguments.get(_BATCH) == self.size != new.size:  # HunyuanImage passes the number of prompts besides
            new = _Call(self.function, {**new.arguments, _BATCH: new.size}, self.beside)
        return new

    def row(self, i: int) -> "_Call":
        """The same call with only prompt `i`."""
        return self.with_arguments({name: [value[i]] for name, value in self.texts.items()})

    def with_prompts(self, prompts: Sequence[str]) -> "_Call":
        """The same call, of one prompt, with other prompts in its place."""
        own = {name for name, text in self.texts.items() if text == self.texts["prompt"] and not _is_negative(name)}
        return self.with_arguments(
            {name: list(prompts) if name in own else text * len(prompts) for name, text in self.texts.items()}
        )


def _bind(function: Callable[..., Encoded], args: tuple, kwargs: dict[str, object]) -> dict[str, Any]:
    """
    The arguments of a call by name. Uses a cached signature, since Python would build a method's anew at every step.
    """
    if not inspect.ismethod(function):
        return inspect.signature(function).bind(*args, **kwargs).arguments
    arguments = _signature(function.__func__).bind(function.__self__, *args, **kwargs).arguments
    return dict(islice(arguments.items(), 1, None))  # without `self`


@cache
def _signature(function: Callable[..., object]) -> inspect.Signature:
    return inspect.signature(function)


def _is_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _is_negative(name: str) -> bool:
    return name.startswith("negative")


def _is_option(name: str, value: object) -> bool:
    # Other values, such as an image to edit, come from `generation_kwargs`, which are the same for a whole run.
    if isinstance(value, (tuple, list)) and not _is_texts(value):  # Flux.2's layers of the encoder
        return all(_is_option(name, item) for item in value)
    return name != "device" and (value is None or isinstance(value, (str, int, float, bool, torch.dtype)))


def _key_of(texts: list[str]) -> str | tuple[str, ...]:
    return texts[0] if len(texts) == 1 else tuple(texts)


def _apart(call: _Call) -> tuple[_Call, _Call]:
    """
    Splits a guided call in two: its prompts without guidance, and its negative prompts with a probe as the prompt.
    """
    probes = {name: [_PROBES[0]] * len(text) for name, text in call.texts.items() if not _is_negative(name)}
    return call.with_arguments({_GUIDED: False}), call.with_arguments(probes)


def _try_parts(call: _Call) -> tuple[str, ...] | None:
    """
    Finds out which values of a guided call belong to the prompts (`"prompt"`: the same as without guidance) and which
    to the negative prompts (`"negative"`: the same for any prompt). Returns a tuple, or `None` if a value is neither.
    """
    names = [name for name in call.texts if not _is_negative(name)]
    guided = [call.row(0).with_arguments({name: [probe] for name in names}) for probe in _PROBES]
    both, alone = ([one() for one in calls] for calls in (guided, [_apart(one)[0] for one in guided]))
    if not all(isinstance(value, tuple) for value in (*both, *alone)):
        return None
    parts = []
    for first, second, first_alone, second_alone in zip(*both, *alone, strict=True):
        if _equal(first, first_alone) and _equal(second, second_alone):
            parts.append("prompt")
        elif _equal(first, second):
            parts.append("negative")
        else:
            return None
    return tuple(parts)


def _equal(a: Encoded, b: Encoded) -> bool:
    """Whether embeddings are equal to the bit."""
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return a is None and b is None


def _try_layout(call: _Call) -> _Layout:
    first, second = (call.with_arguments({name: [probe] for name in call.texts})() for probe in _PROBES)
    return _find_layout(first, second, call.with_arguments({name: list(_PROBES) for name in call.texts})())


def _find_layout(first: Encoded, second: Encoded, both: Encoded) -> _Layout:
    """
    Finds out how the embeddings of two prompts form those of their batch: `"shared"` (equal for all prompts),
    `"rows"`, `"list"`, a tuple of these, or `None` if they don't.
    """
    if isinstance(both, tuple):
        layouts = [_find_layout(*items) for items in zip(first, second, both, strict=True)]
        return None if None in layouts else tuple(layouts)
    if isinstance(both, list):  # one tensor a prompt, each of its own length, or nothing
        if not (first or second or both):
            return "list"
        return "list" if len(both) == 2 and _close(first[0], both[0]) and _close(second[0], both[1]) else None
    if _close(first, both) and _close(second, both):
        return "shared"
    tensors = isinstance(first, Tensor) and isinstance(second, Tensor) and isinstance(both, Tensor)
    if tensors and first.shape == second.shape and _close(torch.cat([first, second]), both):
        return "rows"
    return None


def _try_axes(call: _Call) -> _Layout:
    once, twice = (call.with_arguments({name: list(_PROBES) * n for name in call.texts})() for n in (1, 2))
    return _find_axes(once, twice)


def _find_axes(once: Encoded, twice: Encoded) -> _Layout:
    """
    Finds out along which axis the prompts of a batch lie in its embeddings, by comparing a batch with the same batch
    twice. Returns the number of the axis, `"shared"` (equal for any batch), `"list"`, `"nothing"`, a tuple of these,
    or `None` if there is no such axis.
    """
    if isinstance(twice, tuple):
        axes = [_find_axes(*items) for items in zip(once, twice, strict=True)]
        return None if None in axes else tuple(axes)
    if isinstance(twice, list):
        return "list" if len(twice) == 2 * len(once) and all(map(_close, once * 2, twice)) else None
    if once is None and twice is None:
        return "nothing"
    if _close(once, twice):
        return "shared"
    if isinstance(once, Tensor) and isinstance(twice, Tensor):
        doubled = [
            axis for axis in range(once.ndim) if once.shape[axis] == 2 and _close(torch.cat([once] * 2, axis), twice)
        ]
        return str(doubled[0]) if doubled else None  # a store keeps text
    return None


def _as_tried(encoded: Encoded, axes: _Layout) -> bool:
    """Whether every value that was `None` in the trial is `None`. For others the trial could not find the axis."""
    if isinstance(axes, tuple):
        return all(_as_tried(*items) for items in zip(encoded, axes, strict=True))
    return encoded is None or axes != "nothing"


def _take(encoded: Encoded, axes: str | tuple, numbers: list[int]) -> Encoded:
    """The embeddings of a batch made of the prompts `numbers` of an encoded batch."""
    if isinstance(axes, tuple):
        return tuple(_take(part, of_part, numbers) for part, of_part in zip(encoded, axes, strict=True))
    if axes == "list":
        return [encoded[i] for i in numbers] if encoded else encoded
    if encoded is None or axes == "shared":  # a mask that would mask nothing is None (Qwen-Image)
        return encoded
    return encoded.index_select(int(axes), torch.tensor(numbers, device=encoded.device))


def _fit(rows: list[Encoded], layout: _Layout) -> bool:
    if isinstance(layout, tuple):
        return all(_fit([row[i] for row in rows], part) for i, part in enumerate(layout))
    return layout != "rows" or len({row.shape[1:] for row in rows}) == 1


def _join(rows: list[Encoded], layout: _Layout) -> Encoded:
    if isinstance(layout, tuple):
        return tuple(_join([row[i] for row in rows], part) for i, part in enumerate(layout))
    if layout == "list":
        return [item for row in rows for item in row]
    return torch.cat(rows) if layout == "rows" else rows[0]


def _split(value: Encoded, layout: _Layout, size: int) -> list[Encoded]:
    """The embeddings of each prompt of a batch. [`_join`] is the inverse."""
    if isinstance(layout, tuple):
        columns = [_split(part, of_part, size) for part, of_part in zip(value, layout, strict=True)]
        return [tuple(column[i] for column in columns) for i in range(size)]
    if layout == "list":
        return [[item] for item in value] if value else [[] for _ in range(size)]
    # Copies: a view would keep the whole batch in memory.
    return [row.clone() for row in value.split(1)] if layout == "rows" else [value] * size


def _same_shapes(a: Encoded, b: Encoded, layout: _Layout) -> bool:
    """Whether the embeddings of two prompts have the same shape, except lists, which may have different ones."""
    if isinstance(layout, tuple):
        return all(_same_shapes(*parts) for parts in zip(a, b, layout, strict=True))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape
    return layout == "list" or a is None and b is None


def _close(a: Encoded, b: Encoded) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        # Encoders in half precision round a prompt differently alone and in a batch.
        return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=2e-2, atol=2e-2)
    return a is None and b is None


def _share(value: Encoded, last: Encoded) -> Encoded:
    if isinstance(value, Tensor):
        same = isinstance(last, Tensor) and value.shape == last.shape and torch.equal(value, last)
        return last if same else value
    if isinstance(value, tuple) and isinstance(last, tuple) and len(value) == len(last):
        return tuple(_share(item, other) for item, other in zip(value, last, strict=True))
    return value
