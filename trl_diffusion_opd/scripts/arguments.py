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

"""The commands' arguments beyond a trainer's config. Lists are given as `--option task=value task=value …`."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from .. import trainer
from ..guards.files import JSON
from ..models.teacher_config import TeacherConfig
from ..problems import Problems, Refusal
from ..rewards import RewardFunc, check_reward, load_reward
from ..trainer.option_checks import evaluation_problems
from .prompt_sources import load_datasets
from .values import PACKAGE, OfTasks, by_task, json_object, packaged, single


if TYPE_CHECKING:
    from datasets import Dataset

    from ..acceleration.quantization import QuantizationConfig
    from ..trainer.base_config import DiffusionConfig


# The help of options in several commands.
LORA_SCALES = "task=scale …: strength of the LoRAs of a task's teachers."
TEACHER_BASES = "task=base … for teachers on another base than the student's: a folder or owner/repo[@revision]"


@dataclass(kw_only=True)
class QuantizationArguments:
    """
    How the base's transformer is quantized. The options for bitsandbytes have the names of TRL's `ModelConfig`. Layers
    compute in `--dtype`.

    Args:
        load_in_4bit (`bool`, *optional*, defaults to `False`), load_in_8bit (`bool`, *optional*, defaults to `False`):
            quantize to 4 or 8 bits with bitsandbytes.
        bnb_4bit_quant_type (`str`, *optional*, defaults to `"nf4"`): format of 4-bit weights, `"nf4"` or `"fp4"`.
        use_bnb_nested_quant (`bool`, *optional*, defaults to `False`): quantize the scales of 4-bit weights too.
        torchao_quant_type (`str`, *optional*): quantize with torchao: `"int8_weight_only"` or `"float8_weight_only"`.
    """

    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the base to 4 bits with bitsandbytes."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantize the base to 8 bits with bitsandbytes."})
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "Format of 4-bit weights.", "choices": ["nf4", "fp4"]}
    )
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantize the scales of 4-bit weights too."})
    torchao_quant_type: str | None = field(
        default=None,
        metadata={"help": "Quantize the base with torchao.", "choices": ["int8_weight_only", "float8_weight_only"]},
    )

    def __post_init__(self) -> None:
        given = [name for name in ("load_in_4bit", "load_in_8bit", "torchao_quant_type") if getattr(self, name)]
        if len(given) > 1:
            raise Refusal(f"{' and '.join('--' + name for name in given)} exclude each other. Give one of them.")
        for name in given:
            library = "torchao" if name == "torchao_quant_type" else "bitsandbytes"
            if find_spec(library) is None:
                raise Refusal(
                    f'--{name} needs {library}. Install it with `pip install ".[quantization]"` in a checkout of '
                    "trl-diffusion-opd."
                )

    def quantization_config(self, dtype: str) -> "QuantizationConfig":
        """Makes diffusers' quantization config; `None` without one. `dtype` is the layers' compute dtype."""

        from diffusers import BitsAndBytesConfig, TorchAoConfig

        if self.load_in_4bit:
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_compute_dtype=dtype,
                bnb_4bit_quant_type=self.bnb_4bit_quant_type,
                bnb_4bit_use_double_quant=self.use_bnb_nested_quant,
            )
        if self.load_in_8bit:
            return BitsAndBytesConfig(load_in_8bit=True)
        if self.torchao_quant_type is None:
            return None
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

        quant_type = {"int8_weight_only": Int8WeightOnlyConfig, "float8_weight_only": Float8WeightOnlyConfig}
        return TorchAoConfig(quant_type[self.torchao_quant_type]())


@dataclass(kw_only=True)
class ScriptArguments(QuantizationArguments):
    """
    Arguments of every training command beyond its trainer's config.

    Args:
        model_name_or_path (`str`): the base, a Hub id or a folder.
        prompts (`list[str]`): `task=source`. A source is a Hub dataset (`owner/name[:split]`) or a text, jsonl, csv,
            tsv or parquet file.
        eval_prompts (`list[str]`, *optional*): `task=source` of the prompts that are evaluated during training.
        prompt_column (`str`, *optional*): the sources' column with the prompts. By default `prompt`, else `caption`,
            else `text`.
        reward_funcs (`list[str]`, *optional*): `task=name` of a reward of the package, or
            `task=package.module:function`, or `task=my_file.py:function`. Name a task several times to give it several
            rewards.
        reward_kwargs (`dict`, *optional*): arguments of named rewards, such as `{"remote": {"url": "http://..."}}`.
        full_finetuning (`bool`, *optional*, defaults to `False`): train all weights instead of a LoRA.
        lora_r (`int`, *optional*, defaults to `32`), lora_alpha (`int`, *optional*, defaults to `64`): rank and alpha
            of the LoRA.
        lora_target_modules (`list[str]`, *optional*): layers of the LoRA. By default, the attention projections.
    """

    # The options that name prompts.
    of_prompts: ClassVar[tuple[str, ...]] = ("prompts", "eval_prompts")

    model_name_or_path: str = field(metadata={"help": "The base: a Hub id or a folder."})
    prompts: list[str] = field(
        metadata={"help": "task=source …: a Hub dataset, or a text, jsonl, csv, tsv, parquet file."}
    )
    eval_prompts: list[str] | None = field(
        default=None, metadata={"help": "task=source …, evaluated during training."}
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of the sources with the prompts; prompt, caption or text if not set."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "task=name …: a reward of the package, or module:function, my_file.py:function"},
    )
    reward_kwargs: dict[str, JSON] | str | None = field(
        default=None, metadata={"help": "JSON: arguments of named rewards, by name."}
    )
    full_finetuning: bool = field(default=False, metadata={"help": "Train all weights instead of a LoRA."})
    lora_r: int = field(default=32, metadata={"help": "Rank of the LoRA."})
    lora_alpha: int = field(default=64, metadata={"help": "Alpha of the LoRA."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers of the LoRA; attention if not set."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.reward_kwargs, str):  # from a command line; a YAML file gives a dict
            self.reward_kwargs = json_object("reward_kwargs", self.reward_kwargs)

    def given_teachers(self) -> dict[str, list[TeacherConfig]]:
        """The teachers of each task, of a command that has some."""
        return {}

    def rewards(self) -> dict[str, list[RewardFunc]]:
        """Loads the reward functions of each task."""
        return load_rewards(self.reward_funcs, self.options_of_rewards())

    def options_of_rewards(self) -> dict[str, dict[str, JSON]]:
        """Returns the arguments of named rewards, by name."""
        assert not isinstance(self.reward_kwargs, str)  # strings are parsed
        return self.reward_kwargs or {}

    def datasets(self, args: "DiffusionConfig") -> "dict[str, Dataset | None]":
        """
        Loads the prompts of all options that name some, by option. `args` is the trainer's config.

        Raises:
            [`Refusal`]: if a file or an option cannot be used. One message lists everything.
        """
        problems = Problems(evaluation_problems(args, self.eval_prompts))
        given = {option: getattr(self, option) for option in self.of_prompts}
        return load_datasets(given, args.task_column, self.prompt_column, problems, args.source_images_column)

    def for_trainer(
        self,
        args: "DiffusionConfig",
        datasets: "dict[str, Dataset | None] | None" = None,
        reward_funcs: dict[str, list[RewardFunc]] | None = None,
    ) -> dict[str, Any]:
        """
        Makes the arguments of a trainer, except for its teachers.

        Args:
            args ([`DiffusionConfig`]): the trainer's config.
            datasets (`dict`, *optional*), reward_funcs (`dict`, *optional*):
                As [`~ScriptArguments.datasets`] and [`~ScriptArguments.rewards`] return them. By default, they are
                loaded.

        Raises:
            [`Refusal`]: for what [`early_problems`] finds. Nothing is loaded yet.
        """
        from peft import LoraConfig

        from ..models.student import ATTENTION_TARGETS
        from ..trainer.checks import early_problems

        if datasets is None:
            datasets = self.datasets(args)
        if reward_funcs is None:
            reward_funcs = self.rewards()
        train_dataset, eval_dataset = datasets["prompts"], datasets["eval_prompts"]
        assert train_dataset is not None  # the option is required
        problems = early_problems(train_dataset, eval_dataset, args, self.given_teachers(), reward_funcs)
        Problems(problems).raise_under("The run cannot start")
        lora = LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            init_lora_weights="gaussian",
            target_modules=self.lora_target_modules or list(ATTENTION_TARGETS),
        )
        return {
            "model": packaged(self.model_name_or_path),
            "reward_funcs": reward_funcs or None,
            "args": args,
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "quantization_config": self.quantization_config(args.dtype),
            "peft_config": None if self.full_finetuning else lora,
        }


@dataclass(kw_only=True)
class TaughtArguments(ScriptArguments):
    """
    Arguments of a command with teachers. The others are in [`ScriptArguments`].

    Args:
        teachers (`list[str]`, *optional*): `task=spec`, where a spec is `base`, a folder or
            `owner/repo[/sub/folder][@revision]`. Name a task several times to have it taught by the mean of several
            teachers.
        teacher_guidance_scales (`list[str]`, *optional*): `task=scale` for teachers with another scale than
            `teacher_guidance_scale`.
        teacher_lora_scales (`list[str]`, *optional*): `task=scale`, the strength of the LoRAs of a task's teachers;
            for several teachers one for all, or one for each in their order.
        teacher_bases (`list[str]`, *optional*): `task=base` for teachers on another base than the student's, a folder
            or `owner/repo[@revision]`; for several teachers of a task one for all, or one for each in their order.
    """

    teachers: list[str] | None = field(
        default=None, metadata={"help": "task=spec …: base, a folder or owner/repo[/sub/folder][@revision]"}
    )
    teacher_guidance_scales: list[str] | None = field(
        default=None, metadata={"help": "task=scale … for teachers with another scale than teacher_guidance_scale."}
    )
    teacher_lora_scales: list[str] | None = field(default=None, metadata={"help": LORA_SCALES})
    teacher_bases: list[str] | None = field(default=None, metadata={"help": TEACHER_BASES})

    def given_teachers(self) -> dict[str, list[TeacherConfig]]:
        return self.teachers_by_task()

    def teachers_by_task(self) -> dict[str, list[TeacherConfig]]:
        """Makes the [`TeacherConfig`]s of each task; an empty dict if none are given."""
        teachers = load_teachers(self.teachers or [], self.teacher_guidance_scales, self.teacher_lora_scales)
        return on_bases(teachers, self.teacher_bases)


@dataclass(kw_only=True)
class TeacherScriptArguments(ScriptArguments):
    """
    Arguments of a command that trains by reward. The others are in [`ScriptArguments`].

    Args:
        reward_funcs (`list[str]`): as there, but required. `--reward_weights` sets the weights of a task's rewards.
        dry_run (`bool`, *optional*, defaults to `False`): draw and score a round, show what the run would do, and
            stop.
    """

    reward_funcs: list[str] = field(
        metadata={"help": "task=name …: a reward of the package, or module:function, my_file.py:function"}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Draw and score a round, show what the run would do, and stop."}
    )


def config_path(option: str, name: str, *folders: str) -> str:
    """
    Finds a YAML file by its path, or by its name in the package.

    Args:
        option (`str`), name (`str`): the option, for messages, and its value.
        folders (`str`): the package's folders to look in. By default those of the commands' options.

    Raises:
        [`Refusal`]: if there is neither. The message lists the package's names.
    """
    if os.path.isfile(name):
        return name
    folders = folders or ("configs", "recipes")
    known = {path.stem: path for folder in folders for path in (PACKAGE / folder).glob("*.yaml")}
    if name not in known:
        raise Refusal(
            f"--{option}: there is no file {name!r}, and the package has no config of that name. It has "
            f"{', '.join(sorted(known))}."
        )
    return str(known[name])


def configs() -> list[type]:
    """Returns the config classes of all trainers."""
    names = [name for name in trainer.__all__ if name.endswith("Config")]
    found = [getattr(trainer, name) for name in names]
    return [one for one in found if not one.__subclasses__()]  # not the shared base classes


def load_scales(option: str, values: OfTasks | None, tasks: Collection[str]) -> dict[str, list[float]]:
    """Reads numbers by task."""
    scales: dict[str, list[float]] = {}
    for task, given in by_task(option, values).items():
        if task not in tasks:
            raise Refusal(f"--{option}: no teacher for task {task!r}; teachers are given for {sorted(tasks)}.")
        for value in given:
            try:
                scales.setdefault(task, []).append(float(value))
            except ValueError as error:
                raise Refusal(f"--{option}: {value!r} for task {task!r} is not a number.") from error
    return scales


def load_teachers(
    values: OfTasks, scales: OfTasks | None, lora_scales: OfTasks | None = None
) -> dict[str, list[TeacherConfig]]:
    """
    Makes each task's teachers, with the guidance scales of `--teacher_guidance_scales` and the strengths of
    `--teacher_lora_scales`.
    """
    specs = by_task("teachers", values)
    of_task = load_scales("teacher_guidance_scales", scales, specs)
    strengths = load_scales("teacher_lora_scales", lora_scales, specs)
    teachers = {}
    for task, names in specs.items():
        given = strengths.get(task, [1.0])
        if len(given) not in (1, len(names)):
            raise Refusal(
                f"--teacher_lora_scales: task {task!r} has {len(names)} teachers and {len(given)} scales. Give one for "
                "all of them, or one for each in their order."
            )
        guidance = of_task[task][-1] if task in of_task else None
        each = given * len(names) if len(given) == 1 else given
        teachers[task] = [
            TeacherConfig(packaged(name), guidance_scale=guidance, lora_scale=scale)
            for name, scale in zip(names, each, strict=True)
        ]
    return teachers


def on_bases(teachers: Mapping[str, list[TeacherConfig]], values: OfTasks | None) -> dict[str, list[TeacherConfig]]:
    """Gives each task's teachers the bases of `--teacher_bases`."""
    option, found = "teacher_bases", dict(teachers)
    for task, bases in by_task(option, values).items():
        if task not in found:
            raise Refusal(f"--{option}: no teacher for task {task!r}; teachers are given for {sorted(found)}.")
        count = len(found[task])
        if len(bases) not in (1, count):
            raise Refusal(
                f"--{option}: task {task!r} has {count} teachers and {len(bases)} bases. Give one for all of them, or "
                "one for each in their order."
            )
        each = bases * count if len(bases) == 1 else bases
        found[task] = [replace(config, base=packaged(base)) for config, base in zip(found[task], each, strict=True)]
    return found


def load_students(option: str, values: OfTasks) -> dict[str, str]:
    """Reads the students by name. A single one may have no name, and is then called `student`."""
    only = single(values)
    if only is not None and (os.path.exists(only) or "=" not in only):
        return {"student": packaged(only)}
    students = by_task(option, values, what="name=spec")
    twice = [name for name, specs in students.items() if len(specs) > 1]
    if twice:
        raise Refusal(f"--{option}: {twice[0]!r} names {len(students[twice[0]])} students. Give each its own name.")
    return {name: packaged(specs[0]) for name, specs in students.items()}


def load_rewards(values: OfTasks | None, options: Mapping[str, Mapping[str, JSON]]) -> dict[str, list[RewardFunc]]:
    """
    Loads the reward functions of each task. A reward that several tasks name is loaded once.

    Args:
        values (`list[str]`, *optional*): `task=name`.
        options (`dict`): arguments of named rewards, by name.

    Raises:
        [`Refusal`]: if rewards cannot be loaded. One message lists everything.
    """
    specs, names = _reward_names(values, options)
    problems, loaded = Problems(), {}
    for name in names:
        try:
            loaded[name] = load_reward(name, **options.get(name, {}))
        except (ImportError, ValueError) as error:
            problems.append(str(error))
    problems.raise_under("--reward_funcs")
    return {task: [loaded[name] for name in of_task] for task, of_task in specs.items()}


def reward_problems(values: OfTasks | None, options: Mapping[str, Mapping[str, JSON]]) -> list[str]:
    """Lists what [`load_rewards`] would refuse, without loading weights."""
    try:
        _, names = _reward_names(values, options)
    except ValueError as error:
        return [str(error)]
    problems = []
    for name in names:
        try:
            check_reward(name, **options.get(name, {}))
        except (ImportError, ValueError) as error:
            problems.append(str(error))
    return problems


def _reward_names(
    values: OfTasks | None, options: Mapping[str, Mapping[str, JSON]]
) -> tuple[dict[str, list[str]], list[str]]:
    """Returns the names of rewards by task, and a list of the distinct names."""
    specs = by_task("reward_funcs", values)
    names = list(dict.fromkeys(name for of_task in specs.values() for name in of_task))
    unused = sorted(options.keys() - set(names))
    if unused:
        raise Refusal(
            f"--reward_kwargs has options for {unused}, but --reward_funcs does not name them. It has {names}."
        )
    return specs, names
