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

"""Trains a teacher by reinforcement learning (Flow-GRPO or GRPO-Guard), or one model on several tasks at once."""

from ..trainer.diffusion_grpo_config import DiffusionGRPOConfig
from .arguments import TeacherScriptArguments
from .parser import parse
from .refusals import refusals_told
from .training import train_by_reward


ARGUMENTS = (TeacherScriptArguments, DiffusionGRPOConfig)


def main(script_args: TeacherScriptArguments, training_args: DiffusionGRPOConfig) -> None:
    # Imported here, so that --help and errors in the arguments show sooner.
    from ..trainer.diffusion_grpo_trainer import DiffusionGRPOTrainer

    train_by_reward(DiffusionGRPOTrainer, script_args, training_args)


if __name__ == "__main__":
    with refusals_told():
        main(*parse(ARGUMENTS))
