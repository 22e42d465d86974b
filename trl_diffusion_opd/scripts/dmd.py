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

"""Distils several teachers into one student by matching distributions (DMD2 and TDM), for students of few steps."""

from dataclasses import dataclass, field

from ..trainer.diffusion_dmd_config import DiffusionDMDConfig
from .arguments import TaughtArguments
from .parser import parse
from .refusals import refusals_told
from .training import only_show, publish, show_warnings, train, warn_of_idle_rewards


@dataclass(kw_only=True)
class DMDScriptArguments(TaughtArguments):
    """
    Arguments of the command beyond [`DiffusionDMDConfig`]. The others are in [`TaughtArguments`] and
    [`ScriptArguments`].

    Args:
        teachers (`list[str]`): as in [`TaughtArguments`], but required.
        dry_run (`bool`, *optional*, defaults to `False`): show what the run would do, with an image of every model,
            and stop.
    """

    teachers: list[str] = field(metadata={"help": "task=spec …: base, a folder or owner/repo[/sub/folder][@revision]"})
    dry_run: bool = field(
        default=False, metadata={"help": "Show what the run would do, with an image of every model, and stop."}
    )


ARGUMENTS = (DMDScriptArguments, DiffusionDMDConfig)


def main(script_args: DMDScriptArguments, training_args: DiffusionDMDConfig) -> None:
    show_warnings()
    # Imported here, so that --help and errors in the arguments show sooner.
    from ..trainer.diffusion_dmd_trainer import DiffusionDMDTrainer

    if script_args.dry_run:
        training_args.push_to_hub = False  # or the trainer would make the repository
    arguments = script_args.for_trainer(training_args)
    if script_args.dry_run:
        only_show(DiffusionDMDTrainer(teachers=script_args.teachers_by_task(), **arguments))
        return
    warn_of_idle_rewards(training_args, arguments["reward_funcs"] or {}, has_test_prompts=False)
    trainer = DiffusionDMDTrainer(teachers=script_args.teachers_by_task(), **arguments)
    train(trainer)
    publish(trainer)


if __name__ == "__main__":
    with refusals_told():
        main(*parse(ARGUMENTS))
