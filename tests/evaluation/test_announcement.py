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


"""What an evaluation says before it draws, and what it finds out without drawing."""

import hashlib

import numpy as np
import pytest
from datasets import Dataset
from helpers.tiny_sd3 import SIZE, make_lora, make_pipeline

from trl_diffusion_opd.evaluation import evaluate_retention
from trl_diffusion_opd.evaluation import run as evaluation_run
from trl_diffusion_opd.evaluation.announcement import first_batch
from trl_diffusion_opd.evaluation.plan import Batch, Model
from trl_diffusion_opd.models.teacher_config import TeacherConfig
from trl_diffusion_opd.models.teachers import THE_BASE, Role


def red(prompts, images, **columns):
    return [float(np.asarray(image)[..., 0].mean() / 255) for image in images]


CALLS = []  # not in the function, whose content tells whether its scores are known


def costly(prompts, images, **columns):
    CALLS.append(len(images))
    return [0.0] * len(images)


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    root = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("cold", "student")):
        make_lora(make_pipeline(), root / name, seed=seed)
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture(autouse=True)
def no_fixed_states(monkeypatch):
    """Their forwards are not for images."""
    monkeypatch.setattr(evaluation_run, "measure_fixed_states", lambda *arguments: {})


def dataset(**counts):
    rows = [{"prompt": f"{task} {n}", "task": task} for task, count in counts.items() for n in range(count)]
    return Dataset.from_list(rows)


def evaluate(loras, rewards=red, data=None, **options):
    calls, pipeline = [], make_pipeline()
    pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    report = evaluate_retention(
        pipeline,
        {"cold": loras["cold"], "warm": "base"},
        loras["student"],
        rewards,
        data or dataset(cold=3, warm=2),
        **{"num_inference_steps": 2, "guidance_scale": 1.0, "batch_size": 2, **SIZE, **options},
    )
    return report, len(calls)


def shown(capsys):
    return " ".join(capsys.readouterr().out.split())


class TestAnnouncement:
    def test_one_image_a_prompt(self, loras, capsys):
        report, _ = evaluate(loras)
        text = shown(capsys)
        assert "3 models (base, 2 teachers, 1 student) x 5 images (3 cold, 2 warm) = 15" in text
        assert "16 x 16 px, 2 steps of the deterministic sampler, text up to 16 tokens (given)" in text
        assert "base 1, student 1 (given); teacher/cold 1, teacher/warm 1 (as the base)" in text
        assert "base = teacher/warm: the same model" in text and "nothing is kept on disk" in text
        assert "The first batch of 2 images took" in text and "8 batches are left, about" in text
        assert "repeated" not in text and "reused" not in text
        assert {task: one["num_images"] for task, one in report["tasks"].items()} == {"cold": 3, "warm": 2}
        assert report["num_images"] == 2
        assert report["guidance_scales"]["student"] == {"value": 1.0, "source": "given"}

    def test_at_most_512(self, loras, capsys):
        assert evaluate(loras, data=dataset(cold=600, warm=1), dry_run=True, batch_size=1)[0] is None
        assert "x 513 images (512 cold, 1 warm) = 1,539" in shown(capsys)

    def test_prompts_that_are_repeated_and_images_of_an_earlier_run(self, loras, capsys, tmp_path):
        evaluate(loras, num_images=2, output_dir=tmp_path, num_samples=0)
        assert "has 3 prompts" not in shown(capsys)
        report, calls = evaluate(loras, num_images=4, output_dir=tmp_path, num_samples=0)
        text = shown(capsys)
        assert "x 2 tasks x 4 images = 24" in text and "reused 12 images of an earlier run; 12 are drawn now" in text
        assert "task 'cold' has 3 prompts for its images: other noise each time" in text
        assert report["num_images"] == 4 and calls == 2 * 6
        evaluate(loras, num_images=4, output_dir=tmp_path, num_samples=0)
        assert "reused 24 images of an earlier run; nothing is drawn" in shown(capsys)

    def test_a_report_of_more_images_is_not_replaced_in_silence(self, loras, caplog, tmp_path):
        evaluate(loras, num_images=3, output_dir=tmp_path, num_samples=0)
        evaluate(loras, num_images=3, output_dir=tmp_path, num_samples=0)
        evaluate(loras, num_images=2, output_dir=tmp_path, num_samples=0, dry_run=True)
        assert "takes its place" not in caplog.text
        evaluate(loras, num_images=2, output_dir=tmp_path, num_samples=0)
        assert f"The report in {tmp_path} is of 3 images a task. This one, of 2, takes its place." in caplog.text

    def test_the_report_names_the_weights_that_it_measured(self, loras):
        report, _ = evaluate(loras, num_images=1)
        with open(f"{loras['student']}/adapter_model.safetensors", "rb") as file:
            assert report["weights_sha256"] == {"student": hashlib.file_digest(file, "sha256").hexdigest()}

    def test_the_pipelines_own_size_and_guidance(self, loras, capsys):
        own = dict.fromkeys(("height", "width", "max_sequence_length", "guidance_scale", "num_inference_steps"))
        evaluate(loras, num_images=1, dry_run=True, **own)
        size = make_pipeline()(["a"], num_inference_steps=1).images[0].size
        text = shown(capsys)
        assert f"{size[0]} x {size[1]} px, text as long as the pipeline takes (the pipeline's default)" in text
        assert "40 steps of the deterministic sampler (the package's default)" in text
        assert "base 7, student 7 (the pipeline's default)" in text

    def test_time_that_is_left(self):
        def batch(images, *scales, is_drawn=True):
            roles = [Role(THE_BASE, TeacherConfig("base"), scale, 1.0) for scale in scales]
            return Batch("a", Model(roles, ["x"]), "key", range(images), is_drawn, {"red": [0]})

        # 4 forwards take 10 s. Left are 8 with guidance, 4 of two teachers, 1 of a last image; what is scored is free.
        batches = [batch(4, 1.0), batch(4, 4.5), batch(2, 1.0, 1.0), batch(1, 1.0), batch(9, 1.0, is_drawn=False)]
        assert first_batch(batches, 10.0) == (
            "The first batch of 4 images took 10.0 s; 3 batches are left, about 32 s."
        )
        assert first_batch(batches[:1], 1.0) == "The first batch of 4 images took 1.0 s; it is the only one."


class TestDryRun:
    def test_one_batch_and_no_file(self, loras, capsys, tmp_path):
        report, calls = evaluate(loras, dry_run=True, output_dir=tmp_path / "out")
        assert report is None and calls == 2 and not (tmp_path / "out").exists()
        text = shown(capsys)
        assert "Dry run: 2 images took" in text and "Nothing was written." in text

    def test_nothing_to_draw(self, loras, capsys, tmp_path):
        evaluate(loras, output_dir=tmp_path, num_samples=0)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert evaluate(loras, dry_run=True, output_dir=tmp_path, num_samples=0) == (None, 0)
        assert "Dry run: nothing has to be drawn." in shown(capsys)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


class TestTrial:
    def test_all_problems_at_once_and_nothing_is_drawn(self, loras):
        tried = []

        def broken(prompts, images, **columns):
            tried.append((prompts, images[0].size))
            raise KeyError("label")

        def narrow(prompts, images, task, **columns):
            return [{"warm": 1.0}[of] for of in task]

        with pytest.raises(ValueError) as error:
            evaluate(loras, {"cold": [red, broken], "warm": narrow}, dry_run=True)
        header, own, other = str(error.value).split("\n")
        assert header == "The evaluation cannot start: every reward was tried on two images of every task:"
        assert own == (
            "- reward 'broken' can't score an image of its own task 'cold', for the prompt 'cold 0': KeyError: 'label' "
            f"(test_announcement.py, line {broken.__code__.co_firstlineno + 2})."
        )
        assert other.startswith("- reward 'narrow' can't score an image of task 'cold', for the prompt 'cold 0': KeyE")
        assert other.endswith(
            "Or set cross_task_rewards=False (--no_cross_task_rewards): then only a task's own "
            "rewards score its images."
        )
        assert tried == [(["cold 0", "cold 1"], (16, 16))]  # it fails on its own task, so others tell nothing more
        assert isinstance(error.value.__cause__, KeyError)

    def test_what_is_scored_already_is_not_tried(self, loras, tmp_path):
        CALLS.clear()
        evaluate(loras, costly, num_images=1, output_dir=tmp_path, num_samples=0)
        assert CALLS == [2] * 2 + [1] * (3 * 2)  # a trial of two images a task; then three models
        evaluate(loras, {"cold": [costly, red], "warm": costly}, num_images=1, output_dir=tmp_path, num_samples=0)
        assert len(CALLS) == 2 + 3 * 2
