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
import socket
from pathlib import Path

import evaluate
import numpy as np
import pytest
from datasets import Dataset, Features, Value
from PIL import Image

from trl_diffusion_opd.rewards import CombinedReward, Reward, RewardMetric, as_metric, score


def noise(seed, mode="RGB", size=(7, 5)):
    channels = len(mode)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels, mode)


PROMPTS = ["a", "bb", "ccc"]
IMAGES = [noise(i) for i in range(3)]


class Mean(Reward):
    """Depends on every pixel and on the prompt; does not apply to prompts of two letters."""

    name = "mean"
    bounds = (0.0, None)

    def why_not(self, prompt, columns):
        return "it has two letters" if len(prompt) == 2 else None

    def _score(self, prompts, images, rows):
        weights = [
            np.random.default_rng(len(p)).random(np.asarray(i).shape) for p, i in zip(prompts, images, strict=True)
        ]
        return [float((np.asarray(image) * w).sum()) for image, w in zip(images, weights, strict=True)]


class Spec(Mean):
    name = "spec"
    columns = ("target",)

    def why_not(self, prompt, columns):
        return None

    def _score(self, prompts, images, rows):
        return [float(len(row["target"])) for row in rows]


def level(prompts, images, level, **columns):
    return [None if x is None else x["n"] * image.width for x, image in zip(level, images, strict=True)]


def test_scores_are_those_of_a_direct_call():
    metric = as_metric(Mean())
    assert isinstance(metric, evaluate.Metric) and metric.name == "mean"
    metric.add_batch(prompts=PROMPTS[:2], images=IMAGES[:2])
    metric.add_batch(prompts=PROMPTS[2:], images=IMAGES[2:])
    assert len(metric) == 3
    direct = Mean()(prompts=PROMPTS, images=IMAGES)
    assert direct[1] is None
    expected = {"mean": (direct[0] + direct[2]) / 2, "mean_scores": direct}
    assert metric.compute() == expected
    assert metric.compute(prompts=PROMPTS, images=IMAGES) == expected  # and can be used again
    for prompt, image in zip(PROMPTS, IMAGES, strict=True):
        metric.add(prompts=prompt, images=image)
    assert metric.compute() == expected


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK"])
def test_pixels_and_mode_arrive_as_they_are(mode):
    seen = []

    def look(images, **columns):
        seen.extend((image.mode, image.tobytes()) for image in images)
        return [0] * len(images)

    image = noise(0, mode)
    as_metric(look).compute(prompts=["a"], images=[image])
    assert seen == [(image.mode, image.tobytes())]


def test_an_image_from_a_file_is_its_pixels(tmp_path):
    # datasets would keep the path of a file, or compress a JPEG once more, and turn what says it lies on its side.
    exif = Image.Exif()
    exif[0x0112] = 6
    IMAGES[0].save(tmp_path / "a.jpg", exif=exif)
    IMAGES[0].save(tmp_path / "b.png")
    jpeg, png = Image.open(tmp_path / "a.jpg"), Image.open(tmp_path / "b.png")
    changed = Image.open(tmp_path / "b.png")
    changed.putpixel((0, 0), (1, 2, 3))
    metric = as_metric(Mean())
    metric.add_batch(prompts=["a"] * 3, images=[jpeg, png, changed])
    for name in ("a.jpg", "b.png"):
        (tmp_path / name).unlink()
    assert metric.compute()["mean_scores"] == Mean()(prompts=["a"] * 3, images=[jpeg, png, changed])


def test_columns_of_a_dataset():
    rows = [{"prompt": p, "task": "t", "level": {"n": i}, "target": "x" * i} for i, p in enumerate(PROMPTS)]
    data = Dataset.from_list(rows)
    columns = {name: data[name][:] for name in ("task", "level", "target")}
    metric = as_metric(level, data.features)
    assert metric.compute(prompts=PROMPTS, images=IMAGES, **columns) == {"level": 7.0, "level_scores": [0, 7, 14]}
    # A named reward says what it reads, which is text unless told otherwise.
    spec = as_metric(Spec())
    assert list(spec.features) == ["prompts", "images", "target"]
    assert spec.compute(prompts=PROMPTS, images=IMAGES, target=columns["target"])["spec"] == 1
    assert list(as_metric(Spec(), data.features).features) == ["prompts", "images", "task", "level", "target"]
    # Rewards that read one column or others say themselves what they lack.
    assert as_metric(Mean(), Features({})).compute(prompts=["aa"], images=IMAGES[:1])["mean"] is None


def test_columns_without_a_value():
    # Those of other tasks' rows, in a dataset of several tasks.
    features = Features({"level": {"n": Value("int64")}, "text": Value("string"), "items": [{"a": Value("string")}]})
    columns = {"level": [None, {"n": 2}], "text": [None, "x"], "items": [None, [{"a": None}, {"a": "b"}]]}
    seen = {}

    def look(prompts, images, completions, trainer_state, **columns):
        seen.update(columns)
        return [0, 0]

    as_metric(look, features).compute(prompts=PROMPTS[:2], images=IMAGES[:2], **columns)
    assert seen == columns


def test_nothing_applies():
    assert as_metric(Mean()).compute(prompts=["aa"], images=IMAGES[:1]) == {"mean": None, "mean_scores": [None]}
    assert as_metric(Mean()).compute(prompts=[], images=[]) == {"mean": None, "mean_scores": []}


def test_two_at_the_same_time():
    first, second = as_metric(Mean()), as_metric(Mean())
    first.add_batch(prompts=PROMPTS[:1], images=IMAGES[:1])
    second.add_batch(prompts=PROMPTS[2:], images=IMAGES[2:])
    direct = Mean()(prompts=PROMPTS, images=IMAGES)
    assert first.compute()["mean_scores"] == direct[:1]
    assert second.compute()["mean_scores"] == direct[2:]


def test_processes_cannot_meet_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)
    metric = as_metric(Mean())
    metric.add_batch(prompts=PROMPTS, images=IMAGES)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    metric.compute()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("a metric has looked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    metric = evaluate.combine([as_metric(Mean()), as_metric(level, Features({"level": {"n": Value("int64")}}))])
    metric.compute(prompts=PROMPTS, images=IMAGES, level=[{"n": 1}] * 3)


def test_combine_and_save(tmp_path):
    features = Features({"level": {"n": Value("int64")}})
    metric = evaluate.combine([as_metric(Mean()), as_metric(Spec()), as_metric(level, features)])
    columns = {"target": ["x", "y", "zz"], "level": [{"n": 1}, None, {"n": 3}]}
    for i in range(3):
        metric.add_batch(
            prompts=PROMPTS[i : i + 1],
            images=IMAGES[i : i + 1],
            **{name: values[i : i + 1] for name, values in columns.items()},
        )
    result = metric.compute()
    direct = Mean()(prompts=PROMPTS, images=IMAGES)
    assert result["mean_scores"] == direct and result["spec_scores"] == [1, 1, 2]
    assert result["level_scores"][0] == 7 and result["level_scores"][2] == 21
    assert metric.compute(prompts=PROMPTS, images=IMAGES, **columns) == result
    path = evaluate.save(tmp_path / "result.json", **result)
    assert json.loads(Path(path).read_text())["mean_scores"] == direct
    twice = evaluate.combine({"a": as_metric(Mean()), "b": as_metric(Mean())})
    twice.add_batch(prompts=PROMPTS, images=IMAGES)
    assert set(twice.compute()) == {"a_mean", "a_mean_scores", "b_mean", "b_mean_scores"}
    prefixed = evaluate.combine([as_metric(Mean()), as_metric(Spec())], force_prefix=True)
    prefixed.add_batch(prompts=PROMPTS, images=IMAGES, target=columns["target"])
    assert "spec_spec" in prefixed.compute()


def test_components_of_a_combination():
    reward = CombinedReward({Mean(): 1, Spec(): 2})
    result = as_metric(reward).compute(prompts=PROMPTS, images=IMAGES, target=["x", "y", "zz"])
    rows = [{"prompt": p, "target": t} for p, t in zip(PROMPTS, ["x", "y", "zz"], strict=True)]
    scores = score([reward], rows, IMAGES)
    assert {name: result[f"{name}_scores"] for name in scores} == scores
    assert result["combined/spec"] == pytest.approx(4 / 3)


def test_bad_input():
    metric = as_metric(Spec())
    with pytest.raises(ValueError, match="Metric 'spec' has nothing to compute: add prompts and images first"):
        metric.compute()
    with pytest.raises(
        ValueError, match=r"Metric 'spec' needs \['prompts', 'images', 'target'\], but \['target'\] are missing"
    ):
        metric.add_batch(prompts=PROMPTS, images=IMAGES)
    with pytest.raises(ValueError, match=r"but \['images', 'target'\] are missing"):
        metric.compute(prompts=PROMPTS)
    with pytest.raises(ValueError, match="Mismatch in the number of prompts .3. and images .2."):
        as_metric(level).compute(prompts=PROMPTS, images=IMAGES[:2])
    with pytest.raises(ValueError, match=r"Bad inputs for evaluation module: \['other'\]"):
        as_metric(Mean()).add_batch(prompts=PROMPTS, images=IMAGES, other=[1, 2, 3])


def test_errors_of_the_reward_come_through():
    def broken(prompts, **columns):
        return [float("nan")] * len(prompts)

    metric = as_metric(broken)
    with pytest.raises(ValueError, match="Reward function 'broken' returned nan for the prompt 'a'"):
        metric.compute(prompts=PROMPTS, images=IMAGES)
    assert isinstance(metric, RewardMetric)
