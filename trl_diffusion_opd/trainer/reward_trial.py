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

"""Tries the rewards of a run before its first update, so that it does not end at its first evaluation."""

from collections.abc import Iterable

from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import TrainerState

from ..data.tasks import task_rows
from ..problems import Problems
from ..rewards import Row
from ..rewards.scoring import OnTimeout
from ..rewards.trial import NUM_TRIED, trial_error, trial_problem
from .image_evaluator import ImageEvaluator


def try_rewards(
    evaluator: ImageEvaluator, datasets: Iterable[Dataset], on_timeout: OnTimeout, state: TrainerState
) -> None:
    """
    Has every reward of every task score two images of noise, in one call. Only the main process does, since a call may
    cost money; call it on all of them.

    Args:
        evaluator ([`ImageEvaluator`]): the rewards of each task, and the size of images.
        datasets (`list` of [`~datasets.Dataset`]): the prompts whose images the run will score. The first dataset that
            has a task gives its rows.
        on_timeout (`str`), state ([`~transformers.TrainerState`]): as in [`Scorer`].

    Raises:
        [`Refusal`]: on all processes, if rewards fail. One message lists all of them.
    """
    args, accelerator = evaluator.args, evaluator.accelerator
    rows: dict[str, list[Row]] = {}
    for dataset in datasets:
        for task, numbers in task_rows(dataset, args.task_column).items():
            rows.setdefault(task, [dataset[int(n)] for n in numbers[:NUM_TRIED]])
    tried = [(task, function) for task in rows for function in evaluator.reward_funcs[task]]
    found: list[list[str]] = [[]]
    if tried and accelerator.is_main_process:
        image = evaluator.noise()
        for task, function in tried:
            error = trial_error(function, task, rows[task], image, args.reward_timeout, on_timeout, state)
            if error is not None:
                found[0].append(trial_problem(function, f"of task {task!r}", rows[task][0], error))
    if tried and accelerator.num_processes > 1:
        broadcast_object_list(found)
    Problems(found[0]).raise_under("Training cannot start: every reward was tried on two images of its tasks")
