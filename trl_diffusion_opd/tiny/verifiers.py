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

"""The reward functions of the tiny world. They score an image from its pixels and from what its prompt asks for.

Each task has two functions with the same signature, called by keyword with the dataset's columns. One gives a verdict
(0 or 1; for style a smooth score) for reports, the other a graded score in [0, 1] for training. Images are RGB PIL
images of 32 x 32 px. A row of another task, or without a specification, gets None ("does not apply").
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .prompts import Spec
from .scenes import (
    CELL,
    COLORS,
    INK,
    LETTER_HEIGHT,
    LETTER_MASKS,
    LETTER_WIDTH,
    LETTERS,
    PLAIN,
    SHAPE_MASKS,
    SHAPE_SIZE,
    SHAPES,
    SIZE,
    TINT,
    dusk,
)


# For a verdict of 1: minimum share of pixels with the colour, overlap with the shape, correlation with the letter.
COLOR_SHARE, SHAPE_OVERLAP, LETTER_MATCH = 0.75, 0.7, 0.75
OBJECT_PIXELS, SPECK_PIXELS = 20, 8

_DIRECTIONS = np.stack([color - PLAIN for color in COLORS.values()])
_LENGTHS = np.linalg.norm(_DIRECTIONS, axis=1)


def _pixels(image: Image.Image) -> np.ndarray:
    if image.size != (SIZE, SIZE):
        raise ValueError(f"The tiny world's verifiers need images of {SIZE} x {SIZE} px, got {image.size}.")
    return np.asarray(image.convert("RGB"), dtype=np.float64)


def _templates(masks: dict[str, np.ndarray], height: int, width: int, rows: range, columns: range) -> np.ndarray:
    """Every mask at every allowed place in a window, as an array (names, places, height * width)."""
    placed = []
    for mask in masks.values():
        for top, left in itertools.product(rows, columns):
            window = np.zeros((height, width))
            window[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
            placed.append(window.ravel())
    return np.stack(placed).reshape(len(masks), -1, height * width)


_SHAPES = _templates(SHAPE_MASKS, CELL, CELL, range(CELL - SHAPE_SIZE + 1), range(CELL - SHAPE_SIZE + 1)) > 0.5
_LETTERS = _templates(LETTER_MASKS, SIZE, CELL, range(3, SIZE - LETTER_HEIGHT - 2), range(CELL - LETTER_WIDTH + 1))
_LETTERS -= _LETTERS.mean(axis=2, keepdims=True)
_LETTERS /= np.linalg.norm(_LETTERS, axis=2, keepdims=True)


@dataclass
class Found:
    """The content of one cell: the share of its pixels in each colour, and the best overlap with each shape."""

    cell: int
    shares: np.ndarray
    overlaps: np.ndarray
    is_object: bool


def find_objects(image: Image.Image, degree: float = 0.0) -> list[Found]:
    """
    Finds the occupied cells of the board. Blurred edges have colours on the line between the ground and an object's
    colour. A pixel belongs to an object if it is nearer to the colour than to the ground on that line, or far from all
    these lines. `degree` in [0, 1] is the image's degree of styling: ground and objects are expected in its light.
    """
    ground, directions, squares = PLAIN, _DIRECTIONS, _LENGTHS**2
    if degree:
        light, tint = dusk(), TINT * degree
        ground = (1 - degree) * PLAIN + degree * light
        painted = (1 - tint) * np.stack(list(COLORS.values())) + tint * light[:, :, None]
        directions = painted - ground[:, :, None]
        squares = (directions**2).sum(axis=3)
    offset = _pixels(image) - ground
    along = (offset[:, :, None] * directions).sum(axis=3) / squares
    nearest = np.linalg.norm(offset[:, :, None] - np.clip(along, 0.0, 1.1)[..., None] * directions, axis=3)
    label = nearest.argmin(axis=2)
    residual = np.take_along_axis(nearest, label[..., None], axis=2)[..., 0]
    amount = np.take_along_axis(along, label[..., None], axis=2)[..., 0]
    clean = residual < 60
    solid = (clean & (amount > 0.5)) | (~clean & (np.linalg.norm(offset, axis=2) > 90))
    found = []
    for cell in range(4):
        rows, columns = CELL * (cell // 2), CELL * (cell % 2)
        window = (slice(rows, rows + CELL), slice(columns, columns + CELL))
        mask = solid[window].ravel()
        size = int(mask.sum())
        if size < SPECK_PIXELS:
            continue
        labels = label[window].ravel()[mask & clean[window].ravel()]
        both = (_SHAPES & mask).sum(axis=2)
        overlap = both / (_SHAPES.sum(axis=2) + size - both)
        shares = np.bincount(labels, minlength=len(COLORS)) / size
        found.append(Found(cell, shares, overlap.max(axis=1), size >= OBJECT_PIXELS))
    return found


def _relation_holds(relation: str, first: int, second: int) -> bool:
    rows, columns = second // 2 - first // 2, second % 2 - first % 2
    return {"left of": columns > 0, "right of": columns < 0, "above": rows > 0, "below": rows < 0}[relation]


def compose_scores(image: Image.Image, spec: Spec) -> tuple[float, float]:
    """The verdict and the graded score of an image for a spec with `objects` and `relation`."""
    found, wanted = find_objects(image), spec["objects"]
    colors, verdict, graded = list(COLORS), 0.0, 0.0
    exact = len(found) == len(wanted) and all(one.is_object for one in found)
    number = min(len(found), len(wanted))
    # All ways to match found objects with wanted ones; at most 4 x 3 x 2.
    for places in itertools.permutations(range(max(len(found), len(wanted))), number):
        if len(found) >= len(wanted):
            pairs = [(want, found[place]) for want, place in zip(wanted, places, strict=True)]
        else:
            pairs = [(wanted[place], one) for one, place in zip(found, places, strict=True)]
        score, right = 0.0, exact
        for (color, shape), one in pairs:
            share, overlap = one.shares[colors.index(color)], one.overlaps[SHAPES.index(shape)]
            score += 0.5 * share + 0.5 * float(np.clip((overlap - 0.4) / 0.5, 0.0, 1.0))
            best = SHAPES[int(one.overlaps.argmax())] == shape
            right = right and share >= COLOR_SHARE and best and overlap >= SHAPE_OVERLAP
        score /= max(len(found), len(wanted))
        if spec["relation"]:
            holds = False
            if len(found) >= 2:
                holds = _relation_holds(spec["relation"], pairs[0][1].cell, pairs[1][1].cell)
            score, right = score * (0.6 + 0.4 * holds), right and holds
        graded, verdict = max(graded, score), max(verdict, float(right))
    return verdict, graded


def match_letters(image: Image.Image) -> np.ndarray:
    """
    The best correlation of each half of the image with each letter, in [-1, 1], as an array (2, 26). Letters are in
    the order of `scenes.LETTER_MASKS`: first those that prompts ask for, then the others.
    """
    darkness = (PLAIN.mean() - _pixels(image).mean(axis=2)) / (PLAIN.mean() - INK.mean())
    halves = np.stack([darkness[:, :CELL].ravel(), darkness[:, CELL:].ravel()])
    halves = halves - halves.mean(axis=1, keepdims=True)
    # A blank half has no contrast. The minimum makes its correlations 0 instead of noise divided by noise.
    norms = np.maximum(np.linalg.norm(halves, axis=1), 2.0)
    return np.einsum("lok,hk->hlo", _LETTERS, halves, optimize=True).max(axis=2) / norms[:, None]


def _letters(image: Image.Image, spec: Spec) -> tuple[float, float]:
    matches = match_letters(image)
    wanted = [LETTERS.index(letter) for letter in spec["word"]]
    scores = [float(matches[slot, letter]) for slot, letter in enumerate(wanted)]
    right = all(
        matches[slot].argmax() == letter and score >= LETTER_MATCH
        for slot, (letter, score) in enumerate(zip(wanted, scores, strict=True))
    )
    return float(right), sum(float(np.clip((score - 0.4) / 0.5, 0.0, 1.0)) for score in scores) / len(scores)


_DUSK = dusk()
# The lines between and around the cells, where no scene has an object: a quarter of the image that shows only the
# ground.
_GROUND = np.zeros((SIZE, SIZE), dtype=bool)
_GROUND[[0, CELL - 1, CELL, SIZE - 1], :] = True
_GROUND[:, [0, CELL - 1, CELL, SIZE - 1]] = True
_FAR = np.linalg.norm(_DUSK - PLAIN, axis=2)


def styling(image: Image.Image) -> float:
    """How close an image's ground is to full dusk, in [0, 1]. Linear in the degree of styling."""
    near = 1 - np.linalg.norm(_pixels(image) - _DUSK, axis=2) / _FAR
    return float(np.clip(near, 0.0, 1.0)[_GROUND].mean())


def _style(image: Image.Image, spec: Spec) -> tuple[float, float]:
    score = styling(image)
    return score, score


Score = Callable[[Image.Image, Spec], tuple[float, float]]
_SCORES: dict[str, Score] = {"compose": compose_scores, "letters": _letters, "style": _style}


def score_rows(
    of_task: dict[str, Score], task: str, version: int, images: list[Image.Image], spec: list[str | None]
) -> list[float | None]:
    """The verdict (version 0) or graded score (1) of each image whose row is of the task, `None` for others."""
    scores: list[float | None] = []
    for image, text in zip(images, spec, strict=True):
        parsed = {"task": None} if text is None else json.loads(text)
        scores.append(of_task[task](image, parsed)[version] if parsed["task"] == task else None)
    return scores


def compose(images: list[Image.Image], spec: list[str | None], **_: object) -> list[float | None]:
    """1 if the image has exactly the objects of the prompt, with the right colours, shapes and relation, else 0."""
    return score_rows(_SCORES, "compose", 0, images, spec)


def compose_graded(images: list[Image.Image], spec: list[str | None], **_: object) -> list[float | None]:
    """
    The mean over objects of their scores for colour and shape. Missing and surplus objects count 0. A wrong relation
    leaves 60% of it.
    """
    return score_rows(_SCORES, "compose", 1, images, spec)


def letters(images: list[Image.Image], spec: list[str | None], **_: object) -> list[float | None]:
    """1 if both letters are clear and match best in their place, else 0."""
    return score_rows(_SCORES, "letters", 0, images, spec)


def letters_graded(images: list[Image.Image], spec: list[str | None], **_: object) -> list[float | None]:
    """The mean over both letters of the correlation with the right letter, scaled from 0 at 0.4 to 1 at 0.9."""
    return score_rows(_SCORES, "letters", 1, images, spec)


def style(images: list[Image.Image], spec: list[str | None], **_: object) -> list[float | None]:
    """How close the ground is to dusk (violet above, orange below). Linear in the degree of styling."""
    return score_rows(_SCORES, "style", 0, images, spec)


def style_graded(images: list[Image.Image], spec: list[str | None], **_: object) -> list[float | None]:
    """The same smooth score as `style`."""
    return score_rows(_SCORES, "style", 1, images, spec)


rewards = {"compose": compose, "letters": letters, "style": style}
graded_rewards = {"compose": compose_graded, "letters": letters_graded, "style": style_graded}
