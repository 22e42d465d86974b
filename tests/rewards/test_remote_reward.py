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

import base64
import datetime
import io
import json
import logging
import socket
import time

import pytest
from helpers.example_script import load_script
from helpers.example_server import serving, started
from helpers.stub_server import Answer, StubServer, silent_server
from PIL import Image

from trl_diffusion_opd.rewards import (
    RemoteReward,
    RemoteRewardError,
    load_reward,
    reward_data_problems,
    score,
    server_calls,
)


PROMPTS = ["a cat", "two cats", "three cats"]
IMAGES = [Image.new("RGB", (3, 2), (10 * i, 20, 30)) for i in range(3)]
ROWS = [{"prompt": prompt, "level": {"n": i}} for i, prompt in enumerate(PROMPTS)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Tries again at once, but remembers how long it would have waited."""
    pauses = []
    monkeypatch.setattr(server_calls.time, "sleep", pauses.append)
    return pauses


def decoded(data):
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format == "PNG"
    return image


def red(request, n):
    return Answer(body={"scores": [decoded(data).getpixel((0, 0))[0] for data in request.body["images"]]})


def test_batches_pixels_and_columns_arrive():
    with StubServer(red) as server:
        reward = RemoteReward(server.url + "/score", columns=["level"], batch_size=2)
        assert score([reward], ROWS, IMAGES) == {"remote": [0.0, 10.0, 20.0]}
    assert [request.path for request in server.requests] == ["/score", "/score"]
    assert [request.body["prompts"] for request in server.requests] == [PROMPTS[:2], PROMPTS[2:]]
    assert server.requests[0].body["columns"] == {"level": [{"n": 0}, {"n": 1}]}
    sent = [decoded(data) for request in server.requests for data in request.body["images"]]
    assert [list(image.getdata()) for image in sent] == [list(image.getdata()) for image in IMAGES]


def test_null_is_none():
    with StubServer(lambda request, n: Answer(body={"scores": [None, 0, 1.5]})) as server:
        assert RemoteReward(server.url)(prompts=PROMPTS, images=IMAGES) == [None, 0.0, 1.5]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_is_tried_again(status):
    with StubServer(lambda request, n: red(request, n) if n == 2 else Answer(status, {"error": "busy"})) as server:
        assert RemoteReward(server.url)(prompts=PROMPTS, images=IMAGES) == [0.0, 10.0, 20.0]
    assert len(server.requests) == 3


def test_a_cut_connection_is_tried_again():
    with StubServer(lambda request, n: red(request, n) if n else Answer(cut=True)) as server:
        assert RemoteReward(server.url)(prompts=PROMPTS, images=IMAGES) == [0.0, 10.0, 20.0]


def test_pauses_grow_and_follow_the_server_within_bounds(quick):
    with StubServer(lambda request, n: Answer(503)) as server:
        with pytest.raises(RemoteRewardError, match="answered 503"):
            RemoteReward(server.url, max_retries=4)(prompts=PROMPTS, images=IMAGES)
    assert len(server.requests) == 5
    assert quick == [1, 2, 4]  # the first time at once
    quick.clear()
    waits = ["7", "100000", "soon"]
    with StubServer(
        lambda request, n: Answer(429, headers={"Retry-After": waits[n]}) if n < 3 else red(request, n)
    ) as s:
        assert RemoteReward(s.url)(prompts=PROMPTS, images=IMAGES) == [0.0, 10.0, 20.0]
    assert quick == [7, 30, 2]


FAILURES = [
    (Answer(400, {"error": "no such column"}), "answered 400 Bad Request: .*no such column"),
    (Answer(401, {"error": "wrong token"}), "answered 401"),
    (Answer(500, {"error": "out of memory"}), "answered 500 Internal Server Error: .*out of memory"),
    (
        Answer(307, headers={"Location": "http://127.0.0.1:1/"}),
        "answered 307 Temporary Redirect to http://127.0.0.1:1/",
    ),
    (Answer(204, ""), "answered 204"),
    (Answer(200, "<html>"), "answered no JSON: '<html>'"),
    (Answer(200, [1, 2, 3]), "which is not of the form"),
    (Answer(200, {"scores": "abc"}), "which is not of the form"),
    (Answer(200, {"scores": [1, 2]}), "answered 2 scores for 3 images"),
    (Answer(200, {"scores": [1, 2, "3"]}), "answered '3' as a score"),
    (Answer(200, {"scores": [1, 2, True]}), "answered True as a score"),
    (Answer(200, {"scores": [1, 2, [3]]}), r"answered \[3\] as a score"),
    (Answer(200, '{"scores": [1, 2, NaN]}'), "answered nan as a score"),
    (Answer(200, '{"scores": [1, 2, Infinity]}'), "answered inf as a score"),
    (Answer(200, {"scores": [1, 2, 10**400]}), "as a score"),
    (Answer(cut=True), "cannot be reached: .*disconnected"),
]


@pytest.mark.parametrize(("answer", "message"), FAILURES)
def test_a_failed_call_is_an_error_or_none_and_never_0(answer, message, caplog):
    with StubServer(lambda request, n: answer) as server:
        with pytest.raises(RemoteRewardError, match=message) as error:
            RemoteReward(server.url, name="far", max_retries=1)(prompts=PROMPTS, images=IMAGES)
        assert str(error.value).startswith(f"Reward 'far': {server.url} ")
        reward = RemoteReward(server.url, max_retries=1, on_error="none")
        assert reward(prompts=PROMPTS, images=IMAGES) == [None, None, None]
    assert "These 3 images have no score." in caplog.text


def test_only_the_batch_of_a_failed_call_has_no_scores():
    with StubServer(lambda request, n: red(request, n) if n != 1 else Answer(400)) as server:
        reward = RemoteReward(server.url, batch_size=1, on_error="none")
        assert reward(prompts=PROMPTS, images=IMAGES) == [0.0, None, 20.0]


def test_nobody_there():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(RemoteRewardError, match="cannot be reached: .*refused"):
        RemoteReward(url, max_retries=2)(prompts=PROMPTS, images=IMAGES)


def test_an_answer_that_does_not_come():
    with silent_server() as server:
        start = time.perf_counter()
        with pytest.raises(RemoteRewardError, match="cannot be reached: .*timed out"):
            RemoteReward(server.url, timeout=0.1, max_retries=1)(prompts=PROMPTS, images=IMAGES)
        assert time.perf_counter() - start < 8  # two tries, and not the ten seconds of an answer
    assert len(server.requests) == 2


def test_the_token_is_sent_and_shown_nowhere(monkeypatch, caplog, tmp_path):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_TOKEN", "s3cret-token")
    # What requests would rather send.
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password netrc-secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with StubServer(lambda request, n: red(request, n) if n == 0 else Answer(500)) as server:
        reward = RemoteReward(server.url, token_env="MY_TOKEN", on_error="none")
        assert reward(prompts=PROMPTS, images=IMAGES) == [0.0, 10.0, 20.0]
        reward(prompts=PROMPTS, images=IMAGES)
        with pytest.raises(RemoteRewardError) as error:
            RemoteReward(server.url, token_env="MY_TOKEN")(prompts=PROMPTS, images=IMAGES)
    assert {request.headers["Authorization"] for request in server.requests} == {"Bearer s3cret-token"}
    seen = f"{caplog.text} {reward!r} {vars(reward)} {vars(reward._server)} {vars(reward._server._client)} {reward.fingerprint} {error.value}"
    assert "s3cret" not in seen and "netrc-secret" not in seen


def test_fingerprint_names_no_machine_and_tells_scorers_apart():
    reward = RemoteReward("http://gpu-box.lab:8000/a", columns=["level"])
    assert "gpu-box" not in reward.fingerprint
    others = [
        RemoteReward("http://gpu-box.lab:8000/b", columns=["level"]),
        RemoteReward("http://gpu-box.lab:8000/a"),
        RemoteReward("http://gpu-box.lab:8000/a", name="b", columns=["level"]),
    ]
    assert len({reward.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert RemoteReward("http://gpu-box.lab:8000/a", columns=["level"], timeout=9).fingerprint == reward.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "url='localhost:8000' is not of the form http://host:port/path"),
        ({"url": "ftp://a/b"}, "is not of the form"),
        ({"timeout": 0}, "timeout=0: it must be a positive, finite number of seconds"),
        ({"timeout": float("nan")}, "timeout=nan: it must be"),
        ({"max_retries": -1}, "max_retries=-1: it must not be negative"),
        ({"on_error": "zero"}, 'on_error=\'zero\': it must be "raise" or "none"'),
        ({"columns": "metadata"}, "columns='metadata' is a string; give a list of names"),
        (
            {"token_env": "NOT_SET_HERE"},
            "the environment variable NOT_SET_HERE, which should hold the token, is not set",
        ),
        ({"batch_size": 0}, "batch_size=0, it must be at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        RemoteReward(**{"url": "http://127.0.0.1:1", **options})


@pytest.mark.parametrize("url", ["http://me:hunter2@host/a", "https://host/a?key=hunter2", "http://host/#hunter2"])
def test_a_secret_in_the_url_is_refused_and_not_repeated(url):
    with pytest.raises(ValueError, match="a token belongs in an environment variable") as error:
        RemoteReward(url)
    assert "hunter2" not in str(error.value)


def test_all_problems_at_once():
    with pytest.raises(ValueError) as error:
        RemoteReward("nowhere", timeout=-1, on_error="0")
    assert len(str(error.value).splitlines()) == 3


def test_by_name_without_a_url():
    with pytest.raises(
        ValueError, match="Reward 'remote' needs url: load_reward.'remote', url=.*--reward_kwargs"
    ) as error:
        load_reward("remote")
    assert """--reward_kwargs '{"remote": {"url": ...}}'""" in str(error.value)
    assert load_reward("remote", url="http://127.0.0.1:1", name="far").name == "far"


def test_rows_without_a_column_it_sends():
    from datasets import Dataset

    reward = RemoteReward("http://127.0.0.1:1", columns=["level"], max_retries=0)
    assert reward(prompts=["a"], images=IMAGES[:1]) == [None]
    data = Dataset.from_list([{"prompt": "a", "task": "x", "level": 1}, {"prompt": "b", "task": "x", "level": None}])
    assert reward_data_problems({"x": [reward]}, data, {"x": [0, 1]}, "train_dataset") == [
        "train_dataset: reward 'remote' can't score 1 of the 2 prompts of its task 'x', such as 'b': it has no value in "
        "column 'level'."
    ]


def test_a_column_that_is_no_json():
    reward = RemoteReward("http://127.0.0.1:1", columns=["day"], on_error="none")
    with pytest.raises(ValueError, match="columns .'day',. cannot be sent as JSON: .*datetime"):
        reward(prompts=["a"], images=IMAGES[:1], day=[datetime.datetime(2026, 1, 1)])


# The server of the examples


def brightness(prompts, images, level, **columns):
    if "boom" in prompts:
        raise ValueError("no such thing")
    return [None if n is None else image.getpixel((0, 0))[0] + n for image, n in zip(images, level, strict=True)]


@pytest.fixture(scope="module")
def example():
    return load_script("examples/reward_server.py")


@pytest.fixture
def served(example, monkeypatch):
    monkeypatch.setenv("SERVER_TOKEN", "abc")
    with serving(example, brightness, "SERVER_TOKEN") as port:
        yield f"http://127.0.0.1:{port}"


def test_the_examples_server_gives_the_scores_of_a_direct_call(served):
    reward = RemoteReward(served, columns=["level"], token_env="SERVER_TOKEN", batch_size=2, max_retries=0)
    level = [0.5, 1.5, 2.5]
    assert reward(prompts=PROMPTS, images=IMAGES, level=level) == brightness(PROMPTS, IMAGES, level)


def test_the_examples_server_explains(served, monkeypatch, capfd):
    reward = RemoteReward(served, columns=["level"], token_env="SERVER_TOKEN", max_retries=0)
    with pytest.raises(RemoteRewardError, match="500 .*ValueError: no such thing"):
        reward(prompts=["boom"], images=IMAGES[:1], level=[1])
    with pytest.raises(RemoteRewardError, match="500 .*level"):
        RemoteReward(served, token_env="SERVER_TOKEN", max_retries=0)(prompts=["a"], images=IMAGES[:1])
    monkeypatch.setenv("SERVER_TOKEN", "another")
    with pytest.raises(RemoteRewardError, match="401 .*wrong or missing token"):
        reward(prompts=["a"], images=IMAGES[:1], level=[1])


PNG = server_calls.png_base64(IMAGES[0])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[", "this is no request for scores"),
        (b"[]", "this is no request for scores"),
        (b'{"prompts": []}', "'images' is missing"),
        (b'{"prompts": ["a"], "images": ["bm8gcG5n"]}', "this is no request for scores: cannot identify"),
        (b'{"prompts": ["a"], "images": ["%%%"]}', "this is no request for scores"),
        (json.dumps({"prompts": [1], "images": [PNG]}).encode(), "prompts must be strings"),
        (json.dumps({"prompts": ["a", "b"], "images": [PNG]}).encode(), "for every sample"),
        (json.dumps({"prompts": ["a"], "images": [PNG], "columns": {"b": []}}).encode(), "for every sample"),
    ],
)
def test_the_examples_server_refuses(example, body, message):
    with pytest.raises(example.RequestError, match=message):
        example.read_request(body)


def test_the_examples_server_from_the_command_line(processes):
    with started() as (_, line):
        assert line.startswith("width on port ")
        reward = RemoteReward(f"http://127.0.0.1:{line.split()[-1]}", name="width")
        assert reward(prompts=PROMPTS, images=IMAGES) == [3.0, 3.0, 3.0]
