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
Everything about a GPU that a CPU cannot show, in one command.

Each part runs in a process of its own with a limit of time, the most important first, and writes `<part>.json` after each of
its checks, so that a run that is cut off still tells. What a check measured stands there with `passed`; a check that fails
does not stop the others.

    python benchmarks/gpu.py --output docs/source/results/gpu --minutes 8
    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --output DIR --parts smoke cost

`--device cpu` runs all of it in small on a CPU. `benchmarks/gpu_page.py` writes the page `docs/source/gpu.md` from the JSONs.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

from gpu_parts.report import Report


# Part, what it is about, and the most seconds that it may take on a GPU.
PARTS: dict[str, tuple[str, int]] = {
    "smoke": ("all four trainers on the tiny base in three precisions, evaluation, resume, caches, diffusers", 150),
    "families": ("velocity of every tested family against its own pipeline, and an update of it", 120),
    "cost": ("SD3.5-M at 512 px: one pass against three, use of the arithmetic, memory, kernels", 240),
    "options": (
        "what makes an update cheaper: fewer steps, compilation, several teachers at once, attention, Adam",
        240,
    ),
    "quantised": ("a base in 8 bits: gradients, memory, time", 90),
    "large": ("FLUX.1-dev's transformer with a LoRA: what fits, and what was foretold", 150),
}


def run_part(part: str, device: str, output: Path) -> None:
    """Runs a part in this process."""
    warnings.filterwarnings("ignore")
    importlib.import_module(f"gpu_parts.{part}").run(Report(part, device, output))


def launch(part: str, device: str, output: Path, limit: float) -> bool:
    """Runs a part in a process of its own; whether all of its checks passed within `limit` seconds."""
    file = output / f"{part}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--run", part, "--device", device, "--output", str(output)]
    # Deterministic products need it from the start of the process.
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
    begin = time.monotonic()
    with open(output / "log.txt", "ab") as log:
        try:
            code = subprocess.run(command, env=environment, timeout=limit, stdout=log, stderr=log).returncode
            ended = "finished" if code == 0 else f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            ended = f"cut off after {limit:g} s"
    report = json.loads(file.read_text()) if file.exists() else {"part": part, "checks": {}}
    report |= {"ended": ended, "seconds": round(time.monotonic() - begin, 1)}
    file.write_text(json.dumps(report, indent=2) + "\n")
    failed = [name for name, check in report["checks"].items() if not check["passed"]]
    print(f"{part}: {ended} in {report['seconds']} s, {len(report['checks'])} checks", flush=True)
    for name in failed:
        print(f"  failed: {name}: {json.dumps(report['checks'][name])[:1000]}", flush=True)
    return ended == "finished" and not failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of the JSONs")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: everything in small")
    parser.add_argument("--list", action="store_true", help="say what parts there are, and stop")
    parser.add_argument("--run", choices=list(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list:
        for part, (about, limit) in PARTS.items():
            print(f"{part:10} {about} (at most {limit} s)")
        return
    if args.output is None:
        parser.error("--output is missing: the folder where the JSONs go")
    args.output.mkdir(parents=True, exist_ok=True)
    if args.run:
        run_part(args.run, args.device, args.output)
        return
    end, passed = time.monotonic() + 60 * args.minutes, True
    for part in args.parts:
        left = end - time.monotonic()
        if left < 5:
            print(f"{part}: not begun, the {args.minutes:g} minutes are over")
            passed = False
            continue
        limit = min(left, PARTS[part][1]) if args.device == "cuda" else left
        passed &= launch(part, args.device, args.output, limit)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
