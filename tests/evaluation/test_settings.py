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


"""What an evaluation takes from its students' trainings, and what it says where they differ."""

import json
from types import SimpleNamespace

import pytest

from trl_diffusion_opd.evaluation.settings import Record, choose, read_records, resolve
from trl_diffusion_opd.models.teacher_config import TeacherConfig, parse_teacher


ARGUMENTS = {
    "num_inference_steps": 10,
    "eval_num_inference_steps": 25,
    "guidance_scale": 4.5,
    "eval_guidance_scale": None,
    "height": 512,
    "width": 768,
    "max_sequence_length": None,
    "generation_kwargs": {"negative_prompt": "grey"},
}
MANIFEST = {
    "ocr": [{"guidance_scale": 1.0, "lora_scale": 0.6}],
    "two": [{"guidance_scale": 1.0}, {"guidance_scale": 3.0}],
}
NAMES = ("num_inference_steps", "guidance_scale", "height", "width", "max_sequence_length", "generation_kwargs")
OPEN = dict.fromkeys(NAMES)


def student(folder, arguments=None, manifest=None, **changed):
    folder.mkdir(parents=True)
    for name, content in (("training_args.json", arguments), ("teacher_manifest.json", manifest)):
        if content is not None:
            (folder / name).write_text(json.dumps({**content, **changed} if content is arguments else content))
    return parse_teacher(str(folder))


def recorded(**settings):
    given = {"num_inference_steps": 40, "guidance_scale": 1.0, "height": 512, "width": 512, **settings}
    whole = {"max_sequence_length": None, "generation_kwargs": None, **given}
    return Record(whole, {name: f"eval_{name}" for name in whole})


def values(settings):
    return {name: setting["value"] for name, setting in settings.items()}


class TestRecords:
    def test_the_evaluations_of_the_training(self, tmp_path):
        records, problems = read_records({"opd": student(tmp_path / "opd", ARGUMENTS, MANIFEST)})
        assert problems == []
        assert records["opd"].settings == {
            "num_inference_steps": 25,  # not the training's own 10
            "guidance_scale": 4.5,
            "height": 512,
            "width": 768,
            "max_sequence_length": None,
            "generation_kwargs": {"negative_prompt": "grey"},
            "prompt_templates": None,
        }
        assert records["opd"].teacher_scales == {"ocr": [1.0], "two": [1.0, 3.0]}
        assert records["opd"].lora_scales == {"ocr": [0.6]}
        guided, _ = read_records({"x": student(tmp_path / "x", ARGUMENTS, eval_guidance_scale=2.0)})
        assert guided["x"].settings["guidance_scale"] == 2.0
        assert guided["x"].arguments["guidance_scale"] == "eval_guidance_scale"

    def test_a_student_on_the_hub(self, hub, tmp_path):
        """Only the two small files are loaded, from the student's own folder in its repository."""
        student(tmp_path / "opd", ARGUMENTS, MANIFEST)
        (tmp_path / "opd" / "adapter_model.safetensors").write_bytes(b"weights")
        hub.add_folder("me/students", tmp_path / "opd", "best/lora")
        records, problems = read_records({"opd": parse_teacher("me/students/best/lora")})
        assert problems == [] and records["opd"].settings["width"] == 768
        assert records["opd"].teacher_scales["ocr"] == [1.0]
        _, problems = read_records({"opd": parse_teacher("me/nothing")})
        assert problems == [
            "me/nothing: no such folder here and no such repository on the Hub. Check the spelling; for a private "
            "repository log in with `hf auth login`."
        ]

    def test_no_training_of_this_package(self, tmp_path):
        nothing = {"merged": student(tmp_path / "merged"), "base": TeacherConfig("base")}
        assert read_records(nothing) == ({}, [])
        foreign = student(tmp_path / "foreign", {"learning_rate": 1.0, "height": "tall"})
        records, problems = read_records({"foreign": foreign})
        assert records["foreign"].settings == {} and problems == []

    @pytest.mark.parametrize("changed", [{"height": "512"}, {"height": True}, {"eval_guidance_scale": -1.0}])
    def test_a_strangers_file_is_checked(self, tmp_path, changed):
        _, problems = read_records({"opd": student(tmp_path / "opd", ARGUMENTS, **changed)})
        ((name, value),) = changed.items()
        assert problems == [
            f"student 'opd': its training_args.json has {name}={value}, which can't be used. Mend or remove the file."
        ]
        _, problems = read_records({"two": student(tmp_path / "two", ARGUMENTS, {"ocr": "x"})})
        assert "its teacher_manifest.json has a guidance_scale for task 'ocr' that is no scale" in problems[0]


class TestSettings:
    def test_the_students_own(self):
        settings = resolve(OPEN, {"opd": recorded(height=768)}, warnings := [])
        assert values(settings)["height"] == 768 and settings["height"]["source"] == "student 'opd'"
        assert settings["max_sequence_length"] == {"value": None, "source": "the pipeline's default"}
        assert warnings == []

    def test_nobody_knows(self):
        settings = resolve(OPEN, {}, [])
        assert values(settings) == {**OPEN, "num_inference_steps": 40}
        assert settings["num_inference_steps"]["source"] == "the package's default"
        assert settings["guidance_scale"]["source"] == "the pipeline's default"

    def test_another_value_than_in_training_is_a_warning(self):
        given = {**OPEN, "guidance_scale": 4.5, "height": 512}
        settings = resolve(given, {"opd": recorded(), "old": Record()}, warnings := [])
        assert settings["guidance_scale"] == {"value": 4.5, "source": "given"}
        assert warnings == [
            "guidance_scale=4.5, but student 'opd' was trained with eval_guidance_scale=1.0. Its scores are not those "
            "of its own setting. Leave the option out to use that."
        ]

    def test_students_that_differ_are_refused_until_it_is_given(self):
        records = {"a": recorded(), "b": recorded(height=768, guidance_scale=2.0), "merge": Record()}
        with pytest.raises(ValueError) as error:
            resolve(OPEN, records, [])
        guided, tall = str(error.value).split("\n")
        assert guided.startswith("The students' trainings differ in guidance_scale: 'a' 1.0, 'b' 2.0. One report")
        assert "differ in height: 'a' 512, 'b' 768." in tall and tall.endswith("give height.")
        settings = resolve({**OPEN, "height": 512, "guidance_scale": 1.0}, records, warnings := [])
        assert settings["height"]["value"] == 512 and len(warnings) == 2
        assert settings["num_inference_steps"]["source"] == "students 'a', 'b'"


class TestGuidance:
    def scales(self, record, students=None, given=None, teacher_scale=None, teacher=None):
        students = students or {"opd": TeacherConfig("somewhere")}
        specs = {"base": [TeacherConfig("base")], "teacher/ocr": [teacher or TeacherConfig("t")]}
        specs |= {name: [config] for name, config in students.items()}
        choice = choose({**OPEN, "guidance_scale": given}, teacher_scale, specs, students, {"opd": record})
        _, scales = choice.with_default(SimpleNamespace(default_guidance_scale=lambda: 7.0)).for_report()
        return {name: (one["value"], one["source"]) for name, one in scales.items()}, choice.warnings

    def test_a_teacher_as_its_student_learned_from_it(self):
        record = Record(recorded().settings, recorded().arguments, {"ocr": [4.5]})
        scales, warnings = self.scales(record)
        assert scales == {
            "base": (1.0, "student 'opd'"),
            "teacher/ocr": (4.5, "student 'opd'"),
            "opd": (1.0, "student 'opd'"),
        }
        assert warnings == []
        for option in ({"teacher_scale": 2.0}, {"teacher": TeacherConfig("t", guidance_scale=2.0)}):
            scales, warnings = self.scales(record, **option)
            assert scales["teacher/ocr"] == (2.0, "given")
            assert warnings == [
                "The teacher of task 'ocr' is drawn with guidance_scale=2.0, but student 'opd' learned from it at 4.5."
            ]

    def test_a_teacher_at_another_strength(self):
        record = Record(recorded().settings, recorded().arguments, {"ocr": [4.5]}, {"ocr": [0.6]})
        assert self.scales(record, teacher=TeacherConfig("t", lora_scale=0.6))[1] == []
        assert self.scales(record)[1] == [
            "The teacher of task 'ocr' is drawn with lora_scale=1, but student 'opd' learned from it at 0.6 "
            "(teacher_lora_scales, or lora_scale of TeacherConfig)."
        ]

    def test_nobody_knows(self):
        scales, _ = self.scales(Record())
        default = (7.0, "the pipeline's default")
        assert scales == {"base": default, "teacher/ocr": (7.0, "as the base"), "opd": default}

    def test_a_student_with_a_scale_of_its_own(self):
        own = {"opd": TeacherConfig("somewhere", guidance_scale=3.0)}
        scales, warnings = self.scales(recorded(), own)
        assert scales["base"][0] == scales["opd"][0] == 3.0 and warnings == []
        scales, warnings = self.scales(recorded(), own, given=1.0)  # the base's
        assert (scales["base"][0], scales["opd"][0]) == (1.0, 3.0) and warnings == []

    def test_teachers_at_several_scales(self):
        with pytest.raises(ValueError, match=r"task 'ocr': student 'opd' learned from its teachers .* \[1.0, 4.5\]"):
            self.scales(Record({}, {}, {"ocr": [1.0, 4.5]}))
