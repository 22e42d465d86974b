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

"""An HTTP client that a server can neither hold up, nor fill up, nor send elsewhere."""

import socket
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx2

from ..guards.redaction import shown


# Of an answer, besides what it says: these would have its bytes read in another way than they came.
_HEADERS_OF_THE_TRANSFER = ("content-encoding", "content-length", "content-type", "set-cookie", "transfer-encoding")


class RefusedAnswerError(Exception):
    """An answer is larger, or encoded otherwise, than was asked for."""


class BoundedClient(httpx2.Client):
    """
    A client for servers of others. Whatever they do, a request ends in time, and an answer takes little memory.

    - `seconds` are for the whole of a request: the name, the connection, what is sent, and the answer to its last byte.
      The timeouts of httpx are for one packet, so that a server which sends a byte now and then is waited for.
    - An answer is read up to `max_bytes`, and as it comes: one that is compressed was not asked for, and is not unpacked.
      Of a failure's page (any status but 2xx) the first `max_bytes` are kept, none if it is compressed.
    - Redirects are not followed, cookies are not kept, and a connection is not used twice.
    - What an error says is shortened, and shows no control characters.

    Args:
        seconds (`float`): for a request.
        max_bytes (`int`): of an answer's body.

    Raises:
        [`RefusedAnswerError`]: by a request whose answer is too large or compressed.
        [`httpx2.TransportError`]: by a request that failed or took too long.
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
        """Sends a request and reads the answer, whatever `options` say of redirects and of streaming."""
        connections = _Connections()
        request.headers["Accept-Encoding"] = "identity"
        request.extensions = {**request.extensions, "trace": connections.hold}
        answer: Future[httpx2.Response] = Future()
        # The thread may be in what no other can end, such as the search for a name: it is left behind then, and ends
        # with that.
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
            del answer  # which holds its error, which holds this frame, which would keep what was read

    def _work(self, request: httpx2.Request, answer: "Future[httpx2.Response]") -> None:
        try:
            answer.set_result(self._received(request))
        except BaseException as error:  # whatever it is, the caller raises it
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
            # Some repeat what the server sent, 100 kB of it.
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
    """The connections of a request, for another thread to end them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: list[socket.socket] = []
        self._ended = False

    def hold(self, event: str, info: Mapping[str, Any]) -> None:
        """What httpx calls at each step of a request, as its extension `trace`."""
        if not event.endswith("connect_tcp.complete"):
            return
        # A second handle of the same connection: the first one becomes another object where TLS begins.
        connection = info["return_value"].get_extra_info("socket").dup()
        with self._lock:
            self._held.append(connection)
            late = self._ended
        if late:
            self.end()

    def end(self) -> None:
        """Whoever waits for a byte of them is woken, and finds the end of the connection."""
        with self._lock:
            self._ended = True
            held, self._held = self._held, []
        for connection in held:
            with suppress(OSError):  # closed already, as after every answer
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
