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

"""
Starts processes for tests: with `accelerate launch`, as users do, or by forking.

A new process needs about eight seconds of CPU to import torch, transformers and diffusers. A forked one needs none,
and is still a separate process with its own gloo and exit status, which a signal can kill.

A test or a fixture that starts a process must use the fixture `processes` of `conftest.py`.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState, GradientState


TESTS = Path(__file__).parents[1]
# Without use_cpu, two processes that accelerate starts on a machine without GPUs train alone, each for itself.
LAUNCH = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
mixed_precision: 'no'
num_machines: 1
num_processes: 2
use_cpu: true
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def surroundings(environment: dict[str, str] | None = None) -> dict[str, str]:
    """The environment in which a new Python finds the package and what lies beside the tests."""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **(environment or {})}


# By the launcher


def launcher(folder: Path) -> list[str]:
    """The command of `accelerate launch` for two processes, to which a script (or `-m` and a module) is added."""
    (folder / "launch.yaml").write_text(LAUNCH)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "launch.yaml")]
    # Where one process fails, the launcher ends the others when it looks next: not before they have said why they
    # stop.
    return [*command, "--monitor_interval", "5", "--main_process_port", str(free_port())]


def launched(
    script: str, folder: Path, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """
    Runs a script of `distributed/` on two processes, with a folder that it reads and writes, and returns how it ended.
    """
    command = [*launcher(folder), str(TESTS / "distributed" / script), str(folder), *arguments]
    return subprocess.run(command, env=surroundings(environment), capture_output=True, text=True, timeout=600)


# Forked


class Ended(NamedTuple):
    """How a process ended: its exit status (negative: by which signal), and what it wrote."""

    code: int
    output: str
    error: str


class Forks:
    """
    A process that has imported what the tests import and has computed nothing, and forks others when it is asked to.

    What it forks is as a new process is: it knows nothing of the tests before. The tests' own process would not do,
    also because PyTorch, where it sees a GPU, cannot compute gradients in what is forked after it has computed any.
    """

    def __init__(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        if os.fork() == 0:
            self._connection.close()
            try:
                _serve(theirs)
            finally:
                os._exit(0)
        theirs.close()

    def start(
        self,
        target: Callable[..., object],
        *arguments: Any,
        folder: Path,
        world: int = 2,
        environment: dict[str, str] | None = None,
    ) -> list[int]:
        """
        Starts `target(*arguments)`, a module's function, in so many processes, and returns their ids.

        They know of each other as those of a launcher do. Each writes into `output_RANK.txt` and `error_RANK.txt` of
        the folder. Before others are started, `wait` for these.
        """
        settings = {"OMP_NUM_THREADS": "1"}
        if world > 1:
            settings |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "ACCELERATE_USE_CPU": "true"}
            settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        place = (str(folder), os.getcwd(), settings | (environment or {}))
        self._connection.send((target, arguments, world, place))
        self._started: list[int] = self._connection.recv()
        return self._started

    def ended(self) -> bool:
        """Whether all that were started have ended."""
        return self._connection.poll()

    def wait(self, timeout: float = 600) -> list[int]:
        """The exit statuses of all that were started, which have so many seconds to end by themselves."""
        if not self._connection.poll(timeout):
            for process in self._started:
                os.kill(process, signal.SIGKILL)
        return self._connection.recv()

    def run(
        self, target: Callable[..., object], *arguments: Any, world: int = 2, environment: dict[str, str] | None = None
    ) -> list[Ended]:
        """Starts them and waits for them."""
        with tempfile.TemporaryDirectory() as name:
            self.start(target, *arguments, folder=Path(name), world=world, environment=environment)
            codes, names = self.wait(), ("output", "error")
            texts = [[Path(name, f"{of}_{rank}.txt").read_text() for of in names] for rank in range(world)]
        return [Ended(code, *of_rank) for code, of_rank in zip(codes, texts, strict=True)]

    def run_script(
        self, script: str, folder: Path, *arguments: str, environment: dict[str, str] | None = None
    ) -> None:
        """Runs a script of `distributed/` in two processes, with a folder that it reads and writes, to its end."""
        path = TESTS / "distributed" / script
        ended = self.run(as_script, path, str(folder), *arguments, environment=environment)
        assert [one.code for one in ended] == [0, 0], "\n".join(one.error[-10000:] for one in ended)


def as_script(path: Path, *arguments: str) -> None:
    """What `python path arguments` does, for a forked process."""
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def as_module(name: str, *arguments: str) -> None:
    """What `python -m name arguments` does, for a forked process."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__")


def _serve(connection: Any) -> None:
    context = multiprocessing.get_context("fork")
    while True:
        try:
            target, arguments, world, place = connection.recv()
        except EOFError:  # the tests have ended
            return
        started = [
            context.Process(target=_child, args=(rank, world, target, arguments, *place)) for rank in range(world)
        ]
        for process in started:
            process.start()
        connection.send([process.pid for process in started])
        for process in started:
            process.join()
        connection.send([process.exitcode for process in started])


def _child(
    rank: int,
    world: int,
    target: Callable[..., object],
    arguments: tuple[Any, ...],
    folder: str,
    cwd: str,
    environment: dict[str, str],
) -> None:
    for descriptor, name in ((1, "output"), (2, "error")):
        with open(Path(folder, f"{name}_{rank}.txt"), "ab") as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
    os.chdir(cwd)
    os.environ |= environment
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    # GNU's OpenMP hangs in a child whose parent has used it with several threads.
    torch.set_num_threads(1)
    # What importing has found of one process alone.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    target(*arguments)
