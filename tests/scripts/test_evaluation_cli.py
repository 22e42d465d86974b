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

"""`trl-diffusion-opd evaluate`, run as a user runs it, on random models of a few thousand weights."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import datasets
import pytest
import yaml
from helpers.example_script import command_line
from helpers.launching import as_module
from helpers.refusals import command_refuses
from helpers.stub_reward import brightness, redness
from helpers.tiny_sd3 import make_lora, make_pipeline

from trl_diffusion_opd import TeacherConfig
from trl_diffusion_opd.evaluation import evaluate_retention, measure
from trl_diffusion_opd.evaluation import run as evaluation_run
from trl_diffusion_opd.pipelines.loading import load_pipeline
from trl_diffusion_opd.reporting import plots
from trl_diffusion_opd.scripts import evaluate
from trl_diffusion_opd.scripts.evaluate import student_folder, where
from trl_diffusion_opd.scripts.parser import parse
from trl_diffusion_opd.scripts.refusals import FAILED


MODULE = "trl_diffusion_opd.scripts.evaluate"
TASKS = ("text", "lines")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    make_pipeline().save_pretrained(root / "base")
    for seed, name in enumerate(("one", "two", "student")):
        make_lora(make_pipeline(), root / name, seed=seed)
    return root


@pytest.fixture(autouse=True)
def work_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Path("text.txt").write_text("one cat\ntwo dogs\n")
    Path("lines.jsonl").write_text(json.dumps({"prompt": "a sign", "answer": 1}) + "\n")
    rows = [{"prompt": "one cat", "skill": "text"}, {"prompt": "a sign", "skill": "lines"}]
    Path("both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings_of(models, **options):
    return {
        "base": str(models / "base"),
        "teachers": [f"text={models}/one", f"lines={models}/two"],
        "student": str(models / "student"),
        "reward_funcs": [
            "text=helpers.stub_reward:brightness",
            "text=helpers.stub_reward:redness",
            "lines=helpers.stub_reward:redness",
        ],
        "dataset": ["text=text.txt", "lines=lines.jsonl"],
        "num_images": 2,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "height": 16,
        "width": 16,
        "max_sequence_length": 16,
        "output_dir": "out",
        "num_samples": 1,
        **options,
    }


def run(monkeypatch, settings, *arguments):
    monkeypatch.setattr(sys, "argv", [MODULE, *command_line(settings), *arguments])
    runpy.run_module(MODULE, run_name="__main__")


@pytest.mark.slow
def test_on_the_command_line(monkeypatch, capsys, models):
    settings = settings_of(models, student=[f"a={models}/student", f"b={models}/one"], dtype="bfloat16")
    run(monkeypatch, settings, "--teacher_guidance_scales", "lines=1.0")
    shown = capsys.readouterr().out
    assert "| text     | brightness |" in shown and "## lines" in shown and "teacher/text" in shown
    assert shown.count("## text") == 1 and len(list(Path("out", "scores").iterdir())) == 1
    names = {path.name for path in Path("out").iterdir()}
    assert names >= {"retention.json", "retention.md", "retention.png", "radar.png", "samples.png", "samples.html"}
    report = json.loads(Path("out", "retention.json").read_text())
    assert list(report["students"]) == ["a", "b"] and list(report["scores"]["base"]["text"]) == [
        "brightness",
        "redness",
    ]
    # Two tasks of two and one rewards, and the same numbers as in Python.
    again = evaluate_retention(
        str(models / "base"),
        {"text": str(models / "one"), "lines": TeacherConfig(str(models / "two"), guidance_scale=1.0)},
        {"a": str(models / "student"), "b": str(models / "one")},
        {"text": [brightness, redness], "lines": redness},
        datasets.Dataset.from_list(
            [{"prompt": p, "task": "text"} for p in ("one cat", "two dogs")] + [{"prompt": "a sign", "task": "lines"}]
        ),
        **{
            name: settings[name] for name in ("num_images", "num_inference_steps", "guidance_scale", "height", "width")
        },
        max_sequence_length=16,
        dtype="bfloat16",
    )
    assert again["scores"] == report["scores"]


def test_a_reward_that_hangs_ends_it_before_anything_is_drawn(monkeypatch, capsys, models):
    settings = settings_of(models, reward_funcs=[f"{task}=helpers.stub_reward:stuck" for task in TASKS])
    message = "Reward 'stuck' has given no scores for 2 images of task 'lines' in 0.3 seconds (reward_timeout). "
    with pytest.raises(SystemExit) as done:
        run(monkeypatch, settings, "--reward_timeout", "0.3")
    assert done.value.code == FAILED and message in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_reward_that_hangs_ends_it_and_it_goes_on(monkeypatch, capsys, models):
    for name in ("plot_retention", "plot_samples"):
        monkeypatch.setattr(plots, name, lambda *arguments: None)
    settings = settings_of(models, reward_funcs=[f"{task}=helpers.stub_reward:stuck" for task in TASKS])
    message = "Reward 'stuck' has given no scores for 2 images in 0.3 seconds (reward_timeout). Find out what it waits"
    with monkeypatch.context() as without_trial, pytest.raises(SystemExit) as done:
        without_trial.setattr(evaluation_run, "try_rewards", lambda *arguments: None)  # it hangs later
        run(monkeypatch, settings, "--reward_timeout", "0.3")
    assert done.value.code == FAILED and message in (printed := capsys.readouterr().err)
    assert printed.endswith("What has been drawn and scored is kept: the same command goes on from there.\n")
    drawn = len(list(Path("out").rglob("*.png")))
    Path("answer").touch()
    monkeypatch.setattr(measure, "draw_batch", counted := Counted(measure.draw_batch))
    run(monkeypatch, settings, "--reward_timeout", "30")
    # Two images of four models for two tasks, and none of them twice.
    assert drawn >= 2 and drawn + counted.images == 2 * 4 * 2
    assert json.loads(Path("out", "retention.json").read_text())["scores"]["base"]["text"]["stuck"] == 0.5


class Counted:
    """`draw_batch`, with the number of images that it has drawn."""

    def __init__(self, function):
        self.function, self.images = function, 0

    def __call__(self, *arguments):
        images = self.function(*arguments)
        self.images += len(images)
        return images


def test_the_report_is_beside_a_single_student_that_is_here(monkeypatch, capsys, models, tmp_path):
    for name in ("plot_retention", "plot_samples"):
        monkeypatch.setattr(plots, name, lambda *arguments: None)
    student = shutil.copytree(models / "student", tmp_path / "trained")
    (student / "training_args.json").write_text(
        json.dumps(
            {
                "eval_num_inference_steps": 2,
                "guidance_scale": 2.0,
                "height": 16,
                "width": 16,
                "max_sequence_length": 16,
            }
        )
    )
    options = ("num_images", "num_inference_steps", "guidance_scale", "height", "width", "max_sequence_length")
    settings = {
        name: value
        for name, value in settings_of(models, student=str(student)).items()
        if name not in (*options, "output_dir")
    }
    run(monkeypatch, settings, "--dry_run")
    shown = " ".join(capsys.readouterr().out.split())
    assert "4 models (base, 2 teachers, 1 student) x 3 images (1 lines, 2 text) = 12" in shown
    assert "16 x 16 px, 2 steps of the deterministic sampler, text up to 16 tokens (student 'student')" in shown
    assert "Nothing was written." in shown and "retention" not in shown
    assert not any(path.name in ("images", "scores", "retention.json") for path in student.iterdir())
    run(monkeypatch, settings)
    report = json.loads((student / "retention.json").read_text())
    assert report["settings"]["height"] == {"value": 16, "source": "student 'student'"}
    assert {task: one["num_images"] for task, one in report["tasks"].items()} == {"lines": 1, "text": 2}
    shown = capsys.readouterr().out
    assert f"The report is {student}/retention.md" in shown
    assert f"`trl-diffusion-opd push {student} owner/name` puts it into the student's card." in shown
    assert where("out", str(student)).endswith(
        f"`trl-diffusion-opd push {student} owner/name --report out` puts it into the student's card."
    )
    assert "push" not in where("out", None)
    assert "| guidance of student " in (student / "retention.md").read_text()
    # Anything else has a folder of its own.
    assert student_folder({"a": str(student), "b": "base"}) is None
    assert student_folder({"student": "owner/repo"}) is None and student_folder({"student": "base"}) is None


def test_bad_seconds(monkeypatch, capsys, models):
    with command_refuses(capsys, "reward_timeout=-1.0: it must be a positive number of seconds, or unset"):
        run(monkeypatch, settings_of(models), "--reward_timeout", "-1")


def test_with_a_config_file(monkeypatch, capsys, models):
    for name in ("plot_retention", "plot_samples"):
        monkeypatch.setattr(plots, name, lambda *arguments: None)
    settings = settings_of(
        models,
        dataset=["both.jsonl"],
        task_column="skill",
        reward_funcs={"text": "remote", "lines": ["helpers.stub_reward:redness"]},
        reward_kwargs={"remote": {"url": "http://127.0.0.1:9/none", "max_retries": 0, "on_error": "none"}},
        generation_kwargs={"negative_prompt": "grey"},
        student=[str(models / "student")],
    )
    Path("evaluation.yaml").write_text(yaml.safe_dump(settings))
    loaded = []
    monkeypatch.setattr(evaluation_run, "load_pipeline", lambda *args: loaded.append(args[2]) or load_pipeline(*args))
    run(
        monkeypatch,
        {"num_images": 1, "model_init_kwargs": '{"low_cpu_mem_usage": true}'},
        "--config",
        "evaluation.yaml",
    )
    assert loaded == [{"low_cpu_mem_usage": True}]
    report = json.loads(Path("out", "retention.json").read_text())
    assert report["num_images"] == 1 and list(report["tasks"]) == ["lines", "text"]
    assert report["tasks"]["text"]["base"] is None  # nobody answered, which is no 0
    assert "student" in report["scores"]


@pytest.mark.parametrize("source", ["edit=rows/edits.jsonl", "rows/edits.jsonl"])
def test_a_column_of_pictures(monkeypatch, models, source):
    Path("rows").mkdir()
    row = {"prompt": "make it blue", "task": "edit", "before": ["a.png"]}
    Path("rows", "edits.jsonl").write_text(json.dumps(row))
    given = []
    monkeypatch.setattr(evaluate, "evaluate_retention", lambda *args, **options: given.append((args, options)))
    settings = {"teachers": ["edit=base"], "reward_funcs": ["edit=helpers.stub_reward:redness"]}
    words = command_line(settings_of(models, dataset=[source], source_images_column="before", **settings))
    evaluate.main(*parse(evaluate.ARGUMENTS, words))
    ((args, options),) = given
    # The file is beside the one that names it.
    assert args[-1][0]["before"] == ["rows/a.png"] and options["source_images_column"] == "before"


REFUSED = {
    "a source without tasks": (
        {"dataset": "lines.jsonl"},
        "--dataset: 'lines.jsonl' has no column 'task' that names the tasks; it has ['prompt', 'answer'].",
    ),
    "no file": ({"dataset": ["text=missing.txt", "lines=lines.jsonl"]}, "--dataset: there is no file 'missing.txt'."),
    "two students without a name": ({"student": ["x/y", "x/z"]}, "--student: 'x/y' is not of the form name=spec."),
    "two students of one name": (
        {"student": ["a=x/y", "a=x/z"]},
        "--student: 'a' names 2 students. Give each its own name.",
    ),
    "a student named base": ({"student": ["base=x/y"]}, "A student is named 'base'"),
    "an unknown reward": ({"reward_funcs": "text=clip"}, "There is no reward 'clip'. There are aesthetic,"),
    "a task without a reward": (
        {"reward_funcs": "text=helpers.stub_reward:redness"},
        "reward_funcs has no reward for task 'lines'.",
    ),
    "a task without a teacher": ({"teachers": "text=base"}, "no teacher for task 'lines'"),
    "options of no reward": (
        {"reward_kwargs": '{"ocr": {}}'},
        "--reward_kwargs has options for ['ocr'], but --reward_funcs does not name them",
    ),
    "no JSON": ({"generation_kwargs": "{x}"}, "--generation_kwargs: '{x}' is not a JSON object such as"),
    "precision": ({"dtype": "half"}, "dtype='half': it must be one of float32, bfloat16, float16."),
    "no student there": ({"student": "nobody"}, "'nobody' is neither an existing folder nor of the form"),
}


@pytest.mark.parametrize("label", REFUSED)
def test_mistakes_are_named(monkeypatch, capsys, models, label):
    changed, message = REFUSED[label]
    with command_refuses(capsys, message):
        run(monkeypatch, settings_of(models, **changed))
    assert not Path("out").exists()


@pytest.mark.slow
def test_models_of_the_hub(monkeypatch, models, hub, capsys):
    """The base, a teacher and the student from the Hub, and what it may refuse."""
    for name in ("plot_retention", "plot_samples"):
        monkeypatch.setattr(plots, name, lambda *arguments: None)
    hub.add_folder("team/base", models / "base")
    hub.add_folder("team/teachers", models / "one", "one/lora")
    hub.add_folder("team/student", models / "student")
    hub.create("team/gated", gated=True)
    hub.create("team/private", private=True)
    for repository in ("team/gated", "team/private"):
        hub.add_folder(repository, models / "base")
        hub.add_folder(repository, models / "student")
    settings = settings_of(
        models,
        base="team/base",
        teachers=["text=team/teachers/one/lora", "lines=base"],
        student="team/student",
        reward_funcs=[f"{task}=helpers.stub_reward:redness" for task in TASKS],
    )
    run(monkeypatch, settings)
    here = settings_of(models, teachers=[f"text={models}/one", "lines=base"], output_dir="here")
    run(monkeypatch, {**here, "reward_funcs": settings["reward_funcs"]})
    assert Path("out", "retention.json").read_bytes() == Path("here", "retention.json").read_bytes()

    shutil.rmtree("out")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    refused = {
        "team/nothing": "no such folder here and no such repository on the Hub",
        "team/private": "for a private repository log in with `hf auth login`",
        "team/gated": "the repository is gated. Accept its terms on",
    }
    for repository, message in refused.items():
        for place in (
            {"base": repository},
            {"student": repository},
            {"teachers": [f"{t}={repository}" for t in TASKS]},
        ):
            with command_refuses(capsys, repository, message):
                run(monkeypatch, {**settings, **place})
    assert not Path("out").exists()


def test_on_two_processes(models, processes):
    settings = settings_of(models, num_images=4, batch_size=2, guidance_scale=1.0)
    ended = processes.run(as_module, MODULE, *command_line(settings))
    assert [one.code for one in ended] == [0, 0], ended[0].error[-3000:]
    assert [one.output.count("## text") for one in ended] == [1, 0]
    assert len(list(Path("out", "scores").iterdir())) == 2  # both score
