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
The two kinds of guidance that a pipeline can have. Classifier-free guidance computes each sample twice, with and without
its prompt. A guidance embedding is a number that the transformer gets as an input, and costs nothing; distillation has
taught the model to use it.
"""

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from diffusers.models.modeling_utils import ModelMixin


@dataclass(frozen=True)
class GuidanceEmbedding:
    """
    A pipeline's guidance embedding.

    Attributes:
        option (`str`): the parameter of the pipeline's `__call__` that sets it.
        value (`float`, *optional*): its value; `None` if the pipeline's own default is `None`.
        is_given (`bool`): whether the value is the user's and not the pipeline's default.
    """

    option: str
    value: float | None
    is_given: bool


def embedding_name(transformer: ModelMixin, parameters: Collection[str]) -> str | None:
    """The pipeline's parameter that sets the guidance embedding; `None` if its transformer has no such embedding."""
    if not transformer.config.get("guidance_embeds", False):
        return None
    known = ("distilled_guidance_scale", "guidance_scale")
    return next((name for name in known if name in parameters), None)


def guidance_name(transformer: ModelMixin, parameters: Collection[str]) -> str | None:
    """
    The pipeline's parameter for the scale of classifier-free guidance; `None` if it has none.

    Args:
        transformer ([`~diffusers.ModelMixin`]): the pipeline's transformer.
        parameters (`Collection[str]`): names of the parameters of the pipeline's `__call__`.
    """
    # In FLUX.1 and Qwen-Image `guidance_scale` is the embedding, and in FLUX.2 [dev] the embedding is all there is.
    embedding = embedding_name(transformer, parameters)
    names = (name for name in ("true_cfg_scale", "guidance_scale") if name in parameters and name != embedding)
    return next(names, None)


def guidance_embedding(
    transformer: ModelMixin, parameters: Mapping[str, inspect.Parameter], options: Mapping[str, object]
) -> GuidanceEmbedding | None:
    """
    The guidance embedding of calls with these options; `None` if the transformer has none.

    Args:
        transformer ([`~diffusers.ModelMixin`]): the pipeline's transformer.
        parameters (`dict[str, inspect.Parameter]`): those of the pipeline's `__call__`.
        options (`dict`): the arguments of the calls.
    """
    name = embedding_name(transformer, parameters)
    if name is None:
        return None
    value = options.get(name, parameters[name].default)
    return GuidanceEmbedding(name, float(value) if isinstance(value, int | float) else None, name in options)


def guidance_lines(scale: float, name: str | None, is_default: bool, embedding: GuidanceEmbedding | None) -> list[str]:
    """
    Says which guidance is set to what, and what it costs.

    Args:
        scale (`float`): the scale of classifier-free guidance.
        name (`str`, *optional*): what the pipeline calls it; `None` if it has no such guidance.
        is_default (`bool`): whether the scale is the pipeline's own default.
        embedding ([`GuidanceEmbedding`], *optional*): the guidance embedding.
    """
    given = f"guidance_scale {scale}" + (", the pipeline's own default" if is_default else "")
    if embedding is None:
        return [f"{given}: no classifier-free guidance." if scale == 1 else f"{given}."]
    of_pipeline = f" ({name})" if name not in (None, "guidance_scale") else ""
    if name is None:
        line = "The pipeline has no classifier-free guidance: one forward a step."
    elif scale == 1:
        line = f"{given}: no classifier-free guidance{of_pipeline}, one forward a step."
    else:
        line = (
            f"{given}: classifier-free guidance{of_pipeline}, two forwards a step. Models with a guidance embedding are "
            "usually trained with guidance_scale 1.0, which is half the work."
        )
    value = "unset" if embedding.value is None else str(embedding.value)
    how = f"generation_kwargs='{{\"{embedding.option}\": …}}'"
    whose = "as given" if embedding.is_given else f"the pipeline's own default; set it with {how}"
    return [line, f"The guidance embedding is {value}, {whose}."]
