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

"""Source pictures of edits: how they reach reward functions and servers, and what of them a result keeps."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from helpers.clip_models import cropped_pixels, make_clip, make_images, transformers_embeddings
from helpers.example_script import load_script
from helpers.example_server import serving
from helpers.stub_server import Answer, StubServer
from PIL import Image

from trl_diffusion_opd.rewards import (
    CLIPImageSimilarity,
    CombinedReward,
    RemoteReward,
    RemoteRewardError,
    as_metric,
    load_reward,
    reward_data_problems,
    score,
)
from trl_diffusion_opd.rewards import remote as remote_module
from trl_diffusion_opd.rewards.server_calls import png_base64


PICTURES = make_images()
PROMPTS = ["a", "b", "c", "d"]
SOURCES = [[PICTURES[1]], [PICTURES[0], PICTURES[2], PICTURES[3]], [], None]
ROWS = [{"prompt": p, "task": "edit", "source_images": s} for p, s in zip(PROMPTS, SOURCES, strict=True)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return folder, make_clip(folder)


def test_clip_image_similarity_is_the_mean_cosine(clip):
    folder, weights = clip
    vectors = [transformers_embeddings(weights, cropped_pixels(p, rule="transformers"), "a")[0] for p in PICTURES]
    cosines = torch.stack(vectors) @ torch.stack(vectors).T
    expected = [cosines[0, 1].item(), cosines[1, [0, 2, 3]].mean().item(), None, None]
    assert abs(cosines[1, [0, 2, 3]].max().item() - expected[1]) > 0.01  # so that another rule would show
    for size in (16, 1):
        reward = load_reward("clip_image_similarity", model=str(folder), batch_size=size)
        scores = score([reward], ROWS, PICTURES)["clip_image_similarity"]
        assert scores[2:] == [None, None] and scores[:2] == pytest.approx(expected[:2], abs=1e-5)
    # What stays as it was is 1, in any mode.
    other = PICTURES[0].convert("RGBA")
    assert reward(prompts=["a"], images=[PICTURES[0]], source_images=[[other]]) == pytest.approx([1.0], abs=1e-6)
    assert reward(prompts=["a"], images=PICTURES[:1]) == [None]
    with torch.autocast("cpu", torch.bfloat16):
        assert score([reward], ROWS, PICTURES)["clip_image_similarity"] == scores


def test_rows_without_a_source_are_refused_in_the_rewards_own_task(clip):
    reward = CLIPImageSimilarity(model=str(clip[0]))
    rows = [
        {**row, "source_images": None if row["source_images"] is None else ["x.png"] * (i < 2)}
        for i, row in enumerate(ROWS)
    ]
    data, numbers = Dataset.from_list(rows * 40), {"edit": np.arange(160)}
    (problem,) = reward_data_problems({"edit": [reward]}, data, numbers, "data")
    assert problem == (
        "data: reward 'clip_image_similarity' can't score 80 of the 160 prompts of its task 'edit', such as 'c': it has "
        "no picture in column 'source_images'."
    )
    assert reward_data_problems({"edit": [reward]}, data.select([0, 1]), {"edit": np.arange(2)}, "data") == []
    (problem,) = reward_data_problems(
        {"edit": [reward]}, data.remove_columns("source_images"), {"edit": np.arange(2)}, "data"
    )
    assert "no picture in column 'source_images'" in problem


def count(images, source_images, **columns):
    return [len(pictures or []) + image.width / 100 for pictures, image in zip(source_images, images, strict=True)]


COUNTS = [1.41, 3.24, 0.3, 0.16]


def test_the_column_reaches_functions_sums_and_metrics():
    assert score([count, CombinedReward({count: 2.0})], ROWS, PICTURES) == {
        "count": COUNTS,
        "combined": [2 * value for value in COUNTS],
        "combined/count": COUNTS,
    }
    # A first row that has no such column takes it from no other.
    first = {key: value for key, value in ROWS[3].items() if key != "source_images"}
    assert score([count], [first, ROWS[0]], [PICTURES[3], PICTURES[0]]) == {"count": [0.16, 1.41]}
    metric = as_metric(count, Features({"source_images": [Value("string")], "task": Value("string")}))
    columns = {name: [row[name] for row in ROWS] for name in ("task", "source_images")}
    assert metric.compute(prompts=PROMPTS, images=PICTURES, **columns)["count_scores"] == COUNTS


def keeps(images, source_images, level):
    """The reward of the example's server: tells every pixel of every picture apart."""
    return [
        float(n + np.asarray(i).sum() + sum(k * np.asarray(p, int).sum() for k, p in enumerate(of_row, 2)))
        for i, of_row, n in zip(images, source_images, level, strict=True)
    ]


def test_a_server_gets_source_pictures(monkeypatch):
    example = load_script("examples/reward_server.py")
    given = dict(images=PICTURES, source_images=SOURCES, level=[1, 2, 3, 4])
    with serving(example, keeps) as port:
        reward = RemoteReward(
            f"http://127.0.0.1:{port}", columns=["level", "source_images"], batch_size=3, max_retries=0
        )
        direct = keeps(**{**given, "source_images": [s or [] for s in SOURCES]})
        assert reward(prompts=PROMPTS, **given) == direct
        monkeypatch.setattr(example, "MAX_IMAGES", 6)  # the first three results have four sources
        with pytest.raises(RemoteRewardError, match="400 .*there are 7 images, of at most 6"):
            reward(prompts=PROMPTS, **given)
    without = {name: value for name, value in given.items() if name != "source_images"}
    with StubServer(lambda request, n: Answer(body={"scores": [0] * len(request.body["images"])})) as server:
        reward = RemoteReward(server.url, columns=["source_images"])
        reward(prompts=PROMPTS, **given)
        reward(prompts=PROMPTS, **without)
        RemoteReward(server.url, columns=["level"])(prompts=PROMPTS, **given)
        # The size of a call is that of all its pictures.
        monkeypatch.setattr(remote_module, "_CALL_BYTES", sum(len(png_base64(p)) for p in PICTURES[:2]) + 1)
        assert reward(prompts=PROMPTS[:2], images=PICTURES[:2], source_images=[PICTURES[:1]] * 2) == [0, 0]
    bodies = [request.body for request in server.requests]
    assert bodies[0]["source_images"] == [[png_base64(p) for p in of_row or []] for of_row in SOURCES]
    assert bodies[0]["columns"] == {} and bodies[1]["source_images"] == [[]] * 4
    assert "source_images" not in bodies[2] and len(bodies) == 5


@pytest.mark.parametrize("sources", [[], [["a"], []], ["a"], [[1]], [None], {"a": 1}])
def test_the_examples_server_refuses(sources):
    example = load_script("examples/reward_server.py")
    body = {"prompts": ["a"], "images": [png_base64(PICTURES[0])], "source_images": sources}
    with pytest.raises(example.RequestError):
        example.read_request(json.dumps(body).encode())
    body["source_images"] = [[png_base64(Image.new("RGBA", (2, 3)))]]
    ((row,), (image,)) = example.read_request(json.dumps(body).encode())
    assert [(p.mode, p.size) for p in row["source_images"]] == [("RGB", (2, 3))] and image.size == PICTURES[0].size
