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

"""Makes the prompts of the tiny world's three tasks, splits them, and turns each into a scene that can be drawn."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from .scenes import COLORS, LETTERS, SHAPES, Scene, Thing


if TYPE_CHECKING:
    from datasets import Dataset


TASKS = ("compose", "letters", "style")
SPLITS = ("train", "validation", "test")
COUNTS = ("one", "two", "three")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# The cells of the first and the second object of each relation. They are neighbours, never diagonal.
RELATION_CELLS = {
    "left of": ((0, 1), (2, 3)),
    "right of": ((1, 0), (3, 2)),
    "above": ((0, 2), (1, 3)),
    "below": ((2, 0), (3, 1)),
}

# Number of scenes of each kind in a split. All prompts for the same scene are in the same split.
_TAKEN = {
    "count": {"validation": 4, "test": 8},
    "pair": {"validation": 5, "test": 12},
    "relation": {"validation": 8, "test": 16},
    "letters": {"validation": 14, "test": 44},
    "style one": {"validation": 1, "test": 3},
    "style two": {"validation": 6, "test": 20},
}

Spec = dict[str, Any]


def _named(thing: tuple[str, str]) -> str:
    return f"a {thing[0]} {thing[1]}"


def to_prompt(spec: Spec) -> str:
    """The prompt of a spec. A spec is the parsed `spec` column: task, kind, objects, relation and word of a scene."""
    objects = [tuple(thing) for thing in spec["objects"]]
    if spec["kind"] == "letters":
        return f'the word "{spec["word"]}"'
    if spec["kind"] == "count":
        number, (color, shape) = len(objects), objects[0]
        return f"{COUNTS[number - 1]} {color} {shape}{'s' if number > 1 else ''}"
    if spec["kind"] == "relation":
        return f"{_named(objects[0])} {spec['relation']} {_named(objects[1])}"
    words = " and ".join(_named(thing) for thing in objects)
    return f"a painting of {words}" if spec["task"] == "style" else words


def _spec(task: str, kind: str, objects: list[tuple[str, str]], relation: str = "", word: str = "") -> Spec:
    return {
        "task": task,
        "kind": kind,
        "objects": [list(thing) for thing in objects],
        "relation": relation,
        "word": word,
    }


def _scenes_by_kind() -> dict[str, list[list[Spec]]]:
    """All possible specs by kind, in groups that ask for the same scene."""
    things = list(itertools.product(COLORS, SHAPES))
    pairs = list(itertools.combinations(things, 2))
    return {
        "count": [[_spec("compose", "count", [thing] * n)] for thing in things for n in (1, 2, 3)],
        "pair": [[_spec("compose", "pair", [a, b]), _spec("compose", "pair", [b, a])] for a, b in pairs],
        "relation": [
            [_spec("compose", "relation", [a, b], r), _spec("compose", "relation", [b, a], OPPOSITE[r])]
            for a, b in pairs
            for r in RELATIONS
        ],
        "letters": [[_spec("letters", "letters", [], word=a + b)] for a, b in itertools.product(LETTERS, LETTERS)],
        "style one": [[_spec("style", "style", [thing])] for thing in things],
        "style two": [[_spec("style", "style", [a, b]), _spec("style", "style", [b, a])] for a, b in pairs],
    }


def specs(split: str) -> list[Spec]:
    """All specs of one split, in a fixed shuffled order. Two splits share no scene, and so no prompt.

    Raises:
        `ValueError`: if `split` is not `train`, `validation` or `test`.
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r} of the tiny world: use one of {', '.join(SPLITS)}.")
    rng = np.random.default_rng(2605)
    chosen: list[Spec] = []
    for kind, groups in _scenes_by_kind().items():
        order = [groups[i] for i in rng.permutation(len(groups))]
        held, valid = _TAKEN[kind]["test"], _TAKEN[kind]["validation"]
        part = {"test": order[:held], "validation": order[held : held + valid], "train": order[held + valid :]}[split]
        chosen += [spec for group in part for spec in group]
    return [chosen[i] for i in np.random.default_rng(1).permutation(len(chosen))]


def dataset(split: str = "train") -> Dataset:
    """Prompts of one split with the columns `prompt`, `task` and `spec` (a JSON string that the verifiers read).

    Args:
        split (`str`): `train`, `validation` or `test`. Two splits share no prompt and no scene.
    """
    from datasets import Dataset

    rows = [{"prompt": to_prompt(s), "task": s["task"], "spec": json.dumps(s)} for s in specs(split)]
    return Dataset.from_list(rows)


def to_scene(spec: Spec, rng: np.random.Generator, dusk: float | None = None) -> Scene:
    """
    A scene that fits a spec. `rng` chooses the cells that the spec leaves open. `dusk` defaults to 1 for style, else
    0.
    """
    if spec["kind"] == "letters":
        return Scene(word=spec["word"], dusk=dusk or 0.0)
    objects = spec["objects"]
    cells: tuple[int, ...]
    if spec["kind"] == "relation":
        options = RELATION_CELLS[spec["relation"]]
        cells = options[rng.integers(len(options))]
    else:
        cells = tuple(int(c) for c in rng.permutation(4)[: len(objects)])
    things = tuple(Thing(color, shape, cell) for (color, shape), cell in zip(objects, cells, strict=True))
    return Scene(things=things, dusk=(float(spec["task"] == "style") if dusk is None else dusk))


def corrupt(spec: Spec, rng: np.random.Generator) -> Spec:
    """A spec of the task compose with one thing changed: a count, a colour, a shape or a relation."""
    changed = json.loads(json.dumps(spec))
    what = int(rng.integers(3 if spec["kind"] != "pair" else 2))
    if what == 2 and spec["kind"] == "relation":
        other = [relation for relation in RELATIONS if relation != spec["relation"]]
        changed["relation"] = other[rng.integers(len(other))]
    elif what == 2:
        number = [n for n in (1, 2, 3) if n != len(spec["objects"])][rng.integers(2)]
        changed["objects"] = [list(spec["objects"][0]) for _ in range(number)]
    else:
        names = (tuple(COLORS), SHAPES)[what]
        index = int(rng.integers(len(spec["objects"])))
        old = spec["objects"][index][what]
        new = [name for name in names if name != old][rng.integers(len(names) - 1)]
        for i in range(len(spec["objects"])) if spec["kind"] == "count" else [index]:
            changed["objects"][i][what] = new
    return changed
