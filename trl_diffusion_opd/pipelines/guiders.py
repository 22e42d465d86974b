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
Guidance by a guider: an object of diffusers that is a component of some pipelines and holds the scale, in place of an
argument of their `__call__`.
"""

from collections.abc import Mapping

from diffusers import ClassifierFreeGuidance, DiffusionPipeline
from diffusers.guiders import BaseGuidance


def guiders(pipeline: DiffusionPipeline) -> dict[str, BaseGuidance]:
    """A pipeline's guiders by component."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, BaseGuidance)}


def guider_problems(pipeline: DiffusionPipeline) -> list[str]:
    """Says which guiders cannot be run one step at a time, one sentence each."""
    return [
        f"{type(pipeline).__name__} guides with {type(guider).__name__} ({name}), whose effect depends on the step's "
        f"number or on earlier steps, but training runs one step at a time. Replace it: pipe.{name} = "
        "diffusers.ClassifierFreeGuidance(guidance_scale=…)."
        for name, guider in guiders(pipeline).items()
        if not _is_plain(guider)
    ]


def _is_plain(guider: BaseGuidance) -> bool:
    """Whether it is classifier-free guidance, the same at all steps."""
    span = (guider.config.get("start"), guider.config.get("stop"))
    return type(guider) is ClassifierFreeGuidance and span == (0.0, 1.0)


def scaled(guiders: Mapping[str, BaseGuidance], guidance_scale: float) -> dict[str, BaseGuidance]:
    """Copies of guiders with this scale, of which 1 is no guidance."""
    return {name: guider.new(guidance_scale=guidance_scale - _offset(guider)) for name, guider in guiders.items()}


def default_scale(pipeline: DiffusionPipeline) -> float | None:
    """The scale that a pipeline's guider comes with; `None` without a guider."""
    for guider in guiders(pipeline).values():
        return float(guider.config["guidance_scale"]) + _offset(guider)
    return None


def _offset(guider: BaseGuidance) -> float:
    """In the original formula, `v + s (v - v_empty)`, a guider's scale is one less."""
    return float(guider.config["use_original_formulation"])
