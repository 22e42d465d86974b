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

"""
How well and how fast the `ocr` reward reads, and whether it agrees with the tiny world's own verifier.

    OMP_NUM_THREADS=1 python benchmarks/ocr_reward.py --output docs/source/results/ocr.json

Words: 8 words, drawn plain, on a coloured noisy scene, and in a serif font turned by 8 degrees, at 64, 128 and 512 px;
"exact" is a first reading that equals the word but for case, spaces and accents. Phrases: print of several sizes on 512 px, for the
choice of the reward's `size`. Letters: every letters prompt of the tiny world, with the picture that it asks for and with
one that has one letter wrong; they agree where the reward is 1 and the verifier's verdict is 1, or neither is. Times are
of one call for one image on one thread: on the clock, and of the processor, which other processes slow down less.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trl_diffusion_opd import tiny
from trl_diffusion_opd.rewards.ocr import OCR, folded, text_score
from trl_diffusion_opd.tiny.prompts import specs


WORDS = ("HELLO", "A7", "OPEN", "trl", "42", "STOP", "Cafe 9", "diffusion")
STYLES = ("plain", "noisy", "rotated")
SIZES = (64, 128, 512)
PHRASES = (
    "On-policy distillation",
    "Fresh bread every morning",
    "Platform 9 closed today",
    "Keep off the grass",
    "Mind the gap",
    "Library of small things",
    "Happy birthday Marie",
    "Turn left at the river",
)
PHRASE_PIXELS = (14, 20, 28, 40)
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def sign(text: str) -> str:
    """A prompt for a text."""
    return f'a sign that says "{text}"'


def render(text: str, style: str, size: int, seed: int, font_pixels: int | None = None) -> Image.Image:
    """A square picture of a text, filling 80% of the width unless the size of its font is given."""
    rng = np.random.default_rng([seed, size])
    name = str(FONTS / ("DejaVuSerif.ttf" if style == "rotated" else "DejaVuSans.ttf"))
    font = ImageFont.truetype(name, font_pixels or 100)
    if font_pixels is None:
        font = ImageFont.truetype(name, min(int(80 * size / font.getlength(text)), size // 2))
    ground, ink = (255, 255, 255), (0, 0, 0)
    if style == "noisy":
        ground, ink = tuple(rng.integers(120, 230, 3).tolist()), tuple(rng.integers(0, 60, 3).tolist())
    image = Image.new("RGB", (size, size), ground)
    draw = ImageDraw.Draw(image)
    if style == "noisy":
        for _ in range(6):
            left, top = rng.integers(0, size, 2).tolist()
            box = (left, top, left + size // 3, top + size // 3)
            draw.ellipse(box, fill=tuple(rng.integers(120, 230, 3).tolist()))
    draw.text((size / 2, size / 2), text, fill=ink, font=font, anchor="mm")
    if style == "noisy":
        pixels = np.asarray(image) + rng.normal(0, 15, (size, size, 3))
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if style == "rotated":
        image = image.rotate(8, Image.Resampling.BICUBIC, fillcolor=ground)
    return image


def without_text() -> list[Image.Image]:
    """Six pictures without text: three blank ones, two of noise, a red disc."""
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for size in (64, 256)]
    disc = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(disc).ellipse((64, 64, 192, 192), fill="red")
    return [*(Image.new("RGB", (256, 256), color) for color in ("white", "gray", "black")), *noise, disc]


def words(sizes: tuple[int, ...] = SIZES) -> Iterator[tuple[str, str, int, Image.Image]]:
    """Every word in every style and size."""
    for size in sizes:
        for style in STYLES:
            for i, word in enumerate(WORDS):
                yield word, style, size, render(word, style, size, seed=i)


def letters(seed: int = 0) -> Iterator[tuple[dict[str, Any], Image.Image]]:
    """Rows of the tiny world's letters task: each prompt with its picture, then with one that has a letter wrong."""
    rng = random.Random(seed)
    rows = [spec for split in ("train", "validation", "test") for spec in specs(split) if spec["task"] == "letters"]
    spoken = [spec["word"] for spec in rows]
    for i, spec in enumerate(rows):
        row = {"prompt": f'the word "{spec["word"]}"', "task": "letters", "spec": json.dumps(spec)}
        yield row, tiny.render(row["spec"], seed + i)
        first, second = spec["word"]
        near = [word for word in spoken if (word[0] == first) != (word[1] == second)]
        yield row, tiny.render(json.dumps({**spec, "word": rng.choice(near)}), seed + i)


def measure_words(reward: OCR) -> dict[str, Any]:
    exact: dict[str, int] = {}
    scored, clock, cpu, failed = [], [], [], []
    for word, style, size, image in words():
        prompt = sign(word)
        start = time.perf_counter(), time.process_time()
        scored += reward([prompt], [image])
        clock.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
        read = next(reward.readings(image))
        right = folded(read) == folded(word)
        exact[f"{style} {size}"] = exact.get(f"{style} {size}", 0) + right
        if not right:
            failed.append({"word": word, "style": style, "size": size, "first_reading": read})
    blank = without_text()
    targets = [sign(word) for word in WORDS]
    return {
        "images": len(scored),
        "exact": sum(exact.values()),
        "exact_of_8": exact,
        "failed": failed,
        "reward_1": scored.count(1.0),
        "ms_an_image": {"clock": _milliseconds(clock), "processor": _milliseconds(cpu)},
        "without_text": {
            "images": len(blank),
            "read_as_text_by_look": np.array([[read != "" for read in reward.readings(i)] for i in blank])
            .sum(0)
            .tolist(),
            "mean_reward": statistics.fmean(x for image in blank for x in reward(targets, [image] * len(targets))),
        },
    }


def measure_phrases(sizes: tuple[int, ...] = (256, 512)) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for size in sizes:
        reward = OCR(size=size)
        for pixels in PHRASE_PIXELS:
            images = [render(text, "noisy", 512, seed=i, font_pixels=pixels) for i, text in enumerate(PHRASES)]
            start = time.process_time()
            scores = reward([sign(text) for text in PHRASES], images)
            spent = (time.process_time() - start) / len(images)
            row = {"mean_reward": statistics.fmean(scores), "processor_ms": round(1000 * spent, 1)}
            result[f"size {size}, print of {pixels} px"] = row
    return result


def measure_letters(reward: OCR) -> dict[str, Any]:
    agree, one_look, no_digits = [0, 0], [0, 0], [0, 0]
    differ, cpu, total = [], [], 0
    for i, (row, image) in enumerate(letters()):
        right = tiny.rewards["letters"](images=[image], spec=[row["spec"]])[0] == 1.0
        start = time.process_time()
        (value,) = reward([row["prompt"]], [image])
        cpu.append(time.process_time() - start)
        word, read = json.loads(row["spec"])["word"], next(reward.readings(image))
        kind = i % 2  # right pictures, wrong pictures
        agree[kind] += (value == 1.0) == right
        one_look[kind] += (text_score(word, read) == 1.0) == right
        no_digits[kind] += (folded(word) in folded(read)) == right
        total += kind
        if (value == 1.0) != right:
            differ.append({"asked": word, "verdict": float(right), "reward": value, "first_reading": read})
    return {
        "pictures_of_each_kind": total,
        "agreement_on_right_pictures": agree[0] / total,
        "agreement_on_wrong_pictures": agree[1] / total,
        "agreement": sum(agree) / (2 * total),
        "differ": differ,
        "right_pictures_with_one_look": one_look[0] / total,
        "right_pictures_with_one_look_and_digits_as_read": no_digits[0] / total,
        "processor_ms_an_image": _milliseconds(cpu),
    }


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    return {
        "median": round(1000 * statistics.median(seconds), 1),
        "mean": round(1000 * statistics.fmean(seconds), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    args = parser.parse_args()
    reward = OCR()
    reward([sign("X")], [Image.new("RGB", (256, 256))])  # the first call of each shape is slower
    results = {
        "versions": {name: version(name) for name in ("rapidocr", "onnxruntime", "Levenshtein", "pillow")},
        "words": measure_words(reward),
        "phrases": measure_phrases(),
        "letters": measure_letters(reward),
    }
    print(json.dumps(results, indent=2))
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
