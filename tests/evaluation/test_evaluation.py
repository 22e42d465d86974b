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
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import SD3Transformer2DModel
from helpers.own_pipelines import large_pipeline, save_large
from helpers.tiny_sd3 import make_lora, make_pipeline, make_transformer
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image

from trl_diffusion_opd.algorithms.rollout import sample_generators
from trl_diffusion_opd.evaluation import draw_images, evaluate_retention
from trl_diffusion_opd.evaluation.retention import fixed_states_table, retention_report
from trl_diffusion_opd.models.teachers import TeacherConfig
from trl_diffusion_opd.pipelines import drawing
from trl_diffusion_opd.pipelines.velocity import VelocityField
from trl_diffusion_opd.reporting import plots
from trl_diffusion_opd.rewards import CombinedReward, Reward


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
    @pytest.mark.slow
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
        # Noise to try the rewards on. Base, warm, and warm at another guidance; two tasks of four images.
        assert decoded[0] == 1 and sum(decoded[1:]) == 3 * 2 * 4
        assert report["scores"]["teacher/cold"] == report["scores"]["base"]
        assert report["scores"]["same"] == report["scores"]["teacher/warm"] != report["scores"]["guided"]
        fixed = report["fixed_state_kl"]
        assert [list(of_task) for of_task in fixed.values()] == [["base", "same", "guided"]] * 2
        assert max(fixed["cold"]["base"]["kl"], fixed["warm"]["same"]["kl"]) < 1e-10
        assert min(fixed["warm"]["guided"].values()) > 1e-6
        # Base and teacher are as far apart in both tasks, but are asked at other states.
        there, back = fixed["warm"]["base"], fixed["cold"]["same"]
        assert there["on_images"] != pytest.approx(back["on_images"], rel=1e-3)
        assert there["kl"] == pytest.approx((there["on_trajectories"] + there["on_images"]) / 2)
        assert f"{there['on_images']:.2e} |" in fixed_states_table(report)

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

    def test_a_teacher_of_another_size_draws_through_its_own_pipeline(self, pipeline, folders, dataset, tmp_path):
        teacher = TeacherConfig(save_large(tmp_path / "large"), guidance_scale=3.0)
        report = evaluate_retention(
            pipeline, teacher, folders["student"], red, dataset, num_images=2, guidance_scale=1.0, **OPTIONS
        )
        own, reference = field_of(pipeline), field_of(large_pipeline())  # the student's levels

        def velocity(x, t, prompts):
            return reference(x, t, prompts, 3.0)

        for index, task in enumerate(("cold", "warm")):
            drawn = drawing.draw_with(own, velocity, PROMPTS[:2], entropy=[5, index], batch_size=2)
            expected = np.mean(red([], [image for _, image in drawn]))
            assert report["tasks"][task]["teacher"] == pytest.approx(expected, abs=2e-4)
            assert report["tasks"][task]["teacher"] != report["tasks"][task]["base"]
        with pytest.raises(ValueError, match="large: guidance_scale=0.5 does nothing"):
            teacher = replace(teacher, guidance_scale=0.5)
            evaluate_retention(pipeline, teacher, folders["student"], red, dataset, num_images=1, **OPTIONS)

    def test_rewards_get_columns_and_may_not_apply(self, pipeline, folders, dataset):
        dataset = dataset.map(lambda row, i: {"level": "low" if i % 3 == 1 else "high"}, with_indices=True)
        report = evaluate_retention(
            pipeline, "base", folders["student"], picky, dataset, num_images=3, guidance_scale=1.0, **OPTIONS
        )
        images = own_images(pipeline, PROMPTS[:3], 0, 1.0)
        assert report["tasks"]["cold"]["base"] == pytest.approx(np.mean(red([], [images[0], images[2]])), abs=2e-4)

    @pytest.mark.slow
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
            *("tasks", "mean_retention", "mean_ci95", "num_images", "seed", "scores", "scores_ci95"),
            *("settings", "guidance_scales", "weights_sha256", "fixed_state_kl"),
        }
        assert list(written["tasks"]) == ["cold", "warm"]
        assert set(written["tasks"]["cold"]) == {
            *("reward", "rewards", "num_images", "base", "teacher", "student", "retention", "ci95")
        }
        assert list(written["scores"]) == ["base", "teacher/cold", "teacher/warm", "student"]
        scores = json.loads((tmp_path / "out" / "retention_scores.json").read_text())
        assert len(scores["student"]["warm"]["red"]) == 5
        again = retention_report(scores, {"cold": "teacher/cold", "warm": "teacher/warm"}, ["student"], seed=5)
        assert again.items() <= report.items()
        for name in ("retention.png", "samples.png"):
            with Image.open(tmp_path / "out" / name) as image:
                assert min(image.size) > 200

    @pytest.mark.slow
    def test_every_reward_scores_every_task(self, pipeline, folders, dataset, tmp_path):
        """A reward of the package says None where it does not apply; the sum's parts are reported with it."""

        class High(Reward):
            name, columns, bounds = "high", ("level",), (0, 1)

            def _score(self, prompts, images, rows):
                return red(prompts, images)

        dataset = dataset.map(lambda row: {"level": "high" if row["task"] == "cold" else None})
        both = CombinedReward({red: 1.0, blue: 2.0})
        report = evaluate_retention(
            pipeline,
            "base",
            folders["student"],
            {"cold": High(), "warm": both},
            dataset,
            num_images=3,
            guidance_scale=1.0,
            output_dir=tmp_path,
            **OPTIONS,
        )
        base = report["scores"]["base"]
        assert list(base["cold"]) == ["high", "combined", "combined/red", "combined/blue"]
        assert list(base["warm"]) == ["combined", "combined/red", "combined/blue", "high"]
        assert base["warm"]["high"] is None and report["scores_ci95"]["base"]["warm"]["high"] is None
        assert report["tasks"]["warm"]["rewards"] == ["combined", "combined/red", "combined/blue"]
        images = {i: own_images(pipeline, PROMPTS[:3], i, 1.0) for i in (0, 1)}
        for task, of_task in zip(("cold", "warm"), images.values(), strict=True):
            assert base[task]["combined/blue"] == pytest.approx(np.mean(blue([], of_task)), abs=2e-4)
            expected = np.mean(red([], of_task)) + 2 * np.mean(blue([], of_task))
            assert base[task]["combined"] == pytest.approx(expected, abs=6e-4)
        low, high = report["scores_ci95"]["student"]["cold"]["combined/red"]
        assert low <= report["scores"]["student"]["cold"]["combined/red"] <= high
        table = (tmp_path / "retention.md").read_text()
        assert "## warm" in table and "**combined/red**" in table and f"{base['cold']['high']:.3f} (" in table
        assert (tmp_path / "radar.png").exists()  # four axes

    def test_a_function_that_another_task_breaks(self, pipeline, folders, dataset):
        def narrow(prompts, images, level, **columns):
            return [float(len(at)) for at in level]

        dataset = dataset.map(lambda row: {"level": "high" if row["task"] == "cold" else None})
        arguments = (pipeline, "base", folders["student"], {"cold": narrow, "warm": red}, dataset)
        options = {"num_images": 1, "guidance_scale": 1.0, **OPTIONS}
        with pytest.raises(ValueError) as error:
            evaluate_retention(*arguments, **options)
        assert "reward 'narrow' can't score an image of task 'warm', for the prompt 'a red fox': TypeError" in str(
            error.value
        )
        assert "Or set cross_task_rewards=False" in str(error.value) and isinstance(error.value.__cause__, TypeError)
        report = evaluate_retention(*arguments, cross_task_rewards=False, **options)
        assert list(report["scores"]["base"]["warm"]) == ["red"]

    def test_page_of_samples(self, pipeline, folders, tmp_path):
        odd = '<script>alert("&")</script> % #1'
        dataset = Dataset.from_list([{"prompt": p, "task": "../a b", "level": "low"} for p in (odd, "two")])
        evaluate_retention(
            pipeline,
            {"../a b": folders["cold"]},
            {"<i>x": folders["student"], "y": folders["warm"]},
            [red, picky],
            dataset,
            num_images=2,
            num_samples=2,
            guidance_scale=1.0,
            output_dir=tmp_path / "out",
            **OPTIONS,
        )
        page = PageParser()
        page.feed((tmp_path / "out" / "samples.html").read_text())
        assert "script" not in page.tags and "i" not in page.tags
        assert page.texts.count(odd) == 1
        assert page.texts.count("<i>x") == page.texts.count("teacher/../a b") == 2
        assert len(page.images) == 2 * 4  # base, teacher and two students
        root = (tmp_path / "out").resolve()
        for source in page.images:
            path = (root / unquote(source)).resolve()
            assert not source.startswith("/") and path.is_relative_to(root / "images")
            Image.open(path).verify()
        scores = json.loads((root / "retention_scores.json").read_text())
        for model in scores:
            assert f"{scores[model]['../a b']['red'][1]:.3f}" in page.texts
        assert "red" in page.texts and "picky" not in page.texts  # it applies to none of these


class PageParser(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.texts, self.images = set(), [], []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.images += [dict(attributes)["src"]] if tag == "img" else []

    def handle_data(self, data):
        self.texts.append(data.strip())


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

    def test_prompts_that_their_own_reward_cannot_score(self, pipeline, folders, dataset, monkeypatch):
        class Needy(Reward):
            name, columns, bounds = "needy", ("spec",), (0, 1)

        monkeypatch.setattr(VelocityField, "decode", lambda *arguments: pytest.fail("it has drawn"))
        with pytest.raises(
            ValueError, match="dataset: reward 'needy' can't score 3 of the 3 prompts of its task 'warm'"
        ):
            evaluate_retention(
                pipeline, "base", folders["student"], {"cold": red, "warm": Needy()}, dataset, **OPTIONS
            )

    @pytest.mark.parametrize(
        "changed, message",
        [
            (
                {"reward_funcs": "clip"},
                "There is no reward 'clip'. There are aesthetic, clip_image_similarity, clipscore,",
            ),
            ({"dtype": "float8"}, "dtype='float8': it must be one of float32, bfloat16, float16."),
            ({"dtype": "float32"}, "dtype is for a base that is given by name."),
            ({"num_samples": -1}, "num_samples=-1: it must be at least 0."),
            ({"students": {"teacher/cold": "base"}}, "A student is named 'teacher/cold'"),
            (
                {"pipeline": "no/such/base"},
                "neither a valid local path nor a valid repo id",
            ),
            ({"pipeline": str(Path(__file__).parent)}, "it needs a model_index.json and .safetensors weights"),
        ],
        ids=str,
    )
    def test_bad_input(self, pipeline, folders, dataset, changed, message):
        arguments = {
            "pipeline": pipeline,
            "teachers": "base",
            "students": folders["student"],
            "reward_funcs": red,
            "dataset": dataset,
            **changed,
        }
        with pytest.raises(ValueError) as error:
            evaluate_retention(**arguments, **OPTIONS)
        assert message in str(error.value)

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

    @pytest.mark.parametrize("num_axes", [3, 10])
    def test_radar(self, tmp_path, monkeypatch, num_axes):
        figures = []
        monkeypatch.setattr(plots, "_save", lambda figure, path, **options: figures.append(figure))
        rng = np.random.default_rng(0)
        names = [f"r{i}" for i in range(num_axes - 1)]
        values = {m: rng.random(num_axes) for m in ("base", "teacher/a", "teacher/b", "one", "two")}
        scores = {
            model: {
                "a": {name: [v, v] for name, v in zip(names, of_model, strict=False)} | {"other": [1.0, 1.0]},
                "b": {"last": [of_model[-1]] * 2, "none": [None, None]},
            }
            for model, of_model in values.items()
        }
        own = {"a": names, "b": ["last", "none"]}
        report = retention_report(scores, {"a": "teacher/a", "b": "teacher/b"}, ["one", "two"], own=own)
        axes_names = [*(("a", name) for name in names), ("b", "last")]
        assert (
            plots.radar_axes(report) == axes_names
        )  # without what applies to nothing, and without other tasks' rewards
        plots.plot_radar(report, tmp_path / "radar.png")
        (axes,) = figures[0].axes
        table = np.array(list(values.values()))
        expected = 0.25 + 0.75 * (table - table.min(0)) / (table.max(0) - table.min(0))
        lines = {line.get_label(): line for line in axes.lines}
        labels = ("base", "a teacher", "b teacher", "one", "two")
        for label, radii in zip(labels, expected, strict=True):
            np.testing.assert_allclose(lines[label].get_ydata(), [*radii, radii[0]])
            np.testing.assert_allclose(np.diff(lines[label].get_xdata())[:-1], 2 * np.pi / num_axes)
        texts = [text.get_text() for text in axes.texts]
        assert texts == [f"{t}\n{r}\nbest {b:.3f}" for (t, r), b in zip(axes_names, table.max(0), strict=True)]

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
            "loss": [[[5, 0.3], [10, 0.2]]],  # there is nothing better, such as a velocity gap
            "KL to the task's teacher": [[[5, 0.1], [10, 0.05]], [[5, 0.4], [10, 0.2]]],
            "reward in evaluation": [[[5, 0.5]], [[5, 0.6]]],
        }
        figures.clear()
        log = [{"step": 5, "loss": 0.3, "reward": 0.4, "reward/cold": 0.4, "rewards/red/mean": 0.4, "kl/cold": 0.1}]
        plots.plot_curves([*log, {"step": 5, "eval_cold/red": 0.5}], tmp_path / "curves.png")
        titles = ["reward in training", "KL to the base", "reward in evaluation"]
        assert [axes.get_title() for axes in figures[0].axes] == titles
        # What matters first is on the left. A KL that begins with 0 is logarithmic too.
        spread = [{"step": s, "loss": 0.0, "reward/a": 0.4, "reward_std": 0.1, "kl/a": 0.01 * s} for s in range(3)]
        gaps = [{"step": s, "loss": 0.1, "velocity_gap/a": 0.4, "kl/a": 0.1} for s in range(3)]
        losses = [{"step": s, "loss": 0.1, "loss/a": 0.1} for s in range(3)]
        for log, titles in (
            (spread, ["reward in training", "spread of the reward", "KL to the base"]),
            (gaps, ["velocity gap to the task's teacher", "KL to the task's teacher"]),
            (losses, ["loss"]),
        ):
            figures.clear()
            plots.plot_curves(log, tmp_path / "curves.png")
            assert [axes.get_title() for axes in figures[0].axes] == titles
            scales = {axes.get_title(): axes.get_yscale() for axes in figures[0].axes}
            assert all((scale == "log") == title.startswith("KL") for title, scale in scales.items())
        # Fewer updates than logging_steps: the run has trained, and goes on to its card.
        plots.plot_curves([{"step": 5, "train_runtime": 3.0, "train_loss": 0.1}], tmp_path / "none.png")
        assert len(figures) == 1
