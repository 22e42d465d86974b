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

"""Which of diffusers' pipeline classes make images or videos of a text alone, and why the others are left out."""

import inspect
from enum import StrEnum
from operator import attrgetter

import diffusers
from diffusers import DiffusionPipeline


class Rule(StrEnum):
    """Why a class is not tried, in the order of the questions."""

    NO_TEXT = "its call takes no `prompt`, or takes only one side of a two-stage model's work"
    ENDED = "diffusers has ended its support (`diffusers.pipelines.deprecated`, or `_last_supported_version`)"
    NO_PICTURE = "it writes text, sound or three-dimensional shapes, not images or videos"
    GUIDED_BY_INPUT = (
        "it begins from or follows a picture, a video or a control signal, by its name or by its call ([Pictures](#pictures) "
        "says which of these can be trained)"
    )
    PERTURBED = "it is a sampling variant of a class that is tried: perturbed-attention guidance (`PAG`)"


# Parts of the names of classes that take more than a text.
FOLLOWS_INPUT = (
    "Adapter Condition Control Depth2Img Edit Fill I2I I2V Image2Video ImageToVideo Img2Img ImageVariation "
    "InContext Inpaint Kontext Layered Pix2Pix Redux Refine SuperResolution Upscale VACE VideoToVideo VideoToWorld HDR"
).split()
NOT_PICTURES = "AceStep Audio DiffusionGemma LLaDA2 Music ShapE".split()
FROM_ANOTHER_STAGE = ("image_embeds", "image_embeddings")


def classes() -> dict[str, type[DiffusionPipeline]]:
    """Every pipeline class that diffusers offers by name."""
    names = [name for name in dir(diffusers) if name.endswith("Pipeline")]
    found = {name: attrgetter(name)(diffusers) for name in names}  # the module loads what it is asked for
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, type) and issubclass(value, DiffusionPipeline)
    }


def left_out(name: str, pipeline: type[DiffusionPipeline]) -> Rule | None:
    """The rule by which a class is not tried; `None` if it is."""
    parameters = dict(inspect.signature(inspect.unwrap(pipeline.__call__)).parameters)
    needed = [key for key, value in parameters.items() if value.default is inspect.Parameter.empty]
    if "prompt" not in parameters or "Prior" in name or set(needed) & set(FROM_ANOTHER_STAGE):
        return Rule.NO_TEXT
    if ".deprecated." in pipeline.__module__ or "_last_supported_version" in dir(pipeline):
        return Rule.ENDED
    if any(part in name for part in NOT_PICTURES):
        return Rule.NO_PICTURE
    if any(part in name for part in FOLLOWS_INPUT) or any("image" in key or "control" in key for key in needed):
        return Rule.GUIDED_BY_INPUT
    return Rule.PERTURBED if "PAG" in name else None
