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

"""The two-stage example, run as a user runs it, with a few updates a stage: whole, killed on its way, on two processes."""

import json
import os
import signal
import time
from pathlib import Path

import datasets
import pytest
import yaml
from helpers.example_script import command_line, run_example
from helpers.launching import as_script
from helpers.refusals import command_refuses

from trl_diffusion_opd import DiffusionGRPOTrainer, DiffusionOPDTrainer, tiny
from trl_diffusion_opd.evaluation.store import Store
from trl_diffusion_opd.scripts.stages import StageSpec
from trl_diffusion_opd.trainer.base_trainer import DiffusionTrainer


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "two_stage_tiny.py"
STAGES = ROOT / "examples" / "stages" / "tiny_two_stage.yaml"
NAMES = ("teacher-compose", "teacher-letters", "teacher-style", "student")
SHORT = {
    "max_steps": 2,
    "num_inference_steps": 3,
    "eval_num_inference_steps": 2,
    "num_eval_images": 2,
    "eval_steps": 1,
    "save_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
}
SHORT_RL = {"num_generations": 2, "per_device_train_batch_size": 4, "sde_window_range": [0, 1]}
SHORT_OPD = {"per_device_train_batch_size": 2, "log_completions": False, "warmup_steps": 0}


@pytest.fixture(autouse=True)
def repository_root(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def shortened(folder: Path, **changes) -> Path:
    """The example's own file of stages with fewer updates; `changes` are of its last stage."""
    content = yaml.safe_load(STAGES.read_text())
    for stage in content["stages"]:
        of_trainer = SHORT_RL if stage["trainer"] == "grpo" else SHORT_OPD
        stage["config"] = {**stage.get("config", {}), **SHORT, **of_trainer}
    content["stages"][-1] |= changes
    path = folder / "stages.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(stages: Path, output_dir: Path, **options) -> None:
    options = {"stages": stages, "output_dir": output_dir, "num_test_images": 3, **options}
    with pytest.MonkeyPatch.context() as patch:
        run_example(patch, SCRIPT.name, *command_line(options))


def results(folder: Path) -> dict[str, bytes]:
    files = ("retention.json", "retention_scores.json", *(f"{name}/adapter_model.safetensors" for name in NAMES))
    return {name: (folder / name).read_bytes() for name in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        run(shortened(folder), folder / "out")
    return folder / "out"


def test_report_is_on_base_teachers_and_student(whole):
    report = json.loads((whole / "retention.json").read_text())
    assert list(report["tasks"]) == list(tiny.TASKS) and report["num_images"] == 3
    models = {"base", "student", *(f"teacher/{task}" for task in tiny.TASKS)}
    scores = json.loads((whole / "retention_scores.json").read_text())
    assert scores.keys() == models
    for of_model in scores.values():
        assert of_model.keys() == set(tiny.TASKS)
        assert all(of_task.keys() == {"compose", "letters", "style"} for of_task in of_model.values())
    names = {path.name for path in whole.iterdir()}
    assert names >= {"retention.md", "retention.png", "samples.png", "samples.html", *NAMES}
    # The teachers of this run and not those of the package or of the file's own folder.
    manifest = json.loads((whole / "student" / "teacher_manifest.json").read_text())
    assert [manifest[task][0]["source"] for task in tiny.TASKS] == [f"teacher-{task}" for task in tiny.TASKS]


class Killed(BaseException):
    """Not an error: nothing handles it."""


# Where each run of a folder is killed: at which call of what. A teacher and the student have two updates each.
KILLS = {
    "within the first teacher": (DiffusionGRPOTrainer, "training_step", 2),
    "at the end of the first teacher": (DiffusionTrainer, "create_model_card", 1),
    "between two teachers": (StageSpec, "make_trainer", 2),
    "between the last teacher and the student": (StageSpec, "make_trainer", 3),
    "within the student": (DiffusionOPDTrainer, "training_step", 5),
    "while the report's images are drawn": (Store, "save", 7),
    "while the report's images are scored": (Store, "record", 5),
}


def killing(original, call: int):
    calls = []

    def killed(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    return killed


def test_killed_anywhere_gives_the_same(whole, tmp_path):
    stages = shortened(tmp_path)
    for owner, method, call in KILLS.values():
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, method, killing(getattr(owner, method), call))
            run(stages, tmp_path / "out")
    assert not (tmp_path / "out" / "retention.json").exists()
    run(stages, tmp_path / "out")
    assert results(tmp_path / "out") == results(whole)


def test_two_processes_go_on_after_a_kill(whole, tmp_path, processes):
    out = tmp_path / "out"
    given = ["--stages", str(shortened(tmp_path)), "--output_dir", str(out), "--num_test_images", "3"]

    def log() -> str:
        return "".join(path.read_text()[-5000:] for path in tmp_path.glob("error_*.txt"))

    started = processes.start(as_script, SCRIPT, *given, folder=tmp_path)
    deadline = time.monotonic() + 300
    while not list(out.glob("teacher-letters/checkpoint-*/complete")):
        assert not processes.ended() and time.monotonic() < deadline, log()
        time.sleep(0.05)
    for process in started:
        os.kill(process, signal.SIGKILL)
    assert processes.wait() == [-signal.SIGKILL] * 2
    finished = out / "teacher-compose" / "adapter_model.safetensors"
    before = (finished.read_bytes(), finished.stat().st_mtime_ns)
    processes.start(as_script, SCRIPT, *given, folder=tmp_path)
    assert processes.wait() == [0, 0], log()
    assert (finished.read_bytes(), finished.stat().st_mtime_ns) == before
    report, alone = (json.loads((folder / "retention.json").read_text()) for folder in (out, whole))
    assert report["tasks"].keys() == alone["tasks"].keys() and report["num_images"] == alone["num_images"]
    # The base's images don't depend on the number of processes.
    assert report["scores"]["base"] == alone["scores"]["base"]


def test_what_the_report_would_refuse_is_refused_at_once(tmp_path, capsys):
    stages = shortened(tmp_path, teachers=["compose=base"])
    told = (
        "has trainer='opd' and teachers for ['compose']. The report needs",
        "--num_test_images 0: it must be at least 1.",
    )
    with command_refuses(capsys, *told):
        run(stages, tmp_path / "out", num_test_images=0)
    assert not (tmp_path / "out").exists()
