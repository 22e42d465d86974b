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
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from loopback_hub import LoopbackHub


_HUB = LoopbackHub()
_HOME = Path(tempfile.mkdtemp(prefix="hub-home-"))
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
_HUB.__enter__()
os.environ |= {**_HUB.environment(), "HF_HOME": str(_HOME)}

import pytest  # noqa: E402


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
