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

"""One mode for everything that a run writes."""

import os
from pathlib import Path


def give_usual_mode(folder: str | Path, *patterns: str) -> None:
    """
    Gives files the mode that a new file has: what the umask leaves. safetensors makes its own readable to their owner alone,
    so that of a folder for a group the weights could not be read.

    Args:
        folder (`str` or `Path`)
        patterns (`str`): of their names.
    """
    # There is no other way to ask for it. What another thread makes in between is its owner's alone.
    mask = os.umask(0o077)
    os.umask(mask)
    for pattern in patterns:
        for path in Path(folder).glob(pattern):
            path.chmod(0o666 & ~mask)
