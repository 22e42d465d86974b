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

"""Rewards that ask a server which answers in bad faith: how long that takes, how much memory, and what is said of it."""

import gc
import gzip
import json
import logging
import os
import threading
import time
import traceback
import tracemalloc
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from helpers.raw_server import RawServer, whole
from helpers.stub_server import Answer, StubServer
from PIL import Image

from trl_diffusion_opd.guards.redaction import shown
from trl_diffusion_opd.rewards import RemoteReward, RemoteRewardError, UnifiedReward, server_calls
from trl_diffusion_opd.rewards import remote as remote_module
from trl_diffusion_opd.rewards.unifiedreward import parse_score


IMAGES = [Image.new("RGB", (3, 2))]
SCORES = b'{"scores": [0.5]}'
DEEP = b"[" * 10**5 + b"]" * 10**5


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")


def remote(url, **options):
    return RemoteReward(url, **{"max_retries": 0, "timeout": 5.0, **options})


def unified(url, **options):
    return UnifiedReward(url, **{"max_retries": 0, "timeout": 5.0, **options})


REWARDS = pytest.mark.parametrize("make", [remote, unified])


def ask(reward):
    return reward(prompts=["a secret prompt"], images=IMAGES)


def completion(text):
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return json.dumps({"choices": [choice]}).encode()


# Time


def drip(head, part):
    def send(connection, n):
        connection.sendall(head)
        while True:
            connection.sendall(part)
            time.sleep(0.02)

    return send


def silence(connection, n):
    # Sends nothing, and notices when the client has gone. What it did not read of a request is left there.
    while connection.recv(2**10):
        time.sleep(1)


@pytest.mark.parametrize(
    "send",
    [
        drip(b"HTTP/1.1 200 OK\r\nA: ", b"x"),
        drip(b"HTTP/1.1 200 OK\r\n\r\n", b" "),
        drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        drip(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    ],
    ids=["header", "body", "chunks", "1xx"],
)
@REWARDS
def test_a_drip_ends_in_time_and_its_connection_with_it(make, send):
    with RawServer(send) as server:
        reward = make(server.url, timeout=0.2)
        start = time.perf_counter()
        with pytest.raises(RemoteRewardError, match="timed out, no complete answer in 0.2 seconds"):
            ask(reward)
        assert 0.2 <= time.perf_counter() - start < 1
        assert server.gone.wait(1)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_request_that_is_not_read_ends_in_time(scheme):
    images = [Image.frombytes("RGB", (1500, 1500), os.urandom(1500 * 1500 * 3))] if scheme == "http" else IMAGES
    with RawServer(silence, reads=False) as server:
        reward = remote(f"{scheme}://{server.host}", timeout=0.3)
        data = json.dumps({"images": [server_calls.png_base64(images[0])]})
        start = time.perf_counter()
        with pytest.raises(RemoteRewardError, match="timed out"):
            reward._call(data, 1)
        assert time.perf_counter() - start < 1


def test_threads_and_connections_do_not_stay():
    with RawServer(drip(b"HTTP/1.1 200 OK\r\n\r\n", b" ")) as server:
        reward = remote(server.url, timeout=0.05, on_error="none")
        ask(reward)
        files = len(os.listdir("/dev/fd"))
        for _ in range(5):
            assert ask(reward) == [None]
        end = time.perf_counter() + 1
        while any(thread.name == "bounded-request" for thread in threading.enumerate()) and time.perf_counter() < end:
            time.sleep(0.01)
        assert not any(thread.name == "bounded-request" for thread in threading.enumerate())
        # The server's ends are of this process, too: one of them may not have noticed yet.
        assert len(os.listdir("/dev/fd")) <= files + 1


# Memory


def flood(head, part):
    def send(connection, n):
        connection.sendall(head)
        for _ in range(64):
            connection.sendall(part)

    return send


MEGABYTE = bytes(2**20)
# 64 MB of spaces in 64 kB.
BOMB = gzip.compress(b" " * 2**26)


@pytest.mark.parametrize(
    ("send", "message"),
    [
        (flood(b"HTTP/1.1 200 OK\r\nContent-Length: 67108864\r\n\r\n", MEGABYTE), "gave an answer of more than 1"),
        (flood(b"HTTP/1.1 200 OK\r\n\r\n", MEGABYTE), "gave an answer of more than 1"),
        (
            flood(
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
                b"100000\r\n" + MEGABYTE + b"\r\n",
            ),
            "gave an answer of more than 1",
        ),
        (
            flood(b"HTTP/1.1 500 No\r\nContent-Length: 67108864\r\n\r\n", MEGABYTE),
            r"answered 500 No: '(\\x00)+.*….*(\\x00)+'",
        ),
        (flood(b"HTTP/1.1 200 OK\r\nA: ", MEGABYTE), "too long"),
        (
            lambda connection, n: connection.sendall(whole(BOMB, "Content-Encoding: gzip")),
            "gave an answer compressed by 'gzip', which was not asked for",
        ),
        (
            lambda connection, n: connection.sendall(whole(BOMB, "Content-Encoding: gzip", status="503 Busy")),
            "answered 503 Busy: ''",
        ),
    ],
    ids=["length", "no length", "chunks", "error page", "header", "gzip", "gzip error page"],
)
@REWARDS
def test_an_answer_takes_little_memory(make, send, message):
    with RawServer(send) as server:
        reward = make(server.url)
        gc.disable()  # nothing waits for it
        tracemalloc.start()
        try:
            for _ in range(10):
                with pytest.raises(RemoteRewardError, match=message):
                    ask(reward)
            assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
        finally:
            tracemalloc.stop()
            gc.enable()
    assert b"Accept-Encoding: identity" in server.requests[0] and len(server.requests) == 10


def test_scores_of_any_length_fit():
    scores = [-1.2345678901234567e-300] * 40_000
    with RawServer(lambda connection, n: connection.sendall(whole(json.dumps({"scores": scores}).encode()))) as server:
        assert remote(server.url, batch_size=len(scores))._call("{}", len(scores)) == scores


def test_a_call_is_split_where_its_images_are_large(monkeypatch):
    size = len(server_calls.png_base64(IMAGES[0]))
    monkeypatch.setattr(remote_module, "_CALL_BYTES", 2 * size)
    with StubServer(lambda request, n: Answer(body={"scores": [float(p) for p in request.body["prompts"]]})) as server:
        assert remote(server.url, batch_size=5)(prompts=list("01234"), images=IMAGES * 5) == [0, 1, 2, 3, 4]
    assert [len(request.body["images"]) for request in server.requests] == [2, 2, 1]
    assert list(remote_module._parts([9 * size, 1, 9 * size])) == [slice(0, 1), slice(1, 2), slice(2, 3)]


# What an answer brings about


@pytest.mark.parametrize(
    ("body", "message", "cause"),
    [
        (DEEP, "gave an answer that cannot be read .RecursionError", RecursionError),
        (b'{"scores": [' + b"9" * 10**5 + b"]}", "cannot be read .ValueError: Exceeds the limit", ValueError),
        (b'{"scores": ["\xff"]}', "cannot be read .UnicodeDecodeError", UnicodeDecodeError),
        (b'{"scores": [' + b"[" * 500 + b"]" * 500 + b"]}", r"answered \[+…\]+ as a score", None),
    ],
    ids=["deep", "digits", "bytes", "a deep score"],
)
def test_a_remote_answer_that_breaks_its_reader(body, message, cause):
    with RawServer(lambda connection, n: connection.sendall(whole(body))) as server:
        with pytest.raises(RemoteRewardError, match=message) as error:
            ask(remote(server.url))
        assert type(error.value.__cause__) is (cause or type(None))
        assert ask(remote(server.url, on_error="none")) == [None]


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        DEEP[60_000:-60_000],
        completion("Final Score: 4").replace(b'"Final Score: 4"', b'["Final Score: 4"]'),
        completion("Final Score: 4").replace(b'"choices"', b'"choice"'),
        b'{"choices": [' + b"9" * 10**4 + b"]}",
        b'{"choices": {"0": 1}}',
        b"null",
    ],
)
def test_a_completion_that_breaks_its_reader(body):
    with RawServer(lambda connection, n: connection.sendall(whole(body))) as server:
        with pytest.raises(RemoteRewardError, match="gave no completion for the prompt 'a secret prompt'") as error:
            ask(unified(server.url))
        assert error.value.__cause__ is not None
        assert ask(unified(server.url, on_error="none")) == [None]


@pytest.mark.parametrize(
    "text",
    ["Final Score" + " " * 10**5, "Final Score: 4" + " " * 10**5 + "x", "final score(" * 10**4, "final " * 10**4],
    ids=["spaces", "spaces behind", "brackets", "finals"],
)
def test_a_completion_is_read_once(text):
    start = time.perf_counter()
    parse_score(text)
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize("chunked", [False, True])
def test_an_answer_that_is_cut_is_asked_for_again(chunked):
    full = whole(SCORES)
    cut = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{" if chunked else full[:-5]
    with RawServer(lambda connection, n: connection.sendall(full if n else cut)) as server:
        assert ask(remote(server.url, max_retries=1)) == [0.5]
        assert len(server.requests) == 2
    with RawServer(lambda connection, n: connection.sendall(cut)) as server:
        with pytest.raises(RemoteRewardError, match="cannot be reached: peer closed connection"):
            ask(remote(server.url))


@pytest.mark.parametrize(
    ("asked", "pause"),
    [
        ("9" * 5000, 30),
        ("²", 2),
        ("-1", 2),
        ("Fri, 99 Feb 2026 00:00:00 GMT", 2),
    ],
)
def test_how_long_a_server_may_have_it_wait(asked, pause):
    assert asked_pause(asked) == pause


def test_until_when_a_server_may_have_it_wait():
    now, hour = datetime.now(UTC), timedelta(hours=1)
    assert asked_pause(format_datetime(now - hour, usegmt=True)) == 0
    assert asked_pause(format_datetime(now + hour, usegmt=True)) == 30
    assert asked_pause(format_datetime(datetime.now() + 24 * hour)) == 30  # without a zone


def asked_pause(text):
    response = server_calls.httpx2.Response(503, headers={"Retry-After": text.encode("latin-1")})
    return server_calls._pause(2, response)


def test_pauses_do_not_grow_without_end():
    assert [server_calls._pause(again, None) for again in (0, 1, 2, 9999)] == [0, 1, 2, 30]


# Where it goes


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@REWARDS
def test_redirects_are_not_followed(make, status):
    with StubServer(lambda request, n: Answer(body={})) as there:
        elsewhere = there.url.replace("127.0.0.1", "localhost")
        with StubServer(lambda request, n: Answer(status, "", {"Location": elsewhere})) as here:
            with pytest.raises(RemoteRewardError, match=f"answered {status} .* to {elsewhere}"):
                ask(make(here.url))
    assert len(here.requests) == 1 and not there.requests


def test_cookies_are_not_kept():
    def send(connection, n):
        connection.sendall(whole(SCORES, "Set-Cookie: a=b"))

    with RawServer(send) as server:
        reward = remote(server.url)
        assert ask(reward) == ask(reward) == [0.5]
    assert b"cookie" not in server.requests[1].lower()


def test_the_proxy_of_the_environment(monkeypatch):
    with StubServer(lambda request, n: Answer(body={"scores": [n]})) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert ask(remote("http://scores.invalid/a")) == [0]
    assert proxy.requests[0].path == "http://scores.invalid/a"


# What is shown


@pytest.mark.parametrize("token", ["hunter2\n", "hunter2\r\nA: b", " hunter2", "\x1bhunter2", "hunter2é"])
def test_a_token_that_no_header_can_hold_is_not_shown(token, monkeypatch, caplog):
    monkeypatch.setenv("A_TOKEN", "good")
    reward = RemoteReward("http://127.0.0.1:1", token_env="A_TOKEN", max_retries=0)
    monkeypatch.setenv("A_TOKEN", token)
    monkeypatch.setenv("OPENAI_API_KEY", token)
    for call, name in (
        (lambda: RemoteReward("http://127.0.0.1:1", token_env="A_TOKEN"), "A_TOKEN"),
        (lambda: ask(reward), "A_TOKEN"),
        (lambda: UnifiedReward("http://127.0.0.1:1"), "OPENAI_API_KEY"),
    ):
        with pytest.raises((ValueError, RemoteRewardError), match=f"{name} has a space, a line break") as error:
            call()
        assert "hunter2" not in "".join(traceback.format_exception(error.value))


PAGES = {
    "error": whole(b"\x1b[31mred\n" + b"x" * 10**5, status="400 \x1bNo".replace("\x1b", "\t")),
    "JSON error": whole(b'{"error": {"message": "\\u001b[31mred' + b"x" * 10**5 + b'"}}', status="400 No"),
    "page": whole(b"\x1b[31m<html>\n" + b"x" * 10**5),
    "location": whole(b"", "Location: http://h/" + "x" * 50_000, status="307 Away"),
    "no HTTP": b"\x1b[31m" + b"x" * 50_000 + b"\r\n\r\n",
    "text": whole(completion("\x1b[31m\u202e" + "x" * 10**5)),
}


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
@REWARDS
def test_a_servers_text_is_shown_short_and_without_control_characters(make, page, caplog):
    with RawServer(lambda connection, n: connection.sendall(page)) as server:
        with pytest.raises(RemoteRewardError) as error:
            ask(make(server.url))
        ask(make(server.url, on_error="none"))
    whole_traceback = "".join(traceback.format_exception(error.value))
    for text in (str(error.value), *caplog.messages):
        assert text.isprintable() and len(text) < 700
    assert "\x1b" not in whole_traceback and "x" * 300 not in whole_traceback
    assert [record.levelno for record in caplog.records if record.name.startswith("trl")] == [logging.WARNING]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cät", "a cät"),
        ("a\nb\x1b[2J\u202e", "a\\nb\\x1b[2J\\u202e"),
        (b"\xff\xc3\xa4", "\ufffdä"),
        ("x" * 21, "x" * 13 + "…" + "x" * 6),
        ("x" * 20, "x" * 20),
        ("ä".encode() * 10**6, "ä" * 13 + "…" + "ä" * 6),
        ("\n" * 11, "\\n" * 6 + "\\…" + "\\n" * 3),
        (ValueError("a"), "a"),
    ],
)
def test_shown(text, expected):
    assert shown(text, 20) == expected


@pytest.mark.parametrize("url", ["http://[::1", "http://a:b/", "http://a/\x1b[31m", "http://" + "a" * 10**5])
def test_an_address_that_cannot_be_read(url):
    with pytest.raises(ValueError, match="url is not a valid address"):
        RemoteReward(url)


def test_a_deadline_must_end():
    with pytest.raises(ValueError, match="timeout=inf: it must be a positive, finite number of seconds"):
        remote("http://127.0.0.1:1", timeout=float("inf"))
