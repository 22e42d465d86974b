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

# /// script
# dependencies = ["trl-diffusion-opd"]
# ///

"""
Serves a reward over HTTP, so that a heavy one can live on another device or machine, or in another environment.

```bash
python examples/reward_server.py --reward imagereward --reward_kwargs '{"device": "cuda:1"}' --port 8100
python examples/reward_server.py --reward my_package.rewards:symmetry --port 8101
```

Whoever trains or evaluates names it as a remote reward:

```bash
--reward_funcs aesthetic=remote --reward_kwargs '{"remote": {"url": "http://127.0.0.1:8100", "name": "imagereward"}}'
```

With `--token_env NAME` callers have to send the token that the environment variable NAME holds; give `RemoteReward` the same
option. The format is described in [`RemoteReward`]. It is plain HTTP: across machines, put a proxy with TLS before it.

What callers can take is bounded. A body has 16 MiB at most, and so have all bodies together: a caller whose body doesn't fit
waits. A request has 256 images at most, source pictures included, each of 4.2 million pixels at most, and 16.8 million
together (16 images of 1024 x 1024); `--capacity 4` has four times of all that, and takes four times the memory. Requests
come in within 30 seconds, 256 callers may wait, and whoever comes beside these is answered 503. Images are PNG alone.
"""

import argparse
import base64
import http.client
import io
import json
import math
import mmap
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hmac import compare_digest
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, BinaryIO

from PIL import Image, PngImagePlugin

from trl_diffusion_opd.guards.redaction import shown
from trl_diffusion_opd.rewards import RewardFunc, load_reward, reward_name, score
from trl_diffusion_opd.rewards.server_calls import token_problems


# Of a request, times `--capacity`. With these the server takes less than 100 MB for requests, whoever sends them: a body is
# there twice while it is read, and a pixel has four bytes.
MAX_BODY_BYTES = 16 * 2**20
MAX_PIXELS_OF_AN_IMAGE = 2048**2
MAX_PIXELS = 16 * 1024**2
MAX_IMAGES = 256
# Prompts, columns and the form of the JSON. Each list, object and entry is an object of Python, of up to 200 bytes.
MAX_TEXT_BYTES = 2**20
MAX_ENTRIES = 100_000
MAX_HEADERS_BYTES = 16 * 2**10
# A string that is nothing else. A quote behind a backslash begins none.
BASE64 = re.compile(rb'(?<!\\)"[A-Za-z0-9+/=]*+"')
# What a PNG may say in words, once it is unpacked.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**20

MAX_CALLERS = 256
# Seconds for a request to come in from its first byte to its last, and for an answer to be taken.
TRANSFER_SECONDS = 30.0
# Seconds to wait for the other requests. A caller that is still there then has given up, or should.
QUEUE_SECONDS = 600.0
# Seconds that a caller which is turned away has to read why. Closed at once, its connection would be reset.
REFUSAL_SECONDS = 1.0


class RequestError(Exception):
    """What is wrong with a request."""


class BusyError(Exception):
    """There is no room for a request."""


def read_request(body: bytes, capacity: int = 1) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """
    Rows and RGB images of a request. Its source pictures are a list in each row; images with them count together.

    Raises:
        [`RequestError`]: whatever is wrong with it.
    """
    try:
        check_text(body, capacity)
        text = body.decode()
        del body  # a body may be large, and is not held once more than it has to be
        request = json.loads(text)
        del text
        prompts, encoded, columns = request["prompts"], request["images"], request.get("columns", {})
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise RequestError("prompts must be strings, in a list")
        of_rows = request.get("source_images")
        lists = [*columns.values()] if of_rows is None else [*columns.values(), of_rows]
        if {len(prompts), *(len(values) for values in lists)} != {len(encoded)}:
            raise RequestError("there must be a prompt, an image and a value of each column for every sample")
        count = len(encoded)
        sizes = [len(sources) for sources in of_rows or []]
        for sources in of_rows or []:  # into the same list, from which each is taken out when it is read
            encoded += sources
            sources.clear()
        images = read_images(encoded, capacity)
        rows = [
            {**{name: values[i] for name, values in columns.items()}, "prompt": prompt}
            for i, prompt in enumerate(prompts)
        ]
        if of_rows is not None:
            rest = iter(images[count:])
            for row, size in zip(rows, sizes, strict=True):
                row["source_images"] = [next(rest) for _ in range(size)]
        return rows, images[:count]
    except RequestError:
        raise
    except KeyError as error:
        raise RequestError(f"{error} is missing") from error
    except Exception as error:  # whatever it is that a stranger's request brings about
        raise RequestError(f"this is no request for scores: {shown(error) or type(error).__name__}") from error


def taken_out(body: mmap.mmap, length: int) -> bytes:
    """The first bytes of a body, which is closed."""
    with body:
        return body[:length]


def check_text(body: bytes, capacity: int) -> None:
    """Refuses JSON that would take much more memory than it has bytes. Base64 takes as much as it has."""
    # None of these is in base64. They are counted first, so that what follows has not many pieces.
    if sum(body.count(sign) for sign in (b",", b"[", b"{")) > MAX_ENTRIES * capacity:
        raise RequestError(f"the JSON has more than {MAX_ENTRIES * capacity:,} lists, objects and entries")
    if len(BASE64.sub(b"", body)) > MAX_TEXT_BYTES * capacity:
        raise RequestError(f"there are more than {MAX_TEXT_BYTES * capacity:,} bytes besides the images in base64")
    # One character makes all of a string two or four times as large.
    if len(body) > MAX_BODY_BYTES * capacity // 4 and not body.isascii():
        raise RequestError(
            "the body is large, and not ASCII; send fewer images at a time, or other characters as \\uXXXX"
        )


def read_images(encoded: list[str], capacity: int) -> list[Image.Image]:
    """RGB images from PNGs in base64, which are taken out of their list. How large they are is asked before it is drawn."""
    if len(encoded) > MAX_IMAGES * capacity:
        raise RequestError(
            f"there are {len(encoded)} images, of at most {MAX_IMAGES * capacity}; send fewer at a time"
        )
    images: list[Image.Image] = []
    pixels = 0
    encoded.reverse()
    while encoded:
        png = io.BytesIO(base64.b64decode(encoded.pop(), validate=True))
        try:
            image = Image.open(png, formats=["PNG"])
        except Image.UnidentifiedImageError as error:
            raise RequestError(f"this is no request for scores: cannot identify image {len(images)} as PNG") from error
        with image:
            size = f"image {len(images)} has {image.width} x {image.height} pixels"
            if image.width * image.height > MAX_PIXELS_OF_AN_IMAGE * capacity:
                raise RequestError(f"{size}; at most {MAX_PIXELS_OF_AN_IMAGE * capacity:,} are read, see --capacity")
            pixels += image.width * image.height
            if pixels > MAX_PIXELS * capacity:
                raise RequestError(
                    f"{size}, and with it the request {pixels:,}; at most {MAX_PIXELS * capacity:,} are read. Send fewer "
                    "images at a time, or see --capacity"
                )
            images.append(image.convert("RGB"))
        images[-1].info.clear()  # what else the file says
    return images


class Room:
    """Bytes that all requests share."""

    def __init__(self, size: int):
        self._left = size
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Waits for as many bytes. They are given back at the end of the block."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._left >= size, QUEUE_SECONDS):
                raise BusyError
            self._left -= size
        try:
            yield
        finally:
            with self._changed:
                self._left += size
                self._changed.notify_all()


class RewardServer(ThreadingHTTPServer):
    """Answers requests for scores of one reward, one after another."""

    daemon_threads = True
    request_queue_size = MAX_CALLERS

    def __init__(self, address: tuple[str, int], reward: RewardFunc, token_env: str | None = None, capacity: int = 1):
        super().__init__(address, Handler)
        self.reward = reward
        self.token = os.environ[token_env] if token_env else None
        self.capacity = capacity
        self.room = Room(MAX_BODY_BYTES * capacity)
        # A model is for one thread at a time. So is memory: an allocator keeps tens of MB of what a thread gave back for
        # this thread, and each caller has one.
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="reward")
        self._ends: dict[socket.socket, float] = {}  # of callers: when they are to be done with what they do
        self._refused: dict[socket.socket, float] = {}

    def must_be_done(self, caller: socket.socket, seconds: float) -> None:
        """Whoever sends a byte now and then is not silent, but has no more time than others."""
        self._ends[caller] = time.monotonic() + seconds

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._ends) < MAX_CALLERS:
            self.must_be_done(request, TRANSFER_SECONDS)
            super().process_request(request, client_address)
            return
        if len(self._refused) >= MAX_CALLERS:
            super().shutdown_request(request)
            return
        request.setblocking(False)
        try:
            request.send(
                b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
            request.shutdown(socket.SHUT_WR)
        except OSError:  # gone already
            pass
        self._refused[request] = time.monotonic() + REFUSAL_SECONDS

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self._ends.pop(request, None)

    def server_close(self) -> None:
        super().server_close()
        self.worker.shutdown(wait=False, cancel_futures=True)

    def answer_to(self, body: mmap.mmap, length: int) -> tuple[int, dict[str, Any]]:
        """
        Status and content for a request, whatever it brings about.

        An error ends here, in the worker: handed on, it would keep the images of its frames until the next collection.
        """
        try:
            rows, images = read_request(taken_out(body, length), self.capacity)
        except RequestError as error:
            return 400, {"error": str(error)}
        try:
            return 200, {"scores": score([self.reward], rows, images)[reward_name(self.reward)]}
        except BaseException as error:  # anything, SystemExit too: a caller waits for an answer
            return 500, {"error": f"{type(error).__name__}: {shown(error)}"}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that a caller broke is not worth a traceback."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def service_actions(self) -> None:
        """Called by the loop of `serve_forever`, twice a second."""
        now = time.monotonic()
        for caller, end in list(self._ends.items()):
            if end < now:
                try:
                    caller.shutdown(socket.SHUT_RD)  # its thread finds an end, and can still answer
                except OSError:  # closed in this moment
                    pass
        for caller, end in list(self._refused.items()):
            if end < now:
                del self._refused[caller]
                super().shutdown_request(caller)


class BoundedHeaders:
    """Lines of a file up to a number of bytes: a hundred lines of 64 kB are allowed to headers otherwise."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._left = MAX_HEADERS_BYTES

    def readline(self, size: int) -> bytes:
        line = self._file.readline(min(size, self._left + 1))
        self._left -= len(line)
        if self._left < 0:
            raise http.client.LineTooLong("headers")
        return line


class Handler(BaseHTTPRequestHandler):
    """Reads a request, answers `{"scores": [...]}`, or `{"error": "..."}` with another status. A connection has one."""

    server: RewardServer
    connection: socket.socket
    protocol_version = "HTTP/1.1"
    # The answer in one packet, and at once.
    wbufsize = -1
    disable_nagle_algorithm = True
    # Of one packet, where nothing at all moves. The server's deadlines are sooner.
    timeout = 2 * TRANSFER_SECONDS

    def parse_request(self) -> bool:
        whole: Any = self.rfile
        self.rfile = BoundedHeaders(whole)
        try:
            return super().parse_request()
        finally:
            self.rfile = whole
            self.close_connection = True

    def handle_expect_100(self) -> bool:
        return True  # the caller is told to go on where its body is read

    def do_POST(self) -> None:
        # First of all, so that no one else has a body read.
        sent = self.headers.get("Authorization", "").encode()
        if self.server.token is not None and not compare_digest(sent, f"Bearer {self.server.token}".encode()):
            self.refuse(401, "wrong or missing token")
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self.refuse(411, "a Content-Length is needed")
        elif len(length) > 12 or int(length) > MAX_BODY_BYTES * self.server.capacity:
            self.refuse(
                413,
                f"the body has {length[:20]} bytes, at most {MAX_BODY_BYTES * self.server.capacity:,} are read. Send fewer "
                "images at a time, or see --capacity",
            )
        else:
            try:
                self.read_and_answer(int(length))
            except BusyError:
                self.refuse(503, "too many requests are waiting")

    def read_and_answer(self, length: int) -> None:
        self.server.must_be_done(self.connection, math.inf)
        # Not of this thread's memory, see the worker's.
        with self.server.room.taken(length), mmap.mmap(-1, max(length, 1)) as body:
            self.server.must_be_done(self.connection, TRANSFER_SECONDS)
            if self.headers.get("Expect", "").lower() == "100-continue":
                self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                self.wfile.flush()
            with memoryview(body) as view:
                came = self.rfile.readinto(view[:length])
            self.server.must_be_done(self.connection, math.inf)
            if came < length:
                self.answer(408, {"error": f"{came:,} of {length:,} bytes came in {TRANSFER_SECONDS:g} seconds"})
                return
            answer = self.server.worker.submit(self.server.answer_to, body, length)
            try:
                status, content = answer.result(QUEUE_SECONDS)
            except TimeoutError as error:
                answer.cancel()
                raise BusyError from error
        if status == 500:
            self.log_error("%s", content["error"])
        self.answer(status, content)

    def refuse(self, status: int, message: str) -> None:
        """An answer before the body was read. The caller gets it sooner than the end of the connection, if it reads."""
        self.answer(status, {"error": message})
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(REFUSAL_SECONDS)
        end = time.monotonic() + REFUSAL_SECONDS
        try:
            while time.monotonic() < end and self.connection.recv(2**16):
                pass
        except OSError:  # nothing came, or the caller is gone
            pass

    def answer(self, status: int, content: dict[str, Any]) -> None:
        self.server.must_be_done(self.connection, TRANSFER_SECONDS)
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What is not even HTTP is answered in the same form as the rest."""
        self.answer(code, {"error": shown(message or self.responses[http.HTTPStatus(code)][0])})

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Answers that are as they should be are not worth a line each."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", required=True, help="a reward of the package, or package.module:function")
    parser.add_argument("--reward_kwargs", type=json.loads, default={}, help="JSON: arguments of a named reward")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    parser.add_argument("--port", type=int, default=8100, help="0 for any that is free")
    parser.add_argument("--token_env", help="environment variable with the token that callers must send")
    parser.add_argument("--capacity", type=int, default=1, help="how much requests may take, in units of 100 MB")
    args = parser.parse_args(arguments)
    if args.token_env and (problems := token_problems(args.token_env)):
        parser.error(f"--token_env: {problems[0]}")
    if args.capacity < 1:
        parser.error(f"--capacity {args.capacity}: it must be at least 1")
    reward = load_reward(args.reward, **args.reward_kwargs)
    with RewardServer((args.host, args.port), reward, args.token_env, args.capacity) as server:
        print(f"{reward_name(reward)} on port {server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
