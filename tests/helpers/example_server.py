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

"""Runs the examples' reward server, in the tests' own process or in a separate one."""

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType

from helpers.example_script import EXAMPLES
from helpers.launching import surroundings


@contextlib.contextmanager
def serving(
    example: ModuleType, reward: Callable[..., list[float | None]], token_env: str | None = None
) -> Iterator[int]:
    """Serves a reward on 127.0.0.1; gives the port."""
    with example.RewardServer(("127.0.0.1", 0), reward, token_env) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def started() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Starts the script with a reward that gives widths; its process, and the line in which it says its port."""
    command = [sys.executable, str(EXAMPLES / "reward_server.py")]
    command += ["--reward", "helpers.stub_reward:width", "--port", "0"]
    with subprocess.Popen(command, env=surroundings(), stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, process.stdout.readline()
        finally:
            process.terminate()
