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
How well the tasks can be told apart by their prompts, and whether that matters: the figures and what they mean.

A student sees the prompt and not the task. Where two tasks have the same kind of prompts and their teachers pull apart, the
least loss is at the mean of the two, and the student keeps of each what the mean has of it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor


# With fewer prompts a task the accuracy says little: two of 16 are an eighth of it.
MIN_PROMPTS = 16
# An accuracy below it, of which .5 is chance.
_ALIKE = 0.75
# A share of identical prompts from which on it matters.
_IDENTICAL = 0.1
# What varies by less of its size is constant: encoders in half precision round it differently in other company.
_SAME = 1e-3
# At .5 a student of the mean loses a sixteenth of what the two teach: see `disagreement`.
_APART = 0.5
# Twenty tasks make 190 pairs.
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
        identical: How many different prompts both have.
        identical_share: What part of a task's rows these are, each counted by the task in which it is rarer; in [0, 1].
        accuracy: Of telling the task of a prompt by its embedding, 0.5 is chance; `None` with too few prompts to say.
        disagreement: See [`disagreement`]; `None` where it was not measured.
    """

    tasks: tuple[str, str]
    identical: int
    identical_share: float
    accuracy: float | None
    disagreement: float | None = None

    @property
    def alike(self) -> bool:
        """Whether the prompts can't be told apart."""
        return self.identical_share >= _IDENTICAL or (self.accuracy is not None and self.accuracy < _ALIKE)

    @property
    def in_conflict(self) -> bool:
        """Whether, besides, the teachers pull apart."""
        return self.alike and self.disagreement is not None and self.disagreement >= _APART

    def report(self) -> dict[str, list[str] | float | None]:
        """The figures under their names, ready for JSON."""
        return {
            "tasks": list(self.tasks),
            "identical_prompts": self.identical,
            "identical_share": self.identical_share,
            "accuracy": self.accuracy,
            "disagreement": self.disagreement,
        }

    def findings(self) -> str:
        """A conflict in words."""
        found = []
        if self.accuracy is not None:
            found.append(f"by their embeddings {self.accuracy:.0%} are told right, where 50% is chance")
        if self.identical:
            found.append(f"{self.identical} prompts are in both, {self.identical_share:.1%} of the rows")
        one, other = (repr(task) for task in self.tasks)
        return f"{one} and {other}: {'; '.join(found)}; the teachers are {self.disagreement:.2f} apart"


def conflict_warning(pairs: Sequence[Pair]) -> str | None:
    """What will come of the conflicts among pairs of tasks, and what to do; `None` if there are none."""
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
            "How far teachers are apart is in units of what they teach: 0 is the same, 1.41 has nothing in common. A student sees "
            "the prompt and not the task, so it will learn the mean of such teachers and keep a part of each. Make the prompts say "
            "which task they are of, such as by a word in front that is in all prompts of the task and in no other's, in training, "
            "in evaluations and wherever the student is used.",
        ]
    )


# Prompts


def prompt_counts(prompts: pa.Array) -> dict[str, pa.Array]:
    """The different texts of an array of strings, `"values"`, and how often each is there, `"counts"`."""
    counted = prompts.value_counts()
    return {"values": counted.field("values"), "counts": counted.field("counts")}


def identical_prompts(one: Mapping[str, pa.Array], other: Mapping[str, pa.Array]) -> tuple[int, float]:
    """
    How many different prompts two tasks share, and what part of their rows.

    Both tasks have an equal part of an update, so a prompt that is a tenth of the rows of one task and a hundredth of the
    other's is in conflict in a hundredth.

    Args:
        one (`dict`), other (`dict`): of each task, as [`prompt_counts`] returns it.

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
    One vector of what a pipeline's encoders make of one prompt.

    Of every tensor the mean over all axes but the last: a pooled output stays as it is, a sequence becomes the mean of its
    tokens, of whatever length it is. Tokens that a mask of the pipeline leaves out are left out. What is the same for any
    prompt (position ids, the empty prompt's embedding) does no harm: [`told_apart`] drops it.

    Args:
        embeddings: What `encode_prompt` returned for a batch of this prompt: tensors and `None`, in tuples and lists of any
            depth.

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
    How often the task of a prompt is told right by which task's mean embedding is nearer, in cross-validation.

    Distances are in units of the prompts' spread within their tasks, in every direction (linear discriminant analysis with a
    covariance that is shrunken, since there are fewer prompts than features). In plain ones a word that all prompts of a task
    have would be lost among what they say besides. Each fold's prompts are told by the means and the spread of the others; a
    prompt of both tasks is in the same fold of both.

    Args:
        one (`dict[str, np.ndarray]`), other (`dict[str, np.ndarray]`):
            Features of a task's different prompts, of shape `(features,)`, as [`prompt_features`] returns them.

    Returns:
        `float`, *optional*: the mean of both tasks' shares of prompts that are told right, in [0, 1]. Chance is 0.5, also
        where the tasks have different numbers of prompts. `None` with fewer than [`MIN_PROMPTS`] prompts of a task.
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
    """For each row of `x` a number that is positive where the mean of `other` is nearer than that of `one`."""
    mean_one, mean_other = one.mean(0), other.mean(0)
    within = np.concatenate([one - mean_one, other - mean_other])
    gram = within @ within.T  # as large as the prompts are many, where the covariance is as large as the features are
    ridge = _SHRINKAGE * np.trace(gram) / len(gram) + np.finfo(float).tiny
    inverse = np.linalg.inv(gram + ridge * np.eye(len(gram)))
    apart = mean_other - mean_one
    direction = apart - within.T @ (inverse @ (within @ apart))
    # The mean of n prompts is off by its own noise, which would make the task with fewer the farther one.
    bias = ridge * np.sum(inverse * gram) / len(gram) * (1 / len(other) - 1 / len(one)) / 2
    return (x - (mean_one + mean_other) / 2) @ direction + bias


# Teachers


def disagreement(apart: float, taught: tuple[float, float], size: float, rounding: float) -> float:
    """
    How far two teachers are apart on the same states, in units of what they teach.

    `|v_A - v_B|`, over the root mean square of `|v_A - v_base|` and `|v_B - v_base|`: 0 for the same velocities, the root of 2
    for corrections of the base that have nothing in common, 2 for opposite ones. A student of the mean of the two misses each
    by half of it, so a quarter of its square is lost of the squared correction.

    Args:
        apart (`float`): mean of the squared difference of their velocities.
        taught (`tuple[float, float]`): mean of the squared difference of each to the base's, at the teacher's guidance.
        size (`float`): mean of the squared velocity.
        rounding (`float`): relative difference of the velocities of two equal networks.

    Returns:
        `float`: not negative; infinite where two guidance scales of the base itself are compared.
    """
    if apart <= rounding**2 * size:
        return 0.0
    scale = (taught[0] + taught[1]) / 2
    return math.sqrt(apart / scale) if scale > 0 else math.inf
