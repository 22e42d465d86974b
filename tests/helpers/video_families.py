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

"""Tiny pipelines that draw videos of more than one frame."""

import sys
from dataclasses import replace
from pathlib import Path

from helpers.families import FAMILIES, Family
from helpers.families_experts import WAN_2_2


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from sweep_parts.specimens import SPECIMENS  # noqa: E402


def of_frames(family: Family, number: int) -> Family:
    return replace(family, generation_kwargs={**family.generation_kwargs, "num_frames": number})


VIDEOS = {
    "wan": of_frames(FAMILIES["wan"], 9),
    "wan_2_2": of_frames(WAN_2_2, 9),
    "ltx": of_frames(SPECIMENS["LTXPipeline"], 9),
    "hunyuan": of_frames(SPECIMENS["HunyuanVideoPipeline"], 5),
    "cogvideox": of_frames(SPECIMENS["CogVideoXPipeline"], 9),
}
