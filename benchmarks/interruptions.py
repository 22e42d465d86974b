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
Trainings that a signal interrupts at a random moment, and what goes on from what they have left.

    python benchmarks/interruptions.py --moments 40 --output docs/source/results/interruptions.json

One and two processes, SIGINT, SIGTERM and SIGKILL in turn, on the tests' pipeline of a few thousand weights. After each the last
complete checkpoint must be as it was sealed, with the first two signals there must be a new one, and a resumed run must end with
the weights of an uninterrupted one, to the last bit.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers.launching import Forks  # noqa: E402
from helpers.opd_fixtures import make_teachers, make_trainer, snapshot  # noqa: E402

from trl_diffusion_opd.checkpointing.checkpoint import last_complete  # noqa: E402
from trl_diffusion_opd.checkpointing.seal import damage, update_of  # noqa: E402


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
UPDATES = 12
OPTIONS = dict(
    max_steps=UPDATES,
    sampler="flow_sde",
    learning_rate=1e-2,
    gradient_accumulation_steps=4,
    save_strategy="steps",
    save_steps=2,
    save_total_limit=2,
)


def train(folder: str, teachers: dict[str, str], world: int, resume: bool) -> None:
    """Trains, and writes the weights at its end."""
    trainer = make_trainer(folder, teachers, ema_decay="auto", per_device_train_batch_size=2 // world, **OPTIONS)
    Path(f"{folder}_started_{trainer.accelerator.process_index}").touch()
    trainer.train(resume_from_checkpoint=resume)
    if trainer.accelerator.is_main_process:
        save_file(snapshot(trainer), Path(folder, "end.safetensors"))


def interrupted(forks: Forks, folder: Path, teachers: dict[str, str], world: int, number: int, after: float) -> Any:
    """One trial: what was found, or how the processes ended."""
    run = folder / "run"
    log = folder / "log"
    log.mkdir(parents=True)
    processes = forks.start(train, str(run), teachers, world, False, folder=log, world=world)
    while not all((folder / f"run_started_{rank}").exists() for rank in range(world)):
        if forks.ended():
            raise RuntimeError((log / "error_0.txt").read_text())
        time.sleep(0.005)
    time.sleep(after)
    last = last_complete(run)
    before = 0 if last is None else update_of(last)
    for process in processes:  # as a scheduler does
        if not forks.ended():
            os.kill(process, number)
    codes = forks.wait(120)
    left = last_complete(run)
    found = {
        "signal": signal.Signals(number).name,
        "processes": world,
        "after": round(after, 3),
        "codes": codes,
        "before": before,
        "left": 0 if left is None else update_of(left),
        "intact": left is None or damage(left) == [],
        "finished": (run / "end.safetensors").exists(),
    }
    if not found["finished"]:
        found["new"] = found["left"] > before
        (ended,) = {one.code for one in forks.run(train, str(run), teachers, world, left is not None, world=world)}
        found["resumed"] = ended == 0
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=40, help="for each number of processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/interruptions.json"))
    arguments = parser.parse_args()
    forks, moments, results = Forks(), random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as name:
        teachers = make_teachers(Path(name, "teachers"))
        for world in arguments.processes:
            through = Path(name, f"through_{world}")
            start = time.perf_counter()
            assert {one.code for one in forks.run(train, str(through), teachers, world, False, world=world)} == {0}
            seconds = time.perf_counter() - start
            expected = load_file(through / "end.safetensors")
            for i in range(arguments.moments):
                folder = Path(name, f"{world}_{i}")
                number = SIGNALS[i % len(SIGNALS)]
                found = interrupted(forks, folder, teachers, world, number, moments.uniform(0, seconds))
                end = load_file(folder / "run" / "end.safetensors")
                found["same"] = all(torch.equal(weight, expected[key]) for key, weight in end.items())
                results.append(found)
                print(json.dumps(found), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    asked = [one for one in results if not one["finished"] and one["signal"] != "SIGKILL"]
    print(
        f"{len(results)} moments: {sum(one['intact'] for one in results)} intact, {sum(one['same'] for one in results)} ended as"
    )
    print(
        f"uninterrupted; {sum(one['new'] for one in asked)} of {len(asked)} that were asked to stop left a new checkpoint"
    )


if __name__ == "__main__":
    main()
