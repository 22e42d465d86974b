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

"""Gives the files of a run the usual access mode."""

import os
from pathlib import Path


def give_usual_mode(folder: str | Path, *patterns: str) -> None:
    """
    Gives files the mode of a newly created file, which follows the umask.

    safetensors makes its files readable for their owner only, so nobody else in a group could load the weights.

    Args:
        folder (`str` or `Path`): the folder of the files.
        patterns (`str`): glob patterns of their names.
    """
    # The umask can only be read by setting it. A file that another thread makes in between stays private.
    mask = os.umask(0o077)
    os.umask(mask)
    for pattern in patterns:
        for path in Path(folder).glob(pattern):
            path.chmod(0o666 & ~mask)
