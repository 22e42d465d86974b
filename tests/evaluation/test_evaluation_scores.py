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

"""How a report scores: the functions themselves, each on images of its own, whatever they are."""

import asyncio
import json
import sys
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from helpers.tiny_sd3 import SIZE, make_lora, make_pipeline

from trl_diffusion_opd.evaluation import evaluate_retention
from trl_diffusion_opd.rewards import CombinedReward, score


ROWS = [
    {"prompt": f"{word} {n}", "task": task, "level": n if task == "cold" else None, "notes": {"n": [n, n + 1]}}
    for task in ("cold", "warm")
    for n, word in enumerate(("fox", "cat", "moon"))
]


def red(prompts, images, **columns):
    return [float(np.asarray(image)[..., 0].mean()) for image in images]


def blue(prompts, images, **columns):
    return [float(np.asarray(image)[..., 2].mean()) for image in images]


def scribbling(prompts, images, **columns):
    """As `red`, and leaves the images black."""
    values = red(prompts, images)
    for image in images:
        image.paste((0, 0, 0), (0, 0, *image.size))
    return values


async def asynchronous(prompts, images, level, notes, **columns):
    await asyncio.sleep(0)
    return [None if at is None else at + 10 * note["n"][1] for at, note in zip(level, notes, strict=True)]


class Seen:
    """A callable that keeps what it was given."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, images, **given):
        self.calls.append({"images": images, **given})
        return [0.0] * len(images)


def report(tmp_path, rewards, **options):
    pipeline = make_pipeline()
    make_lora(pipeline, tmp_path / "student", seed=1)
    settings = dict(num_inference_steps=2, **SIZE, guidance_scale=1.0, num_images=5)
    return evaluate_retention(
        pipeline,
        "base",
        str(tmp_path / "student"),
        rewards,
        Dataset.from_list(ROWS),
        output_dir=tmp_path / "out",
        **{**settings, "batch_size": 2, **options},
    )


def test_scores_are_those_of_a_direct_call(tmp_path, monkeypatch):
    """Also those of sums, of async functions and of what does not apply, and without a metric in between."""
    monkeypatch.setitem(sys.modules, "evaluate", None)  # cannot be imported
    seen, both = Seen(), CombinedReward({red: 1.0, blue: 2.0})
    report(tmp_path, [both, asynchronous, seen])
    scores = json.loads((tmp_path / "out" / "retention_scores.json").read_text())
    # First it was tried once on two rows of each task. The base's five images of the first task come next, in batches of two.
    assert [call["prompts"] for call in seen.calls[:2]] == [["fox 0", "cat 1"]] * 2
    del seen.calls[:2]
    drawn = [image for call in seen.calls[:3] for image in call["images"]]
    rows = [ROWS[n % 3] for n in range(5)]  # prompts are taken in turn
    assert [prompt for call in seen.calls[:3] for prompt in call["prompts"]] == [row["prompt"] for row in rows]
    direct = score([both, asynchronous], rows, drawn)
    assert {name: values for name, values in scores["base"]["cold"].items() if name != "Seen"} == direct
    assert list(direct) == ["combined", "combined/red", "combined/blue", "asynchronous"]
    assert direct["asynchronous"] == [10.0, 21.0, 32.0, 10.0, 21.0]
    assert scores["base"]["warm"]["asynchronous"] == [None] * 5
    # All columns, as the dataset has them.
    first = seen.calls[0]
    assert first["completions"] == first["images"] and first["trainer_state"] is None
    assert (first["task"], first["level"]) == (["cold"] * 2, [0, 1])
    assert first["notes"] == [{"n": [0, 1]}, {"n": [1, 2]}]


@pytest.mark.parametrize("order", [(scribbling, red), (red, scribbling)])
def test_what_a_reward_does_to_its_images_is_not_seen_by_others(order, tmp_path):
    whole = report(tmp_path, list(order))["scores"]
    assert all(whole[model]["cold"]["scribbling"] == whole[model]["cold"]["red"] > 10 for model in whole)
