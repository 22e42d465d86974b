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
How teachers from strangers are read: 1,000 of them, each a sound one with something changed in its config, metadata, header, tensors or
index.

    OMP_NUM_THREADS=1 python benchmarks/mutated_teachers.py --output docs/source/results/mutated_teachers.json

Each is loaded on the tiny base of the tests, in a process of its own. It has to be refused in the one message that lists what is wrong
with all teachers, or to be loaded to the function that its files say, which the libraries that the formats are of tell. And it has
2 s and 1 GB. What is none of this is printed with its seed, and the exit status is 1.
"""

import argparse
import json
import os
import pickle
import re
import resource
import select
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from helpers.judging import Judge, Verdict  # noqa: E402


SECONDS, BYTES = 2.0, 2**30
# A process is ended here, so that what is beyond the limits is measured too.
_END_SECONDS, _END_BYTES = 20, 6 * 2**30


def in_a_process(judge: Judge, seed: int) -> tuple[Verdict | str, int]:
    """The verdict on the teacher of a seed, or how the process ended without one; and how many bytes its memory grew by."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        resource.setrlimit(resource.RLIMIT_AS, (_END_BYTES, _END_BYTES))
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        verdict = judge(seed)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump((verdict, peak - before), pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        ready, _, _ = select.select([pipe], [], [], _END_SECONDS)
        if not ready:
            os.kill(pid, signal.SIGKILL)
        try:
            result = pickle.load(pipe) if ready else (f"no end in {_END_SECONDS} s", 0)
        except EOFError:
            result = ("the process ended", 0)
    os.waitpid(pid, 0)
    return result


def kind(verdict: Verdict) -> str:
    """What came of a teacher, in a few words."""
    if not verdict.is_right:
        return "anything else"
    return "refused in the one message" if verdict.result.startswith("refused") else "loaded to the right function"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--output", type=Path, help="where the figures are written, as JSON")
    parser.add_argument("--verbose", action="store_true", help="a line for each teacher")
    arguments = parser.parse_args()

    counts: dict[str, Counter[str]] = {}
    wrong: list[dict[str, Any]] = []
    seconds, memory = (0.0, 0), (0, 0)
    with tempfile.TemporaryDirectory() as work:
        judge = Judge(Path(work))
        for seed in range(arguments.first, arguments.first + arguments.teachers):
            verdict, grown = in_a_process(judge, seed)
            if isinstance(verdict, str):
                wrong.append({"seed": seed, "result": verdict})
                counts.setdefault("no verdict", Counter())["anything else"] += 1
                continue
            counts.setdefault(verdict.teacher, Counter())[kind(verdict)] += 1
            seconds, memory = max(seconds, (verdict.seconds, seed)), max(memory, (grown, seed))
            if not verdict.is_right or verdict.seconds > SECONDS or grown > BYTES:
                wrong.append({"seed": seed, **vars(verdict), "bytes": grown})
            if arguments.verbose:
                said = re.sub(r"\s+", " ", verdict.result)
                print(f"{seed} {verdict.teacher}, {verdict.mutation} ({verdict.right}): {said[:300]}", flush=True)

    columns = ["refused in the one message", "loaded to the right function", "anything else"]
    print("| teacher | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name, count in [*sorted(counts.items()), ("all", sum(counts.values(), Counter()))]:
        print(f"| {name} | " + " | ".join(str(count[column]) for column in columns) + " |")
    print(
        f"Slowest: {seconds[0]:.2f} s (seed {seconds[1]}). Most memory: {memory[0] / 2**20:.0f} MB (seed {memory[1]})."
    )
    for one in wrong:
        print(f"Wrong: {one}")
    if arguments.output:
        figures = {
            "teachers": arguments.teachers,
            "counts": {name: dict(count) for name, count in sorted(counts.items())},
            "slowest_seconds": seconds[0],
            "largest_bytes": memory[0],
            "wrong": wrong,
        }
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
