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

"""What a stranger's text may do where it is shown: nothing. Cards, pages, tables and messages with hostile names in them."""

import ast
import copy
import json
import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from helpers.card_helpers import FIELDS, REPORT, read_card, shown_lora, stand_in, write_card, write_report
from helpers.tiny_sd3 import make_lora, make_pipeline
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token
from peft import get_peft_model
from PIL import Image

from trl_diffusion_opd.data.readers import Readers
from trl_diffusion_opd.evaluation.files import samples_page
from trl_diffusion_opd.evaluation.measure import Measured
from trl_diffusion_opd.evaluation.plan import Task
from trl_diffusion_opd.evaluation.retention import retention_table, scores_table
from trl_diffusion_opd.evaluation.store import Store
from trl_diffusion_opd.guards.extras import extra
from trl_diffusion_opd.guards.markdown import cell, code, inline, literal
from trl_diffusion_opd.guards.redaction import visible
from trl_diffusion_opd.models.teacher_config import normalize_teachers
from trl_diffusion_opd.problems import Problems
from trl_diffusion_opd.reporting import console as tables
from trl_diffusion_opd.reporting.completions import Completion, completions_table
from trl_diffusion_opd.reporting.teacher_card import write_teacher_card


ODD = [
    "a\n\n# Heading\n\n---\n",
    "a\r\n| b | c |\r\n|---|---|\r\n| d | e |",
    "<img src=x onerror=alert(1)><script>alert(1)</script><!-- ",
    "<http://evil.example>",
    "![p](http://evil.example/p.png) [l](http://evil.example 't')",
    "[l][r]\n\n[r]: http://evil.example",
    "[l](javascript:alert(1)) ![p](//evil.example/p.png)",
    "]( x ) [ ] [^1]",
    "a|b\\|c\\\\|d\\",
    "`code` and `` ` ``",
    "http://a|b\\|`c`",
    "**bold** *it* _it_ __b__ ~~s~~ ~s~ a_b_c",
    "&lt;b&gt; &#60;b&#62; &amp; AT&T",
    "www.evil.example and me@evil.example",
    "$\\href{http://x}{y}$ and $$x$$",
    "\x1b[31mred\x1b[0m\x07\x08\x9b2J\x7f",
    "\u202egpj.exe\u2066 \u200f\ufeff\U000e0041",
    "---\ntags:\n- evil\n---",
    "x\u2028# y\u2029# z\x85# w\x0b# v",
    "```\n# out\n```",
    '"; import os #',
    "{{ 7 * 7 }}{% raw %}",
    "- a\n+ b\n1. c\n> d",
    "字" * 30 + "é ß ا 👩\u200d🚀",
]
ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\U000e0000-\U000e007f]")
MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


def tokens(text: str) -> list[Token]:
    """All that a text makes, the parts of lines as well."""
    found = MARKDOWN.parse(text)
    return [part for token in found for part in (token, *(token.children or ()))]


def made(text: str) -> list[str]:
    """What a text makes but for words."""
    plain = ("text", "text_special", "code_inline", "softbreak", "inline")
    return [f"{t.type} {t.attrs.get('href', '')}{t.attrs.get('src', '')}" for t in tokens(text) if t.type not in plain]


def python(text: str) -> list[str]:
    return [token.content for token in MARKDOWN.parse(text) if (token.type, token.info) == ("fence", "python")]


def calls(block: str) -> int:
    return sum(isinstance(node, ast.Call) for node in ast.walk(ast.parse(block)))


def expected(text: str) -> str:
    return visible(" ".join(text.split()))


@pytest.mark.parametrize("odd", ODD)
class TestMarkdown:
    def test_a_cell(self, odd):
        table = f"| a | b |\n|---|---|\n| {cell(odd)} | {cell('tame')} |\n\nafter"
        assert made(table) == made("| a | b |\n|---|---|\n| c | tame |\n\nafter")
        words = "".join(t.content for t in tokens(table) if t.type in ("text", "text_special", "code_inline"))
        # Lossless, but for the bars of what is shown as code.
        assert words in {f"ab{bars}tameafter" for bars in (expected(odd), expected(odd).replace("|", "¦"))}

    def test_a_heading_and_a_line(self, odd):
        text = (
            f"# {inline(odd)}\n\nIt is **{inline(odd)}**, {code(odd)} and [{inline(odd)}](https://here.example/x).\n"
        )
        tame = "# tame\n\nIt is **tame**, `tame` and [tame](https://here.example/x).\n"
        assert made(text) == made(tame)
        (words,) = [token.content for token in tokens(text)[-9:] if token.type == "code_inline"][:1]
        assert words == expected(odd) or "://" in odd or "$" in odd or "@" in odd

    def test_nothing_links_by_itself(self, odd):
        # GitHub's rules, which no renderer here has: in what is no code.
        for token in tokens(f"| {cell(odd)} |\n|---|\n"):
            if token.type in ("text", "text_special"):
                assert not re.search(r"https?://|www\.|\w@\w", token.content)

    def test_a_literal(self, odd):
        assert ast.literal_eval(literal(odd)) == odd and not ACTING.search(literal(odd)) and "\n" not in literal(odd)

    def test_tables_of_a_report_and_of_completions(self, odd):
        def report(name: str) -> dict:
            of_task = {"reward": name, "rewards": [name], "base": 0.1, "teacher": 0.9, "student": 0.5, "ci95": None}
            of_task["num_images"] = 4
            scores = {model: {name: {name: 0.5}} for model in ("base", f"s{name}")}
            return {
                "tasks": {
                    name: {**of_task, "retention": 0.5, "students": {f"s{name}": {**of_task, "retention": 0.5}}}
                },
                "mean_retention": 0.5,
                "students": {f"s{name}": {"mean_retention": 0.5, "mean_ci95": None}},
                "scores": scores,
                "scores_ci95": {model: {name: {name: None}} for model in scores},
            }

        for table in (retention_table, scores_table):
            assert made(table(report(odd))) == made(table(report("tame")))
            assert not ACTING.search(table(report(odd)))
        image = Image.new("RGB", (2, 2))
        rows = [
            completions_table([Completion(name, name, image, {name: 1.0})], {name: [1.0]}) for name in (odd, "tame")
        ]
        assert made(rows[0]) == made(rows[1])


def test_ordinary_names_stay_as_they_are():
    for name in ("ocr", "reward_time", "clip-score 2.0", "x (y)", "Qwen/Image", "attn.to_out.0", "rank 4, alpha 8"):
        assert cell(name) == name
    assert len(cell("x" * 10**6)) == 1000


class TestCards:
    @pytest.fixture(scope="class")
    def pipeline(self, tmp_path_factory):
        pipeline = make_pipeline()
        pipeline.register_to_config(_name_or_path=str(tmp_path_factory.mktemp("model")))
        return pipeline

    def test_of_a_student(self, pipeline, hub, tmp_path):
        def card(named, folder: Path):
            """A card in which every name is made by `named`."""
            own = copy.deepcopy(pipeline)
            trainer = stand_in(own, folder, get_peft_model(own.transformer, shown_lora()))
            teacher = FIELDS["teachers"]["ocr"][0] | {"source": named("source"), "subfolder": named("folder")}
            local = teacher | {"revision": None}
            trainer._card_fields = lambda: {
                "teachers": {named(f"task{i}"): [teacher, local] for i in range(len(ODD))},
                "settings": {f"rewards of {named('s')}": named("reward")},
            }
            trainer.tasks = [named(f"task{i}") for i in range(len(ODD))]
            trainer.student.model.peft_config["default"].target_modules = {named(f"layer{i}") for i in range(3)}
            changes = [{"after": 3, "name": f"prompts of {named('t')}", "then": named("u"), "now": None}]
            trainer.train_dataset = Dataset.from_dict({"prompt": [named("prompt")]})
            tasks = {
                named(f"task{i}"): {**row, "reward": named("reward")}
                for i in range(len(ODD))
                for row in [REPORT["tasks"]["ocr"]]
            }
            write_report(folder / "out", REPORT | {"tasks": tasks})
            trainer.changes = changes
            write_card(trainer, named("model"), tags=[named("tag")])
            return read_card(trainer)

        odd, tame = card(odd_names(), tmp_path / "odd"), card(lambda name: name, tmp_path / "tame")
        hrefs = [line for line in made(odd.text) if line.startswith("link_open") and "/teachers" not in line]
        assert all(line.split()[1].startswith(("https://huggingface.co/", "https://github.com/hug")) for line in hrefs)
        assert [line.split()[0] for line in made(odd.text)] == [line.split()[0] for line in made(tame.text)]
        assert not ACTING.search(odd.content)
        odd.validate()
        assert odd.data.to_dict().keys() == tame.data.to_dict().keys() and len(odd.data.eval_results) == 2 * len(ODD)
        assert [calls(block) for block in python(odd.text)] == [calls(block) for block in python(tame.text)]

    @pytest.mark.parametrize("odd", ODD[:6] + ODD[15:21])
    def test_of_a_teacher(self, odd, pipeline, hub, tmp_path):
        def card(name: str, folder: Path) -> str:
            config = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {}}))
            report = REPORT | {
                "tasks": {name: {**REPORT["tasks"]["ocr"], "reward": name}, "style": REPORT["tasks"]["style"]},
                "scores": {},
                "scores_ci95": {},
            }
            call = {"prompt": name, "num_inference_steps": 4}
            path = write_teacher_card(folder, name.replace("/", "_"), name, 2.0, call, report=report, subfolder=name)
            return ModelCard.load(path).text

        texts = []
        for name in (odd, "no id of a repository"):
            make_lora(pipeline, tmp_path / str(len(texts)), 1)
            texts.append(card(name, tmp_path / str(len(texts))))
        assert [line.split()[0] for line in made(texts[0])] == [line.split()[0] for line in made(texts[1])]
        assert not ACTING.search(texts[0])
        assert [calls(block) for block in python(texts[0])] == [calls(block) for block in python(texts[1])]


def odd_names():
    """Names that are one of [`ODD`] each, in turn, and differ."""
    numbers = iter(range(10**6))

    def named(name: str) -> str:
        known.setdefault(name, f"{ODD[next(numbers) % len(ODD)]}{name}")
        return known[name]

    known: dict[str, str] = {}
    return named


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, tuple(name for name, _ in attributes)))

    def handle_comment(self, data):
        self.tags.append(("comment", ()))


@pytest.mark.parametrize("odd", [*ODD, "\"' onload=alert(1) x='", "</style></dd><iframe src=//evil.example>"])
def test_the_page_of_samples(odd, tmp_path):
    def page(name: str, folder: Path) -> str:
        store = Store(folder, 0)
        store.save("key", name, {0: Image.new("RGB", (4, 4))})
        models = ["base", f"teacher/{name}", name]
        scores = {model: {name: {name: [0.5]}} for model in models}
        measured = Measured(scores, {(model, name): "key" for model in models}, {}, 0)
        task = Task(name, 0, Readers(), Dataset.from_dict({"prompt": [name]}), [], [], 1)
        return samples_page(store, {"tasks": {name: {"reward": name}}}, measured, {name: task}, 1)

    text = page(odd, tmp_path / "odd")
    assert Page(text).tags == Page(page("tame", tmp_path / "tame")).tags
    assert not ACTING.search(text.replace("\r", ""))


class TestConsole:
    def test_tables_and_lines(self, capsys):
        rewards = {odd: [1.0] * len(ODD) for odd in ODD[:2]} | {"\x1b[31m": [0.0] * len(ODD)}
        tables.print_completions([(odd, odd) for odd in ODD], rewards, 3)
        for odd in ODD:
            tables.print_line(odd)
        tables.print_line("\x1b" * 10**5)
        out = capsys.readouterr().out
        assert not ACTING.search(out) and r"\x1b[31m" in out and r"\u202egpj" in out and "é ß ا" in out
        assert len(out) < 100_000

    def test_warnings(self, caplog):
        with extra("A picture"):
            raise ValueError("\x1b]0;title\x07" + "k" * 10**5)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING and not ACTING.search(record.message) and len(record.message) < 1000


class TestTheMessage:
    def test_teachers_of_odd_tasks(self):
        with pytest.raises(ValueError, match="The teachers do not fit") as caught:
            normalize_teachers(dict.fromkeys(ODD, "nowhere/at/all/../x"), ODD[1:])
        lines = str(caught.value).split("\n")
        assert not ACTING.search(str(caught.value)) and all(line.startswith("- ") for line in lines[1:])
        assert len(lines) == 2 + len(ODD) - 1

    def test_no_line_is_without_end(self):
        problems = Problems()
        with problems.collect():
            raise ValueError(f"The teachers do not fit:\n- {'k' * 10**5} is no key\u2028- forged\x1b[2J")
        problems += ["b", "b"]
        with pytest.raises(ValueError, match="Wrong:") as caught:
            problems.raise_under("Wrong")
        text = str(caught.value)
        assert (
            text.startswith("Wrong:\n- The teachers do not fit:\n  - kkk")
            and text.endswith("\n- b")
            and text.count("\n") == 3
        )
        assert r" is no key\u2028- forged\x1b[2J" in text and "…" in text and len(text) < 2200
        with pytest.raises(ValueError, match=r"^Two:\n- a\n  - b\n- a\\x1b\[2J\n\\u202eb$"):
            Problems(["a\n  - b", "a\n  - b", "a\x1b[2J\n\u202eb"]).raise_under("Two")


def test_a_long_name_of_a_task_is_refused():
    from trl_diffusion_opd.data.tasks import dataset_problems

    dataset = Dataset.from_dict({"prompt": ["a"] * 3, "task": ["字" * 200, "x" * 201, "y" * 10**5]})
    (problem,) = dataset_problems(dataset, "task", "train_dataset")
    assert problem.startswith(
        "train_dataset has 2 row(s) with a task name of more than 200 characters, the first in row 1: 'xx"
    )
    assert len(problem) < 300


def test_what_a_server_says_is_cut(monkeypatch):
    from trl_diffusion_opd.hub.errors import http_reason

    said = http_reason(OSError("\x1b[31m" + "no " * 10**5 + "Bearer hf_" + "a1" * 20))
    assert not ACTING.search(said) and len(said) == 300
    token = SimpleNamespace(value="hf_" + "a1" * 20)
    assert token.value not in http_reason(OSError(f"Illegal header value b'Bearer {token.value}\\n'"))
