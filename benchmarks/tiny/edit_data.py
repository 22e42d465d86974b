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

"""Makes the rows on which the base of the world that edits is trained: prompts, given pictures and results."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from make_data import BASE_DUSK

from trl_diffusion_opd.tiny.edits import (
    EDIT_TASKS,
    draw_source,
    drawn_specs,
    edit_prompt,
    edit_spec,
    pairs,
    target_scene,
)
from trl_diffusion_opd.tiny.prompts import SPLITS, Spec, corrupt, to_scene
from trl_diffusion_opd.tiny.scenes import SHAPES, Scene, Thing, draw


# How often a result is not what its prompt asks for: the base learns to draw and edit rightly from some noise and wrongly
# from other noise. Training with rewards can improve that.
WRONG = {"draw": 0.35, "local": 0.4, "global": 0.1}


@dataclass
class Rows:
    """Prompts and uint8 pictures (N, 32, 32, 3). `sources` is `None` for the task `draw`."""

    prompts: list[str]
    sources: np.ndarray | None
    results: np.ndarray


def _wrong_shape(things: tuple[Thing, ...], index: int, rng: np.random.Generator) -> tuple[Thing, ...]:
    old = things[index]
    shapes = [shape for shape in SHAPES if shape != old.shape]
    new = Thing(old.color, shapes[rng.integers(len(shapes))], old.cell, old.offset)
    return (*things[:index], new, *things[index + 1 :])


def _wrong_edit(spec: Spec, rng: np.random.Generator) -> Scene:
    """The result of another edit of the same picture, or of the right one that changes a second thing, too."""
    pair = tuple((thing[0], thing[1]) for thing in spec["things"])
    if rng.random() < 0.5:
        other = {**edit_spec("local", (pair[0], pair[1]), rng), "things": spec["things"]}
        if other["kind"] == "recolor":
            other["shape"] = spec["things"][other["index"]][1]
        return target_scene(other, rng)
    scene = target_scene(spec, rng)
    return Scene(_wrong_shape(scene.things, int(rng.integers(len(scene.things))), rng))


def edit_rows(task: str, number: int, seed: int) -> Rows:
    """Random rows of all splits of one task, with some wrong results and a random degree of dusk."""
    rng = np.random.default_rng([seed, EDIT_TASKS.index(task)])
    wrong = rng.random(number) < WRONG[task]
    every = [pair for split in SPLITS for pair in pairs(split)]
    # Pairs as well, which given pictures show. Both kinds are equally likely, however many prompts of a kind there are.
    drawn = [[spec for split in SPLITS for spec in drawn_specs(split, kind)] for kind in ("count", "pair")]
    texts, sources, results = [], [], []
    for i in range(number):
        if task == "draw":
            group = drawn[rng.integers(len(drawn))]
            spec = group[rng.integers(len(group))]
            scene = to_scene(corrupt(spec, rng) if wrong[i] else spec, rng)
        else:
            spec = edit_spec(task, every[rng.integers(len(every))], rng)
            sources.append(np.asarray(draw_source(spec)))
            if task == "local":
                scene = _wrong_edit(spec, rng) if wrong[i] else target_scene(spec, rng)
            else:
                things = target_scene(spec, rng).things
                if wrong[i]:
                    things = _wrong_shape(things, int(rng.integers(len(things))), rng)
                scene = Scene(things, dusk=float(rng.beta(*BASE_DUSK)))
        texts.append(edit_prompt(spec))
        results.append(np.asarray(draw(scene, rng)))
    return Rows(texts, np.stack(sources) if sources else None, np.stack(results))
