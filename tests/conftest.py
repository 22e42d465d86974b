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
A Hub on 127.0.0.1 for all tests of a process, and the device that they run on. The Hub is here, and above every other
import, because libraries read HF_ENDPOINT and HF_HOME when they are imported.

Tests take the CPU, so that they say the same on every machine. Those marked `gpu` are run by `pytest -m gpu`, in a process of
their own: a GPU is either there or hidden for the whole of a process and those that it starts.

And the processes that tests start: the fixture `processes`, without which no test can start one.
"""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.loopback_hub import LoopbackHub


if TYPE_CHECKING:
    from helpers.launching import Forks


_HUB = LoopbackHub()
_HOME = Path(tempfile.mkdtemp(prefix="hub-home-"))
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
_HUB.__enter__()
os.environ |= {**_HUB.environment(), "HF_HOME": str(_HOME)}

import pytest  # noqa: E402


# `make test-deepspeed` installs what its tests need, beside a C++ compiler: they are no part of the suite.
collect_ignore = [] if find_spec("deepspeed") else ["distributed/test_deepspeed.py"]


def pytest_configure(config: pytest.Config) -> None:
    """Before a test file is imported, and so before anything counts the GPUs; in the workers of xdist as well."""
    if not config.option.markexpr.startswith("gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU, and `pytest -m gpu`")


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """The Hub of this process, empty, with nothing of it in the cache. Uploads go the LFS way."""
    _HUB.reset()
    for name in ("hub", "xet", "datasets"):
        shutil.rmtree(_HOME / name, ignore_errors=True)
    yield _HUB
    _HUB.reset()


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A LoRA of each of the two tasks, by task, for the small SD3 of `helpers.tiny_sd3`. Nobody changes the files."""
    from helpers.opd_fixtures import make_teachers

    return make_teachers(tmp_path_factory.mktemp("teachers"))


# Processes

_BIN = os.path.dirname(sys.executable)
_FORKS = pytest.StashKey["Forks"]()
_running: list[pytest.Item] = []


@pytest.fixture(scope="session")
def processes(request: pytest.FixtureRequest) -> "Forks":
    """What forks processes. Whoever starts one, this way or another, asks for it, and is thereby marked `slow`."""
    return request.config.stash[_FORKS]


def _refuse_to_start(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook. Programs other than Python's, such as the `git` that a library asks for a version, take no time."""
    if event == "os.fork" or (event == "subprocess.Popen" and os.path.dirname(os.fsdecode(arguments[0])) == _BIN):
        if _running and "processes" not in _running[0].fixturenames:
            pytest.fail(f"This test starts a process ({event}): it must ask for the fixture `processes`.")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    _running[:] = [item]
    try:
        return (yield)
    finally:
        _running.clear()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests, and puts files with slow ones first and small files last, so that no core waits for another at the end."""
    slow: dict[Path, int] = {}
    tests: dict[Path, int] = {}
    for item in items:
        if "processes" in item.fixturenames:
            item.add_marker("slow")
        if item.path.parent.name == "distributed":
            item.add_marker("distributed")
        tests[item.path] = tests.get(item.path, 0) + 1
        slow[item.path] = slow.get(item.path, 0) + (item.get_closest_marker("slow") is not None)
    items.sort(key=lambda item: (slow[item.path] == 0, -tests[item.path], item.path))


def pytest_collection_finish(session: pytest.Session) -> None:
    # The million of objects that importing has made stays: to look through all of it, as the Trainer does at the start of
    # every training, takes a third of a second.
    gc.collect()
    gc.freeze()
    if any("processes" in item.fixturenames for item in session.items):
        from helpers.launching import Forks

        session.config.stash[_FORKS] = Forks()


sys.addaudithook(_refuse_to_start)
