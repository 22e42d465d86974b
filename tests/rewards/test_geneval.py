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

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers.clip_models import cropped_pixels, make_config, make_processor
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)

from trl_diffusion_opd.rewards import GenEval, load_reward, reward_data_problems
from trl_diffusion_opd.rewards.geneval_rules import (
    COLORS,
    POSITIONS,
    Clause,
    Detection,
    Metadata,
    MetadataError,
    Thresholds,
    is_correct,
    kept_objects,
    overlap,
    parse_metadata,
    partial_score,
    relations,
)
from trl_diffusion_opd.scripts.prompt_sources import load_prompts


def at(x: float, y: float, size: float = 10) -> tuple[float, float, float, float]:
    """A square box around a centre."""
    return (x - size / 2, y - size / 2, x + size / 2, y + size / 2)


def thing(name: str, x: float = 50, y: float = 50, score: float = 0.95, color: str = "") -> SimpleNamespace:
    return SimpleNamespace(name=name, box=at(x, y), score=score, color=color)


def asked(*clauses: Clause, tag: str, exclude: Sequence[Clause] = ()) -> Metadata:
    return Metadata(tag, clauses, tuple(exclude))


def judge(metadata: Metadata, things: Sequence[SimpleNamespace], rule=is_correct) -> Any:
    colors = {}
    detections = []
    for i, one in enumerate(things):
        detections.append(Detection(one.name, one.score, one.box))
        colors[id(detections[i])] = one.color
    objects = kept_objects(detections, metadata.tag)
    return rule(metadata, objects, lambda found: [colors[id(one)] for one in found])


CAT = asked(Clause("cat", 1), tag="single_object")
CAT_AND_DOG = asked(Clause("cat", 1), Clause("dog", 1), tag="two_object")
TWO_CATS = asked(Clause("cat", 2), tag="counting", exclude=[Clause("cat", 3)])
FOUR_CATS = asked(Clause("cat", 4), tag="counting", exclude=[Clause("cat", 5)])
RED_CAT = asked(Clause("cat", 1, "red"), tag="colors")
RED_CAT_BLUE_DOG = asked(Clause("cat", 1, "red"), Clause("dog", 1, "blue"), tag="color_attr")


def cat_and(position: str) -> Metadata:
    return asked(Clause("dog", 1), Clause("cat", 1, position=(position, 0)), tag="position")


def cats(*scores: float) -> list[SimpleNamespace]:
    return [thing("cat", 10 + 20 * i, score=score) for i, score in enumerate(scores)]


# What is asked for, what is found, the verdict.
TABLE = [
    # single_object: one or more of the class, above 0.3
    (CAT, [thing("cat")], True),
    (CAT, [], False),
    (CAT, [thing("dog")], False),
    (CAT, [thing("cat", score=0.31)], True),
    (CAT, [thing("cat", score=0.3)], False),
    (CAT, cats(0.9, 0.8, 0.7), True),
    (CAT, [thing("dog"), thing("cat", score=0.4)], True),
    # two_object: both, in any place and number
    (CAT_AND_DOG, [thing("cat"), thing("dog")], True),
    (CAT_AND_DOG, [thing("dog"), thing("cat")], True),
    (CAT_AND_DOG, [thing("cat"), thing("cat")], False),
    (CAT_AND_DOG, [thing("dog")], False),
    (CAT_AND_DOG, [thing("cat"), thing("dog", score=0.2)], False),
    (CAT_AND_DOG, [*cats(0.9, 0.9), thing("dog"), thing("bus")], True),
    # counting: exactly as many, above 0.9
    (TWO_CATS, cats(0.95, 0.95), True),
    (TWO_CATS, cats(0.95), False),
    (TWO_CATS, cats(0.95, 0.95, 0.95), False),
    (TWO_CATS, cats(0.95, 0.95, 0.9), True),
    (TWO_CATS, cats(0.95, 0.89), False),
    (TWO_CATS, cats(0.95, 0.95, 0.5, 0.4), True),
    (TWO_CATS, [*cats(0.95, 0.95), thing("dog")], True),
    (FOUR_CATS, cats(*[0.99] * 4), True),
    (FOUR_CATS, cats(*[0.99] * 3), False),
    (FOUR_CATS, cats(*[0.99] * 5), False),
    # colors: of the most confident object
    (RED_CAT, [thing("cat", color="red")], True),
    (RED_CAT, [thing("cat", color="blue")], False),
    (RED_CAT, [thing("dog", color="red")], False),
    (RED_CAT, [thing("cat", score=0.9, color="red"), thing("cat", score=0.8, color="blue")], True),
    (RED_CAT, [thing("cat", score=0.8, color="red"), thing("cat", score=0.9, color="blue")], False),
    # position: the cat as seen from the dog, which is in the middle
    (cat_and("left of"), [thing("dog"), thing("cat", 20)], True),
    (cat_and("left of"), [thing("dog"), thing("cat", 80)], False),
    (cat_and("right of"), [thing("dog"), thing("cat", 80)], True),
    (cat_and("right of"), [thing("dog"), thing("cat", 50, 80)], False),
    (cat_and("above"), [thing("dog"), thing("cat", 50, 20)], True),
    (cat_and("above"), [thing("dog"), thing("cat", 50, 80)], False),
    (cat_and("below"), [thing("dog"), thing("cat", 50, 80)], True),
    (cat_and("below"), [thing("dog"), thing("cat", 20)], False),
    (cat_and("left of"), [thing("dog"), thing("cat", 20, 20)], True),  # a diagonal is both
    (cat_and("above"), [thing("dog"), thing("cat", 20, 20)], True),
    (cat_and("above"), [thing("dog"), thing("cat", 10, 40)], False),  # hardly higher, far to the left
    (cat_and("left of"), [thing("dog"), thing("cat", 48.5)], False),  # nearer than a tenth of both widths
    (cat_and("left of"), [thing("dog"), thing("cat", 44)], True),  # overlapping, but apart enough
    (cat_and("left of"), [thing("cat", 20)], False),  # of no dog
    (cat_and("left of"), [thing("dog")], False),
    (cat_and("left of"), [thing("dog"), thing("cat", 20, score=0.5), thing("cat", 80, score=0.9)], False),
    (cat_and("left of"), [thing("dog"), thing("cat", 20, score=0.9), thing("cat", 80, score=0.5)], True),
    (cat_and("left of"), [thing("dog", 50, score=0.5), thing("dog", 5, score=0.9), thing("cat", 20)], False),
    # color_attr: each its own
    (RED_CAT_BLUE_DOG, [thing("cat", color="red"), thing("dog", color="blue")], True),
    (RED_CAT_BLUE_DOG, [thing("cat", color="blue"), thing("dog", color="red")], False),
    (RED_CAT_BLUE_DOG, [thing("cat", color="red"), thing("dog", color="red")], False),
    (RED_CAT_BLUE_DOG, [thing("cat", color="red")], False),
    (RED_CAT_BLUE_DOG, [thing("cat", color="red"), thing("dog", color="blue"), thing("bus", color="red")], True),
    (RED_CAT_BLUE_DOG, [thing("cat", color="red"), thing("dog", score=0.25, color="blue")], False),
]


def test_the_table_is_large_and_of_all_categories():
    verdicts: dict[str, set[bool]] = {}
    for metadata, _, verdict in TABLE:
        verdicts.setdefault(metadata.tag, set()).add(verdict)
    assert len(TABLE) >= 50
    assert len(verdicts) == 6
    assert set(map(frozenset, verdicts.values())) == {frozenset({True, False})}


@pytest.mark.parametrize(("metadata", "things", "verdict"), TABLE)
def test_verdicts(metadata, things, verdict):
    assert judge(metadata, things) is verdict
    assert judge(metadata, things[::-1]) is verdict  # confidence decides, not the order
    graded = judge(metadata, things, partial_score)
    assert 0 <= graded <= 1


@pytest.mark.parametrize(
    ("metadata", "things", "score"),
    [
        (CAT, [thing("cat")], 1),
        (CAT, [], 0),
        (CAT, cats(0.9, 0.9), 0),  # one too many of one
        (CAT, cats(*[0.9] * 5), 0),  # and not below 0
        (CAT_AND_DOG, [thing("cat")], 1 / 2),
        (FOUR_CATS, cats(*[0.99] * 3), 3 / 4),
        (FOUR_CATS, cats(*[0.99] * 5), 3 / 4),
        (RED_CAT, [thing("cat", color="red")], 1),
        (RED_CAT, [thing("cat", color="blue")], 1 / 2),
        (RED_CAT, [], 0),
        (RED_CAT, [thing("cat", color="red"), thing("cat", color="red")], 0),
        (RED_CAT_BLUE_DOG, [thing("cat", color="red"), thing("dog", color="red")], 3 / 4),
        (RED_CAT_BLUE_DOG, [thing("dog", color="blue")], 1 / 2),
        (cat_and("left of"), [thing("dog"), thing("cat", 20)], 1),
        (cat_and("left of"), [thing("dog"), thing("cat", 80)], 2 / 3),
        (cat_and("left of"), [thing("cat", 20)], 1 / 3),
        (asked(Clause("cat", 2, "red"), tag="colors"), [thing("cat", color=c) for c in ("red", "blue")], 3 / 4),
    ],
)
def test_partial_scores(metadata, things, score):
    assert judge(metadata, things, partial_score) == pytest.approx(score)


def relations_by_hand(one, other, threshold=0.1):
    """The published rule, an axis at a time."""
    far = [(one[i] + one[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1)]
    margin = [threshold * (one[i + 2] - one[i] + other[i + 2] - other[i]) for i in (0, 1)]
    distance = math.hypot(*far)
    names = []
    for value, least, (before, after) in zip(far, margin, (("left of", "right of"), ("above", "below")), strict=True):
        if abs(value) - least >= 1e-3 and (abs(value) - least) / distance > 0.5:
            names.append(before if value < 0 else after)
    return set(names)


def test_relations_against_an_independent_computation():
    rng = np.random.default_rng(0)
    seen: dict[frozenset, int] = {}
    opposite = dict(zip(POSITIONS, ("right of", "left of", "below", "above"), strict=True))
    for _ in range(2000):
        corners, extents = rng.uniform(0, 60, (2, 2)), rng.uniform(1, 60, (2, 2))
        one, other = (tuple(np.concatenate([c, c + e]).tolist()) for c, e in zip(corners, extents, strict=True))
        found = relations(one, other)
        assert found == relations_by_hand(one, other)
        assert relations(other, one) == {opposite[name] for name in found}
        seen[frozenset(found)] = seen.get(frozenset(found), 0) + 1
    assert len(seen) == 9  # four sides, four corners, none
    assert min(seen.values()) > 20
    assert relations(at(5, 5), at(5, 5)) == set()


def test_overlap_against_counted_pixels():
    rng = np.random.default_rng(0)
    for _ in range(200):
        grids, boxes = [], []
        for _ in range(2):
            left, top, right, bottom = (int(value) for value in rng.integers(0, 12, 4))
            boxes.append((min(left, right), min(top, bottom), max(left, right), max(top, bottom)))
            grid = np.zeros((12, 12), dtype=bool)
            grid[boxes[-1][1] : boxes[-1][3] + 1, boxes[-1][0] : boxes[-1][2] + 1] = True
            grids.append(grid)
        assert overlap(*boxes) == pytest.approx((grids[0] & grids[1]).sum() / (grids[0] | grids[1]).sum())


def test_thresholds():
    crowd = [Detection("cat", 0.5 + i / 100, at(5 * i, 50)) for i in range(20)]
    assert [one.score for one in kept_objects(crowd, "colors")["cat"]] == [0.5 + i / 100 for i in range(19, 3, -1)]
    assert kept_objects(crowd, "counting") == {}
    assert len(kept_objects(crowd, "counting", Thresholds(counting=0.6))["cat"]) == 9
    assert len(kept_objects(crowd, "colors", Thresholds(max_objects=2))["cat"]) == 2
    pair = [Detection("cat", 0.8, at(50, 50)), Detection("cat", 0.9, at(51, 50)), Detection("dog", 0.7, at(50, 50))]
    assert len(kept_objects(pair, "colors")["cat"]) == 2  # all boxes count, as published
    kept = kept_objects(pair, "colors", Thresholds(max_overlap=0.5))
    assert [one.score for one in kept["cat"]] == [0.9]
    assert len(kept["dog"]) == 1


def official_rows() -> list[dict[str, Any]]:
    """One row of each category as GenEval's evaluation_metadata.jsonl has them."""
    couch, cat = {"class": "couch", "count": 1}, {"class": "cat", "count": 1}
    return [
        {"tag": "single_object", "include": [cat], "prompt": "a photo of a cat"},
        {"tag": "two_object", "include": [couch, cat], "prompt": "a photo of a couch and a cat"},
        {
            "tag": "counting",
            "include": [{"class": "cat", "count": 3}],
            "exclude": [{"class": "cat", "count": 4}],
            "prompt": "a photo of three cats",
        },
        {"tag": "colors", "include": [{**cat, "color": "red"}], "prompt": "a photo of a red cat"},
        {
            "tag": "position",
            "include": [couch, {**cat, "position": ["left of", 0]}],
            "prompt": "a photo of a cat left of a couch",
        },
        {
            "tag": "color_attr",
            "include": [{**couch, "color": "blue"}, {**cat, "color": "red"}],
            "prompt": "a photo of a blue couch and a red cat",
        },
    ]


class TestMetadata:
    def test_every_form_of_a_row_is_the_same(self):
        for row in official_rows():
            expected = parse_metadata(row)
            assert expected.tag == row["tag"]
            assert [clause.name for clause in expected.include] == [item["class"] for item in row["include"]]
            padded = {**row, "exclude": row.get("exclude")}
            padded["include"] = [{"color": None, "position": None, **item} for item in row["include"]]
            strings = {**row, "include": json.dumps(row["include"]), "exclude": json.dumps(row.get("exclude"))}
            for form in (padded, strings, {"metadata": row}, {"metadata": json.dumps(row)}, {"metadata": padded}):
                assert parse_metadata(form) == expected
            assert parse_metadata({**padded, "metadata": None}) == expected

    def test_contents(self):
        rows = {row["tag"]: parse_metadata(row) for row in official_rows()}
        assert rows["counting"] == Metadata("counting", (Clause("cat", 3),), (Clause("cat", 4),))
        position = (Clause("couch", 1), Clause("cat", 1, position=("left of", 0)))
        assert rows["position"] == Metadata("position", position)
        assert rows["colors"].include == (Clause("cat", 1, "red"),)
        text = {**official_rows()[4], "include": [{"class": "couch", "count": 1}]}
        text["include"].append({"class": "cat", "count": 1, "position": ["left of", "0"]})
        assert parse_metadata(text) == rows["position"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"tag": None, "include": None}, "no GenEval metadata: neither a column 'metadata' nor"),
            ({"metadata": "{"}, "its 'metadata' is not valid JSON"),
            ({"metadata": "[1]"}, "its metadata is a list"),
            ({"include": "cat"}, "its 'include' is not valid JSON"),
            ({"tag": "colours"}, "tag 'colours' is none of single_object, two_object"),
            ({"include": []}, "'include' names no objects"),
            ({"include": None}, "'include' names no objects"),
            ({"include": ["cat"]}, "'include' is not a list of objects"),
            ({"include": [{"count": 1}]}, r"include\[0\] has no 'class'"),
            ({"include": [{"class": "unicorn", "count": 1}]}, "the detector knows no class 'unicorn'"),
            ({"include": [{"class": "cat", "count": 0}]}, "count 0 is not a whole number of at least 1"),
            ({"include": [{"class": "cat", "count": True}]}, "count True is not"),
            ({"include": [{"class": "cat"}]}, "count None is not"),
            ({"include": [{"class": "cat", "count": 1, "color": "teal"}]}, "color 'teal' is none of red, orange"),
            ({"include": [{"class": "cat", "count": 1, "position": "left"}]}, "position 'left' is not of the form"),
            ({"include": [{"class": "cat", "count": 1, "position": ["left of", 0]}]}, "relative to clause 0, which"),
            ({"exclude": [{"class": "dragon", "count": 1}]}, r"exclude\[0\]: the detector knows no class 'dragon'"),
        ],
    )
    def test_what_is_wrong_is_said(self, change, message):
        row = {"tag": "single_object", "include": [{"class": "cat", "count": 1}], **change}
        with pytest.raises(MetadataError, match=message):
            parse_metadata(row, ["cat", "couch"])

    def test_all_that_is_wrong_is_said_at_once(self):
        include = [{"class": "cat", "count": 1}, {"class": "yeti", "count": -1, "position": ["behind", 0]}]
        with pytest.raises(MetadataError) as error:
            parse_metadata({"tag": "x", "include": include}, ["cat"])
        assert str(error.value).count(";") == 3
        assert "position 'behind' is none of left of, right of, above, below" in str(error.value)


def save_detector(folder: Path) -> None:
    """A Mask2Former of random weights that is sure of what it sees."""
    backbone = SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    width = dict(feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, dim_feedforward=16)
    labels = dict(enumerate(["cat", "sofa", "mouse", "stop sign"]))
    config = Mask2FormerConfig(
        backbone_config=backbone,
        **width,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=10,
        id2label=labels,
        label2id={label: i for i, label in labels.items()},
    )
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight *= 8
        model.class_predictor.bias[-1] -= 4
    model.save_pretrained(folder)
    # What files of 2023 hold besides.
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self"
    assert f"{prefix}.query.weight" in tensors
    tensors[f"{prefix}.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    Mask2FormerImageProcessorPil(size={"height": 384, "width": 384}, size_divisor=32).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("geneval")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        save_detector(root / "detector")
        config = make_config()
        config.text_config.max_position_embeddings = 40  # the length of the templates, a letter a token
        clip = CLIPModel(config)
        with torch.no_grad():  # apart enough that images differ in their nearest colour
            for name, parameter in clip.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 3.0 if "patch_embedding" in name else 0.3)
        clip.save_pretrained(root / "clip")
        make_processor(root / "clip")
    return SimpleNamespace(detector=root / "detector", clip=root / "clip")


@pytest.fixture(scope="module")
def options(folders: SimpleNamespace) -> dict[str, Any]:
    return dict(model=str(folders.detector), clip=str(folders.clip), detector_size=64, device="cpu")


@pytest.fixture(scope="module")
def reward(options: dict[str, Any]) -> GenEval:
    return GenEval(**options)


def pictures(count: int, sizes: Sequence[tuple[int, int]] = ((64, 64),)) -> list[Image.Image]:
    rng = np.random.default_rng(3)
    noise = [Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in range(count)]
    return [image.resize(sizes[i % len(sizes)]) for i, image in enumerate(noise)]


class TestReward:
    def test_runs_and_batches_and_sizes_do_not_matter(self, reward, options):
        images = pictures(6, sizes=((64, 64), (96, 60), (40, 90)))
        rows = official_rows()
        call = dict(prompts=[row["prompt"] for row in rows], images=images, metadata=[json.dumps(row) for row in rows])
        graded = GenEval(**options, graded=True, batch_size=4)
        for one in (reward, graded):
            scores = one(**call)
            assert scores == one(**call)
            alone = [one([row["prompt"]], [image], metadata=[row])[0] for row, image in zip(rows, images, strict=True)]
            assert scores == pytest.approx(alone)
        assert set(reward(**call)) <= {0.0, 1.0}
        assert len(set(graded(**call))) > 1
        assert any(reward.detect(images))

    def test_detections_are_those_of_the_processors_own_post_processing(self, reward):
        image = pictures(1, sizes=((384, 384),))[0]  # its grid
        pixels = reward._detector_processor([image], return_tensors="pt").pixel_values
        with torch.inference_mode():
            output = reward._detector(pixels)
        (expected,) = reward._detector_processor.post_process_instance_segmentation(
            output, threshold=0.3, target_sizes=[(384, 384)], return_binary_maps=True
        )
        (found,) = reward.detect([image])
        found = sorted(found, key=lambda one: -one.score)
        order = sorted(range(len(expected["segments_info"])), key=lambda i: -expected["segments_info"][i]["score"])
        assert len(found) == len(order) >= 3
        names = ["cat", "couch", "computer mouse", "stop sign"]  # as GenEval calls them
        for one, i in zip(found, order, strict=True):
            info, mask = expected["segments_info"][i], expected["segmentation"][i].bool().numpy()
            assert (one.name, one.score) == (names[info["label_id"]], pytest.approx(info["score"], abs=1e-5))
            assert np.array_equal(one.mask, mask)
            rows, columns = np.nonzero(mask)
            assert one.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)

    def test_images_are_looked_at_in_the_published_size(self, folders):
        full = GenEval(str(folders.detector), clip=str(folders.clip))
        shapes = {
            size: tuple(full._detector_processor([Image.new("RGB", size)], return_tensors="pt").pixel_values.shape[2:])
            for size in ((512, 512), (1024, 768), (400, 1600))
        }
        assert shapes == {(512, 512): (800, 800), (1024, 768): (800, 1088), (400, 1600): (1344, 352)}

    def test_colors_against_an_independent_computation(self, reward, folders):
        model = CLIPModel.from_pretrained(folders.clip).eval()
        tokenizer = CLIPTokenizer.from_pretrained(folders.clip)

        def direction(text: str) -> torch.Tensor:
            ids = tokenizer(text, return_tensors="pt").input_ids
            return F.normalize(model.get_text_features(ids).pooler_output[0], dim=0)

        rng = np.random.default_rng(5)
        picked = []
        for image in pictures(12, sizes=((40, 40), (48, 30))):
            left, top = (int(value) for value in rng.integers(0, 15, 2))
            box = (left, top, left + int(rng.integers(3, 15)), top + int(rng.integers(3, 15)))
            mask = np.zeros((image.height, image.width), dtype=bool)
            mask[box[1] : box[3], box[0] : box[2]] = rng.random((box[3] - box[1], box[2] - box[0])) < 0.7
            pixels = np.where(mask[..., None], np.asarray(image), 0x99)[box[1] : box[3], box[0] : box[2]]
            with torch.no_grad():
                crop = cropped_pixels(Image.fromarray(pixels.astype(np.uint8))).float()[None]
                seen = F.normalize(model.get_image_features(crop).pooler_output[0], dim=0)
                similar = {}
                for color in COLORS:
                    texts = (
                        f"a photo of a {color} cat",
                        f"a photo of a {color}-colored cat",
                        f"a photo of a {color} object",
                    )
                    similar[color] = float(seen @ F.normalize(sum(map(direction, texts)), dim=0))
            expected = max(similar, key=similar.__getitem__)
            assert reward.colors(image, [Detection("cat", 0.9, box, mask)]) == [expected]
            picked.append(expected)
            whole = Detection("cat", 0.9, (0, 0, *image.size))
            assert reward.colors(image, [whole, whole])[0] == reward.colors(image, [whole])[0]
        assert len(set(picked)) > 1
        assert reward.colors(image, []) == []
        # A margin of 11, whose middle begins elsewhere in torchvision than in transformers.
        wide = pictures(1, sizes=((41, 24),))[0]
        shown = reward._clip_processor([wide], return_tensors="pt").pixel_values[0]
        assert torch.allclose(shown.double(), cropped_pixels(wide), atol=1e-5)

    def test_verdicts_and_partial_scores_of_what_is_found(self, reward, options, monkeypatch):
        graded = GenEval(**options, graded=True)
        found = [Detection("cat", 0.95, at(20, 20)), Detection("couch", 0.8, at(44, 20))]
        for one in (reward, graded):
            monkeypatch.setattr(one, "detect", lambda images: [found for _ in images])
            monkeypatch.setattr(one, "colors", lambda image, objects: ["red" for _ in objects])
        rows = official_rows()
        call = dict(prompts=[""] * 6, images=pictures(6), metadata=rows)
        assert reward(**call) == [1.0, 1.0, 0.0, 1.0, 1.0, 0.0]
        assert graded(**call) == pytest.approx([1.0, 1.0, 1 / 3, 1.0, 1.0, 3 / 4])

    def test_thresholds_are_used(self, options, monkeypatch):
        lax = GenEval(**options, thresholds=Thresholds(counting=0.5, position=0.9))
        found = [Detection("cat", 0.6, at(x, 20)) for x in (10, 25, 40)] + [Detection("couch", 0.9, at(52, 20))]
        monkeypatch.setattr(lax, "detect", lambda images: [found for _ in images])
        rows = official_rows()
        assert lax(["", ""], pictures(2), metadata=[rows[2], rows[4]]) == [1.0, 1.0]
        strict = GenEval(**options, thresholds={"position": 1.0, "confidence": 0.7})  # as from JSON
        monkeypatch.setattr(strict, "detect", lambda images: [found for _ in images])
        assert strict(["", ""], pictures(2), metadata=[rows[2], rows[4]]) == [0.0, 0.0]

    def test_fingerprints_tell_options_apart(self, reward, options):
        others = [
            GenEval(**options, graded=True),
            GenEval(**options, thresholds=Thresholds(confidence=0.4)),
            GenEval(**{**options, "detector_size": 96}),
            GenEval(**options, dtype="bfloat16"),
        ]
        assert len({one.fingerprint for one in (reward, *others)}) == 5
        assert reward.fingerprint == GenEval(**options).fingerprint

    def test_bfloat16_runs(self, options):
        half = load_reward("geneval", **options, dtype="bfloat16")
        assert half([""], pictures(1), metadata=[official_rows()[3]])[0] in (0.0, 1.0)

    def test_prompts_without_metadata(self, reward):
        image = pictures(1)[0]
        assert reward(["a cat"], [image]) == [None]
        assert reward(["a cat"], [image], tag=[None], include=[None], exclude=[None]) == [None]
        dataset = Dataset.from_dict({"prompt": ["a cat", "a dog"], "task": ["geneval", "style"]})
        rows = {"geneval": np.array([0]), "style": np.array([1])}
        (problem,) = reward_data_problems({"geneval": [reward]}, dataset, rows, "train_dataset")
        assert "reward 'geneval' can't score 1 of the 1 prompts of its task 'geneval', such as 'a cat'" in problem
        assert "neither a column 'metadata' nor the columns 'tag' and 'include'" in problem
        assert "knows no class 'dog'" in reward.why_not(
            "", {"tag": "colors", "include": [{"class": "dog", "count": 1}]}
        )

    def test_a_damaged_detector_is_refused(self, options, folders, tmp_path):
        for path in folders.detector.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors["class_predictor.weight"]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="1 tensors are missing .class_predictor.weight"):
            GenEval(**{**options, "model": str(tmp_path)})
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="there is no model.*safetensors.*Pickled weights are not read"):
            GenEval(**{**options, "model": str(tmp_path)})


@pytest.mark.slow
@pytest.mark.parametrize("repeats", [1, 20_000])
def test_the_official_file_is_prompts(reward, tmp_path, monkeypatch, repeats):
    """Also a long one, whose first ten megabytes have no position and no colour."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{**row, "note": "x" * 600} if repeats > 1 else row for row in official_rows()]
    rows = rows[:1] * repeats + rows[1:]
    geneval, ocr = tmp_path / "evaluation_metadata.jsonl", tmp_path / "ocr.txt"
    geneval.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ocr.write_text('a sign that says "OPEN"\n')
    dataset = load_prompts("prompts", [f"geneval={geneval}", f"ocr={ocr}"], "task")
    assert len(dataset) == len(rows) + 1
    last = np.arange(len(rows) - 6, len(rows))
    for row, loaded in zip(rows[-6:], dataset.select(last), strict=True):
        assert loaded["prompt"] == row["prompt"]
        assert parse_metadata(loaded) == parse_metadata(row)
    assert reward_data_problems({"geneval": [reward]}, dataset, {"geneval": last}, "train_dataset") == []
    assert reward(["a sign"], pictures(1), **{name: [value] for name, value in dataset[-1].items()}) == [None]
