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
Fine-tunes by flow matching, on the images of a dataset or, with `--teachers`, on images that teachers draw for
prompts.

Without `--teachers`, the sources of `--prompts` must have a column of images.
"""

from ..trainer.diffusion_sft_config import DiffusionSFTConfig
from .arguments import TaughtArguments
from .parser import parse
from .refusals import refusals_told
from .training import publish, show_warnings, train, warn_of_idle_rewards


ARGUMENTS = (TaughtArguments, DiffusionSFTConfig)


def main(script_args: TaughtArguments, training_args: DiffusionSFTConfig) -> None:
    show_warnings()
    # Imported here, so that --help and errors in the arguments show sooner.
    from ..trainer.diffusion_sft_trainer import DiffusionSFTTrainer

    teachers = script_args.teachers_by_task() or None
    arguments = script_args.for_trainer(training_args)
    warn_of_idle_rewards(training_args, arguments["reward_funcs"] or {}, has_test_prompts=False)
    trainer = DiffusionSFTTrainer(teachers=teachers, **arguments)
    train(trainer)
    publish(trainer)


if __name__ == "__main__":
    with refusals_told():
        main(*parse(ARGUMENTS))
