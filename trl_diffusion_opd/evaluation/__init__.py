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
The retention report: how much of its teachers' gains over the base a student has. All models draw the same prompts
with the same noise.
"""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..hub.files import REPORT_FILE, SCORES_FILE
    from ..pipelines.drawing import draw_images
    from .rehearsal import rehearse_report, report_problems
    from .retention import retention_report, retention_table, scores_table
    from .run import evaluate_retention

# Imported when first asked for: the tables of a report need no diffusers.
_MODULES = {
    "REPORT_FILE": "..hub.files",
    "SCORES_FILE": "..hub.files",
    "draw_images": "..pipelines.drawing",
    "evaluate_retention": ".run",
    "rehearse_report": ".rehearsal",
    "report_problems": ".rehearsal",
    "retention_report": ".retention",
    "retention_table": ".retention",
    "scores_table": ".retention",
}

__all__ = [
    "REPORT_FILE",
    "SCORES_FILE",
    "draw_images",
    "evaluate_retention",
    "rehearse_report",
    "report_problems",
    "retention_report",
    "retention_table",
    "scores_table",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name], __name__), name)
