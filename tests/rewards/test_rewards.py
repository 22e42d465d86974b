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
import importlib
import json
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import nn

from trl_diffusion_opd import rewards
from trl_diffusion_opd.rewards import (
    CombinedReward,
    Reward,
    Scorer,
    load_reward,
    reward_data_problems,
    reward_fingerprint,
    reward_name,
    rewards_by_task,
    score,
)
from trl_diffusion_opd.rewards.combined import check_reward


HERE = __name__  # as an import path names this file
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


def test_only_what_a_function_has_a_parameter_for():
    def few(images):
        return [image.width for image in images]

    def one_column(answer, images):
        return answer

    assert score([few, one_column], ROWS, IMAGES) == {
        "few": [image.width for image in IMAGES],
        "one_column": [1.0, 2.0],
    }


def test_what_functions_log():
    """As in TRL: `log_metric` and `log_extra`, where they are asked for, also by a part of a sum."""

    def logs(completions, log_metric, log_extra=None, **columns):
        assert "log_extra" not in columns
        log_metric("mean answer", sum(columns["answer"]) / 2)
        log_extra("seen", [f"{answer}!" for answer in columns["answer"]])
        return [1, 2]

    def part(images, log_metric, **columns):
        log_metric("part", 7)
        return [0, 0]

    with Scorer([logs, CombinedReward({part: 1.0})]) as scorer:
        for _ in range(2):
            scorer.submit(ROWS, IMAGES)
        assert scorer.results()["logs"] == [1, 2, 1, 2]
    assert scorer.log.metrics == {"mean answer": [1.5, 1.5], "part": [7.0, 7.0]}
    assert scorer.log.extra == {"seen": ["1!", "2!", "1!", "2!"]}
    assert score([logs], ROWS, IMAGES) == {"logs": [1.0, 2.0]}  # nobody listens
    dataset = Dataset.from_list(ROWS)
    assert reward_data_problems({"count": [logs]}, dataset, {"count": np.arange(2)}, "data") == []


class Warmth(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, images, answer):
        return self.weight * torch.tensor(answer)


class PixelModel(nn.Module):
    def forward(self, pixel_values):
        return pixel_values


def test_a_torch_module():
    reward = Warmth()
    assert reward_name(reward) == "Warmth" and rewards_by_task(reward, ["a"]) == {"a": [reward]}
    assert score([reward], ROWS, IMAGES) == {"Warmth": [2.0, 4.0]}
    dataset = Dataset.from_list(ROWS)
    assert reward_data_problems({"count": [reward]}, dataset, {"count": np.arange(2)}, "data") == []
    (problem,) = reward_data_problems({"count": [PixelModel()]}, dataset, {"count": np.arange(2)}, "data")
    assert problem.startswith("data: reward 'PixelModel' needs the column(s) 'pixel_values', but the data has")


def test_classes():
    message = "reward_funcs: Length of task 'a' is a class. Give an instance: Length"
    with pytest.raises(ValueError, match=message):
        rewards_by_task({"a": Length}, ["a"])
    assert load_reward(f"{HERE}:Length", batch_size=3).batch_size == 3
    check_reward(f"{HERE}:Length", batch_size=3)
    with pytest.raises(ValueError, match=rf"Reward '{HERE}:Length' has no options \['batchsize'\]"):
        load_reward(f"{HERE}:Length", batchsize=3)


def test_modules_of_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_the_folder.py").write_text(
        "def score(images, **columns):\n    return [1.0] * len(images)\n"
    )
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # a script's, which has its own folder
    with pytest.raises(
        ValueError, match="cannot be imported: No module named 'rewards_of_the_folder'. Modules are searched in the"
    ):
        load_reward("rewards_of_the_folder:score")
    monkeypatch.chdir(tmp_path)
    assert load_reward("rewards_of_the_folder:score")(IMAGES) == [1.0, 1.0]


def test_rewards_of_a_file(tmp_path, monkeypatch):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "beside_the_reward.py").write_text("VALUE = 0.5\n")
    (folder / "json.py").write_text(
        "from beside_the_reward import VALUE\n\ndef score(images, **columns):\n    return [VALUE] * len(images)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    found = load_reward("elsewhere/json.py:score")
    assert found(IMAGES) == [0.5, 0.5] and found.__name__ == "score"
    assert load_reward(f"{folder}/json.py:score") is load_reward("./elsewhere/json.py:score") is found
    assert json.loads("[1]") == [1]  # the module of that name is still Python's
    with pytest.raises(
        ValueError, match="Reward 'elsewhere/json.py:scroe': elsewhere/json.py has no 'scroe'; it has score"
    ):
        load_reward("elsewhere/json.py:scroe")
    with pytest.raises(ValueError, match="a path must end in .py, as elsewhere/json.py:score"):
        load_reward("elsewhere/json:score")
    with pytest.raises(ValueError, match="there is no file 'jsn.py'"):
        load_reward("jsn.py:score")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import os\n\nx = y\n", "NameError in wrong.py, line 3: name 'y' is not defined"),
        ("def f(:\n", r"SyntaxError: .*\(wrong.py, line 1\)"),
        ("import no_such_module\n", "ModuleNotFoundError in wrong.py, line 1: No module named 'no_such_module'"),
    ],
)
def test_files_that_cannot_be_imported(tmp_path, monkeypatch, content, message):
    (tmp_path / "wrong.py").write_text(content)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.chdir(tmp_path)
    for spec in ("wrong.py:f", "wrong:f"):
        monkeypatch.delitem(sys.modules, "wrong", raising=False)
        importlib.invalidate_caches()
        with pytest.raises(ValueError, match=f"Reward '{spec}' cannot be imported: {message}"):
            load_reward(spec)


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


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([0.5, float("nan")], "returned nan for the prompt 'two cats'. It must return a finite number, or None"),
        ([float("inf"), 0.5], "returned inf for the prompt 'a cat'. It must return a finite number, or None"),
        (["0.5", 1], "returned '0.5' for the prompt 'a cat'. It must return a finite number, or None"),
        ([[0.5], [1]], "returned .0.5. for the prompt 'a cat'. It must return a finite number"),
        (None, "'reward' returned None. It must return a list with one value for each image"),
        (0.5, "'reward' returned 0.5. It must return a list with one value for each image"),
    ],
)
def test_what_is_no_number_is_refused(returned, message):
    def reward(**kwargs):
        return returned

    with pytest.raises(ValueError, match=f"Reward function .*{message}"):
        score([reward], ROWS, IMAGES)


def test_numbers_of_other_kinds():
    import numpy as np
    import torch

    for values in (np.array([1, 2.5]), torch.tensor([1, 2.5]), (np.float32(1), 2.5), [torch.tensor(1), 2.5]):
        found = score([lambda values=values, **kwargs: values], ROWS, IMAGES)["<lambda>"]
        assert found == [1.0, 2.5] and {type(value) for value in found} == {float}


class Length(Reward):
    """Scores prompts of at least two words."""

    name = "length"
    bounds = (0.0, 1.0)
    columns = ("answer",)

    def why_not(self, prompt, columns):
        return super().why_not(prompt, columns) or (None if " " in prompt else "it is a single word")

    def _score(self, prompts, images, rows):
        assert len(images) <= self.batch_size and {image.mode for image in images} == {"RGB"}
        return [len(prompt) + row["answer"] for prompt, row in zip(prompts, rows, strict=True)]


def test_a_reward_scores_what_it_applies_to_in_batches():
    images = [Image.new(mode, (2, 2)) for mode in ("L", "RGBA", "RGB", "P", "RGB")]
    prompts = ["a cat", "cat", "two cats", "three cats", "a dog"]
    scores = Length(batch_size=2)(prompts=prompts, images=images, answer=[1, 2, 3, None, 5], task=["t"] * 5)
    assert scores == [6, None, 11, None, 10]
    with pytest.raises(ValueError, match="Reward 'length': batch_size=0, it must be at least 1"):
        Length(batch_size=0)


def test_a_reward_that_does_not_apply_on_its_own_task():
    data = Dataset.from_list(
        [
            {"prompt": "a cat", "task": "mine", "answer": 1},
            {"prompt": "cat", "task": "mine", "answer": 1},
            {"prompt": "a dog", "task": "mine", "answer": None},
            {"prompt": "cat", "task": "another", "answer": None},
        ]
    )
    rows = {"mine": [0, 1, 2], "another": [3]}
    assert reward_data_problems({"mine": [Length(), red], "another": [red]}, data, rows, "train_dataset") == [
        "train_dataset: reward 'length' can't score 2 of the 3 prompts of its task 'mine', such as 'cat': it is a single "
        "word."
    ]
    assert reward_data_problems({"mine": [red], "absent": [Length()]}, data, rows, "train_dataset") == []
    without = data.select([0]).remove_columns("answer")
    assert (
        "it has no value in column 'answer'"
        in reward_data_problems({"mine": [Length()]}, without, {"mine": [0]}, "x")[0]
    )


def test_fingerprints():
    assert reward_fingerprint(Length()) == "length"
    assert reward_fingerprint(answer) == f"{HERE}:answer"
    assert reward_fingerprint(Ocr()) == f"{HERE}:Ocr"
    assert reward_fingerprint(Ocr().bound) == f"{HERE}:Ocr.bound"
    partial = functools.partial
    assert reward_fingerprint(partial(answer, a=1, b=2)) == reward_fingerprint(partial(answer, b=2, a=1))
    assert reward_fingerprint(partial(answer, a=1)) != reward_fingerprint(partial(answer, a=2))


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
        "reward_funcs: task 'a' has two functions named 'red', which would share a metric. Rename one.",
    ]


def test_one_function_for_two_tasks_is_fine_and_two_of_one_name_are_not():
    assert rewards_by_task({"a": red, "b": red}, ["a", "b"]) == {"a": [red], "b": [red]}
    with pytest.raises(ValueError, match="tasks 'a' and 'b' have two functions named 'red'"):
        rewards_by_task({"a": red, "b": functools.partial(red)}, ["a", "b"])
    with pytest.raises(ValueError, match="task 'a' has 'red' twice"):
        rewards_by_task({"a": [red, red]}, ["a"])


def test_by_task_lists_what_cannot_be_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError) as error:
        rewards_by_task({"a": ["clip", "unifiedreward"], "b": "remote"}, ["a", "b"])
    clip, client, remote = str(error.value).splitlines()
    assert clip.startswith("reward_funcs: task 'a': There is no reward 'clip'. There are aesthetic, ")
    assert client == (
        "reward_funcs: task 'a': Reward 'unifiedreward' needs the openai client. Install it with "
        '`pip install ".[unifiedreward]"` in a checkout of trl-diffusion-opd.'
    )
    assert remote.startswith("reward_funcs: task 'b': Reward 'remote' needs url: ")


def test_a_name_is_loaded_once():
    functions = rewards_by_task({"a": f"{HERE}:Length", "b": [f"{HERE}:Length", red]}, ["a", "b"])
    assert functions["a"][0] is functions["b"][0]


def test_options_of_named_rewards(monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "test", "Length")
    monkeypatch.setattr(rewards.names, "reward_class", lambda name: Length)
    assert load_reward("test", batch_size=3).batch_size == 3
    with pytest.raises(ValueError, match=r"Reward 'test' has no options \['batchsize'\]; it has \['batch_size'\]"):
        load_reward("test", batchsize=3)
    with pytest.raises(ValueError, match=rf"'{HERE}:red' is a function and takes no options, but \['device'\]"):
        load_reward(f"{HERE}:red", device="cpu")


def test_every_public_name_is_there():
    for name in rewards.__all__:
        assert getattr(rewards, name) is not None
    for spec, class_name in rewards.REWARDS.items():
        reward = rewards.reward_class(spec)
        assert issubclass(reward, Reward) and reward.name == spec and reward.__name__ == class_name
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = rewards.Nothing


def test_load_reward():
    assert load_reward("trl_diffusion_opd.rewards:score") is score
    assert load_reward(f"{HERE}:Ocr.bound").__name__ == "bound"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "clip",
            r"There is no reward 'clip'. There are aesthetic, clip_image_similarity, clipscore, .*frames.*pip install .\.\[ocr\]",
        ),
        ("no_such_module:f", "Reward 'no_such_module:f' cannot be imported: No module named 'no_such_module'"),
        ("trl_diffusion_opd.rewards:nothing", "trl_diffusion_opd.rewards has no 'nothing'; it has no function"),
    ],
)
def test_load_reward_refuses(spec, message):
    with pytest.raises(ValueError, match=message):
        load_reward(spec)
