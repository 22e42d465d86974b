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

import json
import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from diffusers import SD3Transformer2DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from tiny_sd3 import make_lora, make_pipeline, make_transformer

from trl_diffusion_opd import plots
from trl_diffusion_opd.evaluation import draw_images, drawing, evaluate_retention
from trl_diffusion_opd.retention import retention_report
from trl_diffusion_opd.rollout import sample_generators
from trl_diffusion_opd.teachers import TeacherConfig
from trl_diffusion_opd.velocity import VelocityField


STEPS, SIZE = 3, 16
OPTIONS = dict(num_inference_steps=STEPS, height=SIZE, width=SIZE, max_sequence_length=16, seed=5)
PROMPTS = ["a red fox", "two cats", "the moon", "a tall tree", "rain"]


def red(prompts, images, **kwargs):
    return [float(np.asarray(image)[..., 0].mean() / 255) for image in images]


def blue(prompts, images, **kwargs):
    return [float(np.asarray(image)[..., 2].mean() / 255) for image in images]


def picky(prompts, images, level, **kwargs):
    return [None if at == "low" else value for at, value in zip(level, red(prompts, images), strict=True)]


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline()


@pytest.fixture(scope="module")
def folders(pipeline, tmp_path_factory):
    root = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(["cold", "warm", "student"]):
        make_lora(pipeline, root / name, seed=seed + 10)
        make_lora(pipeline, root / name, seed=seed + 10, format="diffusers")  # the same weights, for diffusers to load
    make_transformer(seed=3).save_pretrained(root / "full")
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture
def dataset():
    rows = [{"prompt": p, "task": t, "level": "high"} for t in ("cold", "warm") for p in PROMPTS[:3]]
    return Dataset.from_list(rows)


def pixels(images):
    return np.stack([np.asarray(image, dtype=int) for image in images])


def field_of(pipeline, steps=STEPS):
    return VelocityField(pipeline, num_inference_steps=steps, height=SIZE, width=SIZE, max_sequence_length=16)


def own_images(pipeline, prompts, task_index, guidance_scale, seed=5):
    """The pipeline's own images from the evaluation's noise, in one batch."""
    generators = sample_generators([drawing.DRAWING, seed, task_index], range(len(prompts)))
    return pipeline(
        prompts,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        height=SIZE,
        width=SIZE,
        max_sequence_length=16,
        generator=generators,
    ).images


class TestDrawImages:
    def draw(self, pipeline, prompts=PROMPTS, transformer=None, **options):
        options = {"entropy": [5, 1], "guidance_scale": 2.0, "batch_size": 8, **options}
        return draw_images(field_of(pipeline), transformer or pipeline.transformer, prompts, **options)

    def test_is_the_pipelines_own_image(self, pipeline):
        drawn = self.draw(pipeline)
        assert [i for i, _ in drawn] == list(range(5))
        own = own_images(pipeline, PROMPTS, 1, 2.0)
        assert abs(pixels([image for _, image in drawn]) - pixels(own)).max() <= 1  # a level of 255
        assert abs(pixels(own) - pixels(own_images(pipeline, PROMPTS, 1, 1.0))).max() > 1

    @pytest.mark.parametrize("batch_size", [1, 2, 3])
    def test_does_not_depend_on_the_batch_size(self, pipeline, batch_size):
        whole = pixels([image for _, image in self.draw(pipeline)])
        parts = pixels([image for _, image in self.draw(pipeline, batch_size=batch_size)])
        assert abs(whole - parts).max() <= 1
        assert abs(whole[0] - whole[1]).max() > 10

    @pytest.mark.parametrize("world", [2, 3, 7])
    def test_processes_share_the_images_and_call_equally_often(self, pipeline, world):
        whole = pixels([image for _, image in self.draw(pipeline)])
        calls, drawn = [], []
        for rank in range(world):
            count = [0]

            def transformer(count=count, **inputs):
                count[0] += 1
                return pipeline.transformer(**inputs)

            mine = self.draw(pipeline, transformer=transformer, batch_size=2, process=(rank, world))
            assert all(i % world == rank for i, _ in mine)
            drawn += mine
            calls.append(count[0])
        assert len(set(calls)) == 1
        assert sorted(i for i, _ in drawn) == list(range(5))  # padding is dropped
        together = pixels([image for _, image in sorted(drawn, key=lambda item: item[0])])
        assert abs(whole - together).max() <= 1

    def test_batches_are_handed_on_as_they_are_drawn(self, pipeline):
        handed = []
        drawn = self.draw(pipeline, batch_size=2, process=(1, 2), on_batch=lambda *batch: handed.append(batch))
        assert [positions for positions, _ in handed] == [[1, 3]]  # the third one is only drawn to keep step
        assert [image for _, images in handed for image in images] == [image for _, image in drawn]
        handed.clear()
        self.draw(pipeline, batch_size=2, on_batch=lambda *batch: handed.append(batch))
        assert [positions for positions, _ in handed] == [[0, 1], [2, 3], [4]]

    def test_noise_is_never_that_of_training(self):
        def noise(entropy, index):
            return sample_generators(entropy, [index])[0].initial_seed()

        training = {
            noise([s, step, task], i) for s in range(4) for step in range(4) for task in range(3) for i in range(4)
        }
        ours = [noise([drawing.DRAWING, s, task], i) for s in range(4) for task in range(3) for i in range(4)]
        assert len(set(ours)) == len(ours)
        assert not training & set(ours)


class TestEvaluateRetention:
    def test_scores_are_those_of_the_pipeline_with_each_lora(self, pipeline, folders, dataset):
        """Base, teachers and students against diffusers' own loop on a pipeline that has loaded the LoRA."""
        report = evaluate_retention(
            pipeline,
            {"cold": folders["cold"], "warm": TeacherConfig(folders["warm"], guidance_scale=1.0)},
            {"student": folders["student"], "full": folders["full"]},
            {"cold": blue, "warm": [red, blue]},
            dataset,
            num_images=3,
            guidance_scale=2.0,
            teacher_guidance_scale=3.0,
            batch_size=2,
            **OPTIONS,
        )
        models = {
            "base": (None, 2.0),
            "teacher/cold": ("cold", 3.0),
            "teacher/warm": ("warm", 1.0),
            "student": ("student", 2.0),
        }
        for model, (folder, scale) in models.items():
            other = make_pipeline()
            if folder is not None:
                other.load_lora_weights(folders[folder])
            self.check(report, model, other, scale)
        other = make_pipeline()
        other.transformer = SD3Transformer2DModel.from_pretrained(folders["full"])
        self.check(report, "full", other, 2.0)
        values = [round(of["cold"]["blue"], 4) for of in report["scores"].values()]
        assert len(set(values)) == 5  # the models do differ
        assert list(report["scores"]["student"]["warm"]) == ["red", "blue"]
        assert report["tasks"]["warm"]["reward"] == "red"
        assert report["tasks"]["warm"]["teacher"] == report["scores"]["teacher/warm"]["warm"]["red"]
        assert report["tasks"]["cold"]["students"]["full"]["student"] == report["scores"]["full"]["cold"]["blue"]

    def check(self, report, model, pipeline, scale):
        for index, (task, reward) in enumerate((("cold", blue), ("warm", red))):
            images = own_images(pipeline, PROMPTS[:3], index, scale)
            expected = np.mean(reward([], images))
            assert report["scores"][model][task][reward.__name__] == pytest.approx(expected, abs=2e-4), (model, task)

    def test_several_teachers_are_their_weighted_mean_velocity(self, pipeline, folders, dataset):
        one, two = TeacherConfig(folders["cold"], weight=3.0), TeacherConfig(folders["warm"])
        teachers = {"cold": [one, replace(two, guidance_scale=1.0)], "warm": "base"}
        report = evaluate_retention(
            pipeline, teachers, folders["student"], red, dataset, num_images=3, guidance_scale=2.0, **OPTIONS
        )
        models = [make_lora(pipeline, Path(folders["cold"]).parent / "copy", seed=seed) for seed in (10, 11)]
        field = field_of(pipeline)
        x = field.initial_latents(PROMPTS[:3], sample_generators([drawing.DRAWING, 5, 0], range(3)))
        with torch.no_grad():
            for t, t_next in zip(field.levels[:-1].tolist(), field.levels[1:].tolist(), strict=True):
                v = [field(x, t, PROMPTS[:3], scale, m) for m, scale in zip(models, (2.0, 1.0), strict=True)]
                x = x + (t_next - t) * (0.75 * v[0] + 0.25 * v[1])
        expected = np.mean(red([], field.decode(x, PROMPTS[:3])))
        assert report["scores"]["teacher/cold"]["cold"]["red"] == pytest.approx(expected, abs=2e-4)

    def test_no_image_is_drawn_twice(self, pipeline, folders, dataset, monkeypatch):
        decoded = []
        decode = VelocityField.decode
        monkeypatch.setattr(
            VelocityField, "decode", lambda self, x, prompts: decoded.append(len(x)) or decode(self, x, prompts)
        )
        report = evaluate_retention(
            pipeline,
            {"cold": "base", "warm": folders["warm"]},
            {"same": folders["warm"], "guided": TeacherConfig(folders["warm"], guidance_scale=3.0)},
            red,
            dataset,
            num_images=4,
            guidance_scale=1.0,
            batch_size=3,
            **OPTIONS,
        )
        assert sum(decoded) == 3 * 2 * 4  # base, warm, and warm at another guidance; two tasks of four images
        assert report["scores"]["teacher/cold"] == report["scores"]["base"]
        assert report["scores"]["same"] == report["scores"]["teacher/warm"] != report["scores"]["guided"]

    def test_gives_the_pipeline_back_unchanged(self, pipeline, folders, dataset):
        pipeline = make_pipeline()
        pipeline.transformer.train()
        pipeline.transformer.pos_embed.eval()
        before = {
            name: {key: value.clone() for key, value in part.state_dict().items()}
            for name, part in pipeline.components.items()
            if isinstance(part, torch.nn.Module)
        }
        modes = {name: module.training for name, module in pipeline.transformer.named_modules()}
        modules = list(pipeline.transformer.modules())
        attributes, flags = (
            set(vars(pipeline.transformer)),
            [p.requires_grad for p in pipeline.transformer.parameters()],
        )

        def check():
            assert list(pipeline.transformer.modules()) == modules
            assert {name: module.training for name, module in pipeline.transformer.named_modules()} == modes
            assert set(vars(pipeline.transformer)) == attributes
            assert [p.requires_grad for p in pipeline.transformer.parameters()] == flags
            for name, state in before.items():
                after = pipeline.components[name].state_dict()
                assert after.keys() == state.keys() and all(torch.equal(after[key], state[key]) for key in state)

        evaluate_retention(pipeline, folders["cold"], folders["student"], red, dataset, num_images=1, **OPTIONS)
        check()
        with pytest.raises(ValueError, match="made for another base"):
            make_lora(make_pipeline_of(32), Path(folders["cold"]).parent / "wide", seed=0)
            wide = str(Path(folders["cold"]).parent / "wide")
            evaluate_retention(pipeline, folders["cold"], wide, red, dataset, num_images=1, **OPTIONS)
        check()
        pipeline.load_lora_weights(folders["warm"])  # no adapter of ours is in the way

    def test_rewards_get_columns_and_may_not_apply(self, pipeline, folders, dataset):
        dataset = dataset.map(lambda row, i: {"level": "low" if i % 3 == 1 else "high"}, with_indices=True)
        report = evaluate_retention(
            pipeline, "base", folders["student"], picky, dataset, num_images=3, guidance_scale=1.0, **OPTIONS
        )
        images = own_images(pipeline, PROMPTS[:3], 0, 1.0)
        assert report["tasks"]["cold"]["base"] == pytest.approx(np.mean(red([], [images[0], images[2]])), abs=2e-4)

    def test_files(self, pipeline, folders, dataset, tmp_path):
        report = evaluate_retention(
            pipeline,
            {"cold": folders["cold"], "warm": folders["warm"]},
            folders["student"],
            red,
            dataset,
            num_images=5,
            num_samples=2,
            output_dir=tmp_path / "out",
            **OPTIONS,
        )
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
            "images",
            "retention.json",
            "retention.md",
            "retention.png",  # but no radar of two axes
            "retention_scores.json",
            "samples.html",
            "samples.png",
            "scores",
            "timing.json",
        ]
        written = json.loads((tmp_path / "out" / "retention.json").read_text())
        assert written == report
        assert set(written) == {
            *("tasks", "mean_retention", "mean_ci95", "num_images", "seed", "scores", "scores_ci95")
        }
        assert list(written["tasks"]) == ["cold", "warm"]
        assert set(written["tasks"]["cold"]) == {
            *("reward", "rewards", "base", "teacher", "student", "retention", "ci95")
        }
        assert list(written["scores"]) == ["base", "teacher/cold", "teacher/warm", "student"]
        scores = json.loads((tmp_path / "out" / "retention_scores.json").read_text())
        assert len(scores["student"]["warm"]["red"]) == 5
        assert (
            retention_report(scores, {"cold": "teacher/cold", "warm": "teacher/warm"}, ["student"], seed=5) == report
        )
        for name in ("retention.png", "samples.png"):
            with Image.open(tmp_path / "out" / name) as image:
                assert min(image.size) > 200

    def test_two_processes_give_the_same_report(self, folders, tmp_path):
        """Three images on two processes in batches of one: the last chunk leaves one of them without an image."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        fork = multiprocessing.get_context("fork")  # importing everything twice more would take half a minute
        arguments = (port, folders, tmp_path / "two")
        processes = [fork.Process(target=evaluate_as, args=(rank, *arguments)) for rank in range(2)]
        for process in processes:
            process.start()
        alone = evaluate_three(folders, tmp_path / "alone")
        for process in processes:
            process.join(timeout=120)
            process.kill()
        assert [process.exitcode for process in processes] == [0, 0]
        assert (tmp_path / "two" / "samples.png").exists()
        scores, expected = (
            json.loads((tmp_path / name / "retention_scores.json").read_text()) for name in ("two", "alone")
        )
        assert list(alone["scores"]) == list(scores)
        for model in expected:
            np.testing.assert_allclose(scores[model]["one"]["picky"], expected[model]["one"]["picky"], atol=2e-3)
        assert len(np.unique(np.round(expected["base"]["one"]["picky"], 3))) == 3  # an exchange would be seen


def evaluate_three(folders, output_dir):
    rows = Dataset.from_list([{"prompt": prompt, "task": "one", "level": "high"} for prompt in PROMPTS[:3]])
    return evaluate_retention(
        make_pipeline(),
        folders["cold"],
        folders["student"],
        picky,
        rows,
        num_images=3,
        batch_size=1,
        output_dir=output_dir,
        num_samples=3,
        **OPTIONS,
    )


def evaluate_as(rank, port, folders, output_dir):
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    PartialState._reset_state()
    evaluate_three(folders, output_dir)
    assert PartialState().num_processes == 2


def make_pipeline_of(width):
    pipeline = make_pipeline()
    pipeline.transformer = make_transformer(attention_head_dim=width // 2)
    return pipeline


class TestRefusals:
    def test_all_in_one_message(self, pipeline, folders, dataset):
        with pytest.raises(ValueError) as error:
            evaluate_retention(
                pipeline,
                {"cold": folders["cold"], "odd": "base"},
                {"base": "no-such-folder"},
                {"cold": red},
                dataset,
                num_images=0,
                **OPTIONS,
            )
        message = str(error.value)
        for part in (
            "num_images=0: it must be at least 1.",
            "A student is named 'base'",
            "no teacher for task 'warm'",
            "no prompts for task 'odd'",
            "reward_funcs has no reward for task 'warm'.",
            "'no-such-folder' is neither an existing folder nor of the form",
        ):
            assert part in message

    def test_dataset_without_prompts(self, pipeline, folders):
        with pytest.raises(ValueError, match="dataset has no column 'prompt'"):
            evaluate_retention(
                pipeline, "base", folders["student"], red, Dataset.from_list([{"text": "a"}]), **OPTIONS
            )

    def test_no_student(self, pipeline, dataset):
        with pytest.raises(ValueError, match="There is no student to evaluate"):
            evaluate_retention(pipeline, "base", {}, red, dataset, **OPTIONS)

    def test_pipeline_with_a_lora(self, folders, dataset):
        pipeline = make_pipeline()
        pipeline.load_lora_weights(folders["warm"])
        with pytest.raises(ValueError, match="already carries a LoRA"):
            evaluate_retention(pipeline, "base", folders["student"], red, dataset, **OPTIONS)
        assert any(
            isinstance(module, BaseTunerLayer) for module in pipeline.transformer.modules()
        )  # it is still theirs


class TestPlots:
    def test_small_images_are_enlarged_by_whole_pixels(self):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
        large = np.asarray(plots._enlarged(image))
        assert large.shape == (256, 256, 3)
        assert (large[::8, ::8] == np.asarray(image)).all() and (large[7::8, 7::8] == np.asarray(image)).all()

    def test_curves_of_a_training_log(self, tmp_path, monkeypatch):
        figures = []
        monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
        log = [
            {"step": 5, "epoch": 0.1, "loss": 0.3, "kl": 0.2, "kl/cold": 0.1, "kl/warm": 0.4, "grad_norm": 1.0},
            {"step": 5, "eval_cold/red": 0.5, "eval_warm/red": 0.6, "eval_kl/cold": 9.0, "eval_loss": 9.0},
            {"step": 10, "loss": 0.2, "kl": 0.1, "kl/cold": 0.05, "kl/warm": 0.2},
            {"step": 10, "train_runtime": 3.0, "train_loss": 0.1},
        ]
        plots.plot_curves(log, tmp_path / "curves.png")
        lines = {
            axes.get_title(): [np.asarray(line.get_xydata()).tolist() for line in axes.lines]
            for axes in figures[0].axes
        }
        assert lines == {
            "loss": [[[5, 0.3], [10, 0.2]]],
            "KL to the task's teacher": [[[5, 0.1], [10, 0.05]], [[5, 0.4], [10, 0.2]]],
            "reward in evaluation": [[[5, 0.5]], [[5, 0.6]]],
        }
        with pytest.raises(ValueError, match="nothing to plot"):
            plots.plot_curves([{"step": 1, "epoch": 0.1}], tmp_path / "none.png")
