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

"""Fields of a trainer's config that several benchmarks share."""

from typing import Any


# Images and prompts of the tiny world, without guidance.
TINY: dict[str, Any] = dict(height=32, width=32, max_sequence_length=12, guidance_scale=1.0)
# Nothing is saved, reported or drawn on the screen.
QUIET: dict[str, Any] = dict(save_strategy="no", report_to="none", disable_tqdm=True)
# An update and nothing logged of it.
ONE_UPDATE: dict[str, Any] = {**QUIET, "max_steps": 1, "logging_steps": 10**9}
