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

import importlib.util
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

from trl_diffusion_opd import evaluation, plots
from trl_diffusion_opd.evaluation import draw_images, evaluate_retention
from trl_diffusion_opd.retention import (
    interval,
    resample_counts,
    resampled_means,
    retention_of,
    retention_report,
    retention_table,
)
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
    generators = sample_generators([evaluation._DRAWING, seed, task_index], range(len(prompts)))
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

    def test_a_part_of_a_list_has_its_own_noise(self, pipeline):
        whole = pixels([image for _, image in self.draw(pipeline)])
        part = self.draw(pipeline, PROMPTS[3:], offset=3)
        assert [i for i, _ in part] == [0, 1]
        assert abs(pixels([image for _, image in part]) - whole[3:]).max() <= 1

    def test_noise_is_never_that_of_training(self):
        def noise(entropy, index):
            return sample_generators(entropy, [index])[0].initial_seed()

        training = {
            noise([s, step, task], i) for s in range(4) for step in range(4) for task in range(3) for i in range(4)
        }
        drawing = [noise([evaluation._DRAWING, s, task], i) for s in range(4) for task in range(3) for i in range(4)]
        assert len(set(drawing)) == len(drawing)
        assert not training & set(drawing)


def make_scores(n=400, seed=0):
    """Two tasks; task b has no gain. Scores of one image are correlated between models, as with shared noise."""
    rng = np.random.default_rng(seed)
    scores = {}
    common = {task: rng.random(n) for task in "ab"}
    means = {"base": (0.4, 0.4), "teacher/a": (0.8, 0.1), "teacher/b": (0.2, 0.43), "student": (0.75, 0.4)}
    for model, of_tasks in means.items():
        scores[model] = {
            task: {"right": (0.6 * common[task] + 0.4 * rng.random(n) < mean).astype(float).tolist()}
            for task, mean in zip("ab", of_tasks, strict=True)
        }
    return scores


TEACHERS = {"a": "teacher/a", "b": "teacher/b"}


class TestReport:
    def test_means_and_retention(self):
        scores = make_scores()
        report = retention_report(scores, TEACHERS, ["student"], seed=3)
        x, y, z = (np.mean(scores[m]["a"]["right"]) for m in ("base", "teacher/a", "student"))
        entry = report["tasks"]["a"]
        assert entry["reward"] == "right"
        np.testing.assert_allclose([entry["base"], entry["teacher"], entry["student"]], [x, y, z], rtol=1e-12)
        assert entry["retention"] == pytest.approx((z - x) / (y - x), rel=1e-12)
        assert report["scores"]["teacher/b"]["a"]["right"] == pytest.approx(np.mean(scores["teacher/b"]["a"]["right"]))
        assert (report["num_images"], report["seed"]) == (400, 3)

    def test_a_gain_below_the_limit_has_no_retention(self):
        report = retention_report(make_scores(), TEACHERS, ["student"])
        entry = report["tasks"]["b"]
        assert entry["teacher"] - entry["base"] < 0.05
        assert entry["retention"] is None and entry["ci95"] is None
        assert report["mean_retention"] == report["tasks"]["a"]["retention"]  # over the tasks that have one
        none = retention_report(make_scores(), {"a": "base", "b": "base"}, ["student"])
        assert none["mean_retention"] is None and none["mean_ci95"] is None

    def test_retention_is_not_clipped(self):
        scores = {m: {"a": {"r": [v] * 8}} for m, v in (("base", 0.5), ("t", 0.6), ("over", 0.7), ("under", 0.3))}
        report = retention_report(scores, {"a": "t"}, ["over", "under"])
        assert report["tasks"]["a"]["retention"] == pytest.approx(2.0)
        assert report["tasks"]["a"]["students"]["under"]["retention"] == pytest.approx(-2.0)
        assert report["students"]["under"]["mean_retention"] == pytest.approx(-2.0)

    def test_bootstrap_is_the_brute_force_one(self):
        scores = make_scores(n=60)
        report = retention_report(scores, {"a": "teacher/a"}, ["student"], seed=7)
        values = {model: np.array(of["a"]["right"]) for model, of in scores.items()}
        ratios = []
        for row in resample_counts(60, [7, 0]):
            images = np.repeat(np.arange(60), row.astype(int))  # the same images for the three models
            x, y, z = (values[model][images].mean() for model in ("base", "teacher/a", "student"))
            ratios.append((z - x) / (y - x))
        assert len(ratios) == 2000
        np.testing.assert_allclose(report["tasks"]["a"]["ci95"], np.percentile(ratios, [2.5, 97.5]), rtol=1e-9)

    def test_resampling_is_joint(self):
        # A student with 0.9 of the gain on every single image has it on every resample.
        rng = np.random.default_rng(0)
        base, gain = rng.random(100), rng.random(100)
        scores = {m: {"a": {"r": (base + k * gain).tolist()}} for m, k in (("base", 0), ("t", 1), ("s", 0.9))}
        np.testing.assert_allclose(retention_report(scores, {"a": "t"}, ["s"])["tasks"]["a"]["ci95"], [0.9, 0.9])

    def test_intervals_have_the_width_of_theory(self):
        scores = make_scores(n=2000)
        report = retention_report(scores, TEACHERS, ["student"])
        x, y, z = (np.array(scores[m]["a"]["right"]) for m in ("base", "teacher/a", "student"))
        low, high = report["scores_ci95"]["student"]["a"]["right"]
        assert (high - low) / 2 == pytest.approx(1.96 * z.std() / np.sqrt(2000), rel=0.07)
        # Delta method for the quotient of paired means.
        ratio = (z - x).mean() / (y - x).mean()
        deviation = ((z - x) - ratio * (y - x)).std() / (y - x).mean() / np.sqrt(2000)
        low, high = report["tasks"]["a"]["ci95"]
        assert (high - low) / 2 == pytest.approx(1.96 * deviation, rel=0.07)
        assert low < ratio < high

    def test_counts_are_resamples_with_replacement(self):
        counts = resample_counts(10, [0, 0], num_resamples=20000)
        assert (counts.sum(1) == 10).all()
        np.testing.assert_allclose(counts.mean(0), 1, atol=0.03)
        assert (counts[:, 0] == 0).mean() == pytest.approx(0.9**10, abs=0.01)

    def test_missing_values_are_left_out(self):
        values = np.array([[1.0, np.nan, 3.0], [np.nan] * 3])
        counts = np.array([[2.0, 5.0, 1.0], [0.0, 3.0, 0.0]])
        np.testing.assert_allclose(resampled_means(values, counts), [[5 / 3, np.nan], [np.nan, np.nan]])
        scores = {m: {"a": {"r": [v, None, v]}} for m, v in (("base", 0.0), ("t", 1.0), ("s", 0.5))}
        report = retention_report(scores, {"a": "t"}, ["s"])
        assert (report["tasks"]["a"]["student"], report["tasks"]["a"]["retention"]) == (0.5, 0.5)
        never = {m: {"a": {"r": [None, None]}} for m in scores}
        assert retention_report(never, {"a": "t"}, ["s"])["tasks"]["a"]["base"] is None

    def test_an_interval_without_end_is_none(self):
        # A resample in which the teacher has no gain, or loses, has no retention.
        ratios = retention_of(np.array([0.0, 1.0, 1.0]), np.array([1.0, 1.0, 0.5]), np.array([0.5, 2.0, 0.4]))
        np.testing.assert_array_equal(ratios, [0.5, np.nan, np.nan])
        sample = np.linspace(0, 1, 1000)
        sample[:30] = np.nan
        assert interval(sample) is None
        sample[:20] = 0.5
        assert interval(sample) is not None
        # Six images: the gain is zero in many resamples.
        few = {
            m: {"a": {"r": v}} for m, v in (("base", [0, 0, 0, 1, 1, 1]), ("t", [0, 1, 0, 1, 1, 1]), ("s", [0] * 6))
        }
        entry = retention_report(few, {"a": "t"}, ["s"])["tasks"]["a"]
        assert entry["retention"] == pytest.approx(-3.0) and entry["ci95"] is None

    def test_table(self):
        scores = make_scores()
        report = retention_report(scores, TEACHERS, ["student"])
        lines = retention_table(report).splitlines()
        assert len({len(line) for line in lines}) == 1 and len(lines) == 5
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        assert cells[0] == ["task", "reward", "base", "teacher", "student", "retention", "95% interval"]
        entry = report["tasks"]["a"]
        assert cells[2][2:6] == [f"{entry[key]:.3f}" for key in ("base", "teacher", "student", "retention")]
        assert cells[3][5:] == ["–", "–"]
        assert cells[4][5] == f"**{report['mean_retention']:.3f}**"
        several = retention_table(retention_report({**scores, "late": scores["base"]}, TEACHERS, ["student", "late"]))
        assert several.count("| late") == 3 and several.count("| student") == 4


class TestBenchmark:
    def test_summary_over_seeds_is_the_brute_force_one(self):
        path = Path(__file__).parents[1] / "benchmarks" / "retention.py"
        spec = importlib.util.spec_from_file_location("retention_benchmark", path)
        benchmark = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(benchmark)
        reports, n = {}, 50
        for seed in range(3):
            scores = {m: {"a": of["a"], "b": of["a"]} for m, of in make_scores(n, seed).items()}
            report = retention_report(scores, {"a": "teacher/a", "b": "teacher/a"}, ["student"])
            scores |= {"teacher/b": scores["teacher/a"]}
            reports[seed] = {**report, "image_scores": scores}
        summary = benchmark.summarize(reports)
        values = [
            [np.array(reports[s]["image_scores"][m]["a"]["right"]) for m in ("base", "teacher/a", "student")]
            for s in range(3)
        ]
        points = [(z.mean() - x.mean()) / (y.mean() - x.mean()) for x, y, z in values]
        assert summary["tasks"]["a"]["retention"] == pytest.approx(np.mean(points), rel=1e-12)
        assert summary["tasks"]["a"]["teacher"] == pytest.approx(np.mean([y.mean() for _, y, _ in values]), rel=1e-12)
        # The same by loops, and other random numbers.
        rng = np.random.default_rng(1)
        tasks, overall = [], []
        for _ in range(4000):
            seeds = rng.integers(3, size=3)
            ratios = []
            for _ in "ab":
                images = rng.integers(n, size=n)
                means = [[v[images].mean() for v in values[s]] for s in seeds]
                ratios.append(np.mean([(z - x) / (y - x) for x, y, z in means]))
            tasks.append(ratios[0])
            overall.append(np.mean(ratios))
        np.testing.assert_allclose(summary["tasks"]["a"]["ci95"], np.percentile(tasks, [2.5, 97.5]), atol=0.03)
        np.testing.assert_allclose(summary["mean_ci95"], np.percentile(overall, [2.5, 97.5]), atol=0.03)
        assert benchmark.summary_table(summary).count("\n") == 4


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
        x = field.initial_latents(PROMPTS[:3], sample_generators([evaluation._DRAWING, 5, 0], range(3)))
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
            "retention.json",
            "retention.png",
            "retention_scores.json",
            "samples.png",
        ]
        written = json.loads((tmp_path / "out" / "retention.json").read_text())
        assert written == report
        assert set(written) == {
            *("tasks", "mean_retention", "mean_ci95", "num_images", "seed", "scores", "scores_ci95")
        }
        assert list(written["tasks"]) == ["cold", "warm"]
        assert set(written["tasks"]["cold"]) == {"reward", "base", "teacher", "student", "retention", "ci95"}
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
