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

"""Text embeddings, encoded once: a cache around a pipeline's own `encode_prompt`."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .prompt_store import Encoded, PromptStore


# Two prompts of different length: enough to see whether a batch of embeddings is the rows put together.
_PROBES = ("a", "a b c")
# Keys of what the trials found, in a store.
_LAYOUT, _AXES, _PARTS, _SHORT = "layout", "axes", "parts", "short"
# What pipelines call the argument that asks for the negative prompts' embeddings too.
_GUIDED = "do_classifier_free_guidance"
# Guided and unguided calls of student and teachers on one micro-batch.
_RECENT_BATCHES = 8

_Layout = str | tuple["_Layout", ...] | None  # how the embeddings of prompts and of their batch belong together


class PromptCache:
    """
    Remembers what `encode_prompt` returned, one entry a prompt, the least recently used dropped beyond `max_bytes`.

    Prompts are encoded one at a time, or in the company that [`set_companies`] says, so that an embedding depends on
    nothing but its prompt and that: not on the batch, the number of processes or what was encoded before, without which
    a resumed run could not repeat an uninterrupted one to the bit. Some encoders return things that are not rows (position
    ids, layers first) or pad to the longest prompt of the batch; a trial at the first call finds them, and for those the
    whole batch is encoded and kept as it is, a prompt that is several times in it once.

    What comes with every prompt under guidance, the embedding of the empty prompt, is encoded once, and the prompt as
    without guidance: another trial finds which is which.

    Args:
        max_bytes (`int`, *optional*, defaults to 2 GiB):
            Bound of the embeddings kept in host memory.
        store ([`PromptStore`], *optional*):
            Where embeddings are looked for first and kept across runs. What it has takes no host memory.
    """

    def __init__(self, max_bytes: int = 2 * 1024**3, store: PromptStore | None = None):
        self.max_bytes = max_bytes
        self._store = store
        self._entries: OrderedDict[tuple, Encoded] = OrderedDict()
        self._recent: OrderedDict[tuple, Encoded] = OrderedDict()
        self._trials: dict[tuple, Any] = {}
        self._companies: dict[str, tuple[str, ...]] = {}
        self._unasked: set[tuple] = set()  # those that came with others
        self._bytes = 0

    def set_companies(self, companies: Iterable[Sequence[str]]) -> None:
        """
        Says which prompts are encoded together from now on; all others are encoded alone.

        An encoder may round a prompt differently in other company, so who is in it is part of what an embedding is kept
        under. Each company should follow from the data alone.

        Args:
            companies (`Iterable[Sequence[str]]`): different prompts each. A prompt that is in several counts for the first.
        """
        self._recent.clear()
        self._companies = {}
        for company in companies:
            for prompt in company:
                self._companies.setdefault(prompt, tuple(company))

    @torch.no_grad()
    def encode(self, encode_prompt: Callable[..., Encoded], *args: object, **kwargs: object) -> Encoded:
        """What `encode_prompt(*args, **kwargs)` returns, from memory where it can be."""
        call = _Call(encode_prompt, _bind(encode_prompt, args, kwargs))
        device = call.arguments.get("device")
        key = (call.key, str(device))
        if key not in self._recent:
            self._recent[key] = _to(self._encode(call), device)
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
        # One prompt is a batch as it is, and a pipeline that edits images may take no second prompt for its one image.
        layout = None
        if size > 1 or call.keyed and any(text in self._companies for text in call.texts.get("prompt", [])):
            layout = self._trial(_LAYOUT, call, _try_layout)
        rows = [self._row(call.row(i), layout) for i in range(size if layout is not None else 0)]
        # CogView4 pads to the next 16 tokens of the longest: rows until a batch has prompts on both sides of 16.
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
        """The embedding of a call with one prompt, which was encoded alone or in its company."""
        company = self._companies.get(call.texts.get("prompt", [""])[0]) if call.keyed else None
        if company is None or len(company) == 1:
            return self._remember(call)
        together = ("together", company)
        key = (*call.key, together)
        row = self._find(key, call)
        if row is None:
            encoded = _to(call.with_prompts(company)(), "cpu")
            keys = [(*call.with_prompts([prompt]).key, together) for prompt in company]
            rows = dict(zip(keys, _split(encoded, layout, len(company)), strict=True))
            row = self._keep(key, rows.pop(key), call)
            for other, value in rows.items():
                self._hold(other, value)
            self._unasked.update(other for other in rows if other in self._entries)
        elif key in self._unasked and key in self._entries and self._store is not None:
            # A process writes what it was asked for, and others do the rest.
            held, kept = self._drop(key), self._store.read(key)
            row = self._keep(key, held, call) if kept is None else kept
        self._unasked.discard(key)
        # Where the longest of the company decides how long the others are, they are not what they would be without it.
        short = self._trial(_SHORT, call, lambda call: _to(call.with_prompts(_PROBES[:1])(), "cpu"))
        return row if _same_shapes(short, row, layout) else self._remember(call)

    def _trial(self, kind: str, call: "_Call", run: Callable[["_Call"], Encoded]) -> Encoded:
        """What a trial found, for this kind of call."""
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
        return self._keep(call.key, _to(call(), "cpu"), call) if found is None else found

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
        # The empty prompt's embedding comes with every prompt of some families: keep one copy of it.
        self._entries[key] = value = _share(value, last)
        self._bytes += _nbytes(value)
        while self._bytes > self.max_bytes and len(self._entries) > 1:
            self._drop(next(iter(self._entries)))
        return value

    def _drop(self, key: tuple) -> Encoded:
        value = self._entries.pop(key)
        self._unasked.discard(key)
        self._bytes -= _nbytes(value)
        return value


class _Call:
    """
    A call of `encode_prompt`.

    Attributes:
        texts (`dict[str, list[str]]`): its arguments that have a text a prompt.
        options (`tuple`): its plain arguments.
        keyed (`bool`): whether these are all that there are: an image to edit is no part of the key, and may be another
            one in another run.
        key (`tuple`): what it is remembered under.
        size (`int`): number of its prompts.
    """

    def __init__(self, function: Callable[..., Encoded], arguments: dict[str, Any]):
        self.function, self.arguments = function, arguments
        self.texts = {name: value for name, value in arguments.items() if _is_texts(value)}
        plain = [name for name, value in arguments.items() if _is_option(name, value)]
        self.options = tuple((name, str(arguments[name])) for name in plain)
        self.keyed = all(name in self.texts or name == "device" or name in plain for name in arguments)
        self.key = (*self.options, *((name, _key_of(value)) for name, value in self.texts.items()))
        sizes = {len(value) for value in self.texts.values()}
        self.size = sizes.pop() if len(sizes) == 1 else 1

    def __call__(self) -> Encoded:
        copies = {name: list(value) for name, value in self.texts.items()}  # Z-Image writes its template into the list
        return self.function(**{**self.arguments, **copies})

    def with_arguments(self, changes: Mapping[str, object]) -> "_Call":
        return _Call(self.function, {**self.arguments, **changes})

    def row(self, i: int) -> "_Call":
        """The call with one of its prompts."""
        return self.with_arguments({name: [value[i]] for name, value in self.texts.items()})

    def with_prompts(self, prompts: Sequence[str]) -> "_Call":
        """The call of one prompt with these in its place."""
        own = {name for name, text in self.texts.items() if text == self.texts["prompt"] and not _is_negative(name)}
        return self.with_arguments(
            {name: list(prompts) if name in own else text * len(prompts) for name, text in self.texts.items()}
        )


def _bind(function: Callable[..., Encoded], args: tuple, kwargs: dict[str, object]) -> dict[str, Any]:
    """The arguments of a call by name. Python would make a method's signature anew at every step."""
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
    # Whatever is neither text nor a plain value (an image to edit) comes from `generation_kwargs`, which are fixed.
    if isinstance(value, (tuple, list)) and not _is_texts(value):  # Flux.2's layers of the encoder
        return all(_is_option(name, item) for item in value)
    return name != "device" and (value is None or isinstance(value, (str, int, float, bool, torch.dtype)))


def _key_of(texts: list[str]) -> str | tuple[str, ...]:
    return texts[0] if len(texts) == 1 else tuple(texts)


def _apart(call: _Call) -> tuple[_Call, _Call]:
    """A guided call's prompts without guidance, and its negative prompts, beside a probe."""
    probes = {name: [_PROBES[0]] * len(text) for name, text in call.texts.items() if not _is_negative(name)}
    return call.with_arguments({_GUIDED: False}), call.with_arguments(probes)


def _try_parts(call: _Call) -> tuple[str, ...] | None:
    """
    Which part of a guided call's embeddings is the prompts' (`"prompt"`), the same as without guidance, and which is the
    negative prompts' (`"negative"`), the same for any prompt: a tuple, or `None` where it can't be told apart.
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
    """Whether embeddings are the same to the bit."""
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
    How two prompts' embeddings make up those of their batch: `"shared"` (the same for any prompt), `"rows"`, `"list"`, a
    tuple of these, or `None` where they don't.
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
    Where the prompts of a batch are in its embeddings, from those of a batch and of the batch twice over: the number of an
    axis, `"shared"` (the same for any batch), `"list"`, `"nothing"`, a tuple of these, or `None` where they are nowhere to
    be seen.
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
    """Whether there is nothing where the trial had nothing, of which it cannot be said where the prompts are."""
    if isinstance(axes, tuple):
        return all(_as_tried(*items) for items in zip(encoded, axes, strict=True))
    return encoded is None or axes != "nothing"


def _take(encoded: Encoded, axes: str | tuple, numbers: list[int]) -> Encoded:
    """The embeddings of the batch that has the prompts of these numbers of another."""
    if isinstance(axes, tuple):
        return tuple(_take(part, of_part, numbers) for part, of_part in zip(encoded, axes, strict=True))
    if axes == "list":
        return [encoded[i] for i in numbers] if encoded else encoded
    if encoded is None or axes == "shared":  # a mask is None where it would mask nothing (Qwen-Image)
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
    """The embeddings of each prompt of a batch: [`_join`] puts them together again."""
    if isinstance(layout, tuple):
        columns = [_split(part, of_part, size) for part, of_part in zip(value, layout, strict=True)]
        return [tuple(column[i] for column in columns) for i in range(size)]
    if layout == "list":
        return [[item] for item in value] if value else [[] for _ in range(size)]
    # Copies: a view would keep the whole batch in memory.
    return [row.clone() for row in value.split(1)] if layout == "rows" else [value] * size


def _same_shapes(a: Encoded, b: Encoded, layout: _Layout) -> bool:
    """Whether the embeddings of two prompts have the same shape, where those of a batch must."""
    if isinstance(layout, tuple):
        return all(_same_shapes(*parts) for parts in zip(a, b, layout, strict=True))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape
    return layout == "list" or a is None and b is None


def _close(a: Encoded, b: Encoded) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        # Half-precision encoders round differently alone and in a batch.
        return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=2e-2, atol=2e-2)
    return a is None and b is None


def _to(value: Encoded, device: str | torch.device | None) -> Encoded:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(_to(item, device) for item in value)
    return value


def _share(value: Encoded, last: Encoded) -> Encoded:
    if isinstance(value, Tensor):
        same = isinstance(last, Tensor) and value.shape == last.shape and torch.equal(value, last)
        return last if same else value
    if isinstance(value, tuple) and isinstance(last, tuple) and len(value) == len(last):
        return tuple(_share(item, other) for item, other in zip(value, last, strict=True))
    return value


def _nbytes(value: Encoded) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(_nbytes(item) for item in value) if isinstance(value, (list, tuple)) else 0
