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
Checks before the first step whether tasks with different teachers can be told apart by their prompts and, if not,
whether their teachers disagree. A student sees only what it reads, so it would learn the mean of such teachers.

It encodes only some prompts, those that training begins with, and their embeddings are kept. Teachers are computed
only for tasks that can't be told apart. No weight and no random state changes, and every process finds the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn

from ..algorithms.flow import velocity_gap_sq
from ..algorithms.rollout import TASKS_DRAW, sample_generators, walk
from ..algorithms.samplers import sampler_table
from ..algorithms.separability import (
    MIN_PROMPTS,
    Pair,
    disagreement,
    identical_prompts,
    prompt_counts,
    prompt_features,
    told_apart,
)
from ..data.readers import Readers, Texts
from ..data.tasks import TaskSampler
from ..models.teachers import THE_BASE, Role, TeacherBank
from ..pipelines.velocity import VelocityField
from .rounds import Rounds


# The most prompts that are encoded: of each task, and of all tasks (more if each task would otherwise have too few).
_PROMPTS_A_TASK = 128
_PROMPTS = 512
# Number of denoising steps at which teachers are compared.
_STATES = 3

Key = tuple[tuple[str, float, float], ...]


@dataclass(frozen=True)
class TaskComparison:
    """
    Compares the tasks that have different teachers, two at a time.

    Args:
        field ([`VelocityField`]), bank ([`TeacherBank`]), accelerator ([`~accelerate.Accelerator`])
        student (`nn.Module`): the network on whose trajectory teachers are compared.
        rounds ([`Rounds`]), prompts ([`~datasets.Dataset`]): the tasks, and the prompts of the training data.
        readers ([`Readers`]): what each model reads of them.
        batch_size (`int`): samples of a micro-batch on a process.
        guidance_scale (`float`): the student's guidance scale in training.
        seed (`int`): the run's seed.
        mixed_dtype (`torch.dtype`, *optional*): the dtype of mixed precision.
        rest (`Callable`): called after prompts were encoded, to offload the encoders.
    """

    field: VelocityField
    bank: TeacherBank
    student: nn.Module
    accelerator: Accelerator
    rounds: Rounds
    prompts: Dataset
    readers: Readers
    batch_size: int
    guidance_scale: float
    seed: int
    mixed_dtype: torch.dtype | None
    rest: Callable[[], None]

    def pairs(self, sampler: TaskSampler, thorough: bool = False) -> list[Pair]:
        """
        Compares each pair of tasks with different teachers. All processes must call it.

        Args:
            sampler ([`TaskSampler`]): the sampler of the training data.
            thorough (`bool`, *optional*, defaults to `False`):
                Whether to compare the teachers of all pairs, not only of those whose prompts can't be told apart.

        Returns:
            `list[Pair]`: the pairs, the most alike first. The same on every process.
        """
        tasks, roles = self.rounds.tasks, self.bank.teachers
        keys = {task: _key(roles[task]) for task in tasks}
        compared = [(a, b) for a, b in combinations(tasks, 2) if keys[a] != keys[b]]
        if not compared:
            return []
        concerned = [task for task in tasks if any(task in pair for pair in compared)]
        texts = self.prompts.with_format("arrow")[:]["prompt"]
        counts = {
            task: prompt_counts(self.readers.student_column(task, texts.take(self.rounds.rows[task])))
            for task in concerned
        }
        features = self._features(sampler, [task for task in concerned if len(counts[task]["values"]) >= MIN_PROMPTS])
        pairs = [
            Pair(
                (a, b), *identical_prompts(counts[a], counts[b]), told_apart(features.get(a, {}), features.get(b, {}))
            )
            for a, b in compared
        ]
        asked = [pair.tasks for pair in pairs if thorough or pair.alike]
        apart = self._disagreements(sampler, asked) if asked else {}
        self.field.encode_together([])  # the prompts of an evaluation belong to no update
        pairs = [replace(pair, disagreement=apart.get(pair.tasks)) for pair in pairs]
        return sorted(
            pairs, key=lambda pair: (pair.accuracy is None, pair.accuracy, -pair.identical_share, pair.tasks)
        )

    def _features(self, sampler: TaskSampler, tasks: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
        """Computes features of some prompts of each task, by their texts. Each process encodes its share."""
        field, accelerator, every = self.field, self.accelerator, self.rounds.tasks
        limit = min(_PROMPTS_A_TASK, max(_PROMPTS // len(every), 2 * MIN_PROMPTS))
        companies = [
            (task, list(dict.fromkeys(self.readers.texts_of(task, self.prompts[rows.tolist()]).student)))
            for task, of_task in zip(every, sampler.first_companies(limit), strict=True)
            if task in tasks
            for rows in of_task
        ]
        # Grouped as in training, so that training finds these embeddings in the cache.
        field.encode_together([prompts for _, prompts in companies])
        mine = []
        for task, prompts in companies[accelerator.process_index :: accelerator.num_processes]:
            for prompt, embeddings in zip(prompts, field.embeddings(prompts, self.guidance_scale), strict=True):
                mine.append((task, prompt, prompt_features(embeddings)))
        self.rest()
        features: dict[str, dict[str, np.ndarray]] = {task: {} for task in tasks}
        for task, prompt, vector in sorted(gather_object(mine), key=lambda item: item[:2]):
            features[task].setdefault(prompt, vector)
        return features

    @torch.no_grad()
    def _disagreements(self, sampler: TaskSampler, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
        """Computes how far each pair's teachers are apart, at latents of the student for prompts of both tasks."""
        sums = {pair: torch.zeros(4, dtype=torch.float64) for pair in pairs}
        for task in dict.fromkeys(task for pair in pairs for task in pair):
            for pair, figures in self._walk(sampler, task, [pair for pair in pairs if task in pair]).items():
                sums[pair] += figures.cpu().double()
        means = np.mean(gather_object([torch.stack([*sums.values()]).numpy()]), axis=0)
        limit = self.bank.backbone.rounding(self.mixed_dtype)
        return {
            pair: disagreement(apart, (one, other), size, limit)
            for pair, (apart, one, other, size) in zip(sums, means.tolist(), strict=True)
        }

    def _walk(
        self, sampler: TaskSampler, task: str, pairs: Sequence[tuple[str, str]]
    ) -> dict[tuple[str, str], Tensor]:
        """
        Samples a short trajectory of the student for the task's prompts and compares the targets of each pair at its
        states.

        Returns for each pair a tensor of shape `(4,)` with sums over the states: the mean squared difference of the
        two targets, that of each target to the base, and the mean square of the first target.
        """
        field, bank, scale = self.field, self.bank, self.guidance_scale
        texts, numbers = self._batch(sampler, task)
        asked = {_key(bank.teachers[name]): bank.teachers[name] for pair in pairs for name in pair}
        bases = {_key(roles): roles for roles in map(_as_base, [*asked.values()])}
        scales = sorted({scale, *(role.guidance_scale for roles in asked.values() for role in roles)})
        for read in dict.fromkeys(map(tuple, (texts.student, texts.teacher, texts.prompt))):
            field.encode_prompts([*read], scales)
        for roles in asked.values():
            bank.encode_prompts(roles, texts.teacher)
        self.rest()
        levels = field.levels[np.unique(np.linspace(0, field.num_inference_steps, _STATES + 1).round().astype(int))]
        sums: dict[tuple[str, str], Tensor] = {}

        def velocity(j: int, x: Tensor, z: Tensor | None) -> Tensor:
            t = float(levels[j])
            targets = {key: bank.mean_velocity(field, roles, x, t, texts.teacher) for key, roles in asked.items()}
            starts = {
                key: targets[key]
                if key in targets and texts.teacher == texts.prompt
                else bank.mean_velocity(field, roles, x, t, texts.prompt)
                for key, roles in bases.items()
            }
            for pair in pairs:
                roles = [bank.teachers[name] for name in pair]
                one, other = (targets[_key(of_task)] for of_task in roles)
                first, second = (starts[_key(_as_base(of_task))] for of_task in roles)
                gaps = [velocity_gap_sq(*both).mean() for both in ((one, other), (one, first), (other, second))]
                figures = torch.stack([*gaps, one.square().mean()])
                sums[pair] = sums[pair] + figures if pair in sums else figures
            return field(x, t, texts.student, scale, self.student)

        x = field.initial_latents(texts.student, sample_generators([self.seed, 0, TASKS_DRAW], numbers))
        walk(velocity, x, sampler_table("ode", levels, None))
        return sums

    def _batch(self, sampler: TaskSampler, task: str) -> tuple[Texts, list[int]]:
        """Returns what is read of this process's part of the first rows of a task in training, and their numbers."""
        size, accelerator = self.batch_size, self.accelerator
        numbers = np.arange(size) + accelerator.process_index * size
        companies = sampler.first_companies(size * accelerator.num_processes)[self.rounds.tasks.index(task)]
        rows = np.resize(np.concatenate(companies), size * accelerator.num_processes)[numbers]
        return self.readers.texts(task, (self.prompts[int(row)] for row in rows)), numbers.tolist()


def _key(roles: Sequence[Role]) -> Key:
    """Identifies the teachers of a task. Tasks with the same teachers are never in conflict."""
    return tuple(sorted((role.teacher.name, role.guidance_scale, role.weight) for role in roles))


def _as_base(roles: Sequence[Role]) -> list[Role]:
    """Replaces each teacher by the base, at the teacher's guidance scale."""
    return [replace(role, teacher=THE_BASE, field=None) for role in roles]
