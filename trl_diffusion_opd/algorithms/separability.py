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
Measures whether prompts reveal their task, and how much the tasks' teachers disagree.

A student sees the prompt but not the task. If two tasks have the same kind of prompts and their teachers disagree, the
loss is smallest at the mean of the two teachers, and the student learns only that mean.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor


# With fewer prompts a task, the accuracy is too coarse: 2 prompts of 16 change it by an eighth.
MIN_PROMPTS = 16
# Below this accuracy, prompts count as alike. Chance is 0.5.
_ALIKE = 0.75
# From this share of identical prompts on, prompts count as alike.
_IDENTICAL = 0.1
# A feature that varies by less than this part of its size is constant: in half precision an encoder's rounding depends
# on the other prompts of a batch.
_SAME = 1e-3
# From this disagreement on, teachers conflict: a student of their mean loses a sixteenth of what they teach.
_APART = 0.5
# Pairs that a warning lists: twenty tasks make 190.
_SHOWN = 10
_FOLDS = 5
_SHRINKAGE = 0.1  # of the mean variance in the directions in which prompts vary
_SEED = 0


@dataclass(frozen=True)
class Pair:
    """
    Two tasks with different teachers.

    Attributes:
        tasks: Their names.
        identical: Number of different prompts that both tasks contain.
        identical_share: The share of these prompts in the tasks' rows, in [0, 1]. Each prompt counts with its share in
            the task where it is rarer.
        accuracy: How often a classifier finds the task from a prompt's embedding; 0.5 is chance. `None` for too few
            prompts.
        disagreement: How far the teachers are apart, see [`disagreement`]; `None` if it was not measured.
    """

    tasks: tuple[str, str]
    identical: int
    identical_share: float
    accuracy: float | None
    disagreement: float | None = None

    @property
    def alike(self) -> bool:
        """Whether the prompts of the two tasks can't be told apart."""
        return self.identical_share >= _IDENTICAL or (self.accuracy is not None and self.accuracy < _ALIKE)

    @property
    def in_conflict(self) -> bool:
        """Whether the prompts are alike and the teachers disagree."""
        return self.alike and self.disagreement is not None and self.disagreement >= _APART

    def report(self) -> dict[str, list[str] | float | None]:
        """The figures as a dict, ready for JSON."""
        return {
            "tasks": list(self.tasks),
            "identical_prompts": self.identical,
            "identical_share": self.identical_share,
            "accuracy": self.accuracy,
            "disagreement": self.disagreement,
        }

    def findings(self) -> str:
        """One line that describes the conflict."""
        found = []
        if self.accuracy is not None:
            found.append(
                f"from a prompt's embedding the task is found {self.accuracy:.0%} of the time, and 50% is chance"
            )
        if self.identical:
            found.append(f"{self.identical} prompts are in both, {self.identical_share:.1%} of the rows")
        one, other = (repr(task) for task in self.tasks)
        return f"{one} and {other}: {'; '.join(found)}; the teachers are {self.disagreement:.2f} apart"


def conflict_warning(pairs: Sequence[Pair]) -> str | None:
    """
    A warning about pairs of tasks in conflict: what will happen and what to do. `None` if no pair is in conflict.
    """
    conflicts = [pair for pair in pairs if pair.in_conflict]
    if not conflicts:
        return None
    shown = [f"- {pair.findings()}" for pair in conflicts[:_SHOWN]]
    if len(conflicts) > _SHOWN:
        shown.append(f"- and {len(conflicts) - _SHOWN} more pairs")
    return "\n".join(
        [
            "The prompts of these tasks can't be told apart, and their teachers disagree on the same states:",
            *shown,
            "The distance of teachers is relative to what they change in the base: 0 means equal, 1.41 nothing in "
            "common. A student sees the prompt and not the task, so it will learn the mean of such teachers, which is "
            "only a part of each. Make what the student reads show its task: give one task a word of its own with "
            "prompt_templates, such as {'night': '{prompt}, night'}. Use that text wherever the student is used.",
        ]
    )


# Prompts


def prompt_counts(prompts: pa.Array) -> dict[str, pa.Array]:
    """The different strings of an array (`"values"`) and how often each occurs (`"counts"`)."""
    counted = prompts.value_counts()
    return {"values": counted.field("values"), "counts": counted.field("counts")}


def identical_prompts(one: Mapping[str, pa.Array], other: Mapping[str, pa.Array]) -> tuple[int, float]:
    """
    Counts the different prompts that two tasks share, and their share of the tasks' rows.

    Both tasks have the same number of prompts in an update. If a prompt makes up 10% of one task's rows and 1% of the
    other's, its share is therefore 1%.

    Args:
        one (`dict`), other (`dict`): what [`prompt_counts`] returned for each task.

    Returns:
        `tuple[int, float]`: the number, and the share in [0, 1].
    """
    found = pc.index_in(one["values"], value_set=other["values"])
    there = found.is_valid().to_numpy(zero_copy_only=False)
    of_one, of_other = (task["counts"].to_numpy() / pc.sum(task["counts"]).as_py() for task in (one, other))
    places = found.drop_null().to_numpy()
    return int(there.sum()), min(float(np.minimum(of_one[there], of_other[places]).sum()), 1.0)


# Embeddings


def prompt_features(embeddings: object) -> np.ndarray:
    """
    Reduces the output of a pipeline's text encoders for one prompt to one vector.

    Each tensor is averaged over all axes but the last: a pooled output stays as it is, and a sequence of any length
    becomes the mean of its tokens. Tokens that the pipeline masks are ignored. Features that are the same for every
    prompt (position ids, the empty prompt's embedding) may be included: [`told_apart`] drops them.

    Args:
        embeddings: The return value of `encode_prompt` for a batch with this prompt: tensors and `None`, in nested
            tuples and lists.

    Returns:
        `np.ndarray` of shape `(features,)`, float64.
    """
    tensors = list(_tensors(embeddings))
    masks = {tuple(t.shape): t for t in tensors if not t.is_floating_point() and t.ndim == 2}
    parts = []
    for tensor in tensors:
        if not tensor.is_floating_point() or tensor.ndim == 0:
            continue
        rows = tensor.detach().float().reshape(-1, tensor.shape[-1])
        mask = masks.get(tuple(tensor.shape[:-1]))
        if mask is not None and bool(mask.any()):
            rows = rows[mask.reshape(-1).bool()]
        parts.append(rows.mean(0).cpu().double().numpy())
    return np.concatenate(parts) if parts else np.zeros(0)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def told_apart(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float | None:
    """
    The cross-validated accuracy of a classifier that finds a prompt's task by the nearer mean embedding.

    Distances are scaled, in every direction, by the spread of prompts within their tasks. This is linear discriminant
    analysis with a shrunken covariance, since there are fewer prompts than features. Without the scaling, a word that
    all prompts of a task share would be lost among their differences. Each fold is classified with the means and the
    spread of the other folds. A prompt that is in both tasks is in the same fold of both.

    Args:
        one (`dict[str, np.ndarray]`), other (`dict[str, np.ndarray]`):
            Each different prompt of a task with its features from [`prompt_features`], of shape `(features,)`.

    Returns:
        `float`, *optional*: the share of correctly classified prompts, averaged over the two tasks, in [0, 1]. Chance
        is 0.5, even if the tasks have different numbers of prompts. `None` if a task has fewer than [`MIN_PROMPTS`]
        prompts.
    """
    if min(len(one), len(other)) < MIN_PROMPTS:
        return None
    x = np.stack([*one.values(), *other.values()])
    of_other = np.arange(len(x)) >= len(one)
    texts = sorted(one.keys() | other.keys())
    places = np.random.default_rng(_SEED).permutation(len(texts)) % _FOLDS
    fold_of = dict(zip(texts, places.tolist(), strict=True))
    folds = np.array([fold_of[text] for text in (*one, *other)])
    spread = x.std(0)
    varies = spread > _SAME * np.sqrt(np.square(x).mean(0))
    if not varies.any():
        return 0.5
    x = (x - x.mean(0))[:, varies] / spread[varies]
    right = np.zeros(len(x))
    for fold in range(_FOLDS):
        held, used = folds == fold, folds != fold
        side = np.sign(_nearer(x[held], x[used & ~of_other], x[used & of_other]))
        right[held] = 0.5 + 0.5 * side * np.where(of_other[held], 1, -1)
    return float((right[~of_other].mean() + right[of_other].mean()) / 2)


def _nearer(x: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """For each row of `x`, a number that is positive if the mean of `other` is nearer than that of `one`."""
    mean_one, mean_other = one.mean(0), other.mean(0)
    within = np.concatenate([one - mean_one, other - mean_other])
    gram = within @ within.T  # (prompts, prompts): smaller than the covariance, which is (features, features)
    ridge = _SHRINKAGE * np.trace(gram) / len(gram) + np.finfo(float).tiny
    inverse = np.linalg.inv(gram + ridge * np.eye(len(gram)))
    apart = mean_other - mean_one
    direction = apart - within.T @ (inverse @ (within @ apart))
    # The mean of n prompts has a noise of its own, which would make the task with fewer prompts seem farther away.
    bias = ridge * np.sum(inverse * gram) / len(gram) * (1 / len(other) - 1 / len(one)) / 2
    return (x - (mean_one + mean_other) / 2) @ direction + bias


# Teachers


def disagreement(apart: float, taught: tuple[float, float], size: float, rounding: float) -> float:
    """
    The distance of two teachers on the same states, relative to what they change in the base.

    It is `|v_A - v_B|` divided by the root mean square of `|v_A - v_base|` and `|v_B - v_base|`: 0 for equal
    velocities, the square root of 2 for changes that have nothing in common, 2 for opposite ones. A student of the
    teachers' mean differs from each by half the distance, so it loses a quarter of the squared distance from the
    squared change.

    Args:
        apart (`float`): mean squared difference of the teachers' velocities.
        taught (`tuple[float, float]`): mean squared difference of each teacher's velocity from the base's, at the
            teacher's guidance.
        size (`float`): mean squared velocity.
        rounding (`float`): relative difference of the velocities of two equal networks, caused by rounding.

    Returns:
        `float`: not negative; infinite if the base itself is compared at two guidance scales.
    """
    if apart <= rounding**2 * size:
        return 0.0
    scale = (taught[0] + taught[1]) / 2
    return math.sqrt(apart / scale) if scale > 0 else math.inf
