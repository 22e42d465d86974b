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

"""The pictures that a row's prompt comes with, as they are shown beside what models have made of them."""

from collections.abc import Mapping
from typing import Any

from PIL.Image import Image

from ..data.pictured_prompt import SOURCE_IMAGES
from .videos import strip


SOURCE = "source"  # how pictures and pages call them


def source_of(row: Mapping[str, Any]) -> Image | None:
    """A row's pictures side by side, at most 8 of them; `None` if it has none."""
    pictures = row.get(SOURCE_IMAGES)
    return strip(pictures) if pictures else None
