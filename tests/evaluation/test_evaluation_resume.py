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

"""An evaluation that is cut off, repeated or extended draws and scores only what is missing, and reports the same."""

import json
import linecache
import os
import signal
import threading
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from diffusers import DiffusionPipeline
from helpers.tiny_sd3 import make_lora, make_pipeline, make_transformer

from trl_diffusion_opd.evaluation import REPORT_FILE, evaluate_retention, measure, store
from trl_diffusion_opd.evaluation import run as evaluation_run
from trl_diffusion_opd.evaluation.fixed_states import NUM_SAMPLES, measure_fixed_states
from trl_diffusion_opd.evaluation.identity import reward_digest
from trl_diffusion_opd.evaluation.rehearsal import try_rewards
from trl_diffusion_opd.evaluation.store import Store
from trl_diffusion_opd.models.teachers import TeacherConfig
from trl_diffusion_opd.pipelines.fingerprints import base_digest
from trl_diffusion_opd.reporting import plots
from trl_diffusion_opd.rewards import Reward


STEPS, NUM_IMAGES, BATCH = 2, 5, 2
BATCHES = 3  # of a model for a task
FIXED = []  # how often each evaluation called the transformer for fixed states
CALLS = []  # not in the functions, whose content tells whether their scores are known


def red(prompts, images, **columns):
    CALLS.append(("red", len(images)))
    return [float(np.asarray(image)[..., 0].mean() / 255) for image in images]


def blue(prompts, images, task, **columns):
    CALLS.append(("blue", len(images)))
    values = [float(np.asarray(image)[..., 2].mean() / 255) for image in images]
    return [value if of == "warm" else None for value, of in zip(values, task, strict=True)]


def green(prompts, images, **columns):
    CALLS.append(("green", len(images)))
    return [float(np.asarray(image)[..., 1].mean() / 255) for image in images]


class Locked:
    """It can't be hashed."""

    def __init__(self):
        self.held = (number for number in ())

    def __call__(self, prompts, images, **columns):
        CALLS.append(("Locked", len(images)))
        return [0.5] * len(images)


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    root = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("cold", "warm", "student", "second")):
        make_lora(make_pipeline(), root / name, seed=seed + 10)
    return {path.name: str(path) for path in root.iterdir()}


def without_pictures(setattr):
    """They take most of the time, and are not drawn."""
    for name in ("plot_retention", "plot_samples", "plot_radar"):
        setattr(plots, name, lambda *arguments: None)


def uncounted(plan, image):
    """Tries the rewards, and forgets these calls."""
    before = list(CALLS)
    try_rewards(plan, image)
    CALLS[:] = before


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """The same rounding in this process and in those that are forked."""
    without_pictures(monkeypatch.setattr)
    monkeypatch.setattr(evaluation_run, "try_rewards", uncounted)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    CALLS.clear()
    yield
    torch.set_num_threads(threads)


def rows(suffix=""):
    return [{"prompt": f"{t} {p}{suffix}", "task": t} for t in ("cold", "warm") for p in ("fox", "moon", "rain")]


def evaluate(loras, folder, **options):
    """Runs the evaluation and returns how often it called the transformer, without the calls for fixed states."""
    pipeline, calls = make_pipeline(), []
    pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))

    def apart(*inputs):
        before = len(calls)
        fixed = measure_fixed_states(*inputs)
        FIXED.append(len(calls) - before)
        del calls[before:]
        return fixed

    arguments = {
        "teachers": {"cold": loras["cold"], "warm": loras["warm"]},
        "students": loras["student"],
        "reward_funcs": {"cold": red, "warm": blue},
        "dataset": Dataset.from_list(rows()),
        "num_images": NUM_IMAGES,
        "num_inference_steps": STEPS,
        "guidance_scale": 1.0,
        "height": 16,
        "width": 16,
        "max_sequence_length": 16,
        "batch_size": BATCH,
        "output_dir": folder,
        "num_samples": 1,
        **options,
    }
    with patch.object(evaluation_run, "measure_fixed_states", apart):
        evaluate_retention(pipeline, **arguments)
    return len(calls)


@pytest.fixture(scope="module")
def whole(loras, tmp_path_factory):
    """Folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    assert evaluate(loras, folder) == 4 * 2 * BATCHES * STEPS
    # Each of two teachers walks two steps and is asked at one noised image; base and student are asked at one level.
    assert FIXED[-1] == 2 * (NUM_SAMPLES // BATCH) * (STEPS + 1 + 2 * 2)
    return folder


def report_of(folder):
    return (Path(folder) / REPORT_FILE).read_bytes()


@pytest.mark.slow
class TestAgain:
    def test_nothing_is_done_twice(self, loras, whole):
        before = {path: path.read_bytes() for path in whole.rglob("*.json*") if path.is_file()}
        CALLS.clear()
        assert evaluate(loras, whole) == 0
        assert CALLS == [] and FIXED[-1] == 0
        assert {path: path.read_bytes() for path in whole.rglob("*.json*") if path.is_file()} == before

    def test_a_student_and_a_reward_are_added(self, loras, tmp_path):
        evaluate(loras, tmp_path)
        first = json.loads(report_of(tmp_path))
        CALLS.clear()
        students = {"student": loras["student"], "second": loras["second"], "copy": loras["warm"]}
        assert evaluate(loras, tmp_path, students=students) == 2 * BATCHES * STEPS  # the copy is a teacher's
        assert sorted(CALLS) == sorted(2 * [(name, n) for name in ("red", "blue") for n in (2, 2, 1)])
        CALLS.clear()
        assert evaluate(loras, tmp_path, reward_funcs={"cold": [red, green], "warm": blue}) == 0
        assert sorted(CALLS) == sorted(4 * 2 * [("green", n) for n in (2, 2, 1)])
        report = json.loads(report_of(tmp_path))
        assert report["tasks"]["cold"]["rewards"] == ["red", "green"]
        assert list(report["scores"]["base"]["warm"]) == ["blue", "red", "green"]
        for model, of_model in first["scores"].items():
            for task, of_task in of_model.items():
                assert of_task.items() <= report["scores"][model][task].items()

    def test_more_images_of_the_same(self, loras, tmp_path):
        evaluate(loras, tmp_path, num_images=2)
        assert evaluate(loras, tmp_path) == 4 * 2 * (BATCHES - 1) * STEPS

    @pytest.mark.parametrize(
        "changed",
        [
            {"guidance_scale": 2.0},
            {"seed": 1},
            {"num_inference_steps": 3},
            {"width": 32},
            {"max_sequence_length": 12},
            {"generation_kwargs": {"negative_prompt": "grey"}},
            {"dataset": Dataset.from_list(rows("!"))},
        ],
        ids=lambda changed: next(iter(changed)),
    )
    def test_another_setting_never_mixes(self, loras, whole, tmp_path, changed):
        evaluate(loras, tmp_path, num_images=1)
        ours = set(json.loads((tmp_path / "images" / "index.json").read_text())["base"].values())
        evaluate(loras, tmp_path, num_images=1, **changed)
        theirs = set(json.loads((tmp_path / "images" / "index.json").read_text())["base"].values())
        assert not ours & theirs
        assert evaluate(loras, tmp_path, num_images=1) == 0  # what was there is still right

    def test_other_weights_never_mix(self, loras, tmp_path):
        evaluate(loras, tmp_path / "out", num_images=1)
        make_lora(make_pipeline(), tmp_path / "student", seed=99)
        students = {"student": str(tmp_path / "student")}  # the name that the other one had
        assert evaluate(loras, tmp_path / "out", num_images=1, students=students) == 2 * STEPS
        teachers = {"cold": loras["cold"], "warm": [loras["warm"], TeacherConfig(loras["cold"], weight=2.0)]}
        assert evaluate(loras, tmp_path / "out", num_images=1, teachers=teachers) == 2 * 2 * STEPS

    def test_a_reward_that_cannot_be_told_scores_again(self, loras, tmp_path):
        evaluate(loras, tmp_path, reward_funcs=Locked(), num_images=1)
        CALLS.clear()
        assert evaluate(loras, tmp_path, reward_funcs=Locked(), num_images=1) == 0
        assert CALLS == [("Locked", 1)] * 8

    def test_changed_rows_are_scored_again(self, loras, tmp_path):
        dataset = Dataset.from_list([{**row, "target": 1} for row in rows()])
        evaluate(loras, tmp_path, num_images=1, dataset=dataset)
        CALLS.clear()
        changed = Dataset.from_list([{**row, "target": 2 if row["task"] == "warm" else 1} for row in rows()])
        assert evaluate(loras, tmp_path, num_images=1, dataset=changed) == 0
        assert sorted(CALLS) == [("blue", 1)] * 4 + [("red", 1)] * 4  # of one task

    def test_images_that_are_not_kept(self, loras, whole, tmp_path):
        evaluate(loras, tmp_path, keep_images=False)
        assert {path.name for path in tmp_path.glob("images/*/*/*")} == {"00000.png"}
        assert report_of(tmp_path) == report_of(whole)
        assert evaluate(loras, tmp_path, keep_images=False) == 0
        assert evaluate(loras, tmp_path) == 4 * 2 * BATCHES * STEPS  # now they are

    def test_damaged_and_lost_images_are_drawn_again(self, loras, whole, tmp_path):
        evaluate(loras, tmp_path)
        images = sorted(tmp_path.glob("images/*/*/*.png"))
        content = [image.read_bytes() for image in images]
        images[0].write_bytes(content[0][: len(content[0]) // 2])
        images[7].unlink()
        images[12].write_bytes(b"")
        for journal in tmp_path.glob("scores/*"):
            journal.unlink()
        assert evaluate(loras, tmp_path) == 3 * STEPS
        assert [image.read_bytes() for image in images] == content
        assert report_of(tmp_path) == report_of(whole)


def kill_at(owner, name, count, before=lambda *arguments: None):
    """Kills this process at a call of `owner.name`, as nothing else does: no cleanup, no buffers."""
    function, calls = getattr(owner, name), []

    def killing(*arguments, **options):
        calls.append(1)
        if len(calls) == count:
            before(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    setattr(owner, name, killing)


def half_a_line(self, identity, values):
    with open(self._journal, "a") as file:
        file.write('\n{"images": "0123456789", "score": "re')


KILLED = {
    "first": lambda: kill_at(measure, "draw_batch", 1),
    "while drawing": lambda: kill_at(measure, "draw_batch", 8),
    "with half an image": lambda: kill_at(store.os, "replace", 9, lambda path, _: path.write_bytes(b"\x89PNG half")),
    "in the middle of a batch": lambda: kill_at(store.os, "replace", 10),
    "with half a score": lambda: kill_at(Store, "record", 7, half_a_line),
    "before the report": lambda: kill_at(measure, "gather_object", 1),
    "each of two": lambda: kill_at(measure, "draw_batch", 4 + int(os.environ["RANK"])),
}


def evaluate_in_process(loras, folder, world, where=None):
    """What one of so many processes does, which is killed at a place of `KILLED`, if it is."""
    without_pictures(setattr)
    if where:
        KILLED[where]()
    evaluate(loras, folder)
    assert PartialState().num_processes == world


def codes(processes, loras, folder, world=1, where=None):
    """The exit statuses of so many processes that evaluate together."""
    return [one.code for one in processes.run(evaluate_in_process, loras, folder, world, where, world=world)]


def missing_batches(folder):
    """How many of the 24 batches lack an image."""
    names = [{f"{n:05d}.png" for n in batch} for batch in ((0, 1), (2, 3), (4,))]
    folders = [{path.name for path in part.glob("*.png")} for part in Path(folder).glob("images/*/*/")]
    return 24 - sum(batch <= present for present in folders for batch in names)


class TestKilled:
    @pytest.mark.parametrize("where", [where for where in KILLED if where != "each of two"])
    def test_goes_on_where_it_stopped(self, loras, whole, tmp_path, processes, where):
        assert codes(processes, loras, tmp_path, where=where) == [-signal.SIGKILL]
        assert not (tmp_path / REPORT_FILE).exists()
        missing = missing_batches(tmp_path)
        assert missing == {"first": 24, "before the report": 0}.get(where, missing)
        assert evaluate(loras, tmp_path) == missing * STEPS
        assert report_of(tmp_path) == report_of(whole)
        scored = (tmp_path / "retention_scores.json").read_bytes()
        assert scored == (whole / "retention_scores.json").read_bytes()
        assert not list(tmp_path.rglob("*.tmp"))
        CALLS.clear()
        assert evaluate(loras, tmp_path) == 0 and CALLS == []  # all scores were kept, half a line or not

    def test_two_processes_and_then_one(self, loras, whole, tmp_path, processes):
        assert codes(processes, loras, tmp_path / "whole", world=2) == [0, 0]
        assert report_of(tmp_path / "whole") == report_of(whole)
        assert len(list((tmp_path / "whole" / "scores").iterdir())) == 2  # both worked

        assert codes(processes, loras, tmp_path / "cut", world=2, where="each of two") == [-signal.SIGKILL] * 2
        missing = missing_batches(tmp_path / "cut")
        assert missing == 24 - 3 - 4
        assert evaluate(loras, tmp_path / "cut") == missing * STEPS
        assert report_of(tmp_path / "cut") == report_of(whole)
        # And the other way round.
        assert codes(processes, loras, tmp_path / "one", where="while drawing") == [-signal.SIGKILL]
        assert codes(processes, loras, tmp_path / "one", world=2) == [0, 0]
        assert report_of(tmp_path / "one") == report_of(whole)


class TestDigests:
    def test_a_base_is_itself_wherever_it_was_loaded(self, tmp_path):
        pipeline = make_pipeline()
        digest = base_digest(pipeline)
        pipeline.save_pretrained(tmp_path / "base")
        assert base_digest(DiffusionPipeline.from_pretrained(tmp_path / "base")) == digest
        assert base_digest(make_pipeline(seed=1)) != digest

    @pytest.mark.parametrize("part", ["transformer", "text_encoder_2", "vae", "dtype", "config", "scheduler"])
    def test_a_base_is_not_another(self, part):
        pipeline = make_pipeline()
        digest = base_digest(pipeline)
        if part == "dtype":
            pipeline.to(torch.bfloat16)
        elif part == "config":
            pipeline.vae.register_to_config(scaling_factor=2.0)
        elif part == "scheduler":
            pipeline.scheduler.register_to_config(shift=1.0)
        else:
            parameter = list(getattr(pipeline, part).parameters())[-1]
            parameter.data.flatten()[-1:] += 1e-3
        assert base_digest(pipeline) != digest

    def test_rewards(self, tmp_path, monkeypatch):
        class Named(Reward):
            name = "named"

        assert reward_digest(Named()) == "named"
        assert reward_digest(red) == reward_digest(red) != reward_digest(green)
        assert reward_digest(Locked()) is None
        # A function that can be imported: its module may change while its name stays.
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "rewards_of_mine.py").write_text("LIMIT = 1\n\ndef mine(images, **_):\n    return [LIMIT]\n")
        from rewards_of_mine import mine

        before = reward_digest(mine)
        (tmp_path / "rewards_of_mine.py").write_text("LIMIT = 22\n\ndef mine(images, **_):\n    return [LIMIT]\n")
        linecache.checkcache()
        assert reward_digest(mine) != before


def test_scoring_works_while_the_next_batch_is_drawn(loras, tmp_path, monkeypatch):
    drawn, waited = threading.Semaphore(0), []
    draw = measure.draw_batch

    def drawing(*arguments):
        drawn.release()
        return draw(*arguments)

    def patient(prompts, images, **columns):
        # It is called for the first batch after that is drawn, and waits for the second one to begin.
        waited.append(all(waited) and drawn.acquire() and (len(waited) == 23 or drawn.acquire(timeout=20)))
        drawn.release()
        return [0.0] * len(images)

    monkeypatch.setattr(measure, "draw_batch", drawing)
    monkeypatch.setattr(evaluation_run, "try_rewards", lambda *arguments: None)  # nothing is drawn yet
    evaluate(loras, None, reward_funcs=patient)
    assert waited == [True] * 24


def test_transformer_of_a_full_student_is_told_by_its_files(loras, tmp_path):
    make_transformer(seed=3).save_pretrained(tmp_path / "full")
    students = {"full": str(tmp_path / "full")}
    evaluate(loras, tmp_path / "out", num_images=1, students=students)
    index = json.loads((tmp_path / "out" / "images" / "index.json").read_text())
    make_transformer(seed=4).save_pretrained(tmp_path / "full")
    evaluate(loras, tmp_path / "out", num_images=1, students=students)
    assert json.loads((tmp_path / "out" / "images" / "index.json").read_text())["full"] != index["full"]
