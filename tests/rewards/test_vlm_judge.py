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
import io
import logging
import threading

import pytest
from helpers.stub_server import Answer, StubServer
from PIL import Image

from trl_diffusion_opd.rewards import (
    RemoteRewardError,
    VLMJudge,
    load_reward,
    reward_data_problems,
    score,
    server_calls,
)
from trl_diffusion_opd.rewards.vlm_judge import judged_number


RESULTS = [Image.new("RGB", (3, 2), (200, 20, 30)), Image.new("RGB", (3, 2), (40, 20, 30))]
SOURCES = [[Image.new("L", (4, 4), 7), Image.new("RGBA", (5, 4), (1, 2, 3, 255))], []]
ROWS = [{"prompt": "a {red} {lowest} cat", "source_images": SOURCES[0]}, {"prompt": "2 cats", "source_images": []}]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(server_calls.time, "sleep", lambda seconds: None)


def completion(text, finish_reason="stop"):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return Answer(body={"choices": [choice]})


def parts(request):
    """What a message says: its texts as they are, and its pictures as their size and first pixel."""
    (message,) = request.body["messages"]
    assert message["role"] == "user"
    said = []
    for part in message["content"]:
        if part["type"] == "text":
            said.append(part["text"])
        else:
            head, _, data = part["image_url"]["url"].partition(",")
            image = Image.open(io.BytesIO(base64.b64decode(data)))
            assert head == "data:image/png;base64" and (image.format, image.mode) == ("PNG", "RGB")
            said.append((image.size, image.getpixel((0, 0))))
    return said


def redness(request, n):
    return completion(f"It has 4 legs.\nScore: {parts(request)[-1][1][0] / 40}")  # 5 and 1


def test_what_is_asked_and_how_it_is_scored():
    with StubServer(redness) as server:
        judge = VLMJudge(server.url + "/v1/", "vlm", scale=(0, 8))
        assert score([judge], ROWS, RESULTS) == {"vlm_judge": [5 / 8, 1 / 8]}
        # Without the column, in any row, the result alone is judged. The whole path is an address, too.
        whole = load_reward("vlm_judge", url=server.url + "/v1/chat/completions", model="vlm", scale=[1, 5])
        assert whole(prompts=["a"], images=RESULTS[:1]) == [1.0]
        assert whole(prompts=["a"], images=RESULTS[:1], source_images=[None]) == [1.0]
    assert {request.path for request in server.requests} == {"/v1/chat/completions"}
    edit, plain = sorted((request for request in server.requests[:2]), key=lambda request: -len(parts(request)))
    assert (edit.body["model"], edit.body["temperature"], edit.body["max_tokens"]) == ("vlm", 0, 1024)
    question, *rest = parts(edit)
    assert "instruction:\na {red} {lowest} cat\n" in question and "from 0 (failed) to 8 (perfect)" in question
    # The sources first, each under its label.
    assert rest == [
        *("Source picture 1:", ((4, 4), (7, 7, 7))),
        *("Source picture 2:", ((5, 4), (1, 2, 3))),
        *("Result:", ((3, 2), (200, 20, 30))),
    ]
    assert parts(plain)[1:] == ["Result:", ((3, 2), (40, 20, 30))]
    assert "Authorization" not in edit.headers
    assert [parts(request)[1:] for request in server.requests[2:]] == [["Result:", ((3, 2), (200, 20, 30))]] * 2


def test_another_template_and_parameters():
    with StubServer(lambda request, n: completion("-0.5")) as server:
        judge = VLMJudge(
            server.url, "m", "Rate <{prompt}> up to {highest}.", (-1, 1), parameters={"max_completion_tokens": 9}
        )
        assert score([judge], ROWS[1:], RESULTS[1:]) == {"vlm_judge": [0.25]}
    (request,) = server.requests
    assert parts(request)[0] == "Rate <2 cats> up to 1."
    assert {k: v for k, v in request.body.items() if k != "messages"} == {"model": "m", "max_completion_tokens": 9}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Score: 7", 7),
        ("score is **7.5**/10", 7.5),
        ('{"score": 7, "cats": 3}', 7),
        ("Score (1-10): 7. Two cats", 7),
        ("<think>Score: 2</think>Score: 9", 9),
        ("8", 8),
        ("There are 3 cats.\nRating: 8 out of 10.", 8),
        ("Score: -3", -3),
        ("Score: 12", 12),
        ("There are 3 cats.", None),
        ("Score: 80%", None),
        ("80%", None),
        ("Score: 4/5", None),
        ("Score: 4,5", None),
        ("7-8", None),
        ("from 1 – 10", None),
        ("score 1-10", None),
        ("Score: seven", None),
        ("", None),
    ],
)
def test_the_number_of_an_answer(answer, expected):
    assert judged_number(answer, 10) == expected


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            completion("A fine\x1b cat."),
            r"answered no number from 1 to 10 after 'Score:' or at the end for the prompt '2 ",
        ),
        (completion("Score: 11"), "answered 11, which is not from 1 to 10, for the prompt '2 cats': 'Score: 11'"),
        (completion("Score: 0"), "answered 0, which is not from 1 to 10"),
        (completion("x" * 900), "answered no number .*'x{100,250}…x+'$"),
        (
            completion("Score: 7", "length"),
            "gave an answer that was cut off .see `parameters`. for the prompt '2 cats'",
        ),
        (completion(None), "answered no number"),
        (Answer(200, "<html>"), "gave no completion for the prompt '2 cats' .*<html>"),
        (Answer(200, {"choices": []}), "gave no completion"),
        (Answer(401, {"error": "wrong key sk-very-secret"}), "answered 401 Unauthorized: .*wrong key <token>"),
        (Answer(503), "answered 503"),
        (Answer(cut=True), "cannot be reached"),
    ],
)
def test_a_failed_call_is_an_error_or_none_and_never_0(answer, message, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")

    def one_fails(request, n):
        return answer if parts(request)[-1][1][0] == 40 else completion("Score: 5.5")

    with StubServer(one_fails) as server:
        options = dict(model="vlm", token_env="JUDGE_KEY", max_retries=1)
        with pytest.raises(RemoteRewardError, match=message) as error:
            score([VLMJudge(server.url, **options)], ROWS[1:], RESULTS[1:])
        assert str(error.value).startswith(f"Reward 'vlm_judge': model 'vlm' at {server.url} ")
        assert "\x1b" not in str(error.value)
        reward = VLMJudge(server.url, **options, on_error="none")
        assert score([reward], ROWS, RESULTS) == {"vlm_judge": [0.5, None]}
    assert "The image has no score." in caplog.text
    assert {request.headers["Authorization"] for request in server.requests} == {"Bearer sk-very-secret"}
    assert (
        "very-secret" not in f"{caplog.text} {vars(reward)} {vars(reward._server)} {error.value} {reward.fingerprint}"
    )


def test_tries_again_and_requests_at_a_time_are_bounded():
    lock, pause, running, most = threading.Lock(), threading.Event(), 0, 0

    def counted(request, n):
        nonlocal running, most
        if n == 0:
            return Answer(429)
        with lock:
            running += 1
            most = max(most, running)
        pause.wait(0.03)
        with lock:
            running -= 1
        return completion(f"Score: {parts(request)[-1][1][0]}")

    images = [Image.new("RGB", (1, 1), (i, 0, 0)) for i in range(9)]
    with StubServer(counted) as server:
        judge = VLMJudge(server.url, "m", scale=(0, 8), max_concurrency=3)
        assert judge(prompts=["a"] * 9, images=images) == [i / 8 for i in range(9)]
    assert most == 3 and len(server.requests) == 10


def test_fingerprint():
    options = dict(url="http://gpu-box.lab/v1", model="a")
    judge = VLMJudge(**options)
    assert "gpu-box" not in judge.fingerprint
    changes = [{"model": "b"}, {"template": "{prompt}"}, {"scale": (1, 5)}, {"parameters": {}}, {"name": "other"}]
    others = [VLMJudge(**{**options, **change}) for change in changes]
    assert len({judge.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert VLMJudge(**options, timeout=9).fingerprint == judge.fingerprint


def test_bad_options_all_at_once(monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(ValueError) as error:
        VLMJudge(
            *("nowhere", "m", "Is it good?", (5, 1)),
            parameters={"messages": [], "top": {1}},
            **dict(token_env="NO_KEY", max_concurrency=0, timeout=0, max_retries=-1, on_error="0"),
        )
    lines = str(error.value).splitlines()
    assert len(lines) == 10 and all(line.startswith("Reward 'vlm_judge': ") for line in lines)
    for part in (
        "url='nowhere' is not of the form",
        "template='Is it good?' has no {prompt}",
        "scale=(5, 1): it must be two numbers, the lowest and the highest",
        "parameters has ['messages'], which this reward sets itself",
        "parameters cannot be sent as JSON: Object of type set",
        "NO_KEY, which should hold the token, is not set",
        "max_concurrency=0: it must be at least 1",
    ):
        assert any(part in line for line in lines), part
    for scale in ((1,), "19", (0, float("inf")), (True, 5), (1, 1), ("1", "5"), 5):
        with pytest.raises(ValueError, match="it must be two numbers"):
            VLMJudge("http://a", "m", scale=scale)
    with pytest.raises(ValueError, match="Reward 'vlm_judge' needs url, model: load_reward"):
        load_reward("vlm_judge")


def test_rows_of_any_kind_can_be_judged():
    from datasets import Dataset

    data = Dataset.from_list([{"prompt": "a", "source_images": []}, {"prompt": "b", "source_images": None}])
    assert reward_data_problems({"x": [VLMJudge("http://a", "m")]}, data, {"x": [0, 1]}, "data") == []
