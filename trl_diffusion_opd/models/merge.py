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
Merges the teachers' LoRAs into one without training: the baseline that a trained student should beat.

`"svd"` averages the weight updates `dW = scaling B A` and keeps the best approximation of the student's rank. (The
mean of several products `B A` is not the product of the means of `B` and `A`; its rank is in general the sum of the
ranks.)
"""

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ..guards.files import write_json
from ..guards.redaction import shown
from ..hub.files import MERGE_REPORT_FILE
from ..pipelines.loading import borrowed
from ..problems import Problems, Refusal
from .backbone import Backbone
from .student import STUDENT_ADAPTER, Student
from .teacher_config import TeacherSpec, normalize_teachers
from .teachers import TeacherBank


logger = logging.getLogger(__name__)

# PEFT's methods. Those without "_svd" combine the factors A and B separately: cheap, but not a mean of updates.
_PEFT_METHODS = (
    "cat",
    "linear",
    *(name + end for name in ("ties", "dare_linear", "dare_ties", "magnitude_prune") for end in ("", "_svd")),
)
METHODS = ("svd", *_PEFT_METHODS)
_SINGULAR_VALUES_BELOW = 1e-12  # relative to the largest: smaller ones are float64's rounding


@dataclass(frozen=True)
class MergeReport:
    """
    How far a merged LoRA is from the mean of the teachers' updates.

    Attributes:
        method (`str`): one of `METHODS`.
        rank (`int`): rank of the merged LoRA.
        error (`float`): relative error over all layers: the norm of (merged update - weighted mean of the teachers'
            updates), divided by the norm of that mean. With `"svd"` it is the smallest error that the rank allows.
        layers (`dict[str, float]`): the relative error of each layer.
    """

    method: str
    rank: int
    error: float
    layers: dict[str, float]


def truncated_svd(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """
    Finds the best approximation of `b @ a` that has at most the given rank, without forming the product.

    Args:
        b (`Tensor` of shape `(m, k)`), a (`Tensor` of shape `(k, n)`): the factors, float64.
        rank (`int`): the largest rank.

    Returns:
        Two factors of equal norm, of shapes `(m, r)` and `(r, n)`, with `r <= rank` (smaller if the product's rank
        is); then the squared norm of the part that is left out, and of the whole product.
    """
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    kept = min(rank, int((s > _SINGULAR_VALUES_BELOW * s[0]).sum()))
    root = s[:kept].sqrt()
    squares = s.square()
    return (
        q_b @ u[:, :kept] * root,
        (root[:, None] * vh[:kept]) @ q_a.T,
        float(squares[kept:].sum()),
        float(squares.sum()),
    )


def merge_weights(bank: TeacherBank, task_weights: Mapping[str, float] | None = None) -> dict[str, float]:
    """
    Computes each teacher's share in the mean. Tasks count equally, or by `task_weights`. The base counts as an update
    of 0.

    Returns:
        `dict[str, float]`: share by the adapter's name. The sum is 1, or less if the base is one of the teachers.

    Raises:
        [`ValueError`]: if a teacher is a whole transformer, or no teacher is a LoRA.
    """
    given = task_weights or {}
    task_share = {task: float(given.get(task, 1.0)) for task in bank.teachers}
    weights: dict[str, float] = {}
    for task, roles in bank.teachers.items():
        for role in roles:
            teacher = role.teacher
            if teacher.own is not None:
                raise Refusal(
                    f"The teacher of task {task!r}, {role.shown}, runs through a pipeline of its own. Only LoRAs on "
                    "the student's base can be merged."
                )
            if teacher.kind == "student":
                raise Refusal(f"The teacher of task {task!r} is the student itself, which can't be merged.")
            if teacher.is_apart:
                what = "a whole transformer" if teacher.kind == "full" else "no LoRA that PEFT can switch"
                raise Refusal(f"The teacher of task {task!r}, {teacher.source}, is {what}. Only LoRAs can be merged.")
            if teacher.kind == "lora":
                share = task_share[task] / sum(task_share.values()) * role.weight
                weights[teacher.name] = weights.get(teacher.name, 0.0) + share
    if not weights:
        raise Refusal("There is nothing to merge: no teacher is a LoRA.")
    return weights


@torch.no_grad()
def merge_adapters(model: PeftModel, weights: Mapping[str, float], target: str) -> MergeReport:
    """
    Sets an adapter to the weighted sum of other adapters' updates, truncated to its rank by an SVD.

    If the sum's rank is smaller, the unused directions keep their `A` and get a `B` of zero, so that they can be
    trained.

    Args:
        model (`PeftModel`): the model with all of these adapters.
        weights (`dict[str, float]`): weight by the adapter's name.
        target (`str`): the adapter to set.

    Raises:
        [`ValueError`]: if the target lacks a layer that another adapter has, or a layer is not linear.
    """
    layers = _layers(model, [*weights, target])
    lacking = [name for name, layer in layers.items() if target not in layer.lora_A]
    if lacking:
        raise Refusal(
            f"The student's LoRA has no place for {len(lacking)} of the layers that the teachers adapt, such as "
            f"{lacking[0]}. "
            "Name them in the target_modules of peft_config."
        )
    lost, whole = {}, {}
    for name, layer in layers.items():
        a, b = layer.lora_A[target].weight, layer.lora_B[target].weight
        factors = _stacked(layer, weights)
        b.zero_()
        if factors is None:
            continue
        new_b, new_a, lost[name], whole[name] = truncated_svd(*factors, layer.r[target])
        root = math.sqrt(layer.scaling[target])
        b[:, : new_b.shape[1]] = (new_b / root).to(b)
        a[: new_a.shape[0]] = (new_a / root).to(a)
    return _report("svd", model.peft_config[target], lost, whole)


def merge_teachers(
    pipeline: DiffusionPipeline,
    teachers: TeacherSpec | Mapping[str, TeacherSpec],
    output_dir: str | Path,
    *,
    rank: int = 32,
    lora_alpha: int | None = None,
    method: str = "svd",
    weights: Mapping[str, float] | None = None,
    density: float | None = None,
    seed: int = 0,
) -> MergeReport:
    """
    Merges teachers into one LoRA and saves it like a trained student: for PEFT and for
    `pipe.load_lora_weights(output_dir)`. `merge_report.json` beside it says how much was lost in each layer.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The base. It is unchanged afterwards.
        teachers (`str`, [`TeacherConfig`], a list of these, or a `dict` from task to any of them):
            As for [`DiffusionOPDTrainer`], but only LoRAs or `"base"`.
        output_dir (`str` or `Path`): where the LoRA is saved. Created if it does not exist.
        rank (`int`, *optional*, defaults to 32):
            Rank of the merged LoRA, for `"svd"` and the methods that end in `"_svd"`. `"cat"` gives the sum of the
            teachers' ranks, the others keep their common rank.
        lora_alpha (`int`, *optional*): alpha of the merged LoRA, for `"svd"` only. `None` is twice the rank. It does
            not change the result.
        method (`str`, *optional*, defaults to `"svd"`):
            `"svd"`: the mean of the updates, as close as the rank allows. `"cat"`: the exact mean, of a larger rank.
            PEFT's `"linear"`, `"ties"`, `"dare_linear"`, `"dare_ties"` and `"magnitude_prune"` combine the factors A
            and B separately; with `"_svd"` appended they combine the updates.
        weights (`dict[str, float]`, *optional*): weights of the tasks; 1 for those not named. Only their ratios count.
        density (`float`, *optional*): fraction of the numbers that pruning methods keep, in (0, 1].
        seed (`int`, *optional*, defaults to 0): seed of the random choices of `"dare_…"`.

    Returns:
        [`MergeReport`]

    Raises:
        [`ValueError`]: if the options don't fit each other or the teachers. One message lists everything.
    """
    problems = _option_problems(rank, lora_alpha, method, density)
    tasks = list(teachers) if isinstance(teachers, Mapping) else ["default"]
    for task, weight in (weights or {}).items():
        if task not in tasks:
            problems.append(f"weights names the task {task!r}, which has no teacher; teachers are given for {tasks}.")
        elif not (math.isfinite(weight) and weight > 0):
            problems.append(f"weights: {task}={weight} is not a positive number.")
    Problems(problems).raise_under("The teachers can't be merged so")
    with borrowed(pipeline) as transformer:
        bank = TeacherBank(Backbone(transformer), pipeline, normalize_teachers(teachers, tasks), 1.0)
        shares = merge_weights(bank, weights)
        model = bank.backbone.network
        assert isinstance(model, PeftModel)
        adapted = _layers(model, shares)
        if method == "svd":
            # A list of whole names. PEFT shortens a long list to fewer names that mean the same layers.
            config = LoraConfig(r=rank, lora_alpha=lora_alpha or 2 * rank, target_modules=list(adapted))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model.add_adapter(STUDENT_ADAPTER, config)
            report = merge_adapters(model, shares, STUDENT_ADAPTER)
        else:
            report = _merge_by_peft(model, shares, adapted, method, rank, density, seed)
        Student(model, pipeline).save(output_dir)
        content = asdict(report) | {"density": density, "weights": shares_by_task(bank, weights)}
        content["teachers"] = bank.manifest()
    write_json(Path(output_dir) / MERGE_REPORT_FILE, content, sort_keys=True)
    return report


def shares_by_task(bank: TeacherBank, task_weights: Mapping[str, float] | None) -> dict[str, float]:
    """Returns each task's share in the mean; the shares sum to 1."""
    given = task_weights or {}
    weights = {task: float(given.get(task, 1.0)) for task in bank.teachers}
    return {task: weight / sum(weights.values()) for task, weight in weights.items()}


def _option_problems(rank: int, lora_alpha: int | None, method: str, density: float | None) -> list[str]:
    problems = []
    if rank < 1:
        problems.append(f"rank={rank}: it must be at least 1.")
    if lora_alpha is not None and lora_alpha < 1:
        problems.append(f"lora_alpha={lora_alpha}: it must be at least 1.")
    if method not in METHODS:
        problems.append(f"method={method!r}: it must be one of {', '.join(METHODS)}.")
        return problems
    if lora_alpha is not None and method != "svd":
        problems.append(f"lora_alpha={lora_alpha} with method={method!r}: PEFT sets it to the rank. Leave it unset.")
    prunes = method not in ("svd", "cat", "linear")
    if prunes and (density is None or not 0 < density <= 1):
        problems.append(
            f"density={density}: method={method!r} needs the fraction of the numbers that it keeps, in (0, 1]."
        )
    if not prunes and density is not None:
        problems.append(f"density={density}: method={method!r} prunes nothing. Leave it unset.")
    return problems


def _merge_by_peft(
    model: PeftModel,
    weights: Mapping[str, float],
    adapted: Mapping[str, LoraLayer],
    method: str,
    rank: int,
    density: float | None,
    seed: int,
) -> MergeReport:
    if len(weights) < 2:
        raise Refusal(f"method={method!r} merges two LoRAs or more, but there is only one. Use method='svd'.")
    ranks = {name: sorted({layer.r[name] for layer in adapted.values() if name in layer.r}) for name in weights}
    if not (method == "cat" or method.endswith("_svd")) and len({r for values in ranks.values() for r in values}) > 1:
        raise Refusal(
            f"method={method!r} needs teachers of the same rank; theirs are {[*ranks.values()]}. Use 'svd'"
            + (f" or '{method}_svd'." if method != "linear" else ".")
        )
    for name in weights:
        config = model.peft_config[name]
        # PEFT needs target_modules of one type, and would copy use_rslora from the first adapter to the merged one.
        config.target_modules = {layer for layer, module in adapted.items() if name in module.lora_A}
        config.use_rslora = False
    # PEFT's disjoint mean divides by the number of teachers that agree, so weights must have mean 1, not sum 1.
    factor = len(weights) if "ties" in method else 1
    tuner = model.base_model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuner.add_weighted_adapter(
            list(weights),
            [weight * factor for weight in weights.values()],
            STUDENT_ADAPTER,
            combination_type=method,
            svd_rank=rank,
            svd_full_matrices=False,
            density=density,
        )
    lost, whole = {}, {}
    for name, layer in adapted.items():
        mean, merged = _stacked(layer, weights), _stacked(layer, {STUDENT_ADAPTER: 1.0})
        assert mean is not None and merged is not None
        whole[name] = _norm_sq(*mean)
        lost[name] = _norm_sq(torch.cat([mean[0], -merged[0]], 1), torch.cat([mean[1], merged[1]]))
    return _report(method, model.peft_config[STUDENT_ADAPTER], lost, whole)


def _layers(model: PeftModel, adapters: Collection[str]) -> dict[str, LoraLayer]:
    """The layers that have at least one of the adapters, by their name in the base."""
    found = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        and any(adapter in module.lora_A or adapter in module.lora_embedding_A for adapter in adapters)
    }
    other = [
        name
        for name, layer in found.items()
        if layer.lora_embedding_A or any(part.weight.ndim != 2 for part in layer.lora_A.values())
    ]
    if other:
        raise Refusal(f"Only LoRAs of linear layers can be merged; {other[0]} is not linear.")
    return found


def _stacked(layer: LoraLayer, weights: Mapping[str, float]) -> tuple[Tensor, Tensor] | None:
    """
    Stacks factors so that `B @ A` is the weighted sum of the adapters' updates, in float64. `None` if the layer has
    none of the adapters.
    """
    present = [name for name in weights if name in layer.lora_A]
    if not present:
        return None
    b = [weights[name] * layer.scaling[name] * layer.lora_B[name].weight.cpu().double() for name in present]
    a = [layer.lora_A[name].weight.cpu().double() for name in present]
    return torch.cat(b, 1), torch.cat(a)


def _norm_sq(b: Tensor, a: Tensor) -> float:
    # Through QR, since the trace of the Gram matrices loses all digits when the product is small.
    return float((torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T).square().sum())


def _report(method: str, config: LoraConfig, lost: Mapping[str, float], whole: Mapping[str, float]) -> MergeReport:
    def relative(part: float, total: float) -> float:
        return math.sqrt(part / total) if total else 0.0

    layers = {name: relative(lost[name], whole[name]) for name in lost}
    report = MergeReport(method, config.r, relative(sum(lost.values()), sum(whole.values())), layers)
    worst = max(layers, key=lambda name: layers[name])
    logger.info(
        f"Merged by {method} to rank {report.rank}: {report.error:.1%} of the mean update is lost, most in "
        f"{shown(worst)} ({layers[worst]:.1%})."
    )
    return report
