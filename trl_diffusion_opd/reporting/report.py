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

"""The type of the retention report, which `retention_report` makes and `retention.json` holds."""

from typing import Any, NotRequired, TypedDict


Means = dict[str, dict[str, dict[str, float | None]]]  # by model, task and reward
Intervals = dict[str, dict[str, dict[str, list[float] | None]]]


class Kept(TypedDict):
    """A student's score on a task, and how much of the teacher's gain it has kept."""

    student: float | None
    retention: float | None
    ci95: list[float] | None


class KeptOverall(TypedDict):
    """The mean over the tasks that have a retention."""

    mean_retention: float | None
    mean_ci95: list[float] | None


class Setting(TypedDict):
    """A setting with which images were drawn, and where it came from: given, a student's training, or a default."""

    value: Any
    source: str


class FixedStateKL(TypedDict):
    """A model's KL from a task's teacher on the teacher's trajectories and on its images, and the mean of both."""

    kl: float
    on_trajectories: float
    on_images: float


class TaskReport(Kept):
    """A task of the report, with the entries of the first student."""

    num_images: int

    reward: str
    rewards: list[str]
    base: float | None
    teacher: float | None
    students: NotRequired[dict[str, Kept]]  # if there are several


class Report(KeptOverall):
    """The whole report. `retention_report` describes its entries."""

    tasks: dict[str, TaskReport]
    num_images: int
    seed: int
    scores: Means
    scores_ci95: Intervals
    students: NotRequired[dict[str, KeptOverall]]  # if there are several
    # By `evaluate_retention`: the SHA-256 of each student's weights, by which a model card knows
    # the report of its own; `None` for the base.
    weights_sha256: NotRequired[dict[str, str | None]]
    # By task and model, for the base and each student.
    fixed_state_kl: NotRequired[dict[str, dict[str, FixedStateKL]]]
    # How all images were drawn, and each model's guidance scale.
    settings: NotRequired[dict[str, Setting]]
    guidance_scales: NotRequired[dict[str, Setting]]
