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

"""The example's reward server before callers in bad faith: what it takes of them, how long, and what it answers."""

import base64
import concurrent.futures
import contextlib
import io
import json
import os
import re
import socket
import struct
import threading
import time
import zlib
from pathlib import Path

import pytest
from helpers.example_script import load_script
from helpers.example_server import serving, started
from PIL import Image

from trl_diffusion_opd.rewards import RemoteReward


@pytest.fixture
def example():
    return load_script("examples/reward_server.py")


def width(images, **columns):
    return [float(image.width) for image in images]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(side, kind=2, text=b"", drawn=True):
    """A black PNG in base64. `kind` is the PNG's own: 2 for RGB, 6 for RGBA."""
    data = zlib.compress((b"\0" * (1 + side * {2: 3, 6: 4}[kind])) * side if drawn else b"")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, kind, 0, 0, 0))
    words = chunk(b"zTXt", b"a\0\0" + zlib.compress(text)) if text else b""
    file = b"\x89PNG\r\n\x1a\n" + header + words + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return base64.b64encode(file).decode()


def encoded(kind):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def request(images, **more):
    return json.dumps({"prompts": ["a"] * len(images), "images": images, **more}).encode()


GOOD = request([png(3)])


def connected(port):
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def head(length, *headers):
    return "\r\n".join(["POST / HTTP/1.1", f"Content-Length: {length}", *headers]).encode() + b"\r\n\r\n"


def answer(caller):
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := caller.recv(2**16):
            data += part
    return data.decode()


def post(port, body, *headers):
    with connected(port) as caller:
        with contextlib.suppress(ConnectionError):
            caller.sendall(head(len(body), *headers) + body)
        return answer(caller)


# What a request may hold


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([png(2049, drawn=False)], "image 0 has 2049 x 2049 pixels; at most 4,194,304 are read"),
        ([png(3), png(60_000, drawn=False)], "image 1 has 60000 x 60000 pixels|exceeds limit"),
        ([png(3)] * 257, "there are 257 images, of at most 256"),
        ([png(3, text=bytes(2**21))], "too large"),
        ([png(3, drawn=False)], "this is no request for scores"),
        ([encoded("EPS")], "cannot identify image 0 as PNG"),
        ([png(3), encoded("GIF")], "cannot identify image 1 as PNG"),
        (["é"], "this is no request for scores"),
        ([None], "this is no request for scores"),
    ],
)
def test_images_that_are_refused(example, images, message):
    with pytest.raises(example.RequestError, match=message):
        example.read_request(request(images))


def test_pixels_are_added_up_before_they_are_drawn(example, monkeypatch):
    monkeypatch.setattr(example, "MAX_PIXELS", 250)
    fits = request([png(10), png(10), png(7)])
    assert len(example.read_request(fits)[1]) == 3
    # The last one could not be drawn.
    more = request([png(10), png(10), png(8, drawn=False)])
    with pytest.raises(
        example.RequestError, match="image 2 has 8 x 8 pixels, and with it the request 264; at most 250"
    ):
        example.read_request(more)
    assert len(example.read_request(request([png(10)] * 4), capacity=2)[1]) == 4


def test_of_an_image_its_pixels_are_kept_alone(example):
    _, images = example.read_request(request([png(3, text=b"a word"), png(3, kind=6, text=b"a word")]))
    assert [(type(image), image.mode, image.size, image.info) for image in images] == [
        (Image.Image, "RGB", (3, 3), {}),
        (Image.Image, "RGB", (3, 3), {}),
    ]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[" * 10**4 + b"]" * 10**4, "recursion"),
        (b"9" * 5000, "Exceeds the limit"),
        (b'{"prompts": [' + b"[]," * 10**5 + b"[]]}", "more than 100,000 lists, objects and entries"),
        (b'{"prompts": ["' + b"a b" * 400_000 + b'"]}', "more than 1,048,576 bytes besides the images"),
        # Inside of a string, where an escape makes all of it four times as large.
        (b'{"prompts": ["\\ud83d\\ude00\\"' + b"a" * 1_100_000 + b'"]}', "more than 1,048,576 bytes besides"),
        ('{"prompts": ["😀", "'.encode() + b"a" * 4_200_000 + b'"]}', "the body is large, and not ASCII"),
        (b'{"prompts": ["a"], "images": {"0": 1}}', "this is no request for scores"),
        (b'{"prompts": "a", "images": ["a"]}', "prompts must be strings, in a list"),
        (b'{"prompts": ["a"], "images": ["a"], "columns": [1]}', "this is no request for scores"),
        (b"\xff", "this is no request for scores"),
        (b"", "this is no request for scores"),
    ],
)
def test_json_that_is_refused(example, body, message):
    with pytest.raises(example.RequestError, match=message) as error:
        example.read_request(body)
    assert len(str(error.value)) < 300


def test_prompts_of_all_languages_beside_large_images(example):
    # Escaped, as json writes them, and of a large body; and as they are, of a small one.
    prompts = ["猫が二匹 😀"]
    large = request([png(3)], columns={"a": ["b" * 5_000_000]}, prompts=prompts)
    small = json.dumps({"prompts": prompts, "images": [png(3)]}, ensure_ascii=False).encode()
    for body in (large, small):
        assert example.read_request(body)[0][0]["prompt"] == prompts[0]


# Who is answered, and what


def test_the_token_comes_before_the_body(example, monkeypatch):
    monkeypatch.setattr(example, "REFUSAL_SECONDS", 0.1)
    monkeypatch.setenv("SERVER_TOKEN", "abc")
    with serving(example, width, "SERVER_TOKEN") as port:
        with connected(port) as caller:
            caller.sendall(head(10**6))  # and no body
            assert " 401 " in answer(caller)
        with connected(port) as caller:
            caller.sendall(head(10**6, "Authorization: Bearer abd", "Expect: 100-continue"))
            assert answer(caller).startswith("HTTP/1.1 401 ")
        with connected(port) as caller:
            caller.sendall(head(len(GOOD), "Authorization: Bearer abc", "Expect: 100-continue"))
            assert caller.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            caller.sendall(GOOD)
            assert '{"scores": [3.0]}' in answer(caller)
        # One that sends all of a large body in any case, and only then looks.
        assert "wrong or missing token" in post(port, bytes(8 * 2**20))


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (head(2**24 + 1), 413),
        (head("9" * 10**4), 413),
        (head("-1"), 411),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 411),
        (b"POST / HTTP/1.1\r\nA: " + b"x" * 20_000 + b"\r\n\r\n", 431),
        (b"POST / HTTP/1.1\r\n" + b"A: x\r\n" * 3000 + b"\r\n", 431),
        (b"GET /\x1b[31m HTTP/1.1\r\n\r\n", 501),
        (b"\x1b[31m\r\n\r\n", 400),
    ],
)
def test_what_is_no_request_is_answered(example, monkeypatch, sent, status, capfd):
    monkeypatch.setattr(example, "REFUSAL_SECONDS", 0.05)
    with serving(example, width) as port:
        with connected(port) as caller:
            caller.sendall(sent)
            text = answer(caller)
        assert f" {status} " in text or text.startswith('{"error"')  # the second is HTTP 0.9
        assert len(text) < 600 and "\x1b" not in text
        assert " 200 " in post(port, GOOD)
    assert "\x1b" not in capfd.readouterr().err


class Odd(Exception):
    """Of no kind that is known."""


@pytest.mark.parametrize(
    "error",
    [IndexError("no"), AssertionError(), OSError("no"), Odd("\x1b[31m" + "x" * 10**5), SystemExit(3), TimeoutError()],
)
def test_whatever_a_reward_raises_is_answered(example, error, capfd):
    def raises(**columns):
        raise error

    with serving(example, raises) as port:
        for _ in range(2):
            text = post(port, GOOD)
            assert " 500 " in text and type(error).__name__ in text and len(text) < 500
    assert "\x1b" not in capfd.readouterr().err


# Time, and how many


@pytest.mark.parametrize("part", [head(1000)[:-2], head(1000) + b"[", head(1000, "Expect: 100-continue")])
@pytest.mark.parametrize("drips", [True, False])
def test_slow_callers_have_their_time_and_hold_up_no_other(example, monkeypatch, part, drips):
    monkeypatch.setattr(example, "TRANSFER_SECONDS", 0.6)
    with serving(example, width) as port, connected(port) as caller:
        start = time.perf_counter()
        caller.sendall(part)
        assert " 200 " in post(port, GOOD)
        caller.settimeout(0.02)
        data = None
        while data is None and time.perf_counter() - start < 20:
            try:
                data = caller.recv(2**12)
                data = None if b" 100 " in data[:20] and data.count(b"HTTP") == 1 else data
            except TimeoutError:
                if drips:
                    with contextlib.suppress(OSError):
                        caller.sendall(b"x")
            except ConnectionError:
                data = b""
        # A caller that drips would go on until the loop ends. No less: a busy machine takes seconds.
        assert 0.6 <= time.perf_counter() - start < 20
        assert b" 408 " in data or not part.endswith((b"[", b"\r\n\r\n"))


def test_silent_callers_give_their_places_back(example, monkeypatch):
    monkeypatch.setattr(example, "MAX_CALLERS", 3)
    monkeypatch.setattr(example, "TRANSFER_SECONDS", 0.5)
    monkeypatch.setattr(example, "REFUSAL_SECONDS", 0.1)
    pauses = []
    monkeypatch.setattr("trl_diffusion_opd.rewards.server_calls.time.sleep", pauses.append)
    with serving(example, width) as port, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connected(port)) for _ in range(3)]
        text = post(port, GOOD)
        assert text.startswith("HTTP/1.1 503 ") and "Retry-After: 5\r\n" in text
        assert RemoteReward(f"http://127.0.0.1:{port}", max_retries=0, on_error="none")(
            prompts=["a"], images=[Image.new("RGB", (3, 3))]
        ) == [None]
        assert [caller.recv(1) for caller in silent] == [b""] * 3
        assert " 200 " in post(port, GOOD)
    assert not pauses


def test_256_callers_wait_for_their_turn(example):
    assert example.RewardServer.request_queue_size == example.MAX_CALLERS == 256
    running, most = 0, 0

    def counted(images):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.001)
        running -= 1
        return width(images)

    with serving(example, counted) as port, concurrent.futures.ThreadPoolExecutor(120) as threads:
        texts = list(threads.map(lambda _: post(port, GOOD), range(200)))
    assert all(" 200 " in text for text in texts) and most == 1


def test_bodies_share_their_room(example, monkeypatch):
    monkeypatch.setattr(example, "MAX_BODY_BYTES", len(GOOD) + 10)
    monkeypatch.setattr(example, "QUEUE_SECONDS", 0.2)
    monkeypatch.setattr(example, "REFUSAL_SECONDS", 0.05)
    with serving(example, width) as port, connected(port) as first:
        # The server says that it goes on once it has the room; without this, the second may come before the first.
        first.sendall(head(len(GOOD), "Expect: 100-continue"))
        assert first.recv(100).startswith(b"HTTP/1.1 100 ")
        first.sendall(GOOD[:-1])
        assert " 503 " in post(port, GOOD)
        # Whoever needs no more than is left is answered, and the others when the first one is done.
        monkeypatch.setattr(example, "QUEUE_SECONDS", 30)  # on a busy machine an answer takes longer than 0.2 s
        assert " 400 " in post(port, b"[]")
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            second = threads.submit(post, port, GOOD)
            time.sleep(0.05)
            assert not second.done()
            first.sendall(GOOD[-1:])
            assert " 200 " in answer(first) and " 200 " in second.result()


def test_a_reward_that_hangs_is_not_waited_for_without_end(example, monkeypatch):
    monkeypatch.setattr(example, "QUEUE_SECONDS", 0.1)
    release = threading.Event()

    def hangs(images):
        release.wait(5)
        return width(images)

    with serving(example, hangs) as port:
        assert " 503 " in post(port, GOOD)
        release.set()
        assert " 200 " in post(port, GOOD)


@pytest.mark.parametrize("options", [["--token_env", "BAD_TOKEN"], ["--capacity", "0"]])
def test_options_that_are_refused(example, options, monkeypatch, capsys):
    monkeypatch.setenv("BAD_TOKEN", "hunter2\n")
    with pytest.raises(SystemExit):
        example.main(["--reward", "jpeg_compressibility", *options])
    text = capsys.readouterr().err
    assert re.search("BAD_TOKEN has a space, a line break|capacity 0: it must be at least 1", text)
    assert "hunter2" not in text


def test_memory_stays_within_100_mb(processes):
    def megabytes(name):
        return int(re.search(rf"{name}:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1000

    large = request([base64.b64encode(os.urandom(3 * 10**6)).decode()] * 3)
    bad = [
        request([png(2048, kind=6)] * 4),
        request([png(2048)] * 4 + [png(1)]),
        request([png(3, text=bytes(2**20 - 10))] * 256),
        b'{"prompts": [' + b"[]," * 5_000_000 + b"[]]}",
        b'{"prompts": [' + b'"ab",' * 3_000_000 + b'""]}',
        b'{"prompts": ["' + b"a b" * 5_000_000 + b'\\ud83d\\ude00"]}',
        large,
    ]
    with started() as (process, line):
        port = int(line.split()[-1])
        assert " 200 " in post(port, GOOD)
        rest = megabytes("VmRSS")
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak begins here
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            texts = list(threads.map(lambda body: post(port, body), [*bad, *[large] * 5, *bad[:2]]))
        assert {text.split()[1] for text in texts} == {"200", "400"}
        assert megabytes("VmHWM") - rest < 105  # 100 MiB
