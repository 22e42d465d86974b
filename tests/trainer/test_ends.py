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

"""What comes after training: pictures, reports and cards cannot lose what was trained, and are tried before it."""

import logging
import re
import unicodedata
from types import SimpleNamespace
from urllib.parse import quote

import numpy as np
import pytest
from datasets import Dataset
from helpers.opd_fixtures import make_config, make_dataset, make_trainer
from helpers.tiny_sd3 import SIZE, make_lora, make_pipeline
from matplotlib.mathtext import MathTextParser
from PIL import Image

from trl_diffusion_opd.acceleration import processes
from trl_diffusion_opd.evaluation import evaluate_retention, rehearse_report, report_problems, run
from trl_diffusion_opd.evaluation.retention import retention_report
from trl_diffusion_opd.evaluation.store import Store
from trl_diffusion_opd.guards.extras import extra
from trl_diffusion_opd.guards.files import file_name
from trl_diffusion_opd.pipelines.loading import load_pipeline
from trl_diffusion_opd.reporting import plots


# Formulas, markup, templates, paths, and no glyph of the font.
NAMES = ("$5 to $10", "_hidden", "a^b_{", r"\frac{$x", "<b>|{{ x }}", "../日本語\n")
OPTIONS = dict(num_inference_steps=2, **SIZE, guidance_scale=1.0)


def brightness(images, **columns):
    return [float(np.asarray(image).mean() / 255) for image in images]


@pytest.fixture
def formulas(monkeypatch):
    """What was read as a formula."""
    read = []
    parse = MathTextParser.parse
    monkeypatch.setattr(MathTextParser, "parse", lambda self, s, *a, **k: read.append(s) or parse(self, s, *a, **k))
    return read


def make_report(tasks, students=("student",)):
    rng = np.random.default_rng(0)
    models = ["base", *(f"teacher/{task}" for task in tasks), *students]
    scores = {m: {task: {task: rng.random(2).tolist()} for task in tasks} for m in models}
    own = {task: [task] for task in tasks}
    return retention_report(scores, {task: f"teacher/{task}" for task in tasks}, list(students), own=own)


@pytest.mark.filterwarnings("ignore:Glyph")
class TestTexts:
    def test_samples(self, tmp_path, formulas):
        image = Image.new("RGB", (8, 8))
        models = dict.fromkeys(("base", *NAMES[:2]), image)
        rows = [plots.SampleRow(name, f"{name} and {name}", models, dict.fromkeys(models, 0.5)) for name in NAMES]
        plots.plot_samples(rows, tmp_path / "samples.png")
        Image.open(tmp_path / "samples.png").verify()
        assert formulas == []

    def test_bars_and_radar(self, tmp_path, formulas, monkeypatch):
        figures = []
        save = plots._save
        monkeypatch.setattr(plots, "_save", lambda figure, *a, **k: figures.append(figure) or save(figure, *a, **k))
        report = make_report(NAMES, ("_mine", "$a$"))
        plots.plot_retention(report, tmp_path / "retention.png")
        plots.plot_radar(report, tmp_path / "radar.png")
        assert formulas == []
        shown = ["base", *(f"{name} teacher" for name in NAMES), "_mine", "$a$"]
        for figure in figures:  # matplotlib leaves out names that begin with "_"
            assert [text.get_text() for text in figure.legends[0].get_texts()] == shown

    def test_curves(self, tmp_path, formulas):
        log = [{"step": s, "loss": 10.0**-s, **{f"kl/{name}": 0.1 for name in NAMES}} for s in (1, 4)]
        log += [{"step": s, f"eval_{NAMES[0]}/{NAMES[i]}": 0.1} for s in (1, 4) for i in (0, 2)]
        plots.plot_curves(log, tmp_path / "curves.png")
        assert formulas and all("mathdefault" in text for text in formulas)  # a logarithmic axis' powers of ten

    def test_a_long_prompt_leaves_place_for_its_images(self):
        caption = plots._caption("word " * 500, 60)
        assert len(caption.splitlines()) == 4 and caption.endswith("…")
        assert plots._caption("two words", 60) == "two words"

    def test_pictures_have_a_largest_size(self, tmp_path, monkeypatch):
        monkeypatch.setattr(plots, "_LARGEST", 3.0)
        figures = []
        monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
        plots.plot_retention(make_report(NAMES), tmp_path / "retention.png")
        row = plots.SampleRow("a", "b", {"base": Image.new("RGB", (8, 8))}, {"base": None})
        plots.plot_samples([row] * 3, tmp_path / "samples.png")
        assert figures[0].get_figwidth() == 3 and figures[1].get_figheight() == 3
        assert 400 * 150 < 2**16


def test_file_names_of_tasks(tmp_path):
    store = Store(tmp_path, 0)
    long = ["字" * 300, "字" * 299 + "母", "字" * 30, "x" * 200, "X" * 200, "👩\u200d🚀" * 40]
    odd = [
        "..",
        ".",
        "a/b",
        "a\\b",
        "-rf",
        "~",
        "con",
        "NUL",
        "a.",
        "a ",
        " a",
        "a\0b",
        "a\x1b[31m\n",
        "\u202ea",
        "*?:|<>",
        "%2E",
    ]
    twins = [
        "A",
        "a",
        "Ab",
        "aB",
        "AB",
        "ab",
        "É",
        "é",
        "e\u0301",
        "A+559aead08264d579",
        "a+559aead08264d579",
        "\ud800",
    ]
    names = [*NAMES, *long, *odd, *twins]
    paths = [store.path("key", task, 0) for task in names]
    # Also where "A" and "a" are one file, and where accents are written in another way.
    assert len({unicodedata.normalize("NFD", str(path)).lower() for path in paths}) == len(names)
    for path, task in zip(paths, names, strict=True):
        assert re.fullmatch(r"[A-Za-z0-9_%+][A-Za-z0-9_%+-]{0,199}", path.parent.name)
        assert path.parent.name.lower() not in ("con", "nul", "aux")
        store.save("key", task, {0: Image.new("RGB", (2, 2))})
    for path in paths:
        assert path.is_file() and path.parent.parent == tmp_path / "images" / "key"


def test_a_plain_name_stays_as_it_is():
    assert [file_name(task) for task in ("ocr", "draw_2", "a-b", "日本")] == ["ocr", "draw_2", "a-b", quote("日本")]


class TestExtras:
    def test_an_error_is_a_warning(self, caplog):
        with extra("The picture x.png", "Make it later."):
            raise RuntimeError("no ink")
        (record,) = caplog.records
        assert record.levelno == logging.WARNING and record.exc_info is not None
        assert record.message.startswith(
            "The picture x.png could not be made, and the run goes on without it: RuntimeError: no ink"
        )
        with pytest.raises(KeyboardInterrupt), extra("x"):
            raise KeyboardInterrupt

    def test_a_report_without_its_pictures(self, tmp_path, monkeypatch, caplog):
        monkeypatch.setattr(plots, "_save", lambda *args, **options: 1 / 0)
        dataset = Dataset.from_dict({"prompt": ["a"], "task": ["x"]})
        pipeline = make_pipeline()
        make_lora(pipeline, tmp_path / "lora", 1)
        given = (pipeline, {"x": str(tmp_path / "lora")}, "base", brightness, dataset)
        report = evaluate_retention(*given, **OPTIONS, num_images=1, num_samples=1, output_dir=tmp_path / "out")
        assert set(report["tasks"]) == {"x"}
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert {"retention.json", "retention.md", "samples.html"} <= names and not any(
            n.endswith(".png") for n in names
        )
        assert [r.message.split(" could")[0] for r in caplog.records if "could not be made" in r.message] == [
            "The picture retention.png",
            "The picture samples.png",
        ]


class TestTogether:
    @pytest.fixture
    def told(self, monkeypatch):
        """What the processes tell, of which this one is the first."""
        others = [None]
        monkeypatch.setattr(processes, "PartialState", lambda: SimpleNamespace(num_processes=2))
        monkeypatch.setattr(processes, "gather_object", lambda mine: mine + others)
        return others

    def test_all_go_on(self, told):
        with processes.failing_together():
            pass

    def test_another_fails(self, told):
        told[0] = ("OSError: disk full", False)
        with pytest.raises(RuntimeError, match="Process 1 of 2 has failed.*OSError: disk full"):
            with processes.failing_together():
                pass

    def test_this_one_fails(self, told):
        with pytest.raises(ZeroDivisionError), processes.failing_together():
            _ = 1 / 0


class TestRehearsal:
    @pytest.fixture
    def trainer(self, tmp_path):
        return make_trainer(tmp_path, "base", train_dataset=make_dataset())

    def rehearse(self, trainer, functions):
        options = dict(task_column="task", seed=trainer.args.seed, guidance_scale=trainer.args.guidance_scale)
        with trainer.averaged_student() as student:
            rehearse_report(trainer.evaluator.field, student, functions, make_dataset(), **options)

    def test_every_reward_scores_every_task(self, trainer):
        seen = []

        def first(prompts, images, **columns):
            seen.append((prompts, images[0].size))
            return [None] * len(images)

        before = {name: value.clone() for name, value in trainer.student.named_parameters().items()}
        self.rehearse(trainer, {"count": [first], "draw": [brightness]})
        assert seen == [(["count0", "count1"], (16, 16)), (["draw0", "draw1"], (16, 16))]
        assert all(value.equal(before[name]) for name, value in trainer.student.named_parameters().items())

    def test_a_reward_that_would_end_the_report(self, trainer):
        def only_counts(prompts, images, **columns):
            return [int(prompt.removeprefix("count")) for prompt in prompts]

        message = "The report at the end would fail: reward 'only_counts' can't score an image of task 'draw', for .*'draw0': Val"
        with pytest.raises(ValueError, match=message):
            self.rehearse(trainer, {"count": [only_counts], "draw": [brightness]})

    def test_problems(self):
        def colour(images, colour, **columns):
            return [0.0] * len(images)

        dataset = make_dataset(a=1, b=1, c=1)
        problems = report_problems(
            {"a": "base", "b": "base"}, {"a": [colour], "c": [brightness]}, dataset, "task", "--test"
        )
        assert problems[:2] == [
            "--test: tasks ['c'] have no teacher to compare with. Name a teacher, or leave out their prompts.",
            "--test: tasks ['b'] have no reward. Name one in --reward_funcs.",
        ]
        assert "--test: reward 'colour' needs the column(s) 'colour'" in problems[2] and len(problems) == 3


class TestHowABaseIsLoaded:
    def test_the_report_loads_it_as_training_did(self, tmp_path, monkeypatch):
        make_pipeline().save_pretrained(tmp_path / "base", variant="fp16")
        base, kwargs = str(tmp_path / "base"), {"variant": "fp16"}
        config = make_config(tmp_path, model_init_kwargs=kwargs)
        trainer = make_trainer(tmp_path, "base", pipeline=base, model_init_kwargs=kwargs)
        trainer.create_model_card()
        assert 'variant="fp16")' in (tmp_path / "README.md").read_text()
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_pipeline(base, "float32")
        seen = []
        monkeypatch.setattr(run, "load_pipeline", lambda *args: seen.append(args) or load_pipeline(*args))
        dataset = Dataset.from_dict({"prompt": ["a"], "task": ["x"]})
        options = {**config.retention_options(), "num_images": 1}
        evaluate_retention(base, {"x": "base"}, "base", brightness, dataset, **options)
        assert seen == [(base, "float32", kwargs, None)]

    def test_of_one_that_is_loaded(self):
        with pytest.raises(
            ValueError, match="model_init_kwargs is for a base that is given by name. This one is loaded"
        ):
            evaluate_retention(
                make_pipeline(), "base", "base", brightness, make_dataset(), model_init_kwargs={"revision": "v2"}
            )

    @pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
    @pytest.mark.parametrize("value", ["bfloat16", "torch.bfloat16"])
    def test_a_dtype_by_its_name(self, tmp_path, name, value):
        make_pipeline().save_pretrained(tmp_path / "base")
        config = make_config(tmp_path, model_init_kwargs={name: value})
        assert config.dtype == config.retention_options()["dtype"] == "bfloat16"
        pipeline = load_pipeline(str(tmp_path / "base"), config.dtype, config.model_init_kwargs)
        assert str(pipeline.transformer.dtype) == "torch.bfloat16"
        by_part = load_pipeline(str(tmp_path / "base"), "float32", {name: {"vae": value, "default": "float32"}})
        assert (str(by_part.vae.dtype), str(by_part.transformer.dtype)) == ("torch.bfloat16", "torch.float32")

    @pytest.mark.parametrize("place", ["file", "folder"])
    def test_a_single_file(self, tmp_path, place):
        file = tmp_path / "sd3.safetensors"
        file.touch()
        name = str(file if place == "file" else tmp_path)
        expected = "is not a readable safetensors file" if place == "file" else "name that file: '.*sd3.safetensors'"
        with pytest.raises(ValueError, match=expected):
            make_trainer(tmp_path / "out", "base", pipeline=name)
        with pytest.raises(ValueError, match=expected):
            load_pipeline(name, "float32")
