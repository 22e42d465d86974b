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
Builds every pipeline of diffusers that makes images or videos of a text, tiny and with random weights, and tries it.

    OMP_NUM_THREADS=1 python benchmarks/sweep.py --output docs/source/results/sweep.json
    python benchmarks/sweep_page.py

`--only NAME …` tries some, and keeps what the file says of the others. `--videos` tries only videos of several frames,
`--pictures` only pipelines that take pictures beside the prompt.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers


ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from helpers.families import Family  # noqa: E402
from sweep_parts import picture_trial  # noqa: E402
from sweep_parts.classes import classes, left_out  # noqa: E402
from sweep_parts.pictures import PICTURES, PICTURES_NOT_BUILT  # noqa: E402
from sweep_parts.specimens import NOT_BUILT, SPECIMENS  # noqa: E402
from sweep_parts.trial import RefusedError, Trial, quiet, update, velocity_and_walk, verdict  # noqa: E402
from sweep_parts.videos import FRAMES  # noqa: E402

from trl_diffusion_opd.pipelines.frames import frames_argument  # noqa: E402


PACKAGE = str(ROOT / "trl_diffusion_opd")


def tried(family: Family, *steps: Callable[[Trial], None]) -> Trial:
    """The result of all trials of a pipeline. A stranger's code may raise anything: that is a result too."""
    trial = Trial()
    try:
        with quiet():
            family.build()
    except Exception as error:
        return Trial("not built", reason=said(error))
    for step in steps:
        try:
            with quiet():
                step(trial)
        except Exception as error:
            ours = traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE)
            refused = isinstance(error, RefusedError) or ours and isinstance(error, ValueError)
            trial.outcome = "refused" if refused else "fails"
            trial.reason = said(error)
            break
    if trial.outcome == "works":
        verdict(trial)
    return trial


def steps_of(family: Family, update_too: bool = True) -> list[Callable[[Trial], None]]:
    """What is tried with a pipeline for text."""
    return [partial(step, family) for step in (velocity_and_walk, update)[: 1 + update_too]]


def said(error: Exception) -> str:
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines() if line.strip()]
    if isinstance(error, ValueError):
        return " ".join(lines)
    return f"{type(error).__name__}: {lines[0].split(', but expected')[0] if lines else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/source/results/sweep.json")
    parser.add_argument("--only", nargs="*", default=None, help="names of pipeline classes")
    parser.add_argument("--traceback", action="store_true", help="let the first error through")
    parser.add_argument("--no_update", action="store_true", help="velocity and walk alone")
    parser.add_argument("--videos", action="store_true", help="videos of several frames alone")
    parser.add_argument("--pictures", action="store_true", help="rows with pictures of their own alone")
    args = parser.parse_args()
    before: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    if args.videos:
        args.output.write_text(json.dumps({**before, "videos": videos(args.only or FRAMES, before)}, indent=1) + "\n")
        return
    if args.pictures:
        names = args.only or sorted(PICTURES | PICTURES_NOT_BUILT)
        found = pictures(names, before, args.traceback, not args.no_update)
        args.output.write_text(json.dumps({**before, "pictures": found}, indent=1) + "\n")
        return
    kept: dict[str, Any] = before.get("pipelines", {})
    results: dict[str, Any] = {}
    everything = classes()
    rules = {name: left_out(name, pipeline) for name, pipeline in everything.items()}
    for name in [name for name, rule in rules.items() if rule is None]:
        if args.only is not None and name not in args.only:
            if name in kept:
                results[name] = kept[name]
            continue
        start = time.perf_counter()
        if name in NOT_BUILT:
            trial = Trial("not built", reason=NOT_BUILT[name])
        elif name in SPECIMENS:
            if args.traceback:
                let_through(steps_of(SPECIMENS[name]))
            trial = tried(SPECIMENS[name], *steps_of(SPECIMENS[name], not args.no_update))
        else:
            trial = Trial("not built", reason="nobody has written a tiny configuration of it yet")
        results[name] = trial.record()
        seconds = time.perf_counter() - start
        print(f"{name:40} {seconds:5.1f} s  {results[name]}", flush=True)
    report = {
        "diffusers": diffusers.__version__,
        "pipelines": results,
        "videos": before.get("videos", {}),
        "pictures": before.get("pictures", {}),
        "left_out": {name: rule.name for name, rule in rules.items() if rule is not None},
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")


def videos(names: Iterable[str], before: dict[str, Any]) -> dict[str, Any]:
    """The results of pipelines that are asked for several frames."""
    results: dict[str, Any] = dict(before.get("videos", {}))
    for name in names:
        family = SPECIMENS[name]
        argument = frames_argument(family.build())
        assert argument is not None
        start = time.perf_counter()
        film = replace(family, generation_kwargs={**family.generation_kwargs, argument: FRAMES[name]})
        results[name] = {"argument": argument, "frames": FRAMES[name], **tried(film, *steps_of(film)).record()}
        print(f"{name:40} {time.perf_counter() - start:5.1f} s  {results[name]}", flush=True)
    return dict(sorted(results.items()))


def pictures(names: Iterable[str], before: dict[str, Any], traceback_too: bool, update_too: bool) -> dict[str, Any]:
    """The results of pipelines that take pictures beside the prompt, for rows with different ones."""
    results: dict[str, Any] = dict(before.get("pictures", {}))
    for name in names:
        start = time.perf_counter()
        if name in PICTURES_NOT_BUILT:
            results[name] = Trial("not built", reason=PICTURES_NOT_BUILT[name]).record()
        else:
            edit = PICTURES[name]
            steps = [partial(step, edit) for step in (picture_trial.velocity_and_walk, picture_trial.update)]
            steps = steps[: 1 + update_too]
            with edit.context():
                if traceback_too:
                    let_through(steps)
                trial = tried(edit.family, *steps)
            results[name] = {"numbers": list(edit.numbers), "video": edit.is_video, **trial.record()}
        print(f"{name:40} {time.perf_counter() - start:5.1f} s  {results[name]}", flush=True)
    return dict(sorted(results.items()))


def let_through(steps: Iterable[Callable[[Trial], None]]) -> None:
    trial = Trial()
    for step in steps:
        step(trial)
        print(trial)


if __name__ == "__main__":
    main()
