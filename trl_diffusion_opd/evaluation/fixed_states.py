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
How far base and students are from each task's teacher at states that do not depend on them. See
[`~algorithms.fixed_states`].

It takes few forwards, whatever the number of images: some of the first prompts, on a coarse noise grid. Results are kept
in the journals of scores.
"""

from collections.abc import Mapping, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from ..acceleration.processes import failing_together
from ..algorithms.fixed_states import FixedStates, Velocity
from ..algorithms.opd import StepPlan
from ..algorithms.rollout import FIXED_DRAW, sample_generators
from ..algorithms.samplers import sampler_table
from ..models.teachers import TeacherBank
from ..pipelines.velocity import VelocityField
from ..reporting.report import FixedStateKL
from .identity import digest
from .plan import Plan
from .store import KnownScores, Store, merge


# Samples of each task, and the most steps of their noise grid.
NUM_SAMPLES = 4
MOST_STEPS = 10

_NAME = "fixed_state_kl"


def measure_fixed_states(
    field: VelocityField, bank: TeacherBank, plan: Plan, students: Sequence[str], store: Store | None
) -> dict[str, dict[str, FixedStateKL]]:
    """
    Measures the KL of base and students from each task's teacher on the teacher's own trajectories and on its images,
    noised again. Processes share the tasks. Call it on all of them; all return the same.

    Args:
        field ([`VelocityField`]), bank ([`TeacherBank`]): the base, and all models by name.
        plan ([`Plan`]): the tasks, and what earlier runs have found.
        students (`list[str]`): names of the students.
        store ([`Store`], *optional*): keeps the results.

    Returns:
        `dict`: by task and model, as [`retention_report`] describes it.
    """
    state = PartialState()
    models = ["base", *students]
    fresh: KnownScores = {}
    with failing_together():
        for task in [*plan.tasks][state.process_index :: state.num_processes]:
            missing = [name for name in models if _identity(plan, task, name) not in plan.found.scores]
            found = _kl_of(field, bank, plan, task, missing) if missing else {}
            for name, kl in found.items():
                identity, by_number = _identity(plan, task, name), dict(enumerate(kl.tolist()))
                fresh[identity] = by_number
                if store is not None:
                    store.record(identity, by_number)
        bank.rest()
    known = dict(plan.found.scores)
    merge(known, gather_object([fresh]))
    return {task: {name: _entry(known[_identity(plan, task, name)]) for name in models} for task in plan.tasks}


def _identity(plan: Plan, task: str, model: str) -> tuple[str, str, str]:
    """The key of a result in the journals: of both models and all that their images depend on."""
    pair = [plan.keys[name, task] for name in (f"teacher/{task}", model)]
    return digest(pair, NUM_SAMPLES, MOST_STEPS), _NAME, ""


def _kl_of(field: VelocityField, bank: TeacherBank, plan: Plan, task: str, models: Sequence[str]) -> dict[str, Tensor]:
    grid = field.with_steps(min(MOST_STEPS, field.num_inference_steps))
    steps = StepPlan.of(sampler_table("ode", grid.levels), "kl", min(1, grid.num_inference_steps - 1))
    part, numbers, batch_size = plan.tasks[task], range(NUM_SAMPLES), plan.options.batch_size
    models_by_name = {name: model for model in plan.models for name in model.names}

    def velocity(name: str) -> Velocity:
        roles, read = bank.teachers[name], part.texts(models_by_name[name].reader, numbers)

        def of_batches(x: Tensor, t: float) -> Tensor:
            texts = read * (len(x) // NUM_SAMPLES)
            batches = [slice(start, start + batch_size) for start in range(0, len(x), batch_size)]
            return torch.cat([bank.mean_velocity(grid, roles, x[rows], t, texts[rows]) for rows in batches])

        return of_batches

    generators = sample_generators([plan.options.seed, FIXED_DRAW, part.index], numbers)
    start = grid.initial_latents(part.texts("prompt", numbers), generators)
    states = FixedStates.of(velocity(f"teacher/{task}"), start, generators, steps)
    return {name: states.kl(velocity(name)) for name in models}


def _entry(kl: Mapping[int, float | None]) -> FixedStateKL:
    on_trajectories, on_images = kl[0], kl[1]
    assert on_trajectories is not None and on_images is not None  # only means of scores can lack a value
    return {"kl": (on_trajectories + on_images) / 2, "on_trajectories": on_trajectories, "on_images": on_images}
