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
from collections.abc import Callable
from functools import cache, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .prompt_store import PromptStore


# Two prompts of different length: enough to see whether a batch of embeddings is the rows put together.
_PROBES = ("a", "a b c")
# Keys of what the trials found, in a store.
_LAYOUT, _AXES = "layout", "axes"
# Guided and unguided calls of student and teachers on one micro-batch.
_RECENT_BATCHES = 8


class PromptCache:
    """
    Remembers what `encode_prompt` returned, one entry a prompt, the least recently used dropped beyond `max_bytes`.

    Prompts are encoded one at a time, so that an embedding depends on nothing but its prompt: not on the batch, the
    number of processes or what was encoded before, without which a resumed run could not repeat an uninterrupted one
    to the bit. Some encoders return things that are not rows (position ids, layers first) or pad to the longest
    prompt of the batch; a trial at the first call finds them, and for those the whole batch is encoded and kept as it
    is, a prompt that is several times in it once.

    Args:
        max_bytes (`int`, *optional*, defaults to 2 GiB):
            Bound of the embeddings kept in host memory.
        store ([`PromptStore`], *optional*):
            Where embeddings are looked for first and kept across runs. What it has takes no host memory.
    """

    def __init__(self, max_bytes: int = 2 * 1024**3, store: PromptStore | None = None):
        self.max_bytes = max_bytes
        self._store = store
        self._entries: OrderedDict[tuple, Any] = OrderedDict()
        self._recent: OrderedDict[tuple, Any] = OrderedDict()
        self._layouts: dict[tuple, Any] = {}
        self._bytes = 0

    @torch.no_grad()
    def encode(self, encode_prompt: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `encode_prompt(*args, **kwargs)` returns, from memory where it can be."""
        call = _bind(encode_prompt, args, kwargs)
        texts = {name: value for name, value in call.items() if _is_texts(value)}
        options = tuple((name, str(value)) for name, value in call.items() if _is_option(name, value))
        device = str(call.get("device"))
        # An image to edit is no part of the key, and may be another one in another run.
        keyed = all(name in texts or name == "device" or _is_option(name, value) for name, value in call.items())
        store = self._store if keyed else None
        batch = (*options, *((name, tuple(value)) for name, value in texts.items()))
        if (batch, device) not in self._recent:
            self._recent[batch, device] = self._encode_batch(encode_prompt, call, texts, options, batch, store)
            if len(self._recent) > _RECENT_BATCHES:
                self._recent.popitem(last=False)
        self._recent.move_to_end((batch, device))
        return self._recent[batch, device]

    def _encode_batch(
        self,
        encode_prompt: Callable[..., Any],
        call: dict,
        texts: dict[str, list[str]],
        options: tuple,
        batch: tuple,
        store: PromptStore | None,
    ) -> Any:
        sizes = {len(value) for value in texts.values()}
        # One prompt is a batch as it is, and a pipeline that edits images may take no second prompt for its one image.
        size = sizes.pop() if len(sizes) == 1 else 1
        layout = None
        if size > 1:
            trial = partial(_try_layout, encode_prompt, call, texts)
            layout = self._trial((_LAYOUT, *options, *texts), trial, store)
        rows = []
        for i in range(size if layout is not None else 0):
            row = {name: [value[i]] for name, value in texts.items()}
            key = (*options, *((name, value[0]) for name, value in row.items()))
            rows.append(self._remember(key, partial(encode_prompt, **{**call, **row}), store))
        # CogView4 pads to the next 16 tokens of the longest: rows until a batch has prompts on both sides of 16.
        if layout is not None and _fit(rows, layout):
            return _to(_join(rows, layout), call.get("device"))
        distinct = list(dict.fromkeys(zip(*texts.values(), strict=True))) if size > 1 else []
        if 0 < len(distinct) < size:
            trial = partial(_try_axes, encode_prompt, call, texts)
            axes = self._trial((_AXES, *options, *texts), trial, store)
            if axes is not None:
                once = dict(zip(texts, map(list, zip(*distinct, strict=True)), strict=True))
                key = (*options, *((name, tuple(value)) for name, value in once.items()))
                encoded = self._encode_batch(encode_prompt, {**call, **once}, once, options, key, store)
                if _as_tried(encoded, axes):
                    return _take(encoded, axes, [distinct.index(row) for row in zip(*texts.values(), strict=True)])
        copies = {name: list(value) for name, value in texts.items()}  # Z-Image writes its template into the list
        return _to(self._remember(batch, lambda: encode_prompt(**{**call, **copies}), store), call.get("device"))

    def _trial(self, pattern: tuple, run: Callable[[], Any], store: PromptStore | None) -> Any:
        """What a trial found, for this kind of call."""
        if pattern not in self._layouts:
            kept = None if store is None else store.read(pattern)
            self._layouts[pattern] = kept[0] if kept is not None else run()
            if store is not None and kept is None:
                store.write(pattern, (self._layouts[pattern],))
        return self._layouts[pattern]

    def _remember(self, key: tuple, compute: Callable[[], Any], store: PromptStore | None) -> Any:
        if key not in self._entries:
            kept = None if store is None else store.read(key)
            if kept is not None:
                return kept
            value = _to(compute(), "cpu")
            if store is not None and store.write(key, value):
                return value
            last = next(reversed(self._entries.values())) if self._entries else None
            # The empty prompt's embedding comes with every prompt of some families: keep one copy of it.
            self._entries[key] = _share(value, last)
            self._bytes += _nbytes(self._entries[key])
            while self._bytes > self.max_bytes and len(self._entries) > 1:
                self._bytes -= _nbytes(self._entries.popitem(last=False)[1])
        self._entries.move_to_end(key)
        return self._entries[key]


def _bind(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name. Python would make a method's signature anew at every step."""
    if not inspect.ismethod(function):
        return inspect.signature(function).bind(*args, **kwargs).arguments
    arguments = _signature(function.__func__).bind(function.__self__, *args, **kwargs).arguments
    return dict(islice(arguments.items(), 1, None))  # without `self`


@cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _is_option(name: str, value: Any) -> bool:
    # Whatever is neither text nor a plain value (an image to edit) comes from `generation_kwargs`, which are fixed.
    if isinstance(value, (tuple, list)) and not _is_texts(value):  # Flux.2's layers of the encoder
        return all(_is_option(name, item) for item in value)
    return name != "device" and (value is None or isinstance(value, (str, int, float, bool, torch.dtype)))


def _try_layout(encode_prompt: Callable[..., Any], call: dict, texts: dict) -> Any:
    first, second = (encode_prompt(**{**call, **{name: [probe] for name in texts}}) for probe in _PROBES)
    both = encode_prompt(**{**call, **{name: list(_PROBES) for name in texts}})
    return _find_layout(first, second, both)


def _find_layout(first: Any, second: Any, both: Any) -> Any:
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


def _try_axes(encode_prompt: Callable[..., Any], call: dict, texts: dict) -> Any:
    once, twice = (encode_prompt(**{**call, **{name: list(_PROBES) * n for name in texts}}) for n in (1, 2))
    return _find_axes(once, twice)


def _find_axes(once: Any, twice: Any) -> Any:
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


def _as_tried(encoded: Any, axes: Any) -> bool:
    """Whether there is nothing where the trial had nothing, of which it cannot be said where the prompts are."""
    if isinstance(axes, tuple):
        return all(_as_tried(*items) for items in zip(encoded, axes, strict=True))
    return encoded is None or axes != "nothing"


def _take(encoded: Any, axes: Any, numbers: list[int]) -> Any:
    """The embeddings of the batch that has the prompts of these numbers of another."""
    if isinstance(axes, tuple):
        return tuple(_take(part, of_part, numbers) for part, of_part in zip(encoded, axes, strict=True))
    if axes == "list":
        return [encoded[i] for i in numbers] if encoded else encoded
    if encoded is None or axes == "shared":  # a mask is None where it would mask nothing (Qwen-Image)
        return encoded
    return encoded.index_select(int(axes), torch.tensor(numbers, device=encoded.device))


def _fit(rows: list[Any], layout: Any) -> bool:
    if isinstance(layout, tuple):
        return all(_fit([row[i] for row in rows], part) for i, part in enumerate(layout))
    return layout != "rows" or len({row.shape[1:] for row in rows}) == 1


def _join(rows: list[Any], layout: Any) -> Any:
    if isinstance(layout, tuple):
        return tuple(_join([row[i] for row in rows], part) for i, part in enumerate(layout))
    if layout == "list":
        return [item for row in rows for item in row]
    return torch.cat(rows) if layout == "rows" else rows[0]


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        # Half-precision encoders round differently alone and in a batch.
        return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=2e-2, atol=2e-2)
    return a is None and b is None


def _to(value: Any, device: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(_to(item, device) for item in value)
    return value


def _share(value: Any, last: Any) -> Any:
    if isinstance(value, Tensor):
        same = isinstance(last, Tensor) and value.shape == last.shape and torch.equal(value, last)
        return last if same else value
    if isinstance(value, tuple) and isinstance(last, tuple) and len(value) == len(last):
        return tuple(_share(item, other) for item, other in zip(value, last, strict=True))
    return value


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(_nbytes(item) for item in value) if isinstance(value, (list, tuple)) else 0
