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

"""Trains a teacher by reinforcement learning on the forward process, DiffusionNFT."""

from ..trainer.diffusion_nft_config import DiffusionNFTConfig
from .arguments import TeacherScriptArguments, packaged
from .parser import parse
from .training import publish, show_warnings, train


ARGUMENTS = (TeacherScriptArguments, DiffusionNFTConfig)


def main(script_args: TeacherScriptArguments, training_args: DiffusionNFTConfig) -> None:
    show_warnings()
    # Imported here, so that --help and what is wrong with the arguments are there sooner.
    from ..trainer.diffusion_nft_trainer import DiffusionNFTTrainer

    if script_args.dry_run:
        training_args.push_to_hub = False  # with it the trainer makes the repository
    trainer = DiffusionNFTTrainer(
        model=packaged(script_args.model_name_or_path),
        reward_funcs=script_args.rewards(),
        args=training_args,
        **script_args.datasets(training_args.task_column),
        quantization_config=script_args.quantization_config(training_args.dtype),
        peft_config=script_args.peft_config(),
    )
    if script_args.dry_run:
        trainer.dry_run()
        trainer.end()
        return
    train(trainer)
    publish(trainer)


if __name__ == "__main__":
    main(*parse(ARGUMENTS))
