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

"""The tiny worlds, for demos and tests: a 32 px `StableDiffusion3Pipeline` that draws, and a `FluxKontextPipeline` that
draws and edits, each with three teachers, prompts and rewards.

Importing it loads only numpy and PIL. The weights are ordinary folders that diffusers and PEFT can load.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from .edit_verifiers import edit_graded_rewards, edit_rewards
from .edits import EDIT_TASKS, edit_dataset, render_edit
from .prompts import TASKS, dataset
from .verifiers import graded_rewards, rewards


_WEIGHTS = Path(__file__).parent / "weights"

BASE = str(_WEIGHTS / "base")
TEACHERS = {task: str(_WEIGHTS / "teachers" / task) for task in TASKS}
EDIT = str(_WEIGHTS / "edit_base")
EDIT_TEACHERS = {task: str(_WEIGHTS / "edit_teachers" / task) for task in EDIT_TASKS}


def render(spec: str, seed: int = 0, dusk: float | None = None) -> Image.Image:
    """Draws a correct image for one row of the dataset.

    Args:
        spec (`str`): the row's `spec` column.
        seed (`int`, *optional*, defaults to 0): seed of everything that the prompt leaves open, such as positions.
        dusk (`float`, *optional*): degree of styling in [0, 1]. Defaults to 1 for style prompts and 0 for others.
    """
    import json

    import numpy as np

    from .prompts import to_scene
    from .scenes import draw

    rng = np.random.default_rng(seed)
    return draw(to_scene(json.loads(spec), rng, dusk), rng)


__all__ = [
    "BASE",
    "EDIT",
    "EDIT_TASKS",
    "EDIT_TEACHERS",
    "TASKS",
    "TEACHERS",
    "dataset",
    "edit_dataset",
    "edit_graded_rewards",
    "edit_rewards",
    "graded_rewards",
    "render",
    "render_edit",
    "rewards",
]
