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
Finds out how to draw the images of an evaluation: as the caller says, else as the students were trained, else as the
pipeline does by default. Each setting keeps where it came from.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..data.readers import Readers, template_problems
from ..guards.files import JSON
from ..guards.redaction import public_value, shown
from ..hub.errors import download
from ..hub.files import ARGUMENTS_FILE, MANIFEST_FILE
from ..models.teacher_config import TeacherConfig, TeacherError, local_folder
from ..models.teacher_files import read_json
from ..pipelines.velocity import VelocityField
from ..problems import Problems
from ..reporting.report import Setting


NUM_INFERENCE_STEPS = 40
GIVEN, PIPELINE, PACKAGE = "given", "the pipeline's default", "the package's default"


def _is_count(value: JSON) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_scale(value: JSON) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


# For each setting of an evaluation: the training arguments that give it, the first that is set, and what it may be.
_ARGUMENTS: dict[str, tuple[tuple[str, ...], Callable[[JSON], bool]]] = {
    "num_inference_steps": (("eval_num_inference_steps",), _is_count),
    "guidance_scale": (("eval_guidance_scale", "guidance_scale"), _is_scale),
    "height": (("height",), _is_count),
    "width": (("width",), _is_count),
    "max_sequence_length": (("max_sequence_length",), _is_count),
    "generation_kwargs": (("generation_kwargs",), lambda value: isinstance(value, dict)),
    "prompt_templates": (
        ("prompt_templates",),
        lambda value: isinstance(value, dict) and not template_problems(value),
    ),
}
# Those that are no arguments of a `VelocityField`
_NOT_OF_THE_FIELD = ("guidance_scale", "prompt_templates")


@dataclass(frozen=True)
class Record:
    """
    What a student's files say about its training.

    Attributes:
        settings (`dict`): settings of its evaluations, by name. `None` is the pipeline's own default.
        arguments (`dict[str, str]`): the name of the training argument that each setting is from.
        teacher_scales (`dict[str, list[float]]`): the guidance scales of its teachers by task.
        lora_scales (`dict[str, list[float]]`): the strengths of its teachers' LoRAs by task.
    """

    settings: dict[str, JSON] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    teacher_scales: dict[str, list[float]] = field(default_factory=dict)
    lora_scales: dict[str, list[float]] = field(default_factory=dict)


def read_records(students: Mapping[str, TeacherConfig]) -> tuple[dict[str, Record], list[str]]:
    """
    Reads what the files of each student say about its training: `training_args.json` and `teacher_manifest.json`,
    which a training saves beside its student. A student without these files is left out.

    Returns:
        The records by the students' names, and a list of problems.
    """
    records: dict[str, Record] = {}
    problems = Problems()
    for name, config in students.items():
        with problems.collect():
            record = _read_record(name, config)
            if record is not None:
                records[name] = record
    return records, list(problems)


def _read_record(name: str, config: TeacherConfig) -> Record | None:
    if config.model_name_or_path == "base":
        return None
    prefix = f"{config.subfolder.strip('/')}/" if config.subfolder else ""
    folder = local_folder(config)
    if folder is None:
        repository = config.model_name_or_path
        names = [prefix + file for file in (ARGUMENTS_FILE, MANIFEST_FILE)]
        folder = download(repository, repository, config.revision, names, TeacherError)
    arguments = _object(folder / prefix / ARGUMENTS_FILE, name)
    manifest = _object(folder / prefix / MANIFEST_FILE, name)
    if not arguments and not manifest:
        return None
    # Other packages have a file of this name too. A training of this package writes all of these arguments.
    ours = all(argument in arguments for argument in ("eval_num_inference_steps", "guidance_scale", "height", "width"))
    settings, sources = _settings(name, arguments) if ours else ({}, {})
    return Record(settings, sources, _teacher_scales(name, manifest), _lora_scales(manifest))


def _object(path: Path, name: str) -> dict[str, JSON]:
    return read_json(path, f"student {name!r}") if path.is_file() else {}


def _settings(name: str, arguments: Mapping[str, JSON]) -> tuple[dict[str, JSON], dict[str, str]]:
    settings: dict[str, JSON] = {}
    sources: dict[str, str] = {}
    for setting, (candidates, is_valid) in _ARGUMENTS.items():
        argument = next((one for one in candidates if arguments.get(one) is not None), candidates[-1])
        value = arguments.get(argument)
        if value is not None and not is_valid(value):
            raise ValueError(
                f"student {name!r}: its {ARGUMENTS_FILE} has {argument}={shown(value, 80)}, which can't be used. "
                "Mend or remove the file."
            )
        settings[setting], sources[setting] = value, argument
    return settings, sources


def _teacher_scales(name: str, manifest: Mapping[str, JSON]) -> dict[str, list[float]]:
    scales: dict[str, list[float]] = {}
    for task, entries in manifest.items():
        listed = entries if isinstance(entries, list) else [entries]
        of_task: list[JSON] = [entry.get("guidance_scale") if isinstance(entry, dict) else None for entry in listed]
        if not all(map(_is_scale, of_task)):
            raise ValueError(
                f"student {name!r}: its {MANIFEST_FILE} has a guidance_scale for task {shown(task, 80)!r} that is no "
                "scale. Mend or remove the file."
            )
        scales[task] = list(dict.fromkeys(of_task))
    return scales


def _lora_scales(manifest: Mapping[str, JSON]) -> dict[str, list[float]]:
    scales: dict[str, list[float]] = {}
    for task, entries in manifest.items():
        for entry in entries if isinstance(entries, list) else [entries]:
            scale = entry.get("lora_scale") if isinstance(entry, dict) else None
            if isinstance(scale, int | float):
                scales.setdefault(task, []).append(scale)
    return scales


def resolve(given: Mapping[str, object], records: Mapping[str, Record], warnings: list[str]) -> dict[str, Setting]:
    """
    Decides on each setting of `given`: its own value, else that of the students' trainings, else the default. `None`
    is the pipeline's own.

    Args:
        given (`dict`): the caller's settings by name; `None` where the caller leaves it open.
        records (`dict[str, Record]`): what is known of the students, by name.
        warnings (`list[str]`): where a given value is not what a student was trained with, a sentence is added.

    Raises:
        [`ValueError`]: if the students' trainings differ in a setting that is not given. One message lists all.
    """
    problems = Problems()
    settings: dict[str, Setting] = {}
    for name, value in given.items():
        known = {student: one.settings[name] for student, one in records.items() if name in one.settings}
        if value is not None:
            settings[name] = {"value": value, "source": GIVEN}
            for student, recorded in known.items():
                if recorded is not None and recorded != value:
                    argument = records[student].arguments[name]
                    warnings.append(
                        f"{name}={value}, but student {student!r} was trained with {argument}={recorded}. Its scores "
                        "are not those of its own setting. Leave the option out to use that."
                    )
        elif any(one != next(iter(known.values())) for one in known.values()):
            listed = ", ".join(f"{student!r} {recorded}" for student, recorded in known.items())
            problems.append(
                f"The students' trainings differ in {name}: {listed}. One report draws all with the same one: give "
                f"{name}."
            )
        else:
            default = NUM_INFERENCE_STEPS if name == "num_inference_steps" else None
            found = next(iter(known.values()), None)
            source = _students(known) if found is not None else PIPELINE if default is None else PACKAGE
            settings[name] = {"value": default if found is None else found, "source": source}
    if problems:
        raise ValueError("\n".join(problems))
    return settings


def teacher_setting(
    task: str,
    config: TeacherConfig,
    given: float | None,
    records: Mapping[str, Record],
    base: Setting,
    warnings: list[str],
) -> Setting:
    """
    Decides on the guidance scale of one of a task's teachers: its own, else `given`, else the one at which the
    students learned from the task's teachers, else the base's.

    Args:
        task (`str`), config ([`TeacherConfig`]): the task, and its teacher.
        given (`float`, *optional*): the caller's scale of teachers that name none.
        records (`dict[str, Record]`): what is known of the students, by name.
        base (`dict`): the setting of the base.
        warnings (`list[str]`): where a scale that was given is not the students', a sentence is added.

    Raises:
        [`ValueError`]: if nobody names a scale, and the students' teachers had several.
    """
    known = {student: one.teacher_scales[task] for student, one in records.items() if one.teacher_scales.get(task)}
    scales = list(dict.fromkeys(scale for of_student in known.values() for scale in of_student))
    named = given if config.guidance_scale is None else config.guidance_scale
    if named is not None:
        if scales and named not in scales:
            warnings.append(
                f"The teacher of task {task!r} is drawn with guidance_scale={named}, but {_students(known)} learned "
                f"from it at {', '.join(map(str, scales))}."
            )
        return {"value": named, "source": GIVEN}
    if len(scales) > 1:
        raise ValueError(
            f"task {task!r}: {_students(known)} learned from its teachers at the guidance scales {scales}. Give each "
            "teacher its own (teacher_guidance_scales, or guidance_scale of TeacherConfig)."
        )
    if scales:
        return {"value": scales[0], "source": _students(known)}
    return {"value": base["value"], "source": "as the base"}


def with_own_scales(
    records: Mapping[str, Record], students: Mapping[str, TeacherConfig], given: float | None
) -> dict[str, Record]:
    """
    Returns the records with the guidance scales that the students' configs name, which win over their trainings'. If
    the caller gives the base another (`given`), they say nothing about it.
    """
    result = dict(records)
    for name, config in students.items():
        if config.guidance_scale is not None:
            record = records.get(name, Record())
            settings = {key: value for key, value in record.settings.items() if key != "guidance_scale"}
            settings |= {"guidance_scale": config.guidance_scale} if given is None else {}
            result[name] = replace(record, settings=settings)
    return result


def guidance(
    specs: Mapping[str, list[TeacherConfig]],
    base: Setting,
    teacher_scale: float | None,
    records: Mapping[str, Record],
    warnings: list[str],
) -> dict[str, list[Setting]]:
    """
    Decides on the guidance scale of each network of each model. `None` is the pipeline's own.

    Args:
        specs (`dict`): the models by their names in the report.
        base (`dict`): the setting of the base.
        teacher_scale (`float`, *optional*): the caller's scale of teachers that name none.
        records (`dict[str, Record]`), warnings (`list[str]`): as in [`resolve`].

    Raises:
        [`ValueError`]: as [`teacher_setting`]. One message lists all.
    """
    problems = Problems()
    scales: dict[str, list[Setting]] = {}
    for name, configs in specs.items():
        scales[name] = []
        for config in configs:
            if name.startswith("teacher/"):
                with problems.collect():
                    task = name.removeprefix("teacher/")
                    scales[name].append(teacher_setting(task, config, teacher_scale, records, base, warnings))
                    _compare_strengths(task, config, records, warnings)
            elif config.guidance_scale is not None:
                scales[name].append({"value": config.guidance_scale, "source": GIVEN})
            else:
                scales[name].append(base)
    if problems:
        raise ValueError("\n".join(problems))
    return scales


def _compare_strengths(task: str, config: TeacherConfig, records: Mapping[str, Record], warnings: list[str]) -> None:
    known = {student: one.lora_scales[task] for student, one in records.items() if one.lora_scales.get(task)}
    scales = list(dict.fromkeys(scale for of_student in known.values() for scale in of_student))
    if scales and config.lora_scale not in scales:
        warnings.append(
            f"The teacher of task {task!r} is drawn with lora_scale={config.lora_scale:g}, but {_students(known)} "
            f"learned from it at {', '.join(f'{scale:g}' for scale in scales)} (teacher_lora_scales, or lora_scale of "
            "TeacherConfig)."
        )


@dataclass(frozen=True)
class Choice:
    """
    How the images of an evaluation are drawn.

    Attributes:
        settings (`dict[str, Setting]`): the settings of all images, by name.
        scales (`dict[str, list[Setting]]`): the guidance scale of each network of each model.
        warnings (`list[str]`): what is not as in the students' trainings.
    """

    settings: Mapping[str, Setting]
    scales: Mapping[str, list[Setting]]
    warnings: list[str]

    def options(self) -> dict[str, Any]:
        """The arguments of a [`VelocityField`]."""
        return {name: setting["value"] for name, setting in self.settings.items() if name not in _NOT_OF_THE_FIELD}

    def readers(self) -> Readers:
        """What each model reads of a row."""
        return Readers(self.settings["prompt_templates"]["value"] or {})

    def with_default(self, field: VelocityField) -> "Choice":
        """The same with the pipeline's own guidance scale, where that is asked for."""
        if all(one["value"] is not None for of_model in self.scales.values() for one in of_model):
            return self
        scale = field.default_guidance_scale()

        def filled(one: Setting) -> Setting:
            return {"value": scale if one["value"] is None else one["value"], "source": one["source"]}

        return replace(self, scales={name: [*map(filled, of_model)] for name, of_model in self.scales.items()})

    def for_report(self) -> tuple[dict[str, Setting], dict[str, Setting]]:
        """The settings, and each model's guidance scale (a list for several networks), without paths and secrets."""
        settings: dict[str, Setting] = {
            name: {"value": public_value(setting["value"]), "source": setting["source"]}
            for name, setting in self.settings.items()
            if name != "guidance_scale"
        }
        scales: dict[str, Setting] = {}
        for name, of_model in self.scales.items():
            values = [one["value"] for one in of_model]
            source = ", ".join(dict.fromkeys(one["source"] for one in of_model))
            scales[name] = {"value": values[0] if len(set(values)) == 1 else values, "source": source}
        return settings, scales


def choose(
    given: Mapping[str, object],
    teacher_scale: float | None,
    specs: Mapping[str, list[TeacherConfig]],
    students: Mapping[str, TeacherConfig],
    records: Mapping[str, Record],
) -> Choice:
    """
    Chooses how the images of an evaluation are drawn.

    Args:
        given (`dict`), teacher_scale (`float`, *optional*): the caller's settings; `None` where they are left open.
        specs (`dict`), students (`dict`): all models by their names in the report, and the students among them.
        records (`dict[str, Record]`): what is known of the students, by name.

    Raises:
        [`ValueError`]: if the students differ where nothing is given. One message lists all.
    """
    scale = given["guidance_scale"]
    assert scale is None or isinstance(scale, int | float)
    records = with_own_scales(records, students, scale)
    warnings: list[str] = []
    settings = resolve(given, records, warnings)
    scales = guidance(specs, settings["guidance_scale"], teacher_scale, records, warnings)
    return Choice(settings, scales, list(dict.fromkeys(warnings)))


def _students(names: Mapping[str, object] | Sequence[str]) -> str:
    listed = ", ".join(repr(name) for name in names)
    return f"student {listed}" if len(names) == 1 else f"students {listed}"
