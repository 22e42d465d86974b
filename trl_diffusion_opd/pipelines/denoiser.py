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

"""The network of a pipeline that denoises: the only one that is trained and taught."""

from collections.abc import Collection
from inspect import signature
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.loaders.peft import PeftAdapterMixin

from .experts import EXPERTS, Experts, has_experts


DENOISERS = ("transformer", "unet")


def denoiser_name_in(components: Collection[str]) -> str:
    """The component that denoises: `"unet"` in Stable Diffusion and its relatives, else `"transformer"`."""
    return "unet" if "unet" in components else "transformer"


def denoiser_name(pipeline: DiffusionPipeline) -> str:
    """The name of a pipeline's component that denoises. See [`denoiser_name_in`]."""
    return denoiser_name_in(pipeline.components)


def denoiser(pipeline: DiffusionPipeline) -> Any:
    """
    The network that denoises, an `nn.Module`; `None` if the pipeline has none. Two networks that share the levels are
    one [`~experts.Experts`], made anew at every call; it holds the pipeline's own networks.
    """
    if has_experts(pipeline):
        return Experts(*(pipeline.components[name] for name in EXPERTS))
    return pipeline.components.get(denoiser_name(pipeline))


def loads_lora(pipeline: DiffusionPipeline) -> bool:
    """
    Whether diffusers saves and loads LoRAs of the network that denoises. (PRX has a loader, but for a UNet; Kandinsky 3
    has one, but its UNet takes no LoRA.)
    """
    name = denoiser_name(pipeline)
    return (
        isinstance(pipeline, LoraBaseMixin)
        and f"{name}_lora_layers" in signature(type(pipeline).save_lora_weights).parameters
        and isinstance(pipeline.components.get(name), PeftAdapterMixin)
    )
