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

import asyncio
import functools

import pytest
from PIL import Image

from trl_diffusion_opd.rewards import load_reward, reward_name, rewards_by_task, score


ROWS = [{"prompt": "a cat", "task": "count", "answer": 1}, {"prompt": "two cats", "task": "count", "answer": 2}]
IMAGES = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]


def answer(answer, **kwargs):
    return [value / 2 for value in answer]


def red(images, **kwargs):
    return [image.getpixel((0, 0))[0] / 255 for image in images]


class Ocr:
    def __call__(self, prompts, **kwargs):
        return [float(len(prompt)) for prompt in prompts]

    def bound(self, prompts, **kwargs):
        return [0.0 for _ in prompts]


def test_called_by_keyword_with_every_column():
    seen = {}

    def reward(*args, **kwargs):
        assert not args
        seen.update(kwargs)
        return [1, 2]

    state = object()
    assert score([reward], ROWS, IMAGES, trainer_state=state) == {"reward": [1.0, 2.0]}
    assert seen == {
        "prompts": ["a cat", "two cats"],
        "images": IMAGES,
        "completions": IMAGES,  # what functions written for TRL take
        "task": ["count", "count"],
        "answer": [1, 2],
        "trainer_state": state,
    }


def test_several_functions():
    assert score([answer, red, Ocr()], ROWS, IMAGES) == {"answer": [0.5, 1.0], "red": [1.0, 0.0], "Ocr": [5.0, 8.0]}


def test_a_function_cannot_change_what_the_next_one_sees():
    def greedy(images, prompts, **kwargs):
        images.clear()
        return [0.0] * len(prompts)

    assert score([greedy, red], ROWS, IMAGES)["red"] == [1.0, 0.0]


def test_none_is_kept():
    def sometimes(prompts, **kwargs):
        return [None, 0.25]

    assert score([sometimes], ROWS, IMAGES) == {"sometimes": [None, 0.25]}


def test_async():
    async def slow(prompts, **kwargs):
        await asyncio.sleep(0)
        return [1.0 for _ in prompts]

    assert score([slow], ROWS, IMAGES) == {"slow": [1.0, 1.0]}


def test_no_images():
    # A process whose share of the last batch is empty.
    assert score([red], [], []) == {"red": []}


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_values_is_refused(count):
    def reward(**kwargs):
        return [0.0] * count

    with pytest.raises(
        ValueError, match=f"Reward function 'reward' returned {count} values for 2 images. It must return"
    ):
        score([reward], ROWS, IMAGES)


def test_names():
    assert reward_name(answer) == "answer"
    assert reward_name(functools.partial(functools.partial(answer, a=1), b=2)) == "answer"
    assert reward_name(Ocr()) == "Ocr"
    assert reward_name(Ocr().bound) == "bound"
    assert reward_name(functools.partial(Ocr())) == "Ocr"


def test_by_task():
    assert rewards_by_task(None, ["a", "b"]) == {"a": [], "b": []}
    assert rewards_by_task(red, ["a", "b"]) == {"a": [red], "b": [red]}
    assert rewards_by_task([red, answer], ["a", "b"]) == {"a": [red, answer], "b": [red, answer]}
    assert rewards_by_task({"b": (answer, red)}, ["a", "b"]) == {"a": [], "b": [answer, red]}


def test_by_task_refuses_everything_at_once():
    with pytest.raises(ValueError) as error:
        rewards_by_task({"a": [red, functools.partial(red)], "b": 3, "c": red}, ["a", "b"])
    assert str(error.value).splitlines() == [
        "reward_funcs: no prompts for task 'c'; the data has ['a', 'b'].",
        "reward_funcs: 3 of task 'b' is neither a name nor a function.",
        "reward_funcs: task 'a' has two functions named 'red'; their metrics would be one. Rename one.",
    ]


def test_one_function_for_two_tasks_is_fine_and_two_of_one_name_are_not():
    assert rewards_by_task({"a": red, "b": red}, ["a", "b"]) == {"a": [red], "b": [red]}
    with pytest.raises(ValueError, match="tasks 'a' and 'b' have two functions named 'red'"):
        rewards_by_task({"a": red, "b": functools.partial(red)}, ["a", "b"])
    with pytest.raises(ValueError, match="task 'a' has 'red' twice"):
        rewards_by_task({"a": [red, red]}, ["a"])


def test_load_reward():
    assert load_reward("trl_diffusion_opd.rewards:score") is score
    assert load_reward("test_rewards:Ocr.bound").__name__ == "bound"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("clip", "There is no reward 'clip'. There are aesthetic, clipscore, geneval, .*trl-diffusion-opd.ocr."),
        ("no_such_module:f", "Reward 'no_such_module:f' cannot be imported: No module named 'no_such_module'"),
        ("trl_diffusion_opd.rewards:nothing", "has no attribute 'nothing'"),
    ],
)
def test_load_reward_refuses(spec, message):
    with pytest.raises(ValueError, match=message):
        load_reward(spec)
