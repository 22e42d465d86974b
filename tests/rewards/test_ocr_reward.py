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

import itertools
import sys
from types import ModuleType

import numpy as np
import pytest
from datasets import Dataset
from helpers.example_script import load_script
from PIL import Image

from trl_diffusion_opd import tiny
from trl_diffusion_opd.rewards import load_reward, reward_data_problems
from trl_diffusion_opd.rewards.ocr import OCR, text_score
from trl_diffusion_opd.rewards.quoted_text import folded, quoted_text


@pytest.fixture(scope="module")
def reward() -> OCR:
    return OCR()


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script("benchmarks/ocr_reward.py")


def sign(text: str) -> str:
    return f'a sign that says "{text}"'


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "OPEN"', "OPEN"),
        ('"A 7" in snow', "A 7"),
        ('one "LEFT" and one "RIGHT"', "LEFT"),  # the first, as published
        ("a poster, “Fresh bread”", "Fresh bread"),
        ("ein Schild: „Brot“", "Brot"),
        ('mixed "OPEN” marks', "OPEN"),
        ("it's the cat's 'home'", None),  # apostrophes quote nothing
        ('a screen of 5" by 3 cm', None),
        ("no text", None),
        ('empty ""', ""),
        ('blank "  " then "X"', "  "),
    ],
)
def test_quoted_text(prompt, text):
    assert quoted_text(prompt) == text


def test_folded():
    assert folded(" Café\n９ ") == "cafe9"
    assert folded("STRASSE") == folded("straße") == "strasse"


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance by its definition, over all alignments."""
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    table[:, 0], table[0] = np.arange(len(a) + 1), np.arange(len(b) + 1)
    for i, j in itertools.product(range(len(a)), range(len(b))):
        table[i + 1, j + 1] = min(table[i, j] + (a[i] != b[j]), table[i, j + 1] + 1, table[i + 1, j] + 1)
    return table[-1, -1]


@pytest.mark.parametrize(
    ("target", "read", "score"),
    [
        ("HELLO", "hello", 1.0),
        ("A 7", "a7", 1.0),
        ("open", "now OPEN daily", 1.0),  # a substring is exact
        ("HELLO", "HELO", 0.8),
        ("HELLO", "HALLO!", 0.6),
        ("42", "47", 0.5),
        ("42", "", 0.0),
        ("cat", "something else altogether", 0.0),  # not below 0
        ("STOP", "5T0P", 1.0),  # digits drawn like letters, where the target has none
        ("STOP", "1TOP", 0.75),  # a 1 is an I or an L
        ("A5", "AS", 0.5),  # but a digit that is asked for must be one
        ("20", "ZO", 0.0),
    ],
)
def test_text_score(target, read, score):
    assert text_score(target, read) == pytest.approx(score)


def test_text_score_is_the_published_formula():
    rng = np.random.default_rng(0)
    for _ in range(300):
        target, read = ("".join(rng.choice(list("abcd "), rng.integers(1, 9))) for _ in range(2))
        a, b = target.replace(" ", ""), read.replace(" ", "")
        if a:
            expected = 1.0 if a in b else 1 - min(edit_distance(a, b), len(a)) / len(a)
            assert text_score(target, read) == pytest.approx(expected), (target, read)


def test_rendered_words(reward, benchmark):
    drawn = list(benchmark.words(sizes=(64,)))
    assert len(drawn) == 24
    wrong = [(word, style) for word, style, _, image in drawn if folded(next(reward.readings(image))) != folded(word)]
    assert len(wrong) <= 1, wrong


@pytest.mark.slow
def test_agrees_with_the_tiny_worlds_verifier(reward, benchmark):
    cases = list(itertools.islice(benchmark.letters(), 0, 216, 3))
    rows, images = [row for row, _ in cases], [image for _, image in cases]
    verdicts = tiny.rewards["letters"](images=images, spec=[row["spec"] for row in rows])
    assert 30 <= sum(verdicts) <= 40 < len(verdicts)  # right and wrong pictures
    scores = reward([row["prompt"] for row in rows], images)
    agree = [(score == 1.0) == (verdict == 1.0) for score, verdict in zip(scores, verdicts, strict=True)]
    assert np.mean(agree) >= 0.95


def test_images_without_text(reward, benchmark):
    images = benchmark.without_text()
    assert [next(reward.readings(image)) for image in images] == [""] * 6
    assert reward([sign("HELLO")] * 6, images) == [0.0] * 6


def test_shapes_and_modes(reward, benchmark):
    square = benchmark.render("HELLO", "plain", 256, seed=0)
    wide, tall = (Image.new("RGB", size, "white") for size in ((640, 256), (256, 640)))
    wide.paste(square, (200, 0))
    tall.paste(square, (0, 300))
    images = [wide, tall, square.resize((40, 40)), square.convert("L"), square.convert("RGBA"), square.convert("1")]
    assert reward([sign("Hello")] * len(images), images) == [1.0] * len(images)
    assert reward([sign("Hello")], [Image.new("RGB", (1, 400))]) == [0.0]


@pytest.mark.slow
def test_batches_and_calls_do_not_matter(reward, benchmark):
    drawn = list(benchmark.words(sizes=(64,)))[5:11]
    prompts, images = [sign("HALLO OPEN") for _ in drawn], [image for *_, image in drawn]
    scores = reward(prompts, images)
    assert scores == reward(prompts, images)
    assert scores == [reward([p], [i])[0] for p, i in zip(prompts, images, strict=True)]
    assert len(set(scores)) > 2


def test_what_it_cannot_score(reward):
    image = Image.new("RGB", (64, 64))
    assert reward(["a cat", 'empty ""', sign("X")], [image] * 3) == [None, None, 0.0]
    assert "quotes no text" in reward.why_not("a cat", {})
    assert "nothing between" in reward.why_not('a sign that says " "', {})


def test_prompts_without_quotes_are_refused_on_its_own_task(reward):
    dataset = Dataset.from_dict({"prompt": ["a cat", sign("X"), "a dog"], "task": ["ocr", "ocr", "style"]})
    rows = {"ocr": np.array([0, 1]), "style": np.array([2])}
    (problem,) = reward_data_problems({"ocr": [reward]}, dataset, rows, "train_dataset")
    assert problem.startswith("train_dataset: reward 'ocr' can't score 1 of the 2 prompts of its task 'ocr'")
    assert "'a cat': it quotes no text" in problem


def test_options(reward):
    with pytest.raises(ValueError, match="size=32, it must be at least 64"):
        OCR(size=32)
    small = load_reward("ocr", size=128, batch_size=4)
    assert [len(list(one.readings(Image.new("RGB", (64, 64))))) for one in (small, reward)] == [2, 3]
    assert small.fingerprint != reward.fingerprint
    assert reward.fingerprint.startswith("ocr size=256 rapidocr=3")


def load_without(*packages):
    for package in packages:
        sys.modules[package] = None
        sys.modules.pop("trl_diffusion_opd.rewards.ocr", None)
        try:
            load_reward("ocr")
        except ImportError as error:
            sys.stdout.write(f"{error}\n")
        del sys.modules[package]


def test_missing_package_names_the_extra(processes):
    packages = ("rapidocr", "onnxruntime", "Levenshtein")
    (done,) = processes.run(load_without, *packages, world=1)
    install = 'Install it with `pip install ".[ocr]"` in a checkout of trl-diffusion-opd.'
    assert done.code == 0 and done.output.splitlines() == [
        f'Reward "ocr" needs the package {package!r}. {install}' for package in packages
    ]
