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
import sys
import threading

import pytest
from helpers.stub_server import Answer, StubServer, silent_server
from PIL import Image

from trl_diffusion_opd.rewards import RemoteRewardError, UnifiedReward, load_reward, score
from trl_diffusion_opd.rewards.unifiedreward import parse_score


PROMPTS = ["a {red} cat", "two cats"]
IMAGES = [Image.new("RGB", (3, 2), (200, 20, 30)), Image.new("RGB", (3, 2), (40, 20, 30))]
ROWS = [{"prompt": prompt} for prompt in PROMPTS]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    # The client's pauses between tries.
    monkeypatch.setattr("openai._base_client.time.sleep", lambda seconds: None)


def completion(text, finish_reason="stop"):
    message = {"role": "assistant", "content": text}
    choices = [{"index": 0, "message": message, "finish_reason": finish_reason}]
    return Answer(body={"id": "1", "object": "chat.completion", "created": 0, "model": "vlm", "choices": choices})


def picture(request):
    url = request.body["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def redness(request, n):
    return completion(f"The cat is there.\nFinal Score: {1 + picture(request).getpixel((0, 0))[0] / 50}")


def test_scores_and_what_is_asked():
    with StubServer(redness) as server:
        reward = UnifiedReward(server.url + "/v1", model="vlm", max_tokens=64)
        assert score([reward], ROWS, IMAGES) == {"unifiedreward": [5.0, 1.8]}
    for request in server.requests:
        assert request.path == "/v1/chat/completions"
        assert request.headers["Authorization"] == "Bearer sk-very-secret"
        assert (request.body["model"], request.body["temperature"], request.body["max_tokens"]) == ("vlm", 0, 64)
        assert picture(request).size == (3, 2)
    questions = sorted(request.body["messages"][0]["content"][1]["text"] for request in server.requests)
    assert "Text Caption: [a {red} cat]" in questions[0] and "Text Caption: [two cats]" in questions[1]
    assert "score from 1 to 5 after 'Final Score:'" in questions[0]


def test_another_question_and_the_endpoint_from_the_environment(monkeypatch):
    with StubServer(redness) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        reward = load_reward("unifiedreward", question="Rate <{prompt}>.")
        assert reward(prompts=PROMPTS, images=IMAGES) == [5.0, 1.8]
    assert {r.body["messages"][0]["content"][1]["text"] for r in server.requests} == {
        "Rate <a {red} cat>.",
        "Rate <two cats>.",
    }


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Final Score: 3.5", 3.5),
        ("cat (animal): 1\n**Final Score:** 4", 4.0),
        ("Final Score (1-5): 2.25/5", 2.25),
        ("final score: [4]", 4.0),
        ("FINAL SCORE: **4.2**/5", 4.2),
        ("Final Score:3.9375.", 3.9375),
        ("Final score is 3 out of 5", 3.0),
        ("<think>Final Score: 1</think>\nFinal Score: 5", 5.0),
        ("Final Score: 4\n2. Overall", 4.0),
        ("Final Score: 10", None),
        ("Final Score: 4/10", None),
        ("Final Score: 4,5", None),
        ("Final Score: 1-5", None),
        ("Final Score: 4.5.6", None),
        ("Final Score: -3", None),
        ("Final Score: 0", None),
        ("Final Score: 5.1", None),
        ("Final Score: 4, no: Final Score: unclear. Final Score: 7", None),
        ("Final Score: five", None),
        ("Score: 3", None),
        ("3", None),
        ("", None),
    ],
)
def test_parse_score(answer, expected):
    assert parse_score(answer) == expected


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            completion("I can't tell."),
            "without a score from 1 to 5 after 'Final Score:' for the prompt .*I can't tell",
        ),
        (completion(None), "without a score from 1 to 5"),
        (completion("Final Score: 4.", "length"), "answered, cut off at max_tokens=1024, without a score"),
        (
            Answer(body={"id": "1", "object": "chat.completion", "created": 0, "model": "vlm", "choices": []}),
            "gave no completion",
        ),
        (Answer(200, "<html>", {"Content-Type": "text/html"}), "gave no completion for the prompt .*<html>"),
        (Answer(200, {"error": "busy"}), "gave no completion"),
        (Answer(401, {"error": {"message": "who are you"}}), "cannot be asked: .*401.*who are you"),
        (Answer(404, {"error": {"message": "no such model"}}), "cannot be asked: .*no such model"),
        (Answer(500, {"error": {"message": "out of memory"}}), "cannot be asked: .*out of memory"),
        (Answer(cut=True), "cannot be asked: Connection error"),
    ],
)
def test_a_failed_call_is_an_error_or_none_and_never_0(answer, message, caplog):
    def one_fails(request, n):
        return answer if picture(request).getpixel((0, 0))[0] == 200 else completion("Final Score: 2")

    with StubServer(one_fails) as server:
        with pytest.raises(RemoteRewardError, match=message) as error:
            UnifiedReward(server.url, model="vlm", max_retries=0)(prompts=PROMPTS, images=IMAGES)
        assert str(error.value).startswith(f"Reward 'unifiedreward': model 'vlm' at {server.url} ")
        reward = UnifiedReward(server.url, max_retries=0, on_error="none")
        assert reward(prompts=PROMPTS, images=IMAGES) == [None, 2.0]
    assert "The image has no score." in caplog.text


def test_the_client_tries_again():
    with StubServer(lambda request, n: redness(request, n) if n == 2 else Answer(429)) as server:
        assert UnifiedReward(server.url, max_retries=2)(prompts=PROMPTS[:1], images=IMAGES[:1]) == [5.0]


def test_an_answer_that_does_not_come():
    with silent_server() as server:
        with pytest.raises(RemoteRewardError, match="cannot be asked: Request timed out"):
            UnifiedReward(server.url, timeout=0.1, max_retries=1)(prompts=PROMPTS[:1], images=IMAGES[:1])
    assert len(server.requests) == 2


def test_requests_at_a_time_are_bounded_and_in_order():
    lock, pause, running, most = threading.Lock(), threading.Event(), 0, 0

    def counted(request, n):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        pause.wait(0.05)
        with lock:
            running -= 1
        return redness(request, n)

    images = [Image.new("RGB", (1, 1), (i, 0, 0)) for i in range(9)]
    with StubServer(counted) as server:
        scores = UnifiedReward(server.url, max_concurrency=3)(prompts=["a"] * 9, images=images)
    assert scores == [1 + i / 50 for i in range(9)]
    assert most == 3


def test_the_key_is_shown_nowhere(caplog):
    caplog.set_level(logging.DEBUG)
    with StubServer(lambda request, n: redness(request, n) if n == 0 else Answer(500)) as server:
        reward = UnifiedReward(server.url, max_retries=0)
        reward(prompts=PROMPTS[:1], images=IMAGES[:1])
        with pytest.raises(RemoteRewardError) as error:
            reward(prompts=PROMPTS[:1], images=IMAGES[:1])
    assert "very-secret" not in f"{caplog.text} {reward!r} {vars(reward)} {reward.fingerprint} {error.value}"


def test_fingerprint():
    reward = UnifiedReward("http://gpu-box.lab/v1")
    assert "gpu-box" not in reward.fingerprint
    others = [
        UnifiedReward("http://gpu-box.lab/v2"),
        UnifiedReward("http://gpu-box.lab/v1", model="b"),
        UnifiedReward("http://gpu-box.lab/v1", question="{prompt}?"),
    ]
    assert len({reward.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[unifiedreward\]"'):
        UnifiedReward("http://127.0.0.1:1")


def test_bad_options_all_at_once(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError) as error:
        UnifiedReward(question="Is it good?", max_tokens=0, max_concurrency=0, timeout=0, max_retries=-1, on_error="0")
    lines = str(error.value).splitlines()
    assert len(lines) == 8
    for part in (
        "timeout=0: it must be a positive, finite number",
        "max_retries=-1: it must not be negative",
        "on_error='0'",
        """no endpoint. Give base_url, on the command line --reward_kwargs '{"unifiedreward": {"base_url": "http""",
        "OPENAI_API_KEY is not set. A server that checks no key takes any value",
        "question='Is it good?' has no {prompt}",
        "max_tokens=0: it must be at least 1",
        "max_concurrency=0: it must be at least 1",
    ):
        assert any(part in line for line in lines), part
    with pytest.raises(ValueError, match="a token belongs in an environment variable"):
        UnifiedReward("http://me:pass@host/v1")
