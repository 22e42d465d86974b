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
Runs trainers one after another, each starting from the LoRA of the stage before. Such a cascade, one task at a time,
is the baseline of on-policy distillation.

```bash
trl-diffusion-opd stages --stages cascade.yaml
```

```yaml
output_dir: outputs/cascade
shared:                       # for every stage; a stage's own values win
  model_name_or_path: stabilityai/stable-diffusion-3.5-medium
  config: {dtype: bfloat16, save_strategy: steps, save_steps: 50}
stages:
  - name: geneval
    trainer: nft
    prompts: [geneval=prompts/geneval.jsonl]
    reward_funcs: [geneval=geneval]
    config: {max_steps: 500}
  - name: ocr
    trainer: grpo
    prompts: [ocr=prompts/ocr.txt]
    reward_funcs: [ocr=ocr]
    config: {max_steps: 300, sampler: flow_sde, guidance_scale: 4.5}
```

With `from_base: true` a stage starts from the base instead. So one file can also train teachers and then the student
that they teach: the student's stage names their folders, `teachers: [geneval=outputs/cascade/geneval, …]`. If
`--output_dir` moves the run elsewhere, these folders move too. `config_file` names a command's config (a path, or a
name in the package) for values that a stage does not give.

If the run is interrupted, start it again: finished stages are skipped, and an unfinished one resumes from its last
checkpoint. The result is the same.
"""

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from accelerate import PartialState
from accelerate.utils import release_memory

from ..checkpointing.checkpoint import last_complete
from ..guards.extras import extra
from ..guards.files import JSON, read_json, write_json
from ..hub.files import ADAPTER_FILE, FINISHED_FILE, STAGE_FILE
from ..models.expert_teachers import find_for_any_base
from ..models.teacher_config import local_folder, parse_teacher
from ..problems import Problems, Refusal
from ..trainer.option_checks import evaluation_problems, unknown_option
from .arguments import TaughtArguments, config_path, configs, reward_problems
from .parser import parse
from .prompt_sources import source_problems
from .refusals import refusals_told
from .values import OfTasks, by_task


if TYPE_CHECKING:
    from ..trainer.base_config import DiffusionConfig
    from ..trainer.base_trainer import DiffusionTrainer

_TRAINERS = {
    "opd": "DiffusionOPD",
    "grpo": "DiffusionGRPO",
    "nft": "DiffusionNFT",
    "sft": "DiffusionSFT",
    "dmd": "DiffusionDMD",
}
_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Stage:
    """
    One stage.

    Args:
        name (`str`): name of the stage, and of its folder in the output folder.
        make_trainer (`Callable`):
            `make_trainer(output_dir, student_init)` makes the trainer. `student_init` is the folder with the LoRA of
            the stage before, or `None` to start from the base. The trainer must write its checkpoints to `output_dir`.
        settings (`dict`, *optional*): JSON values that describe the stage. A folder of a stage with other settings is
            refused.
        from_base (`bool`, *optional*, defaults to `False`): start from the base instead of the stage before.
        teachers (`list[str]`, *optional*): names of earlier stages whose LoRAs it reads.
    """

    name: str
    make_trainer: "Callable[[Path, str | None], DiffusionTrainer]"
    settings: dict[str, JSON] = field(default_factory=dict)
    from_base: bool = False
    teachers: Sequence[str] = ()


def run_stages(stages: Sequence[Stage], output_dir: str | Path) -> Path:
    """
    Runs the stages that are not finished yet.

    Args:
        stages (`list[Stage]`): the stages, in their order.
        output_dir (`str` or `Path`): gets a folder for each stage, with its checkpoints and its LoRA.

    Returns:
        `Path`: the folder of the last stage, with the final LoRA.

    Raises:
        [`Refusal`]: before anything is run, if a name is missing, invalid or used twice, or if a folder holds a
            stage with other settings or another start. One message lists everything.
    """
    output_dir = Path(output_dir)
    Problems(_name_problems(stages) or _folder_problems(stages, output_dir)).raise_under("The stages can't be run")
    state = PartialState()
    state.wait_for_everyone()  # no process writes while another still checks
    for stage, before in zip(stages, _beginnings(stages), strict=True):
        folder = output_dir / stage.name
        if not (folder / FINISHED_FILE).exists():
            if state.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / STAGE_FILE, _record(stage, before, output_dir), sort_keys=True)
            _run(stage, folder, None if before is None else str(output_dir / before))
            if state.is_main_process:
                (folder / FINISHED_FILE).touch()
            state.wait_for_everyone()
    return output_dir / stages[-1].name


def _beginnings(stages: Sequence[Stage]) -> list[str | None]:
    """For each stage the name of the stage whose LoRA it starts from; `None` for the base."""
    names = [None, *(stage.name for stage in stages)]
    return [None if stage.from_base else before for stage, before in zip(stages, names, strict=False)]


def _run(stage: Stage, folder: Path, student_init: str | None) -> None:
    trainer = stage.make_trainer(folder, student_init)
    started = last_complete(folder) is not None
    trainer.train(resume_from_checkpoint=started)
    trainer.save_model(str(folder))
    with extra("The model card"):
        trainer.create_model_card()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    release_memory(trainer)


def _name_problems(stages: Sequence[Stage]) -> list[str]:
    names = [stage.name for stage in stages]
    problems = [] if names else ["there are none."]
    problems += [
        f"the name {name!r} can't be a folder's name: use letters, digits, '-', '_' and '.'."
        for name in names
        if not _NAME.fullmatch(name)
    ]
    problems += [
        f"the name {name!r} is given to {names.count(name)} stages, but each needs its own folder. Rename all but one."
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    problems += [
        f"stage {stage.name!r} is taught by stage {teacher!r}, which does not come before it."
        for i, stage in enumerate(stages)
        for teacher in stage.teachers
        if teacher not in names[:i]
    ]
    return problems


def _folder_problems(stages: Sequence[Stage], output_dir: Path) -> list[str]:
    """Lists the stages in the output folder that were begun with other settings or another start than these."""
    problems: list[str] = []
    for stage, before in zip(stages, _beginnings(stages), strict=True):
        folder = output_dir / stage.name
        recorded = read_json(folder / STAGE_FILE)
        if recorded is None:
            continue
        needed = [name for name in (before, *stage.teachers) if name is not None]
        unfinished = [name for name in needed if not (output_dir / name / FINISHED_FILE).exists()]
        settings, ours = recorded["settings"], json.loads(json.dumps(stage.settings))
        differing = sorted(key for key in {*settings, *ours} if settings.get(key) != ours.get(key))
        remedy = f"Remove the folder {folder.name!r} to run it anew, or choose another output_dir."
        if differing:
            problems.append(f"stage {stage.name!r} was begun with other settings ({', '.join(differing)}). {remedy}")
        elif unfinished or recorded != _record(stage, before, output_dir):
            problems.append(
                f"stage {stage.name!r} was begun from another LoRA than "
                f"{' and '.join(map(repr, needed)) or 'the base'} has now. {remedy}"
            )
    return problems


def _record(stage: Stage, before: str | None, output_dir: Path) -> dict[str, JSON]:
    """The settings of a stage, and the hashes of the LoRAs that it reads."""
    return {
        "settings": json.loads(json.dumps(stage.settings)),
        "student_init": None if before is None else _digest(output_dir / before),
        "teachers": {name: _digest(output_dir / name) for name in stage.teachers},
    }


def _digest(folder: Path) -> str:
    with open(folder / ADAPTER_FILE, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# From a file


@dataclass(kw_only=True)
class StageSpec(TaughtArguments):
    """
    A stage in a file: the arguments of its trainer's command ([`TaughtArguments`]), and these. The LoRA arguments
    apply to stages that start from the base; the others continue the LoRA of the stage before.

    Args:
        name (`str`): name of the stage, and of its folder in the output folder.
        trainer (`str`): `"opd"`, `"grpo"`, `"nft"`, `"sft"` or `"dmd"`.
        config (`dict`): fields of the trainer's config.
        from_base (`bool`, *optional*, defaults to `False`): start from the base instead of the stage before.
    """

    name: str
    trainer: str
    config: dict[str, JSON] = field(default_factory=dict)
    from_base: bool = False

    def stage(self, output_dir: str) -> Stage:
        settings = {known.name: self.__dict__[known.name] for known in fields(self)}
        specs = [spec for of_task in by_task("teachers", self.teachers).values() for spec in of_task]
        teachers = [stage for spec in specs if (stage := _stage_of(spec, Path(output_dir))) is not None]
        return Stage(self.name, self.make_trainer, settings, self.from_base, teachers)

    def problems(self, output_dir: str) -> list[str]:
        """Lists problems that can be found before it is run, without loading weights or asking the Hub."""
        problems = [
            problem
            for option in self.of_prompts
            for problem in source_problems(option, getattr(self, option), self.prompt_column)
        ]
        problems += reward_problems(self.reward_funcs, self.options_of_rewards())
        problems += self._teacher_problems(Path(output_dir))
        try:
            args = self.make_config(Path(output_dir) / self.name, None)
        except ValueError as error:
            return [*problems, *str(error).replace("\n- ", " ").splitlines()]
        problems += evaluation_problems(args, self.eval_prompts)
        if args.ema_decay and 0 < args.max_steps < args.ema_update_interval:
            problems.append(
                f"config: max_steps={args.max_steps} is less than ema_update_interval={args.ema_update_interval}: the "
                "average, which is saved, would still be the LoRA of the start. Leave out ema_update_interval."
            )
        return problems

    def _teacher_problems(self, output_dir: Path) -> list[str]:
        try:
            by_name = self.teachers_by_task()
        except ValueError as error:
            return [str(error)]
        problems = []
        for config in (config for of_task in by_name.values() for config in of_task):
            if _stage_of(config.model_name_or_path, output_dir) is None:  # otherwise an earlier stage makes it
                try:
                    parsed = parse_teacher(config)
                    if parsed.model_name_or_path != "base" and local_folder(parsed) is not None:
                        find_for_any_base(parsed)
                except ValueError as error:
                    problems.append(str(error))
        return problems

    def make_config(self, output_dir: Path, student_init: str | None) -> "DiffusionConfig":
        """
        Makes the trainer's config.

        Raises:
            [`Refusal`]: if the config refuses a value, or has no field of a given name.
        """
        options = {**self.config, "output_dir": str(output_dir)}
        if student_init is not None:
            options["student_init"] = student_init
        if last_complete(output_dir) is not None:
            options["resume_from_checkpoint"] = True  # Hub teachers are then loaded at the commits that it recorded
        config_class = getattr(importlib.import_module("trl_diffusion_opd"), f"{_TRAINERS[self.trainer]}Config")
        unknown = sorted(options.keys() - {one.name for one in fields(config_class)})
        if unknown:
            raise Refusal("\n".join(unknown_option(config_class, name, configs()) for name in unknown))
        return config_class(**options)

    def make_trainer(self, output_dir: Path, student_init: str | None) -> "DiffusionTrainer":
        args = self.make_config(output_dir, student_init)
        trainer_class = getattr(importlib.import_module("trl_diffusion_opd"), f"{_TRAINERS[self.trainer]}Trainer")
        arguments = {"teachers": self.teachers_by_task()} if self.teachers else {}
        return trainer_class(**self.for_trainer(args), **arguments)


_KNOWN = {one.name for one in fields(StageSpec)}
_OF_TASKS = {"prompts", "eval_prompts", "reward_funcs", "teachers"}
_OF_TASKS |= {"teacher_guidance_scales", "teacher_lora_scales", "teacher_bases"}
# Arguments of commands that a stage ignores.
_OF_COMMANDS = {"output_dir", "test_prompts", "num_test_images", "dry_run"}


def read_stages(path: str | Path, output_dir: str | None = None) -> tuple[list[Stage], str]:
    """
    Reads a file of stages.

    Args:
        path (`str` or `Path`): a YAML file, or the name of one in the package.
        output_dir (`str`, *optional*): an output folder instead of the file's. Teachers in the file's output folder
            are then looked for in this one.

    Returns:
        The stages and the output folder.

    Raises:
        [`Refusal`]: if anything in the file is wrong, or a prompt file, reward or local teacher cannot be found.
            One message lists everything, for all stages.
    """
    path = config_path("stages", str(path), "stage_configs")
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("stages"), list) or "output_dir" not in content:
        raise Refusal(f"{path}: it needs an output_dir and a list of stages.")
    problems = [
        f"{key!r} is none of output_dir, shared, stages."
        for key in content.keys() - {"output_dir", "shared", "stages"}
    ]
    written = Path(content["output_dir"])
    output_dir = str(written) if output_dir is None else output_dir
    stages = []
    for i, given in enumerate(content["stages"]):
        merged = _merge(content.get("shared") or {}, given)
        try:
            merged |= {option: _values(option, merged[option]) for option in _OF_TASKS & merged.keys()}
        except ValueError as error:
            found = [str(error)]
        else:
            found = _spec_problems(merged, from_base=i == 0 or merged.get("from_base", False))
        if not found:
            moved = [_moved(teacher, written, Path(output_dir)) for teacher in merged.get("teachers") or []]
            spec = StageSpec(**{**merged, "teachers": moved or None})
            found = spec.problems(output_dir)  # all stages are checked before the first is run, not hours later
            if not found:
                stages.append(spec.stage(output_dir))
        problems += [f"stage {merged.get('name', i + 1)!r}: {problem}" for problem in found]
    Problems(problems or _name_problems(stages)).raise_under(str(path))
    return stages, output_dir


def _values(option: str, given: OfTasks | None) -> list[str] | None:
    """Makes `task=value` strings of a mapping from task to values. A list stays as it is."""
    if given is None or isinstance(given, list):
        return given
    return [f"{task}={value}" for task, values in by_task(option, given).items() for value in values]


def _stage_of(teacher: str, output_dir: Path) -> str | None:
    """The name of the stage that makes a teacher, if the teacher lies directly in the output folder."""
    return Path(teacher).name if Path(teacher).parent == output_dir else None


def _moved(teacher: str, written: Path, output_dir: Path) -> str:
    """Moves a teacher's `task=spec` from the file's output folder to this run's, if a stage makes the teacher."""
    task, equals, spec = teacher.partition("=")
    stage = _stage_of(spec, written)
    return teacher if stage is None else f"{task}{equals}{output_dir / stage}"


def _merge(shared: dict[str, JSON], given: dict[str, JSON]) -> dict[str, JSON]:
    """Merges a stage's own values, the shared ones, and those of its `config_file`. The first to give a value wins."""
    merged = {**shared, **given}
    config = {**(shared.get("config") or {}), **(given.get("config") or {})}
    path = merged.pop("config_file", None)
    if path is not None:
        in_file = yaml.safe_load(Path(config_path("config_file", path)).read_text(encoding="utf-8"))
        in_file = {key: value for key, value in in_file.items() if key not in _OF_COMMANDS}
        merged = {**{key: value for key, value in in_file.items() if key in _KNOWN}, **merged}
        config = {**{key: value for key, value in in_file.items() if key not in _KNOWN}, **config}
    return {**merged, "config": config}


def _spec_problems(given: dict[str, JSON], from_base: bool) -> list[str]:
    missing = [name for name in ("name", "trainer", "model_name_or_path", "prompts") if not given.get(name)]
    problems = [f"{', '.join(missing)} must be given."] if missing else []
    problems += [f"{name!r} is none of {', '.join(sorted(_KNOWN))}." for name in sorted(given.keys() - _KNOWN)]
    trainer, config = given.get("trainer"), given["config"]
    if trainer is not None and trainer not in _TRAINERS:
        problems.append(f"trainer={trainer!r}: it must be one of {', '.join(_TRAINERS)}.")
    if trainer in ("opd", "dmd") and not given.get("teachers"):
        problems.append(f"trainer={trainer!r} needs teachers.")
    if trainer in ("grpo", "nft") and given.get("teachers"):
        problems.append(f"trainer={trainer!r} takes no teachers.")
    if "output_dir" in config:
        problems.append("config: output_dir is the stage's own folder. Set the one at the top.")
    if not from_base and "student_init" in config:
        problems.append("config: student_init is the LoRA of the stage before. Remove it.")
    return problems


@dataclass
class StagesArguments:
    """
    Arguments of the command.

    Args:
        stages (`str`): a YAML file, or the name of one in the package.
        output_dir (`str`, *optional*): an output folder instead of the file's.
    """

    stages: str = field(
        metadata={"help": "YAML with output_dir, shared and stages, or the name of one in the package."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "An output folder instead of the file's."})


ARGUMENTS = (StagesArguments,)


def main(arguments: StagesArguments) -> None:
    stages, output_dir = read_stages(arguments.stages, arguments.output_dir)
    folder = run_stages(stages, output_dir)
    if PartialState().is_main_process:
        print(f"The LoRA of all {len(stages)} stages is in {folder}.")


if __name__ == "__main__":
    with refusals_told():
        main(*parse(ARGUMENTS))
