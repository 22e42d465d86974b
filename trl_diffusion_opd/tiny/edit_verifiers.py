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

"""The reward functions of the world that edits. They know the given picture's scene from the row's `spec`.

As in `verifiers.py`, each task has a verdict, 0 or 1, for reports, and a graded score in [0, 1] for training. A row of
another task, or without a specification, gets None ("does not apply").
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from .edits import draw_source, source_scene, target_scene
from .prompts import Spec
from .scenes import CELL, COLORS, SHAPES, Scene, Thing, draw
from .verifiers import COLOR_SHARE, SHAPE_OVERLAP, Found, Score, compose_scores, find_objects, score_rows, styling


# For a verdict of 1: the greatest mean difference of a cell that must stay (in 0..1), and the least degree of dusk.
MOST_CHANGE, LEAST_DUSK = 0.06, 0.8


def _float(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float64) / 255


def _cell(pixels: np.ndarray, cell: int) -> np.ndarray:
    row, column = CELL * (cell // 2), CELL * (cell % 2)
    return pixels[row : row + CELL, column : column + CELL]


def _is(one: Found, thing: Thing) -> bool:
    """Whether what was found in a cell is a thing, by the measures of the first world."""
    overlap = one.overlaps[SHAPES.index(thing.shape)]
    return bool(
        one.is_object
        and one.shares[list(COLORS).index(thing.color)] >= COLOR_SHARE
        and overlap == one.overlaps.max()
        and overlap >= SHAPE_OVERLAP
    )


def _shows(found: Sequence[Found], scene: Scene) -> bool:
    """Whether exactly the things of a scene were found, each in its cell."""
    cells = {one.cell: one for one in found}
    return len(found) == len(scene.things) and all(
        thing.cell in cells and _is(cells[thing.cell], thing) for thing in scene.things
    )


def _targets(spec: Spec) -> list[Scene]:
    """All results that a row of `local` allows: a thing may be added in any free cell, a pixel to each side."""
    if spec["kind"] != "add":
        return [target_scene(spec, np.random.default_rng(0))]
    kept = source_scene(spec).things
    free = [cell for cell in range(4) if cell not in {thing.cell for thing in kept}]
    new = [
        Thing(spec["color"], spec["shape"], *at) for at in itertools.product(free, itertools.product((2, 3), (2, 3)))
    ]
    return [Scene((*kept, thing)) for thing in new]


def _edited(spec: Spec, target: Scene) -> int:
    """The cell that changes."""
    cell = target.things[2].cell if spec["kind"] == "add" else spec["things"][spec["index"]][2]
    return int(cell)


def _local(image: Image.Image, spec: Spec) -> tuple[float, float]:
    """
    The graded score is half the way that the edited cell has gone from the source to the target, and half how much of
    the other three cells has stayed: the mean difference of each, from 0 to as much as an object's coming or going.
    """
    pixels, source = _float(image), _float(draw_source(spec))
    found, graded, verdict = find_objects(image), 0.0, 0.0
    for target in _targets(spec):
        wanted, edited = _float(draw(target, np.random.default_rng(0))), _edited(spec, target)
        gone = (
            1
            - np.abs(_cell(pixels, edited) - _cell(wanted, edited)).mean()
            / np.abs(_cell(source, edited) - _cell(wanted, edited)).mean()
        )
        changes = [np.abs(_cell(pixels, cell) - _cell(source, cell)).mean() for cell in range(4) if cell != edited]
        stayed = np.mean([np.clip(1 - change / (3 * MOST_CHANGE), 0.0, 1.0) for change in changes])
        graded = max(graded, 0.5 * float(np.clip(gone, 0.0, 1.0)) + 0.5 * float(stayed))
        verdict = max(verdict, float(_shows(found, target) and max(changes) <= MOST_CHANGE))
    return verdict, graded


def _degree(image: Image.Image) -> float:
    return float(np.clip(styling(image), 0.0, 1.0))


def _global(image: Image.Image, spec: Spec) -> tuple[float, float]:
    """
    The graded score is half the degree of dusk of the ground, and half the mean over the given picture's things of how
    well each is still in its cell, seen in that light.
    """
    scene, degree = source_scene(spec), _degree(image)
    found = find_objects(image, degree)
    cells = {one.cell: one for one in found}
    kept = 0.0
    for thing in scene.things:
        if thing.cell in cells:
            one = cells[thing.cell]
            share, overlap = one.shares[list(COLORS).index(thing.color)], one.overlaps[SHAPES.index(thing.shape)]
            kept += 0.5 * share + 0.5 * float(np.clip((overlap - 0.4) / 0.5, 0.0, 1.0))
    kept /= max(len(found), len(scene.things))
    return float(degree >= LEAST_DUSK and _shows(found, scene)), 0.5 * degree + 0.5 * kept


_SCORES: dict[str, Score] = {"draw": compose_scores, "local": _local, "global": _global}


def draw_verdict(images: list[Image.Image], spec: list[str | None], **_: object) -> list[float | None]:
    """1 if the image has exactly the objects of the prompt, with the right colours and shapes, else 0."""
    return score_rows(_SCORES, "draw", 0, images, spec)


def draw_graded(images: list[Image.Image], spec: list[str | None], **_: object) -> list[float | None]:
    """The mean over objects of their scores for colour and shape. Missing and surplus objects count 0."""
    return score_rows(_SCORES, "draw", 1, images, spec)


def local_verdict(images: list[Image.Image], spec: list[str | None], **_: object) -> list[float | None]:
    """1 if the asked-for thing has changed and nothing else, else 0."""
    return score_rows(_SCORES, "local", 0, images, spec)


def local_graded(images: list[Image.Image], spec: list[str | None], **_: object) -> list[float | None]:
    """Half how far the edited cell has come from the given picture to the result, and half how much the rest stayed."""
    return score_rows(_SCORES, "local", 1, images, spec)


def global_verdict(images: list[Image.Image], spec: list[str | None], **_: object) -> list[float | None]:
    """1 if the ground is at dusk (a degree of at least 0.8) and shows the given picture's things, else 0."""
    return score_rows(_SCORES, "global", 0, images, spec)


def global_graded(images: list[Image.Image], spec: list[str | None], **_: object) -> list[float | None]:
    """Half the ground's degree of dusk, and half how well the things of the given picture are kept."""
    return score_rows(_SCORES, "global", 1, images, spec)


edit_rewards = {"draw": draw_verdict, "local": local_verdict, "global": global_verdict}
edit_graded_rewards = {"draw": draw_graded, "local": local_graded, "global": global_graded}
