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

"""An HTTP server on 127.0.0.1 whose answers a test chooses."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from httpx2 import Headers


@dataclass
class Request:
    path: str
    headers: Headers
    body: Any


@dataclass
class Answer:
    status: int = 200
    body: Any = None
    headers: dict[str, str] | None = None
    cut: bool = False  # close the connection without an answer


class StubServer:
    """
    Calls `answer(request, n)` for the n-th request, from 0, and keeps the requests.

    A dict is sent as JSON and a string as it is.
    """

    def __init__(self, answer: Callable[[Request, int], Answer]):
        self.requests: list[Request] = []
        lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                request = Request(self.path, Headers(dict(self.headers)), json.loads(raw))
                with lock:
                    number = len(stub.requests)
                    stub.requests.append(request)
                result = answer(request, number)
                if result.cut:
                    self.close_connection = True
                    return
                body = (result.body if isinstance(result.body, str) else json.dumps(result.body)).encode()
                self.send_response(result.status)
                headers = {
                    "Content-Type": "application/json",
                    "Content-Length": str(len(body)),
                    **(result.headers or {}),
                }
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> "StubServer":
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def silent_server() -> Iterator[StubServer]:
    """One that closes a connection after ten seconds without an answer, or when the test has ended."""
    release = threading.Event()

    def answer(request: Request, n: int) -> Answer:
        release.wait(10)
        return Answer(cut=True)

    with StubServer(answer) as server:
        try:
            yield server
        finally:
            release.set()
