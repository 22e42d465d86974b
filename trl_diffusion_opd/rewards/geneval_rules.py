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
The rules of GenEval: what its metadata asks for, and whether detected objects meet it.

Pure functions. Thresholds and rules are those of the published evaluation
([Ghosh et al., 2023](https://huggingface.co/papers/2310.11513), `evaluate_images.py` of djghosh13/geneval).
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..guards.files import JSON
from .base import Row


TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")


class MetadataError(ValueError):
    """Metadata that nothing can be judged by; says what is wrong with it."""


@dataclass(frozen=True)
class Clause:
    """
    Objects that a prompt asks for.

    Attributes:
        name (`str`): class of the objects.
        count (`int`): how many, at least 1.
        color (`str`, *optional*): one of [`COLORS`].
        position (`tuple[str, int]`, *optional*): one of [`POSITIONS`], and the index of the clause it is relative to.
    """

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Metadata:
    """
    A row of GenEval's metadata.

    Attributes:
        tag (`str`): one of [`TAGS`].
        include (`tuple[Clause]`): what must be there, in order.
        exclude (`tuple[Clause]`): what must not: as many objects of a class, or more.
    """

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


@dataclass(frozen=True)
class Detection:
    """
    An object that a detector found.

    Attributes:
        name (`str`): class, as GenEval calls it.
        score (`float`): confidence, in [0, 1].
        box (`tuple[float, float, float, float]`): left, top, right, bottom, in pixels.
        mask (`np.ndarray`, *optional*): its pixels, bool, `[height, width]` of the image.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Thresholds:
    """
    When an object counts. The defaults are the published ones.

    Args:
        confidence (`float`, *optional*, defaults to `0.3`): only objects of a greater score.
        counting (`float`, *optional*, defaults to `0.9`): the same in the category `counting`.
        max_objects (`int`, *optional*, defaults to `16`): most confident objects of a class that are kept.
        max_overlap (`float`, *optional*, defaults to `1.0`): boxes of a class that overlap a more confident one as much,
            or more, in intersection over union, are dropped. 1 keeps all.
        position (`float`, *optional*, defaults to `0.1`): share of both objects' extent that centres must be apart.
    """

    confidence: float = 0.3
    counting: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position: float = 0.1


PUBLISHED = Thresholds()

# Colours of objects of one class, in their order.
ColorsOf = Callable[[Sequence[Detection]], Sequence[str]]


def parse_metadata(columns: Row, classes: Collection[str] | None = None) -> Metadata:
    """
    Metadata from a row of a dataset.

    Args:
        columns (`dict`): the row. Either `metadata`, or `tag`, `include` and `exclude`; each may be a string of JSON. Fields
            that are `None` are taken as absent: datasets adds them where rows differ.
        classes (`collection` of `str`, *optional*): classes that can be detected; any if not given.

    Raises:
        [`MetadataError`]: with all that is wrong.
    """
    row = _decoded(columns.get("metadata"), "metadata")
    if row is None:
        row = {name: _decoded(columns.get(name), name) for name in ("tag", "include", "exclude")}
        if row["tag"] is None and row["include"] is None:
            raise MetadataError(
                "it has no GenEval metadata: neither a column 'metadata' nor the columns 'tag' and 'include', as in GenEval's "
                "evaluation_metadata.jsonl"
            )
    if not isinstance(row, Mapping):
        raise MetadataError(f"its metadata is a {type(row).__name__}, not an object with 'tag' and 'include'")
    problems: list[str] = []
    tag = row.get("tag")
    if tag not in TAGS:
        problems.append(f"tag {tag!r} is none of {', '.join(TAGS)}")
    include, exclude = (_clauses(row.get(name), name, classes, problems) for name in ("include", "exclude"))
    if not row.get("include"):
        problems.append("'include' names no objects")
    if problems:
        raise MetadataError("its metadata is not GenEval's: " + "; ".join(problems))
    return Metadata(str(tag), include, exclude)


def _decoded(value: JSON, name: str) -> JSON:
    # A tag is a string, and not of JSON.
    if not isinstance(value, str) or name == "tag":
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise MetadataError(f"its {name!r} is not valid JSON ({error})") from error


def _clauses(value: JSON, name: str, classes: Collection[str] | None, problems: list[str]) -> tuple[Clause, ...]:
    if value is None:
        return ()
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str)
        or not all(isinstance(item, Mapping) for item in value)
    ):
        problems.append(f"{name!r} is not a list of objects with 'class' and 'count'")
        return ()
    clauses = []
    for i, item in enumerate(value):
        where = f"{name}[{i}]"
        class_name, count, color = item.get("class"), item.get("count"), item.get("color")
        if not isinstance(class_name, str) or not class_name:
            problems.append(f"{where} has no 'class'")
        elif classes is not None and class_name not in classes:
            problems.append(f"{where}: the detector knows no class {class_name!r:.200}")
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            problems.append(f"{where}: count {count!r} is not a whole number from 1 on")
        if color is not None and color not in COLORS:
            problems.append(f"{where}: color {color!r} is none of {', '.join(COLORS)}")
        clauses.append(Clause(str(class_name), count, color, _position(item.get("position"), where, i, problems)))
    return tuple(clauses)


def _position(value: JSON, where: str, index: int, problems: list[str]) -> tuple[str, int] | None:
    if value is None:
        return None
    try:
        relation, target = value
        target = int(target)  # a column that can't mix types has it as a string
    except (TypeError, ValueError):
        problems.append(f'{where}: position {value!r} is not of the form ["left of", 0]')
        return None
    if relation not in POSITIONS:
        problems.append(f"{where}: position {relation!r} is none of {', '.join(POSITIONS)}")
    if not 0 <= target < index:
        problems.append(f"{where}: position is relative to clause {target}, which does not come before it")
    return relation, target


def kept_objects(
    detections: Sequence[Detection], tag: str, thresholds: Thresholds = PUBLISHED
) -> dict[str, list[Detection]]:
    """Detections that count in a category, by class, the most confident first."""
    confidence = thresholds.counting if tag == "counting" else thresholds.confidence
    of_class: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda detection: -detection.score):
        if detection.score > confidence:
            of_class.setdefault(detection.name, []).append(detection)
    kept: dict[str, list[Detection]] = {}
    for name, found in of_class.items():
        kept[name] = []
        for one in found[: thresholds.max_objects]:
            if thresholds.max_overlap >= 1 or all(
                overlap(other.box, one.box) < thresholds.max_overlap for other in kept[name]
            ):
                kept[name].append(one)
    return kept


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes, whose last pixels belong to them."""
    first, second = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    both = np.concatenate([np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])])
    area, area_of_other, shared = (
        float(np.prod(np.maximum(box[2:] - box[:2] + 1, 0))) for box in (first, second, both)
    )
    union = area + area_of_other - shared
    return shared / union if union else 0.0


def relations(one: Sequence[float], other: Sequence[float], threshold: float = 0.1) -> set[str]:
    """
    Where a box lies as seen from another: any of [`POSITIONS`], two of them on a diagonal, none if they are too close.

    The distance of the centres along each axis is lessened by `threshold` times the sum of both extents. What is left must
    be more than half of the whole distance, of both axes together.
    """
    first, second = (np.asarray(box, dtype=float).reshape(2, 2) for box in (one, other))
    offset = first.mean(0) - second.mean(0)
    margin = threshold * (np.abs(first[1] - first[0]) + np.abs(second[1] - second[0]))
    rest = np.sign(offset) * np.maximum(np.abs(offset) - margin, 0)
    if (np.abs(rest) < 1e-3).all():
        return set()
    right, down = rest / np.linalg.norm(offset)
    found = {"left of": right < -0.5, "right of": right > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, holds in found.items() if holds}


def is_correct(
    metadata: Metadata,
    objects: Mapping[str, Sequence[Detection]],
    colors_of: ColorsOf,
    position_threshold: float = 0.1,
) -> bool:
    """
    GenEval's verdict: every clause of `include` is met, and none of `exclude`.

    A clause is met by its `count` most confident objects: there are as many, all of the colour that is asked for, and each
    in the position that is asked for to each object of the clause it refers to, which must be met. More objects than asked
    for are no mistake, unless `exclude` says so.

    Args:
        metadata (`Metadata`)
        objects (`dict[str, list[Detection]]`): from [`kept_objects`].
        colors_of (`callable`): the colours of some objects.
        position_threshold (`float`, *optional*, defaults to `0.1`): see [`Thresholds`].
    """
    met: list[Sequence[Detection] | None] = []
    for clause in metadata.include:
        found = objects.get(clause.name, [])[: clause.count]
        right = len(found) == clause.count
        if right and clause.color is not None:
            right = list(colors_of(found)).count(clause.color) == clause.count
        if right and clause.position is not None:
            right = _in_position(found, clause.position, met, position_threshold)
        met.append(found if right else None)
    too_many = any(len(objects.get(clause.name, [])) >= clause.count for clause in metadata.exclude)
    return None not in met and not too_many


def partial_score(
    metadata: Metadata,
    objects: Mapping[str, Sequence[Detection]],
    colors_of: ColorsOf,
    position_threshold: float = 0.1,
) -> float:
    """
    How much of what is asked for is there, in [0, 1]: for training, after Flow-GRPO's reward server.

    The mean over everything that is asked for. For each clause, the count: 1 - |found - asked| / asked, at least 0, objects
    too many as wrong as too few. If it asks for a colour, the share of objects that have it; if for a position, 1 or 0;
    both 0 unless the count is right, and the position also unless the colour is. Arguments as in [`is_correct`].

    Published code differs in two details: it does not bound the count's part, so that five objects for one give -3, and
    averages a wrong position with a 1.
    """
    met: list[Sequence[Detection] | None] = []
    parts = []
    for clause in metadata.include:
        found = objects.get(clause.name, [])
        right = len(found) == clause.count
        parts.append(max(0.0, 1 - abs(len(found) - clause.count) / clause.count))
        if clause.color is not None:
            of_color = list(colors_of(found)).count(clause.color) if right else 0
            parts.append(of_color / clause.count)
            right = of_color == clause.count
        if clause.position is not None:
            right = right and _in_position(found, clause.position, met, position_threshold)
            parts.append(float(right))
        met.append(found if right else None)
    return sum(parts) / len(parts)


def _in_position(
    found: Sequence[Detection],
    position: tuple[str, int],
    met: Sequence[Sequence[Detection] | None],
    threshold: float,
) -> bool:
    relation, index = position
    target = met[index]
    if target is None:
        return False
    return all(relation in relations(one.box, other.box, threshold) for one in found for other in target)
