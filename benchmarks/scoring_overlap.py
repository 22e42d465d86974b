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
What scoring while the next images are generated saves, against scoring after each batch.

The embedded tiny model draws the images. Three settings: a reward that computes, for half the time of drawing a batch, beside
one that waits for all of it; a `RemoteReward` whose server, a process of its own, answers after that time; and the reward that
computes alone, which gains what the machine has of idle cores. Both ways are timed in turns within one process, the time of
drawing is measured anew for each turn, and the scores must be identical.

    OMP_NUM_THREADS=1 python benchmarks/scoring_overlap.py --output docs/source/results/scoring_overlap.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageFilter, ImageStat
from run_settings import TINY

from trl_diffusion_opd import tiny
from trl_diffusion_opd.rewards import RemoteReward, Reward, Scorer, score


SERVER = Path(__file__).parents[1] / "examples" / "reward_server.py"

Rows = Sequence[dict[str, Any]]
Draw = Callable[[Rows], list[Image.Image]]


class Sharpness(Reward):
    """Variance of the difference to a blurred copy, enlarged so often as to keep a core busy."""

    name = "sharpness"
    bounds = (0.0, None)

    def __init__(self, repeats: int):
        super().__init__()
        self.repeats = repeats

    def _score(self, prompts: list[str], images: list[Image.Image], rows: list[dict[str, Any]]) -> list[float]:
        return [statistics.fmean(self._variance(image) for _ in range(self.repeats)) for image in images]

    def _variance(self, image: Image.Image) -> float:
        gray = image.convert("L").resize((256, 256), Image.Resampling.BICUBIC)
        return ImageStat.Stat(gray.filter(ImageFilter.UnsharpMask(3, 400))).var[0]


class Waiting(Reward):
    """Waits for something else, for as long as the column `seconds` says, and then knows the brightness."""

    name = "waiting"
    bounds = (0.0, 255.0)
    columns = ("seconds",)

    def _score(self, prompts: list[str], images: list[Image.Image], rows: list[dict[str, Any]]) -> list[float]:
        time.sleep(rows[0]["seconds"])
        return [ImageStat.Stat(image.convert("L")).mean[0] for image in images]


waiting = Waiting(batch_size=1024)  # what the server calls, once a batch


@contextmanager
def server() -> Iterator[str]:
    """Address of a server of examples/reward_server.py with the waiting reward."""
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, str(SERVER), "--reward", "scoring_overlap:waiting", "--port", "0"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().split()[-1]}"
        finally:
            process.terminate()


def one_after_the_other(functions: Sequence[Reward], batches: Sequence[Rows], draw: Draw) -> Any:
    scores: dict[str, list[float | None]] = {}
    for rows in batches:
        for name, values in score(functions, rows, draw(rows)).items():
            scores.setdefault(name, []).extend(values)
    return scores


def overlapped(functions: Sequence[Reward], batches: Sequence[Rows], draw: Draw) -> Any:
    with Scorer(functions) as scorer:
        for rows in batches:
            scorer.submit(rows, draw(rows))
        return scorer.results()


def timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def measure(functions: Sequence[Reward], batches: Sequence[Rows], draw: Draw, repeats: int) -> dict[str, Any]:
    """Times both ways in turns."""
    ways = {"one_after_the_other": one_after_the_other, "overlapped": overlapped}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        pause = statistics.median(timed(draw, batches[0])[0] for _ in range(3))
        paced = [[{**row, "seconds": pause} for row in rows] for rows in batches]
        scores = {}
        for name in ways if repeat % 2 else reversed(ways):
            taken, scores[name] = timed(ways[name], functions, paced, draw)
            seconds[name].append(taken)
        if scores["overlapped"] != scores["one_after_the_other"]:
            raise AssertionError("the scores differ")
    ratios = [a / b for a, b in zip(seconds["one_after_the_other"], seconds["overlapped"], strict=True)]
    return {
        "rewards": [function.name for function in functions],
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "speedup": statistics.median(ratios),
        "speedups": ratios,
        "identical_scores": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    pipeline = DiffusionPipeline.from_pretrained(tiny.BASE)
    pipeline.set_progress_bar_config(disable=True)
    data = tiny.dataset("test")

    def draw(rows: Rows) -> list[Image.Image]:
        return pipeline(
            [row["prompt"] for row in rows],
            num_inference_steps=10,
            **TINY,
            generator=[torch.Generator().manual_seed(row["seed"]) for row in rows],
        ).images

    numbers = range(args.batches * args.batch_size)
    rows = [{"prompt": data[n % len(data)]["prompt"], "seed": n, "seconds": 0.0} for n in numbers]
    batches = [rows[start : start + args.batch_size] for start in numbers[:: args.batch_size]]
    drawing = statistics.median(timed(draw, batches[0])[0] for _ in range(5))
    images = draw(batches[0])
    once = statistics.median(timed(score, [Sharpness(1)], batches[0], images)[0] for _ in range(5))
    sharpness = Sharpness(max(1, round(drawing / 2 / once)))
    with server() as url:
        remote = RemoteReward(url, columns=["seconds"], batch_size=args.batch_size)
        score([remote], batches[0], images)  # a connection
        settings = {
            "computing_and_waiting": [sharpness, waiting],
            "remote": [remote],
            "computing": [sharpness],
        }
        results = {name: measure(rewards, batches, draw, args.repeats) for name, rewards in settings.items()}
    report = {
        "batches": args.batches,
        "batch_size": args.batch_size,
        "repeats": args.repeats,
        "seconds_to_draw_a_batch": drawing,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "settings": results,
    }
    print(f"{args.batches} batches of {args.batch_size} images, {drawing:.3f} s to draw one, {os.cpu_count()} cores\n")
    print("| rewards | one after the other, s | overlapped, s | speed-up |")
    print("|---|---:|---:|---:|")
    for name, result in results.items():
        before, after = result["seconds"]["one_after_the_other"], result["seconds"]["overlapped"]
        print(f"| {name.replace('_', ' ')} | {before:.2f} | {after:.2f} | {result['speedup']:.2f} |")
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
