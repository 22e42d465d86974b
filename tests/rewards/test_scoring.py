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
import contextlib
import contextvars
import threading
import time
import traceback

import pytest
import torch
from helpers.stub_server import Answer, StubServer
from PIL import Image

from trl_diffusion_opd.rewards import RemoteReward, Scorer, score


BATCHES = [[{"prompt": f"{i} {j}", "number": 10 * i + j} for j in range(3)] for i in range(5)]


def generate(rows):
    return [Image.new("RGB", (8, 8), (row["number"] % 256, 0, 0)) for row in rows]


def number(number, **columns):
    return number


def red(images, **columns):
    return [image.getpixel((0, 0))[0] for image in images]


def overlapped(functions, batches=BATCHES, generate=generate):
    with Scorer(functions) as scorer:
        for rows in batches:
            scorer.submit(rows, generate(rows))
        return scorer.results()


def one_after_the_other(functions, batches=BATCHES, generate=generate):
    scores = {}
    for rows in batches:
        for name, values in score(functions, rows, generate(rows)).items():
            scores.setdefault(name, []).extend(values)
    return scores


def test_same_scores_in_the_same_order():
    def uneven(number, **columns):
        time.sleep(0.02 if number[0] % 20 == 0 else 0)
        return [None if n % 3 == 0 else n / 7 for n in number]

    async def later(number, **columns):
        await asyncio.sleep(0.01)
        return number

    functions = [number, uneven, later, red]
    scores = overlapped(functions)
    assert scores == one_after_the_other(functions)
    assert scores["red"] == [row["number"] for rows in BATCHES for row in rows]


def test_a_function_is_called_by_one_thread_in_order_and_others_beside_it():
    both = threading.Barrier(2)  # passes only if both functions are called at the same time
    calls = {"left": [], "right": []}

    def left(number, **columns):
        both.wait(5)
        calls["left"].append((number[0], threading.get_ident()))
        return number

    def right(number, **columns):
        both.wait(5)
        calls["right"].append((number[0], threading.get_ident()))
        return number

    overlapped([left, right])
    for seen in calls.values():
        assert [first for first, _ in seen] == [rows[0]["number"] for rows in BATCHES]
        assert len({thread for _, thread in seen}) == 1
    assert calls["left"][0][1] != calls["right"][0][1]


def test_at_most_two_batches_are_under_way():
    go = threading.Event()

    def waits(number, **columns):
        go.wait(5)
        return number

    with Scorer([waits]) as scorer:
        for rows in BATCHES[:2]:
            scorer.submit(rows, generate(rows))  # neither waits
        third = threading.Thread(target=scorer.submit, args=(BATCHES[2], generate(BATCHES[2])))
        third.start()
        third.join(0.1)
        assert third.is_alive()
        go.set()
        third.join(5)
        assert not third.is_alive()
        assert scorer.results()["waits"] == [row["number"] for rows in BATCHES[:3] for row in rows]
        assert scorer.waited > 0.05


def fails_at_ten(number, **columns):
    if number[0] == 10:
        raise KeyError("what went wrong")
    return number


def test_an_error_comes_with_its_traceback_and_every_time():
    with Scorer([number, fails_at_ten]) as scorer:
        with pytest.raises(KeyError, match="what went wrong") as error:
            for rows in BATCHES:
                scorer.submit(rows, generate(rows))
        assert "fails_at_ten" in "".join(traceback.format_exception(error.value))
        # Nobody goes on with scores that lack a batch.
        with pytest.raises(KeyError, match="what went wrong"):
            scorer.results()
        with pytest.raises(KeyError, match="what went wrong"):
            scorer.submit(BATCHES[4], generate(BATCHES[4]))
            scorer.submit(BATCHES[4], generate(BATCHES[4]))


def test_an_error_leaves_the_block_without_hanging():
    with pytest.raises(KeyError, match="what went wrong"):
        overlapped([fails_at_ten, number])


def test_after_an_error_only_the_running_calls_are_waited_for():
    called = {"left": 0, "right": 0}

    def slow(side):
        def function(number, **columns):
            called[side] += 1
            time.sleep(0.5)
            return number

        function.__name__ = side
        return function

    with pytest.raises(RuntimeError, match="the generator"):
        with Scorer([slow("left"), slow("right")]) as scorer:
            for rows in BATCHES[:2]:
                scorer.submit(rows, generate(rows))
            while not all(called.values()):
                time.sleep(0.001)
            raise RuntimeError("the generator")
    assert called == {"left": 1, "right": 1}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("reward-left", "reward-right"))]


def test_seconds():
    def sleeps(number, **columns):
        time.sleep(0.03)
        return number

    with Scorer([sleeps, number]) as scorer:
        for rows in BATCHES:
            scorer.submit(rows, generate(rows))
        scorer.results()
    assert scorer.seconds["sleeps"] >= 0.03 * len(BATCHES)
    assert scorer.seconds["number"] > 0 and scorer.waited > 0


def test_more_processes_than_images():
    with Scorer([number]) as scorer:
        scorer.submit([], [])
        assert scorer.results() == {"number": []}
    with Scorer([number]) as scorer:
        assert scorer.results() == {"number": []}
    with Scorer([]) as scorer:
        scorer.submit(BATCHES[0], generate(BATCHES[0]))
        assert scorer.results() == {}


def test_two_functions_of_one_name():
    def other(**columns):
        return []

    other.__name__ = "number"
    for use in (Scorer, lambda functions: score(functions, BATCHES[0], generate(BATCHES[0]))):
        with pytest.raises(
            ValueError, match=r"Two of the reward functions \['number', 'red', 'number'\] have the same name"
        ):
            use([number, red, other])


def test_without_gradients_in_every_thread():
    weight = torch.ones(1, requires_grad=True)

    def sync(prompts, **columns):
        assert not (weight * 2).requires_grad
        return (weight * 2).expand(len(prompts))

    async def later(prompts, **columns):
        await asyncio.sleep(0)
        return sync(prompts)

    assert torch.is_grad_enabled()
    assert overlapped([sync, later]) == one_after_the_other([sync, later])
    assert torch.is_grad_enabled()


def test_the_callers_context_and_device(monkeypatch):
    current = threading.local()
    current.index = 3  # of this thread; another one would start with device 0
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: current.index)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: setattr(current, "index", index))
    setting = contextvars.ContextVar("setting", default="other")
    setting.set("caller's")
    seen = []

    def look(number, **columns):
        seen.append((setting.get(), current.index))
        return number

    overlapped([look])
    assert set(seen) == {("caller's", 3)}


def test_async_functions_in_a_running_loop():
    # As in a notebook.
    async def later(number, **columns):
        await asyncio.sleep(0)
        assert not torch.is_grad_enabled()
        return number

    async def cell():
        return score([later], BATCHES[0], generate(BATCHES[0])), overlapped([later])

    one, all_of_them = asyncio.run(cell())
    assert one == {"later": [0, 1, 2]}
    assert all_of_them == one_after_the_other([later])


def test_an_async_error():
    async def later(number, **columns):
        raise KeyError("what went wrong")

    with pytest.raises(KeyError, match="what went wrong"):
        overlapped([later])


# Overlap, shown by waiting for what only comes if others go on; how much it saves is in benchmarks/scoring_overlap.py.


def generated_while_scored(wait_in):
    """Scores whose every batch is held until the next one is being generated."""
    begun = [threading.Event() for _ in [*BATCHES, None]]
    begun[-1].set()

    def wait(number):
        batch = next(i for i, rows in enumerate(BATCHES) if rows[0]["number"] == number)
        assert begun[batch + 1].wait(20), "the next batch is not generated while this one is scored"

    with wait_in(wait) as function, Scorer([function]) as scorer:
        for i, rows in enumerate(BATCHES):
            begun[i].set()
            scorer.submit(rows, generate(rows))
        return scorer.results()


def test_the_next_batch_is_generated_while_one_is_scored():
    @contextlib.contextmanager
    def waiting(wait):
        def held(number, **columns):
            wait(number[0])
            return number

        yield held

    assert generated_while_scored(waiting) == {"held": [row["number"] for rows in BATCHES for row in rows]}


def test_the_next_batch_is_generated_while_a_server_scores():
    @contextlib.contextmanager
    def remote(wait):
        def answer(request, n):
            numbers = request.body["columns"]["number"]
            wait(numbers[0])
            return Answer(body={"scores": numbers})

        with StubServer(answer) as server:
            yield RemoteReward(server.url, columns=["number"])

    assert generated_while_scored(remote) == {"remote": [row["number"] for rows in BATCHES for row in rows]}
