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
Keeps the latents of images that teachers have drawn in a folder. An interrupted run continues where it stopped, and
training reads one image at a time.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..guards.file_modes import give_usual_mode
from ..guards.files import write_json


INDEX_FILE = "index.json"
_SHARD_SIZE = 64
_KEY = "latents"


@dataclass(frozen=True)
class Shard:
    """
    A file with consecutive images of one task.

    Attributes:
        file (`str`): name of the file in the folder.
        task (`str`): the task of all its images.
        numbers (`range`): the images, counted within the task. Image `n` belongs to prompt `n // images_per_prompt`.
    """

    file: str
    task: str
    numbers: range


class LatentCache:
    """
    A folder with an index (`index.json`: settings, prompts, files) and the latents in shards (safetensors, float32).

    Args:
        folder (`str` or `Path`): the folder, which need not exist yet.
        settings (`dict`): everything that the images depend on besides their prompts, as JSON values.
        prompts (`dict[str, list[str]]`): the different prompts of each task, in a fixed order.
        images_per_prompt (`int`): number of images drawn for each prompt.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, object],
        prompts: Mapping[str, Sequence[str]],
        images_per_prompt: int,
    ):
        self.folder = Path(folder)
        self.images_per_prompt = images_per_prompt
        self.prompts = {task: list(of_task) for task, of_task in prompts.items()}
        self.settings = json.loads(json.dumps({**settings, "images_per_prompt": images_per_prompt}))
        self._places = {task: {prompt: i for i, prompt in enumerate(of)} for task, of in self.prompts.items()}
        self.shards: list[Shard] = []
        for task, of_task in self.prompts.items():
            count = len(of_task) * images_per_prompt
            for first in range(0, count, _SHARD_SIZE):
                name = f"latents-{len(self.shards):05d}.safetensors"
                self.shards.append(Shard(name, task, range(first, min(first + _SHARD_SIZE, count))))
        self._files: dict[str, Any] = {}

    def problems(self) -> list[str]:
        """
        Why the folder can't be used, one sentence each; empty if it can. It may hold images of the same settings.
        """
        path = self.folder / INDEX_FILE
        if not path.exists():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                return [f"the folder {self.folder.name!r} holds other files and no {INDEX_FILE}. Name an empty one."]
            return []
        index = json.loads(path.read_text(encoding="utf-8"))
        recorded = index["settings"]
        differing = sorted(key for key in {*recorded, *self.settings} if recorded.get(key) != self.settings.get(key))
        if index["prompts"] != self.prompts:
            differing.append("prompts")
        if not differing:
            return []
        return [
            f"the images in {self.folder.name!r} were made with other settings ({', '.join(differing)}). Use those "
            "again, or name another folder."
        ]

    def start(self) -> None:
        """Writes the index, unless it exists."""
        path = self.folder / INDEX_FILE
        if path.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "settings": self.settings,
            "digest": hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest(),
            "prompts": self.prompts,
            "shards": [
                {"file": shard.file, "task": shard.task, "first": shard.numbers.start, "images": len(shard.numbers)}
                for shard in self.shards
            ],
        }
        write_json(path, content, ensure_ascii=False)

    def missing(self) -> list[Shard]:
        """The shards that have not been written yet."""
        return [shard for shard in self.shards if not (self.folder / shard.file).exists()]

    def prompts_of(self, shard: Shard) -> list[str]:
        return [self.prompts[shard.task][number // self.images_per_prompt] for number in shard.numbers]

    def write(self, shard: Shard, latents: Tensor) -> None:
        """
        Writes the latents of a shard, of shape `(len(shard.numbers), ...)`. A killed process leaves no partial file.
        """
        path = self.folder / shard.file
        unfinished = path.with_suffix(".unfinished")
        save_file({_KEY: latents.detach().to("cpu", torch.float32).contiguous()}, unfinished)
        give_usual_mode(self.folder, unfinished.name)
        os.replace(unfinished, path)

    def read(self, task: str, prompt: str, which: int) -> Tensor:
        """The latents of image `which` (from 0 to `images_per_prompt` - 1) of a prompt, on the CPU."""
        number = self._places[task][prompt] * self.images_per_prompt + which
        shard = next(shard for shard in self.shards if shard.task == task and number in shard.numbers)
        if shard.file not in self._files:
            self._files[shard.file] = safe_open(self.folder / shard.file, "pt").get_slice(_KEY)
        row = number - shard.numbers.start
        return self._files[shard.file][row : row + 1][0]
