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

"""Draws the scenes of the tiny world: 32 x 32 px images of a board with 2 x 2 cells."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image


SIZE = 32
CELL = 16  # a cell is 2 x 2 tokens of the transformer: small models place whole tokens best
SHAPE_SIZE = 11
LETTER_WIDTH, LETTER_HEIGHT = 12, 20

PLAIN = np.array([238.0, 238.0, 232.0])
INK = np.array([35.0, 35.0, 45.0])
COLORS = {
    "red": np.array([220.0, 50.0, 47.0]),
    "green": np.array([40.0, 160.0, 70.0]),
    "blue": np.array([45.0, 90.0, 210.0]),
    "yellow": np.array([240.0, 200.0, 40.0]),
}
SHAPES = ("ring", "square", "triangle")
TINT = 0.3  # of the objects at full dusk: styling tints them as well, like evening light
DUSK_TOP, DUSK_BOTTOM = np.array([96.0, 60.0, 150.0]), np.array([240.0, 140.0, 60.0])

# Any two letters differ in at least two of the fifteen squares, so that a blurred letter doesn't look like another.
GLYPHS = {
    "A": "010 101 111 101 101",
    "C": "111 100 100 100 111",
    "H": "101 101 111 101 101",
    "J": "001 001 001 101 111",
    "L": "100 100 100 100 111",
    "N": "111 101 101 101 101",
    "P": "111 101 111 100 100",
    "S": "111 100 111 001 111",
    "T": "111 010 010 010 010",
    "X": "101 101 010 101 101",
    "Y": "101 101 010 010 010",
    "Z": "111 001 010 100 111",
}
LETTERS = tuple(GLYPHS)
# Letters that no prompt asks for. The verifier must know them, or it would take an F for a blurred P.
OTHER_GLYPHS = {
    "B": "110 101 110 101 110",
    "D": "110 101 101 101 110",
    "E": "111 100 111 100 111",
    "F": "111 100 111 100 100",
    "G": "111 100 101 101 111",
    "I": "010 010 010 010 010",
    "K": "101 101 110 101 101",
    "M": "101 111 111 101 101",
    "O": "111 101 101 101 111",
    "Q": "111 101 101 111 001",
    "R": "111 101 111 110 101",
    "U": "101 101 101 101 111",
    "V": "101 101 101 101 010",
    "W": "101 101 111 111 101",
}


@dataclass(frozen=True)
class Thing:
    """
    One object on the board: a colour, a shape and its cell (0 top left, 1 top right, 2 bottom left, 3 bottom right).
    `offset` is its place within the cell in pixels (down, right), each 2 or 3; `None` leaves it to the drawing.
    """

    color: str
    shape: str
    cell: int
    offset: tuple[int, int] | None = None


@dataclass(frozen=True)
class Scene:
    """Everything that an image shows. `dusk` in [0, 1] is the degree of styling."""

    things: tuple[Thing, ...] = ()
    word: str = ""
    dusk: float = 0.0


def _shape_mask(shape: str) -> np.ndarray:
    sub = 8
    axis = (np.arange(SHAPE_SIZE * sub) + 0.5) / sub - SHAPE_SIZE / 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    half = SHAPE_SIZE / 2
    if shape == "ring":
        radius = np.hypot(x, y)
        inside = (radius <= half) & (radius >= 2.4)
    elif shape == "square":
        inside = np.ones_like(x, dtype=bool)
    else:
        inside = np.abs(x) <= (y + half) / 2
    return inside.reshape(SHAPE_SIZE, sub, SHAPE_SIZE, sub).mean(axis=(1, 3))


def _letter_mask(glyph: str) -> np.ndarray:
    grid = np.array([[float(bit) for bit in row] for row in glyph.split()])
    return np.kron(grid, np.ones((4, 4)))


SHAPE_MASKS = {shape: _shape_mask(shape) for shape in SHAPES}
LETTER_MASKS = {letter: _letter_mask(glyph) for letter, glyph in {**GLYPHS, **OTHER_GLYPHS}.items()}


def dusk() -> np.ndarray:
    """The fully styled background, float (32, 32, 3) in 0..255: violet at the top, orange at the bottom."""
    ramp = np.linspace(0.0, 1.0, SIZE)[:, None, None]
    return np.broadcast_to((1 - ramp) * DUSK_TOP + ramp * DUSK_BOTTOM, (SIZE, SIZE, 3)).copy()


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draws a scene as an RGB image of 32 x 32 px. `rng` moves every object without an offset by up to a pixel."""
    canvas = (1 - scene.dusk) * PLAIN + scene.dusk * dusk()
    tint = TINT * scene.dusk
    light = dusk()

    def paint(mask: np.ndarray, top: int, left: int, color: np.ndarray) -> None:
        window = (slice(top, top + mask.shape[0]), slice(left, left + mask.shape[1]))
        paint_color = (1 - tint) * color + tint * light[window]
        canvas[window] += mask[..., None] * (paint_color - canvas[window])

    for thing in scene.things:
        row, column = CELL * (thing.cell // 2), CELL * (thing.cell % 2)
        down, right = thing.offset or (int(rng.integers(2, 4)), int(rng.integers(2, 4)))
        paint(SHAPE_MASKS[thing.shape], row + down, column + right, COLORS[thing.color])
    if scene.word:
        top = int(rng.integers(5, 8))
        for slot, letter in enumerate(scene.word):
            paint(LETTER_MASKS[letter], top, CELL * slot + int(rng.integers(2, 4)), INK)
    return Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))
