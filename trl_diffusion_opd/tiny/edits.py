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
The world that edits: rows that draw from a text alone, rows that change one thing in a given picture, and rows that
bring dusk over one.
"""

from __future__ import annotations

import io
import itertools
import json
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from . import prompts
from .prompts import SPLITS, Spec
from .scenes import COLORS, SHAPES, Scene, Thing, draw


if TYPE_CHECKING:
    from datasets import Dataset


EDIT_TASKS = ("draw", "local", "global")
KINDS = ("recolor", "remove", "add")
GLOBAL_PROMPTS = ("at dusk", "make it dusk", "paint it at dusk")

# Pairs of things that the pictures of a split show. No picture of one split shows the things of another's.
_PAIRS = {"validation": 6, "test": 14}
# Rows of a split, by task. `draw` has all the first world's prompts with a number of things.
_ROWS = {
    "local": {"train": 480, "validation": 60, "test": 128},
    "global": {"train": 240, "validation": 40, "test": 128},
}


def pairs(split: str) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """The pairs of things, each a colour and a shape, that the source pictures of a split show.

    Raises:
        `ValueError`: if `split` is not `train`, `validation` or `test`.
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r} of the tiny world: use one of {', '.join(SPLITS)}.")
    every = list(itertools.combinations(itertools.product(COLORS, SHAPES), 2))
    order = [every[i] for i in np.random.default_rng(2606).permutation(len(every))]
    held, valid = _PAIRS["test"], _PAIRS["validation"]
    return {"test": order[:held], "validation": order[held : held + valid], "train": order[held + valid :]}[split]


def edit_spec(task: str, pair: tuple[tuple[str, str], tuple[str, str]], rng: np.random.Generator) -> Spec:
    """
    A random row of `local` or `global` whose picture shows a pair of things.

    Returns:
        `dict`: `task`; `kind`, an entry of `KINDS` or of `GLOBAL_PROMPTS`; `things`, each `[color, shape, cell, down,
        right]`; and for `local` the `index` of the thing that changes, and the `color` and `shape` of the new one (none
        of them where a thing goes).
    """
    cells = rng.permutation(4)[:2]
    things: list[list[Any]] = []
    for i in rng.permutation(2):
        things.append([*pair[i], int(cells[i]), *(int(place) for place in rng.integers(2, 4, size=2))])
    if task == "global":
        return {"task": task, "kind": GLOBAL_PROMPTS[rng.integers(len(GLOBAL_PROMPTS))], "things": things}
    kind, index = KINDS[rng.integers(len(KINDS))], int(rng.integers(2))
    color, shape = "", ""
    if kind == "recolor":
        color, shape = _other(tuple(COLORS), things[index][0], rng), things[index][1]
    elif kind == "add":
        index = 2
        new = [one for one in itertools.product(COLORS, SHAPES) if one not in pair]
        color, shape = new[rng.integers(len(new))]
    return {"task": task, "kind": kind, "things": things, "index": index, "color": color, "shape": shape}


def _other(names: tuple[str, ...], name: str, rng: np.random.Generator) -> str:
    others = [one for one in names if one != name]
    return others[rng.integers(len(others))]


def edit_prompt(spec: Spec) -> str:
    """The prompt of a spec of the world that edits."""
    if spec["task"] == "draw":
        return prompts.to_prompt(spec)
    if spec["task"] == "global":
        return str(spec["kind"])
    if spec["kind"] == "add":
        return f"add a {spec['color']} {spec['shape']}"
    color, shape = spec["things"][spec["index"]][:2]
    if spec["kind"] == "remove":
        return f"remove the {color} {shape}"
    return f"make the {color} {shape} {spec['color']}"


def source_scene(spec: Spec) -> Scene:
    """What the given picture of a row of `local` or `global` shows."""
    return Scene(tuple(Thing(color, shape, cell, (down, right)) for color, shape, cell, down, right in spec["things"]))


def target_scene(spec: Spec, rng: np.random.Generator) -> Scene:
    """What a row of `local` or `global` asks for. `rng` chooses where a thing is added."""
    things = list(source_scene(spec).things)
    if spec["task"] == "global":
        return Scene(tuple(things), dusk=1.0)
    if spec["kind"] == "remove":
        del things[spec["index"]]
    elif spec["kind"] == "recolor":
        old = things[spec["index"]]
        things[spec["index"]] = Thing(spec["color"], old.shape, old.cell, old.offset)
    else:
        free = [cell for cell in range(4) if cell not in {thing.cell for thing in things}]
        down, right = (int(place) for place in rng.integers(2, 4, size=2))
        things.append(Thing(spec["color"], spec["shape"], free[rng.integers(len(free))], (down, right)))
    return Scene(tuple(things))


def draw_source(spec: Spec) -> Image.Image:
    """The given picture of a row of `local` or `global`, RGB of 32 x 32 px. It is the same each time."""
    return draw(source_scene(spec), np.random.default_rng(0))


def drawn_specs(split: str, kind: str) -> list[Spec]:
    """The first world's specs of one kind of `compose`, as specs of `draw`."""
    kept = [spec for spec in prompts.specs(split) if spec["task"] == "compose" and spec["kind"] == kind]
    return [{**spec, "task": "draw"} for spec in kept]


def edit_specs(task: str, split: str) -> list[Spec]:
    """All specs of one task in one split, in a fixed order, all different."""
    if task == "draw":
        return drawn_specs(split, "count")
    rng = np.random.default_rng([EDIT_TASKS.index(task), SPLITS.index(split)])
    chosen: dict[str, Spec] = {}
    shown = pairs(split)
    while len(chosen) < _ROWS[task][split]:
        spec = edit_spec(task, shown[len(chosen) % len(shown)], rng)
        chosen.setdefault(json.dumps(spec), spec)
    return list(chosen.values())


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def edit_dataset(split: str = "train", tasks: tuple[str, ...] = EDIT_TASKS) -> Dataset:
    """
    Rows of one split with the columns `prompt`, `task`, `source_images` (a list with one picture, or none for `draw`)
    and `spec` (a JSON string that the verifiers read).

    Args:
        split (`str`): `train`, `validation` or `test`. Two splits share no prompt of `draw`, and no pictures.
        tasks (`tuple[str]`, *optional*): only rows of these tasks.
    """
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    rows: list[dict[str, Any]] = []
    for spec in itertools.chain.from_iterable(edit_specs(task, split) for task in tasks):
        pictures = [] if spec["task"] == "draw" else [{"bytes": _png(draw_source(spec)), "path": None}]
        rows.append(
            {"prompt": edit_prompt(spec), "task": spec["task"], "source_images": pictures, "spec": json.dumps(spec)}
        )
    text = Value("string")
    features = Features(prompt=text, task=text, source_images=List(ImageFeature()), spec=text)
    return Dataset.from_list(rows, features=features)


def render_edit(spec: str, seed: int = 0) -> Image.Image:
    """
    Draws a correct result for one row of [`edit_dataset`].

    Args:
        spec (`str`): the row's `spec` column.
        seed (`int`, *optional*, defaults to 0): seed of what the row leaves open, such as where a thing is added.
    """
    parsed, rng = json.loads(spec), np.random.default_rng(seed)
    scene = prompts.to_scene(parsed, rng) if parsed["task"] == "draw" else target_scene(parsed, rng)
    return draw(scene, rng)
