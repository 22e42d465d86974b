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

"""Gradients of a field against finite differences."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from trl_diffusion_opd.pipelines.denoiser import denoiser
from trl_diffusion_opd.pipelines.velocity import VelocityField


EPSILON = 1e-2  # of a central difference: outputs are float32


def derivative_error(
    field: VelocityField, x: Tensor, prompts: list[str], scale: float, targets: list[str] | str
) -> float:
    """Relative error of the directional derivative of a loss in the LoRA's weights, in a random direction."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(denoiser(field.pipeline)), config).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for name, p in model.named_parameters():
            p *= 0.3 if "lora_B" in name else 1.0
    level, probe = field.levels[1].item(), torch.randn(x.shape, dtype=torch.float64)

    def loss() -> Tensor:
        return (field(x, level, prompts, scale, model).double() * probe).sum()

    gradients = torch.autograd.grad(loss(), parameters)
    directions = [[torch.randn_like(p) * p.std() for p in parameters] for _ in range(4)]
    slopes = [sum((g * d).sum().item() for g, d in zip(gradients, ds, strict=True)) for ds in directions]
    # The steepest of a few: a direction that happens to be level has no relative error.
    slope, direction = max(zip(slopes, directions, strict=True), key=lambda pair: abs(pair[0]))
    values = []
    with torch.no_grad():
        for step in (EPSILON, -2 * EPSILON):
            for p, d in zip(parameters, direction, strict=True):
                p += step * d
            values.append(loss().item())
    return abs((values[0] - values[1]) / (2 * EPSILON) - slope) / abs(slope)
