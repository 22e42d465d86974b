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

"""Makes the pictures and captions on which the tiny base is trained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trl_diffusion_opd.tiny.prompts import SPLITS, TASKS, Spec, corrupt, specs, to_prompt, to_scene
from trl_diffusion_opd.tiny.scenes import LETTERS, draw


# How often a training picture does not match its caption. The base's mistakes come from this, not from a lack of
# capacity: it draws each prompt correctly from some noise and wrongly from other noise. Training with rewards can
# improve that.
WRONG_COMPOSE = 0.35
WRONG_LETTER = 0.28
BASE_DUSK = (1.0, 2.4)  # the base's degree of styling: Beta(1, 2.4), mean 0.29


@dataclass
class Pictures:
    """Captions and uint8 images (N, 32, 32, 3)."""

    prompts: list[str]
    images: np.ndarray


def _sampled_specs(task: str, splits: tuple[str, ...], number: int, rng: np.random.Generator) -> list[Spec]:
    # All kinds of compose prompts are equally likely, however many prompts of a kind there are.
    groups: dict[str, list[Spec]] = {}
    for split in splits:
        for spec in specs(split):
            if spec["task"] == task:
                groups.setdefault(spec["kind"], []).append(spec)
    names = sorted(groups)
    picked = [groups[names[i]] for i in rng.integers(len(names), size=number)]
    return [group[rng.integers(len(group))] for group in picked]


def _misspell(spec: Spec, rng: np.random.Generator) -> Spec:
    word = [letter if rng.random() > WRONG_LETTER else LETTERS[rng.integers(len(LETTERS))] for letter in spec["word"]]
    return {**spec, "word": "".join(word)}


def base_pictures(
    number: int,
    seed: int,
    shares: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3),
    wrong_compose: float = WRONG_COMPOSE,
) -> Pictures:
    """The base's training data: prompts of all splits, with some wrong captions and a random degree of styling.

    `shares` are the tasks' shares of the pictures, in the order of `TASKS`.
    """
    rng = np.random.default_rng(seed)
    prompts, images = [], []
    for task, share in zip(TASKS, shares, strict=True):
        for spec in _sampled_specs(task, SPLITS, round(number * share), rng):
            shown, dusk = spec, None
            if task == "compose" and rng.random() < wrong_compose:
                shown = corrupt(spec, rng)
            if task == "letters":
                shown = _misspell(spec, rng)
            if task == "style":
                dusk = float(rng.beta(*BASE_DUSK))
            prompts.append(to_prompt(spec))
            images.append(np.asarray(draw(to_scene(shown, rng, dusk), rng)))
    return Pictures(prompts, np.stack(images))


def styled_pictures(number: int, seed: int) -> Pictures:
    """Fully styled pictures of the train split's style prompts."""
    rng = np.random.default_rng(seed)
    chosen = _sampled_specs("style", ("train",), number, rng)
    images = [np.asarray(draw(to_scene(spec, rng), rng)) for spec in chosen]
    return Pictures([to_prompt(spec) for spec in chosen], np.stack(images))


def letters_pictures(number: int, seed: int) -> Pictures:
    """Rightly spelled pictures of the train split's letters prompts."""
    rng = np.random.default_rng(seed)
    chosen = _sampled_specs("letters", ("train",), number, rng)
    images = [np.asarray(draw(to_scene(spec, rng), rng)) for spec in chosen]
    return Pictures([to_prompt(spec) for spec in chosen], np.stack(images))
