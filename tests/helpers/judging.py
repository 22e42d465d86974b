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

"""Loads a mutated teacher (see `mutations.py`) and says whether the outcome is right."""

import copy
import re
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import regex
import torch
from helpers.mutations import Stranger, mutate, reference, sound_teachers
from helpers.tiny_sd3 import forward, make_pipeline

from trl_diffusion_opd.models.backbone import Backbone
from trl_diffusion_opd.models.teachers import TeacherBank, parse_teacher
from trl_diffusion_opd.problems import Refusal


@dataclass(frozen=True)
class Verdict:
    """Of one teacher: what was changed, what came of it in how many seconds, and whether that is right."""

    teacher: str
    mutation: str
    right: str
    result: str
    is_right: bool
    seconds: float


class Judge:
    """Mutates sound teachers, made in a folder, and judges how they are loaded."""

    def __init__(self, work: Path):
        self.folder = work / "the-teacher"
        self.pipeline = make_pipeline()
        self.base = forward(self.pipeline.transformer)
        self.sound = sound_teachers(self.pipeline, work / "sound")
        self.velocities = {}
        for name, it in self.sound.items():
            it.write(work / "written" / name)
            self.velocities[name] = self._load(work / "written" / name)
            expected = forward(reference(it, work / "written" / name, self.pipeline.transformer))
            assert _is_close(self.velocities[name], expected) and not _is_close(self.velocities[name], self.base), name

    def _load(self, folder: Path) -> torch.Tensor:
        model = copy.deepcopy(self.pipeline.transformer)
        bank = TeacherBank(Backbone(model), self.pipeline, {"t": [parse_teacher(str(folder))]}, 1.0)
        with bank.use(bank.teachers["t"][0]) as module:
            return forward(module)

    def __call__(self, seed: int) -> Verdict:
        """Mutates and judges the teacher of a seed."""
        name, mutation, right = mutate(seed, self.sound, self.folder)
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                velocity = self._load(self.folder)
            except Exception as error:  # what is raised is what is judged
                seconds = time.perf_counter() - start
                start_of_it = rf"The teachers cannot be used:\n- task 't': {self.folder.name}(/[\w.]+)?: "
                is_right = type(error) is Refusal and re.match(start_of_it, str(error)) is not None
                is_right = is_right and len(str(error)) < 3000
                said = str(error).removeprefix("The teachers cannot be used:\n- task 't': the-teacher: ")
                return Verdict(
                    name, mutation, right, f"refused: {said}" if is_right else repr(error), is_right, seconds
                )
            seconds = time.perf_counter() - start
            result, is_right = self._judge(self.sound[name], velocity, right, self.velocities[name])
        return Verdict(name, mutation, right, result, is_right, seconds)

    def _reference(self, it: Stranger) -> torch.Tensor:
        try:
            with _deadline(2):
                return forward(reference(it, self.folder, self.pipeline.transformer))
        except TimeoutError:  # of a pattern, which another engine may match sooner
            with _deadline(5), patch("peft.utils.other.re", regex), patch("peft.tuners.tuners_utils.re", regex):
                return forward(reference(it, self.folder, self.pipeline.transformer))

    def _judge(self, it: Stranger, velocity: torch.Tensor, right: str, own: torch.Tensor) -> tuple[str, bool]:
        if right == "refuse":
            return "loaded what is to be refused", False
        if not velocity.isfinite().all():
            return "loaded to what is not finite", False
        if torch.equal(velocity, self.base):
            return "loaded to the base", False
        if right == "reference":
            try:
                own = self._reference(it)
            except Exception as error:  # the library can't: then nothing but the sound one's function is right
                right = f"same ({type(error).__name__} in the library)"
        is_right = _is_close(velocity, own)
        return f"loaded to {'the' if is_right else 'another'} function, {right}", is_right


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Within it a library that takes longer is stopped: some patterns would keep `re` for ever."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _is_close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours.double() - theirs.double()).norm() <= 1e-5 * theirs.double().norm())
