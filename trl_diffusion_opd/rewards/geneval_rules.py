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
The rules of GenEval: reads its metadata and checks whether detected objects match it.

All functions are pure. Thresholds and rules are those of the published evaluation
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
    """Metadata is invalid. The message says what is wrong."""


@dataclass(frozen=True)
class Clause:
    """
    Objects that a prompt asks for.

    Attributes:
        name (`str`): class of the objects.
        count (`int`): number of objects, at least 1.
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
        include (`tuple[Clause]`): the objects that must be in the image, in order.
        exclude (`tuple[Clause]`): objects that must not: `count` or more of a class.
    """

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


@dataclass(frozen=True)
class Detection:
    """
    An object that a detector found.

    Attributes:
        name (`str`): GenEval's name of its class.
        score (`float`): confidence, in [0, 1].
        box (`tuple[float, float, float, float]`): left, top, right, bottom, in pixels.
        mask (`np.ndarray`, *optional*): its pixels in the image, bool, `[height, width]`.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Thresholds:
    """
    Which detected objects count. The defaults are the published values.

    Args:
        confidence (`float`, *optional*, defaults to `0.3`): an object's score must be greater than this.
        counting (`float`, *optional*, defaults to `0.9`): the same for prompts of the category `counting`.
        max_objects (`int`, *optional*, defaults to `16`): number of objects of a class that are kept, the most
            confident.
        max_overlap (`float`, *optional*, defaults to `1.0`): an object is dropped if its intersection over union with
            a more confident one of its class is this or more. 1 keeps all.
        position (`float`, *optional*, defaults to `0.1`): minimum distance of two centres, as a share of both objects'
            extent.
    """

    confidence: float = 0.3
    counting: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position: float = 0.1


PUBLISHED = Thresholds()

# Returns the colours of objects of one class, in the same order.
ColorsOf = Callable[[Sequence[Detection]], Sequence[str]]


def parse_metadata(columns: Row, classes: Collection[str] | None = None) -> Metadata:
    """
    Reads the metadata of a dataset's row.

    Args:
        columns (`dict`): the row, with `metadata`, or with `tag`, `include` and `exclude`. Each may be a JSON string.
            `None` counts as absent, since `datasets` adds it where rows have different fields.
        classes (`collection` of `str`, *optional*): classes that the detector knows. By default all are accepted.

    Raises:
        [`MetadataError`]: if the metadata is invalid. The message lists everything that is wrong.
    """
    row = _decoded(columns.get("metadata"), "metadata")
    if row is None:
        row = {name: _decoded(columns.get(name), name) for name in ("tag", "include", "exclude")}
        if row["tag"] is None and row["include"] is None:
            raise MetadataError(
                "it has no GenEval metadata: neither a column 'metadata' nor the columns 'tag' and 'include', as in "
                "GenEval's evaluation_metadata.jsonl"
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
    # A tag is a plain string, not JSON.
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
            problems.append(f"{where}: count {count!r} is not a whole number of at least 1")
        if color is not None and color not in COLORS:
            problems.append(f"{where}: color {color!r} is none of {', '.join(COLORS)}")
        clauses.append(Clause(str(class_name), count, color, _position(item.get("position"), where, i, problems)))
    return tuple(clauses)


def _position(value: JSON, where: str, index: int, problems: list[str]) -> tuple[str, int] | None:
    if value is None:
        return None
    try:
        relation, target = value
        target = int(target)  # a string in columns that can't mix types
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
    """The detections that count in a category, grouped by class, the most confident first."""
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
    """Intersection over union of two boxes. Their right and bottom pixels are part of them."""
    first, second = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    both = np.concatenate([np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])])
    area, area_of_other, shared = (
        float(np.prod(np.maximum(box[2:] - box[:2] + 1, 0))) for box in (first, second, both)
    )
    union = area + area_of_other - shared
    return shared / union if union else 0.0


def relations(one: Sequence[float], other: Sequence[float], threshold: float = 0.1) -> set[str]:
    """
    The position of a box relative to another: one of [`POSITIONS`], two on a diagonal, none if the boxes are too
    close.

    Along each axis, the distance of the centres is reduced by `threshold` times the sum of both extents. An axis
    counts if the rest is more than half of the distance between the centres.
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
    GenEval's verdict: whether every clause of `include` is met, and none of `exclude`.

    A clause looks at its `count` most confident objects. It is met if there are that many, if all have the requested
    colour, and if each is in the requested position to each object of the clause that it refers to, which must be met
    too. More objects are no mistake, unless `exclude` says so.

    Args:
        metadata (`Metadata`): the prompt's metadata.
        objects (`dict[str, list[Detection]]`): the detected objects, from [`kept_objects`].
        colors_of (`callable`): returns the colours of objects of one class.
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
    A graded score in [0, 1] for training, modelled on Flow-GRPO's reward server. Arguments as in [`is_correct`].

    It is the mean of these parts of all clauses of `include`:

    - the count: 1 - |found - requested| / requested, at least 0, so that too many objects are as wrong as too few;
    - the colour, if requested: the share of objects that have it, and 0 if the count is wrong;
    - the position, if requested: 1 or 0, and 0 if the count or the colour is wrong.

    The published code differs in two details: it does not bound the count's part, so that five objects instead of one
    give -3, and it averages a wrong position with a 1.
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
