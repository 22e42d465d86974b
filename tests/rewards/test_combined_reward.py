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

import pytest
from PIL import Image

from trl_diffusion_opd.rewards import CombinedReward, Reward, Scorer, load_reward, names, score
from trl_diffusion_opd.rewards import combined as combined_module


PROMPTS = ["a", "b", "c"]
IMAGES = [Image.new("RGB", (2, 2), (10 * i, 0, 0)) for i in range(3)]
ROWS = [{"prompt": prompt, "level": i} for i, prompt in enumerate(PROMPTS)]


class Fixed(Reward):
    """Has the values that it is given, by image."""

    def __init__(self, name, values, bounds=(0.0, 1.0), columns=()):
        super().__init__()
        self.name, self.values, self.bounds, self.columns = name, values, bounds, columns

    def _score(self, prompts, images, rows):
        return [self.values[image.getpixel((0, 0))[0] // 10] for image in images]


PICKSCORE = [22.0, 20.8, 23.4]
CLIPSCORE = [0.3, 0.25, 0.28]
HPSV2 = [0.27, 0.31, 0.35]


@pytest.fixture
def named(monkeypatch):
    """The three rewards of the paper's aesthetic teacher, by their names."""
    values = {"pickscore": PICKSCORE, "clipscore": CLIPSCORE, "hpsv2": HPSV2}

    class Named(Fixed):
        def __init__(self, name, device="cpu"):
            super().__init__(name, values[name], (None, None))
            self.device = device

    def load(spec, **options):
        return Named(spec, **options) if spec in values else names.load_named(spec, **options)

    monkeypatch.setattr(combined_module, "load_named", load)


def test_the_papers_aesthetic_reward(named):
    reward = CombinedReward({"pickscore": 1, "clipscore": 1, "hpsv2": 1})
    expected = [p / 26 + c + h for p, c, h in zip(PICKSCORE, CLIPSCORE, HPSV2, strict=True)]
    assert reward(prompts=PROMPTS, images=IMAGES) == pytest.approx(expected, abs=1e-12)
    # Without a common scale the order would be PickScore's.
    assert max(expected) == expected[2] and min(expected) == expected[1]
    assert reward.name == "combined" and reward.bounds == (None, None)


def test_by_name(named):
    reward = load_reward("pickscore+clipscore+hpsv2", name="beauty")
    assert reward.name == "beauty" and reward.weights == {"pickscore": 1, "clipscore": 1, "hpsv2": 1}
    assert reward.scales == {"pickscore": 26, "clipscore": 1, "hpsv2": 1}


def test_components_are_given_unscaled(named):
    reward = CombinedReward({"pickscore": 2, "hpsv2": -1}, name="mix")
    expected = [2 * p / 26 - h for p, h in zip(PICKSCORE, HPSV2, strict=True)]
    scores = score([reward], ROWS, IMAGES)
    assert list(scores) == ["mix", "mix/pickscore", "mix/hpsv2"]  # the sum comes first
    assert scores["mix"] == pytest.approx(expected, abs=1e-12)
    assert scores["mix/pickscore"] == PICKSCORE and scores["mix/hpsv2"] == HPSV2
    assert score([reward], [], []) == {"mix": [], "mix/pickscore": [], "mix/hpsv2": []}
    with Scorer([reward]) as scorer:
        scorer.submit(ROWS[:2], IMAGES[:2])
        scorer.submit([], [])
        scorer.submit(ROWS[2:], IMAGES[2:])
        assert scorer.results() == scores


def test_none_if_one_does_not_apply():
    partly = Fixed("partly", [1.0, None, 0.0])
    reward = CombinedReward({partly: 1, Fixed("all", [0.5, 0.5, 0.5]): 1})
    assert score([reward], ROWS, IMAGES) == {
        "combined": [1.5, None, 0.5],
        "combined/partly": [1.0, None, 0.0],
        "combined/all": [0.5, 0.5, 0.5],
    }


def test_functions_columns_and_other_scales():
    def level(level, **columns):
        return level

    async def later(prompts, **columns):
        return [1.0] * len(prompts)

    fixed = Fixed("pickscore", [13.0, 26.0, 39.0], bounds=(0.0, 39.0), columns=("level", "spec"))
    reward = CombinedReward({level: 1, later: 3, fixed: 1}, scales={"level": 2, "pickscore": 13})
    assert reward.columns == ("level", "spec")
    rows = [{**row, "spec": "s"} for row in ROWS]
    assert score([reward], rows, IMAGES)["combined"] == [4.0, 5.5, 7.0]
    # A function of the same name is of no known scale.
    pickscore = level
    pickscore.__name__ = "pickscore"
    assert CombinedReward({pickscore: 1}).scales == {"pickscore": 1.0}


def test_bounds():
    reward = CombinedReward(
        {Fixed("unifiedreward", [], (1.0, 5.0)): 2, Fixed("x", [], (0.0, 3.0)): -1, Fixed("y", [], (0.0, 1.0)): 1}
    )
    assert reward.bounds == pytest.approx((2 * 0.2 - 3 + 0, 2 * 1 - 0 + 1))
    assert CombinedReward({Fixed("x", [], (0.0, None)): -1}).bounds == (None, 0.0)
    assert CombinedReward({len: 1}).bounds == (None, None)


def test_why_not():
    reward = CombinedReward({Fixed("x", [1, 1, 1]): 1, Fixed("y", [1, 1, 1], columns=("level",)): 1})
    assert reward.why_not("a", {"level": 1}) is None
    assert reward.why_not("a", {}) == "'y' can't score it: it has no value in column 'level'"
    assert score([reward], [{"prompt": "a"}], IMAGES[:1]) == {
        "combined": [None],
        "combined/x": [1.0],
        "combined/y": [None],
    }


def test_a_combination_of_combinations():
    inner = CombinedReward({Fixed("x", [1.0, 2.0, 3.0]): 1, Fixed("y", [1.0, 1.0, 1.0]): 1}, name="inner")
    assert score([CombinedReward({inner: 2})], ROWS, IMAGES) == {
        "combined": [4.0, 6.0, 8.0],
        "combined/inner": [2.0, 3.0, 4.0],
    }


def test_fingerprint():
    def make(weight=1.0, name="x", scale=1.0):
        return CombinedReward({Fixed(name, []): weight, len: 1}, scales={name: scale}).fingerprint

    assert make() == make()
    assert len({make(), make(2.0), make(name="z"), make(scale=2.0)}) == 4


def test_a_component_that_returns_nonsense_is_named():
    reward = CombinedReward({Fixed("x", [float("nan")] * 3): 1})
    with pytest.raises(ValueError, match="Reward function 'x' returned nan for the prompt 'a'"):
        reward(prompts=PROMPTS, images=IMAGES)


def test_options_of_components(named):
    reward = CombinedReward({"pickscore": 1}, reward_kwargs={"pickscore": {"device": "cuda"}})
    assert reward.components["pickscore"].device == "cuda"
    remote = load_reward("remote+helpers.stub_reward:width", reward_kwargs={"remote": {"url": "http://127.0.0.1:1"}})
    assert list(remote.components) == ["remote", "width"]


def test_everything_wrong_at_once():
    with pytest.raises(ValueError) as error:
        CombinedReward(
            {"nothing": 1, "remote": 1, 3: 1, Fixed("x", []): "1", Fixed("y", []): float("nan"), Fixed("x", []): 1},
            name="mix",
            scales={"z": 1, "y": 0},
            reward_kwargs={"pickscore": {}},
        )
    lines = str(error.value).splitlines()
    assert all(line.startswith("Reward 'mix': ") for line in lines)
    for part in (
        "There is no reward 'nothing'",
        "Reward 'remote' needs url",
        "3 is neither a name nor a function",
        "the weight of 'x' is '1'; it must be a finite number",
        "the weight of 'y' is nan; it must be a finite number",
        "two components are named 'x'. Rename one.",
        "scales has 'z', which is no component",
        "the scale of 'y' is 0; it must be positive",
        "reward_kwargs has 'pickscore', which is no component",
    ):
        assert sum(part in line for line in lines) == 1, part
    assert len(lines) == 9
    with pytest.raises(ValueError, match="there is no component"):
        CombinedReward({})
