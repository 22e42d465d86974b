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
"""

import argparse
import base64
import binascii
import hmac
import io
import json
import os
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from trl_diffusion_opd.rewards import RewardFunc, load_reward, reward_name, score


MAX_BODY_BYTES = 512 * 2**20
# Seconds that a connection may be silent.
CONNECTION_TIMEOUT = 600


class RequestError(Exception):
    """What is wrong with a request."""


def read_request(body: bytes) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """Rows and images of a request."""
    try:
        request = json.loads(body)
        prompts, encoded, columns = request["prompts"], request["images"], request.get("columns", {})
        images = [Image.open(io.BytesIO(base64.b64decode(data, validate=True))).convert("RGB") for data in encoded]
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise RequestError("prompts must be strings")
        if {len(prompts), *(len(values) for values in columns.values())} != {len(images)}:
            raise RequestError("there must be a prompt, an image and a value of each column for every sample")
        return [
            {**{name: values[i] for name, values in columns.items()}, "prompt": prompt}
            for i, prompt in enumerate(prompts)
        ], images
    except KeyError as error:
        raise RequestError(f"{error} is missing") from error
    except (ValueError, TypeError, AttributeError, OSError, binascii.Error, Image.DecompressionBombError) as error:
        raise RequestError(f"this is no request for scores: {error}") from error


class RewardServer(ThreadingHTTPServer):
    """Answers requests for scores of one reward, one after another."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], reward: RewardFunc, token_env: str | None = None):
        super().__init__(address, Handler)
        self.reward = reward
        self.token = os.environ[token_env] if token_env else None
        self.lock = threading.Lock()  # a model is for one thread at a time


class Handler(BaseHTTPRequestHandler):
    """Reads a request, answers `{"scores": [...]}`, or `{"error": "..."}` with another status."""

    server: RewardServer
    protocol_version = "HTTP/1.1"
    # The answer in one packet, and at once.
    wbufsize = -1
    disable_nagle_algorithm = True
    timeout = CONNECTION_TIMEOUT

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            self.close_connection = True  # the body is still in it
            self.answer(413 if length else 411, {"error": f"Content-Length must be at most {MAX_BODY_BYTES}"})
            return
        body = self.rfile.read(int(length))
        sent = self.headers.get("Authorization", "").encode()
        if self.server.token is not None and not hmac.compare_digest(sent, f"Bearer {self.server.token}".encode()):
            self.answer(401, {"error": "wrong or missing token"})
            return
        try:
            rows, images = read_request(body)
        except RequestError as error:
            self.answer(400, {"error": str(error)})
            return
        try:
            with self.server.lock:
                scores = score([self.server.reward], rows, images)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            self.log_error("%s: %s", type(error).__name__, error)
            self.answer(500, {"error": f"{type(error).__name__}: {error}"})
            return
        self.answer(200, {"scores": scores[reward_name(self.server.reward)]})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Answers that are as they should be are not worth a line each."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", required=True, help="a reward of the package, or package.module:function")
    parser.add_argument("--reward_kwargs", type=json.loads, default={}, help="JSON: arguments of a named reward")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    parser.add_argument("--port", type=int, default=8100, help="0 for any that is free")
    parser.add_argument("--token_env", help="environment variable with the token that callers must send")
    args = parser.parse_args(arguments)
    if args.token_env and not os.environ.get(args.token_env):
        parser.error(f"--token_env: the environment variable {args.token_env} is not set")
    reward = load_reward(args.reward, **args.reward_kwargs)
    with RewardServer((args.host, args.port), reward, args.token_env) as server:
        print(f"{reward_name(reward)} on port {server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
