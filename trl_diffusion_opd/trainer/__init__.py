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

"""The trainers and their configs."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .base_config import DiffusionConfig
    from .base_trainer import DiffusionTrainer
    from .diffusion_dmd_config import DiffusionDMDConfig
    from .diffusion_dmd_trainer import DiffusionDMDTrainer
    from .diffusion_grpo_config import DiffusionGRPOConfig
    from .diffusion_grpo_trainer import DiffusionGRPOTrainer
    from .diffusion_nft_config import DiffusionNFTConfig
    from .diffusion_nft_trainer import DiffusionNFTTrainer
    from .diffusion_opd_config import DiffusionOPDConfig
    from .diffusion_opd_trainer import DiffusionOPDTrainer
    from .diffusion_sft_config import DiffusionSFTConfig
    from .diffusion_sft_trainer import DiffusionSFTTrainer
    from .rl_config import DiffusionRLConfig
    from .rl_round import Rollout
    from .rl_trainer import DiffusionRLTrainer
    from .taught_config import TaughtConfig

# Imported on first use: a config needs no diffusers, so mistakes on a command line show sooner.
_MODULES = {
    "DiffusionConfig": "base_config",
    "DiffusionDMDConfig": "diffusion_dmd_config",
    "DiffusionDMDTrainer": "diffusion_dmd_trainer",
    "DiffusionGRPOConfig": "diffusion_grpo_config",
    "DiffusionGRPOTrainer": "diffusion_grpo_trainer",
    "DiffusionNFTConfig": "diffusion_nft_config",
    "DiffusionNFTTrainer": "diffusion_nft_trainer",
    "DiffusionOPDConfig": "diffusion_opd_config",
    "DiffusionOPDTrainer": "diffusion_opd_trainer",
    "DiffusionRLConfig": "rl_config",
    "DiffusionRLTrainer": "rl_trainer",
    "DiffusionSFTConfig": "diffusion_sft_config",
    "DiffusionSFTTrainer": "diffusion_sft_trainer",
    "DiffusionTrainer": "base_trainer",
    "Rollout": "rl_round",
    "TaughtConfig": "taught_config",
}

__all__ = [
    "DiffusionConfig",
    "DiffusionDMDConfig",
    "DiffusionDMDTrainer",
    "DiffusionGRPOConfig",
    "DiffusionGRPOTrainer",
    "DiffusionNFTConfig",
    "DiffusionNFTTrainer",
    "DiffusionOPDConfig",
    "DiffusionOPDTrainer",
    "DiffusionRLConfig",
    "DiffusionRLTrainer",
    "DiffusionSFTConfig",
    "DiffusionSFTTrainer",
    "DiffusionTrainer",
    "Rollout",
    "TaughtConfig",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
