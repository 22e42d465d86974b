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

"""Rewards that hang: named, without a score in an evaluation, an error where they are trained on, and the program exits."""

import asyncio
import math
import subprocess
import sys
import threading

import pytest
from helpers.launching import surroundings
from helpers.opd_fixtures import make_config, make_dataset, make_teachers, make_trainer
from helpers.stub_server import Answer, StubServer
from PIL import Image

from trl_diffusion_opd.rewards import RemoteReward, Scorer


ROWS = [{"prompt": "a"}, {"prompt": "b"}]
IMAGES = [Image.new("RGB", (8, 8)) for _ in ROWS]
NAMED = r"Reward '{}' has given no scores for 2 images of task 'count' in 0\.2 seconds"


def quick(prompts, **columns):
    return [1.0] * len(prompts)


@pytest.fixture(params=["sync", "async", "remote"])
def hanging(request):
    """A reward that hangs until the test has ended."""
    release = threading.Event()

    def sync(prompts, **columns):
        release.wait(60)
        return [0.0] * len(prompts)

    async def later(prompts, **columns):
        while not release.is_set():
            await asyncio.sleep(0.01)
        return [0.0] * len(prompts)

    def answer(request, n):
        release.wait(60)
        return Answer(body={"scores": [0.0, 0.0]})

    with StubServer(answer) as server:
        rewards = {"sync": sync, "async": later, "remote": RemoteReward(server.url, max_retries=0)}
        yield rewards[request.param], {"sync": "sync", "async": "later", "remote": "remote"}[request.param]
        release.set()


def test_an_error_names_it(hanging):
    function, name = hanging
    with pytest.raises(TimeoutError, match=NAMED.format(name)):
        with Scorer([quick, function], timeout=0.2, task="count") as scorer:
            scorer.submit(ROWS, IMAGES)
            scorer.results()


def test_no_score_and_a_warning(hanging, caplog):
    function, name = hanging
    with Scorer([function, quick], timeout=0.2, on_timeout="none", task="count") as scorer:
        for _ in range(4):
            scorer.submit(ROWS, IMAGES)
        assert scorer.results() == {name: [None] * 8, "quick": [1.0] * 8}
    # Said and waited for once.
    assert [r.getMessage().split(" (")[0] for r in caplog.records if name in r.getMessage()] == [
        f"Reward '{name}' has given no scores for 2 images of task 'count' in 0.2 seconds"
    ]


def test_a_timeout_of_the_function_is_its_own_error():
    def impatient(prompts, **columns):
        raise TimeoutError("of a database")

    with (
        pytest.raises(TimeoutError, match="of a database"),
        Scorer([impatient], timeout=5, on_timeout="none") as scorer,
    ):
        scorer.submit(ROWS, IMAGES)
        scorer.results()


CHILD = """
import threading
from PIL import Image
from trl_diffusion_opd.rewards import Scorer

ROWS = [{"prompt": "a"}, {"prompt": "b"}]
IMAGES = [Image.new("RGB", (8, 8)) for _ in ROWS]

def never(**columns):
    threading.Event().wait()

with Scorer([never], timeout=0.2, on_timeout="none") as scorer:
    scorer.submit(ROWS, IMAGES)
    print(scorer.results())
"""


def test_the_program_exits(processes):
    command = [sys.executable, "-c", CHILD]
    result = subprocess.run(command, env=surroundings(), capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "{'never': [None, None]}" in result.stdout


@pytest.fixture
def stuck():
    """A reward that gives no scores before the test has ended."""
    release = threading.Event()

    def stuck(prompts, **columns):
        release.wait(60)
        return [0.0] * len(prompts)

    yield stuck
    release.set()


@pytest.mark.slow
def test_training_goes_on_without_a_monitored_reward(stuck, tmp_path, caplog):
    data = make_dataset(count=2, draw=1)
    trainer = make_trainer(
        tmp_path / "out",
        make_teachers(tmp_path),
        reward_funcs={"count": stuck, "draw": quick},
        eval_dataset=data,
        eval_strategy="steps",
        eval_steps=1,
        reward_timeout=0.2,
    )
    trainer.train()
    metrics = next(entry for entry in trainer.state.log_history if "eval_draw/quick" in entry)
    assert trainer.state.global_step == 1
    assert metrics["eval_draw/quick"] == 1.0 and math.isnan(metrics["eval_count/stuck"])
    assert "Reward 'stuck' has given no scores for 2 images of task 'count' in 0.2 seconds" in caplog.text


@pytest.mark.slow
def test_a_dry_run_goes_on_without_a_monitored_reward(stuck, tmp_path, caplog):
    trainer = make_trainer(
        tmp_path / "out",
        make_teachers(tmp_path),
        reward_funcs={"count": stuck, "draw": quick},
        train_dataset=make_dataset(count=2, draw=2),
        reward_timeout=0.2,
    )
    tasks = trainer.dry_run()["tasks"]
    assert {score for of_image in tasks["count"]["rewards"].values() for score in of_image.values()} == {None}
    assert {score for of_image in tasks["draw"]["rewards"].values() for score in of_image.values()} == {1.0}
    assert "Reward 'stuck' has given no scores for 3 images of task 'count' in 0.2 seconds" in caplog.text


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_bad_seconds(seconds, tmp_path):
    with pytest.raises(ValueError, match="reward_timeout=.*: it must be a positive number of seconds, or unset"):
        make_config(tmp_path, reward_timeout=seconds)
