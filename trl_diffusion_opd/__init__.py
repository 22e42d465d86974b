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
On-policy distillation of diffusion models, in the style of TRL. Imports its public names when they are first used.
"""

import gc
import importlib
from typing import TYPE_CHECKING, Any


# Imported on first use: `trl_diffusion_opd.tiny` and the samplers don't need transformers.
_MODULES = {
    "DiffusionDMDConfig": "trainer.diffusion_dmd_config",
    "DiffusionDMDTrainer": "trainer.diffusion_dmd_trainer",
    "DiffusionGRPOConfig": "trainer.diffusion_grpo_config",
    "DiffusionGRPOTrainer": "trainer.diffusion_grpo_trainer",
    "DiffusionNFTConfig": "trainer.diffusion_nft_config",
    "DiffusionNFTTrainer": "trainer.diffusion_nft_trainer",
    "DiffusionOPDConfig": "trainer.diffusion_opd_config",
    "DiffusionOPDTrainer": "trainer.diffusion_opd_trainer",
    "DiffusionSFTConfig": "trainer.diffusion_sft_config",
    "DiffusionSFTTrainer": "trainer.diffusion_sft_trainer",
    "TeacherConfig": "models.teacher_config",
    "VelocityField": "pipelines.velocity",
    "estimate_memory": "trainer.memory_estimate",
    "evaluate_retention": "evaluation",
    "MergeReport": "models.merge",
    "merge_teachers": "models.merge",
    "SamplerTable": "algorithms.samplers",
    "sampler_table": "algorithms.samplers",
    "step_weights": "algorithms.opd",
    "walk": "algorithms.rollout",
    "write_teacher_card": "reporting.teacher_card",
    "tiny": "tiny",
}

__all__ = [
    "DiffusionDMDConfig",
    "DiffusionDMDTrainer",
    "DiffusionGRPOConfig",
    "DiffusionGRPOTrainer",
    "DiffusionNFTConfig",
    "DiffusionNFTTrainer",
    "DiffusionOPDConfig",
    "DiffusionOPDTrainer",
    "DiffusionSFTConfig",
    "DiffusionSFTTrainer",
    "MergeReport",
    "SamplerTable",
    "TeacherConfig",
    "VelocityField",
    "__version__",
    "estimate_memory",
    "evaluate_retention",
    "merge_teachers",
    "sampler_table",
    "step_weights",
    "tiny",
    "walk",
    "write_teacher_card",
]

if TYPE_CHECKING:
    __version__: str
    from . import tiny
    from .algorithms.opd import step_weights
    from .algorithms.rollout import walk
    from .algorithms.samplers import SamplerTable, sampler_table
    from .evaluation import evaluate_retention
    from .models.merge import MergeReport, merge_teachers
    from .models.teacher_config import TeacherConfig
    from .pipelines.velocity import VelocityField
    from .reporting.teacher_card import write_teacher_card
    from .trainer.diffusion_dmd_config import DiffusionDMDConfig
    from .trainer.diffusion_dmd_trainer import DiffusionDMDTrainer
    from .trainer.diffusion_grpo_config import DiffusionGRPOConfig
    from .trainer.diffusion_grpo_trainer import DiffusionGRPOTrainer
    from .trainer.diffusion_nft_config import DiffusionNFTConfig
    from .trainer.diffusion_nft_trainer import DiffusionNFTTrainer
    from .trainer.diffusion_opd_config import DiffusionOPDConfig
    from .trainer.diffusion_opd_trainer import DiffusionOPDTrainer
    from .trainer.diffusion_sft_config import DiffusionSFTConfig
    from .trainer.diffusion_sft_trainer import DiffusionSFTTrainer
    from .trainer.memory_estimate import estimate_memory


def __getattr__(name: str) -> Any:
    if name == "__version__":  # pyproject.toml's
        from importlib.metadata import version

        return version("trl-diffusion-opd")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Imported objects stay alive; collecting garbage meanwhile would take a quarter of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        module = importlib.import_module(f".{_MODULES[name]}", __name__)
    finally:
        if collecting:
            gc.enable()
    return module if name == "tiny" else getattr(module, name)
