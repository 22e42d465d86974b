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
Two networks that share the noise levels of one pipeline, as one module.

Wan 2.2 denoises high noise with its `transformer` and low noise with its `transformer_2`. Both are trained and taught
together, so everything that takes a network (LoRAs, optimizer, moving average, checkpoints, DDP) gets one module that
holds both. Names of weights begin with the name of their expert.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..acceleration.quantization import described


HIGH_NOISE, LOW_NOISE = "transformer", "transformer_2"  # as diffusers calls the components
EXPERTS = (HIGH_NOISE, LOW_NOISE)
# What they are for, in messages.
NOISE = {HIGH_NOISE: "high noise", LOW_NOISE: "low noise"}


class Experts(nn.Module):
    """
    The two networks of a pipeline. It has what the rest of the package reads of a diffusers model.

    Args:
        transformer ([`~diffusers.ModelMixin`]): denoises levels from the boundary up.
        transformer_2 ([`~diffusers.ModelMixin`]): denoises levels below it.
    """

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module):
        super().__init__()
        self.transformer: Any = transformer
        self.transformer_2: Any = transformer_2
        self.train(transformer.training)

    def forward(self, *, expert: str, **inputs: Any) -> Any:
        """Calls one of the two, `"transformer"` or `"transformer_2"`, with these inputs."""
        return self.of(expert)(**inputs)

    def of(self, expert: str) -> Any:
        """The network of that name."""
        return self.get_submodule(expert)

    def each(self) -> Iterator[tuple[str, Any]]:
        """Name and network of both."""
        return ((name, self.of(name)) for name in EXPERTS)

    @property
    def config(self) -> Mapping[str, Any]:
        """The config of both: they differ in weights alone."""
        return self.transformer.config

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes of blocks that FSDP splits one by one; accelerate reads it."""
        return vars(type(self.transformer)).get("_no_split_modules") or []

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.transformer.is_gradient_checkpointing

    def enable_gradient_checkpointing(self) -> None:
        for _, network in self.each():
            network.enable_gradient_checkpointing()

    def disable_gradient_checkpointing(self) -> None:
        for _, network in self.each():
            network.disable_gradient_checkpointing()

    def set_attention_backend(self, backend: str) -> None:
        for _, network in self.each():
            network.set_attention_backend(backend)


def networks_of(network: nn.Module) -> dict[str, nn.Module]:
    """The diffusers models that a denoiser consists of, by name: two experts, or itself under an empty name."""
    return dict(network.each()) if isinstance(network, Experts) else {"": network}


def has_experts(pipeline: DiffusionPipeline) -> bool:
    """Whether the pipeline changes from one network to another at a boundary of its levels."""
    both = (pipeline.components.get(name) for name in EXPERTS)
    return pipeline.config.get("boundary_ratio") is not None and all(isinstance(one, nn.Module) for one in both)


def expert_problems(pipeline: DiffusionPipeline) -> list[str]:
    """Says what is missing for a pipeline's two networks to be used, one sentence each."""
    ratio, name = pipeline.config.get("boundary_ratio"), type(pipeline).__name__
    first, second = (isinstance(pipeline.components.get(expert), nn.Module) for expert in EXPERTS)
    if second and not first:
        return [
            f"{name} has a transformer_2, for low noise, but no transformer, so nothing denoises the first steps. "
            "Load the pipeline with both of its networks."
        ]
    if ratio is None or not first:
        return []
    if not second:
        return [
            f"{name} has boundary_ratio={ratio}, so its transformer is for high noise only, but no transformer_2 for "
            "low noise. Load the pipeline with both, or without a boundary: "
            "pipe.register_to_config(boundary_ratio=None)."
        ]
    kinds = [described(pipeline.components[expert]) for expert in EXPERTS]
    if kinds[0] != kinds[1]:
        how = " and ".join(
            f"{expert} ({kind or 'not quantized'})" for expert, kind in zip(EXPERTS, kinds, strict=True)
        )
        return [
            f"Only one of {how} of {name} is quantized, or each in another way. Quantize both with "
            "diffusers.PipelineQuantizationConfig(quant_mapping={'transformer': ..., 'transformer_2': ...})."
        ]
    ours, theirs = (_comparable(pipeline.components[expert]) for expert in EXPERTS)
    if ours != theirs:
        differing = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
        return [
            f"The transformer and transformer_2 of {name} differ in {', '.join(differing[:3])}: only two networks of "
            "the same kind, size and dtype can be trained together."
        ]
    return []


def _comparable(network: Any) -> dict[str, object]:
    own = {
        key: value for key, value in network.config.items() if not key.startswith("_") and key != "quantization_config"
    }
    return {**own, "class": type(network).__name__, "dtype": network.dtype}


def alone(pipeline: DiffusionPipeline, expert: str) -> DiffusionPipeline:
    """A shallow copy of a pipeline whose only network is that expert. It is for reading files, not for drawing."""
    one = copy.copy(pipeline)
    one.transformer, one.transformer_2 = pipeline.components[expert], None
    return one


def expert_at(timestep: float, pipeline: DiffusionPipeline) -> str:
    """The expert that the pipeline's loop calls at a timestep. It compares in float32, as the loop does."""
    boundary = pipeline.config["boundary_ratio"] * pipeline.scheduler.config.num_train_timesteps
    return HIGH_NOISE if np.float32(timestep) >= np.float32(boundary) else LOW_NOISE


def expert_groups(timesteps: Sequence[float], pipeline: DiffusionPipeline) -> list[list[int]]:
    """The positions of the samples of each expert, for samples with these timesteps."""
    experts = [expert_at(timestep, pipeline) for timestep in timesteps]
    return [[i for i, other in enumerate(experts) if other == expert] for expert in dict.fromkeys(experts)]


def in_groups(groups: Sequence[list[int]], compute: Callable[[list[int]], Tensor]) -> Tensor:
    """Computes the rows of each group by itself. Returns all `(B, ...)` in the order of their positions."""
    parts = torch.cat([compute(rows) for rows in groups])
    positions = torch.tensor([i for rows in groups for i in rows], device=parts.device)
    return parts[positions.argsort()]


def unseen_expert(levels: Sequence[float], pipeline: DiffusionPipeline) -> str | None:
    """A warning if a noise grid, with its final 0, has no level for one of two experts; else `None`."""
    if not has_experts(pipeline):
        return None
    seen = {expert_at(level * pipeline.scheduler.config.num_train_timesteps, pipeline) for level in levels[:-1]}
    if not (unseen := [expert for expert in EXPERTS if expert not in seen]):
        return None
    return (
        f"None of the {len(levels) - 1} noise levels is on the side of {unseen[0]}, which denoises {NOISE[unseen[0]]} "
        f"(the boundary is at {pipeline.config['boundary_ratio']}): its LoRA is not trained. Use more "
        "num_inference_steps."
    )
