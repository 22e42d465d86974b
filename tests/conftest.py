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
A Hub on 127.0.0.1 for all tests of a process. It is here, and above every other import, because libraries read
HF_ENDPOINT and HF_HOME when they are imported.
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


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """The Hub of this process, empty, with nothing of it in the cache. Uploads go the LFS way."""
    _HUB.reset()
    for name in ("hub", "xet", "datasets"):
        shutil.rmtree(_HOME / name, ignore_errors=True)
    yield _HUB
    _HUB.reset()
