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

"""An HTTP client with limits on time and memory, which follows no redirects. For servers that are not trusted."""

import socket
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx2

from ..guards.redaction import shown


# Headers that are dropped from an answer, since they would change how its body is read.
_HEADERS_OF_THE_TRANSFER = ("content-encoding", "content-length", "content-type", "set-cookie", "transfer-encoding")


class RefusedAnswerError(Exception):
    """An answer is too large, or compressed although that was not requested."""


class BoundedClient(httpx2.Client):
    """
    A client for servers that are not trusted. Whatever a server does, a request ends in time and an answer takes
    little memory.

    - A request may take `seconds` in total: looking up the name, connecting, sending, and reading the answer to its
      last byte. The timeouts of httpx count for each packet, so a server that sends a byte now and then could delay it
      forever.
    - An answer is read up to `max_bytes`. A compressed answer was not requested and is refused. Of an error page (any
      status but 2xx) the first `max_bytes` are kept, or none if it is compressed.
    - Redirects are not followed, cookies are not kept, and a connection is not reused.
    - Texts of errors are shortened and show no control characters.

    Args:
        seconds (`float`): maximum time of a request.
        max_bytes (`int`): maximum size of an answer's body.

    Raises:
        [`RefusedAnswerError`]: by a request, if its answer is too large or compressed.
        [`httpx2.TransportError`]: by a request, if it fails or takes too long.
    """

    def __init__(self, seconds: float, max_bytes: int):
        super().__init__(
            timeout=seconds,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        )
        self.seconds = seconds
        self.max_bytes = max_bytes

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Sends a request and reads the whole answer. Ignores `options`, such as those for redirects and streaming."""
        connections = _Connections()
        request.headers["Accept-Encoding"] = "identity"
        request.extensions = {**request.extensions, "trace": connections.hold}
        answer: Future[httpx2.Response] = Future()
        # The thread may be in a call that can't be interrupted, such as looking up a name. Then nobody waits for it,
        # and it ends when that call does.
        threading.Thread(target=self._work, args=(request, answer), name="bounded-request", daemon=True).start()
        try:
            return answer.result(self.seconds)
        except TimeoutError:
            if answer.done():
                return answer.result()
            raise httpx2.ReadTimeout(
                f"timed out, no complete answer in {self.seconds:g} seconds", request=request
            ) from None
        finally:
            connections.end()
            del answer  # breaks a cycle: it holds its error, which holds this frame and so what was read

    def _work(self, request: httpx2.Request, answer: "Future[httpx2.Response]") -> None:
        try:
            answer.set_result(self._received(request))
        except BaseException as error:  # raised again by the caller, whatever it is
            answer.set_exception(error)
            del answer

    def _received(self, request: httpx2.Request) -> httpx2.Response:
        try:
            response = super().send(request, stream=True, follow_redirects=False)
            try:
                body = self._body(response)
            finally:
                response.close()
        except httpx2.TransportError as error:
            # Some errors repeat up to 100 kB of the server's answer.
            raise type(error)(shown(error), request=request) from None
        for name in _HEADERS_OF_THE_TRANSFER:
            response.headers.pop(name, None)
        return httpx2.Response(
            response.status_code,
            headers=response.headers,
            content=body,
            request=request,
            extensions={"reason_phrase": response.extensions.get("reason_phrase", b"")},
        )

    def _body(self, response: httpx2.Response) -> bytes:
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            if response.is_success:
                raise RefusedAnswerError(f"an answer compressed by {shown(encoding, 50)!r}, which was not asked for")
            return b""
        body = bytearray()
        for part in response.iter_raw():
            body += part
            if len(body) > self.max_bytes:
                if response.is_success:
                    raise RefusedAnswerError(f"an answer of more than {self.max_bytes:,} bytes")
                break
        return bytes(body[: self.max_bytes])


class _Connections:
    """The connections of a request, so that another thread can end them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: list[socket.socket] = []
        self._ended = False

    def hold(self, event: str, info: Mapping[str, Any]) -> None:
        """The `trace` extension of httpx, which calls it at each step of a request. Keeps new connections."""
        if not event.endswith("connect_tcp.complete"):
            return
        # A second handle of the connection, since TLS wraps the first one in another object.
        connection = info["return_value"].get_extra_info("socket").dup()
        with self._lock:
            self._held.append(connection)
            late = self._ended
        if late:
            self.end()

    def end(self) -> None:
        """Closes the connections. A thread that waits for data from one wakes up and finds its end."""
        with self._lock:
            self._ended = True
            held, self._held = self._held, []
        for connection in held:
            with suppress(OSError):  # closed already, as after every complete answer
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
