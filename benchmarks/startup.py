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
Start-up with 10^2 to 10^6 prompts: seconds from the constructor to the end of the first update, and memory.

```bash
OMP_NUM_THREADS=1 python benchmarks/startup.py --output startup.json
```

The embedded tiny model with its three teachers; the prompts, all different and of three tasks, lie in an Arrow file. Each
size runs in a process of its own, twice, in turns. Memory is what the start-up adds to the process's anonymous memory: pages
of the mapped file belong to the system, which takes them back when it needs them. The peak is of all pages, the file's too.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from run_settings import ONE_UPDATE, TINY
from transformers import TrainerCallback

from trl_diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer, tiny


SIZES = (100, 1_000, 10_000, 100_000, 1_000_000)
TASKS = tuple(tiny.TEACHERS)


def memory_mib(kind: str = "RssAnon") -> float:
    """The process's memory that is no file's, or of another kind of /proc/self/status, in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) / 1024


def make_prompts(n: int, folder: Path) -> None:
    """`n` prompts of some 60 characters, the tasks one after another."""
    rows = {
        "prompt": [f"prompt number {i}: a red circle above a green square, {i % 7} times" for i in range(n)],
        "task": [TASKS[i * len(TASKS) // n] for i in range(n)],
    }
    Dataset.from_dict(rows).shuffle(seed=0).flatten_indices().save_to_disk(folder)


class FirstUpdate(TrainerCallback):
    """Notes when the first update is done, and what memory is used then."""

    def __init__(self) -> None:
        self.at = self.mib = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.at:
            self.at, self.mib = time.perf_counter(), memory_mib()


def measure(folder: str) -> dict[str, float]:
    """One start on the prompts in `folder`, in this process."""
    dataset, first = Dataset.load_from_disk(folder), FirstUpdate()
    with tempfile.TemporaryDirectory() as output_dir:
        before, resident, start = memory_mib(), memory_mib("VmRSS"), time.perf_counter()
        trainer = DiffusionOPDTrainer(
            tiny.BASE,
            tiny.TEACHERS,
            args=DiffusionOPDConfig(
                output_dir,
                **TINY,
                **ONE_UPDATE,
                num_inference_steps=5,
                num_trained_timesteps=1,
                per_device_train_batch_size=2,
                use_cpu=True,
            ),
            train_dataset=dataset,
            callbacks=[first],
        )
        made = time.perf_counter()
        trainer.train()
    return {
        "constructor_s": made - start,
        "first_update_s": first.at - made,
        "start_up_s": first.at - start,
        "start_up_mib": first.mib - before,
        "peak_mib": memory_mib("VmHWM") - resident,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0].strip())
    parser.add_argument("--output", default="startup.json", help="JSON to write")
    parser.add_argument("--repeats", type=int, default=2, help="processes a size, the fastest of which counts")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of prompts")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the folder of prompts, in a process of its own
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    disable_progress_bars()
    runs: dict[int, list[dict[str, float]]] = {n: [] for n in options.sizes}
    with tempfile.TemporaryDirectory() as root:
        for n in options.sizes:
            make_prompts(n, Path(root) / str(n))
        for _ in range(options.repeats):
            for n in options.sizes:
                command = [sys.executable, __file__, "--measure", str(Path(root) / str(n))]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                runs[n].append(json.loads(out.splitlines()[-1]))
    results = [{"prompts": n, **min(of_size, key=lambda run: run["start_up_s"])} for n, of_size in runs.items()]
    print(
        f"{'prompts':>9} {'constructor s':>14} {'first update s':>15} {'start-up s':>11} {'start-up MiB':>13} {'peak MiB':>9}"
    )
    for row in results:
        print(
            f"{row['prompts']:9,} {row['constructor_s']:14.2f} {row['first_update_s']:15.2f} {row['start_up_s']:11.2f} "
            f"{row['start_up_mib']:13.0f} {row['peak_mib']:9.0f}"
        )
    report = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or torch.get_num_threads(),
        "tasks": len(TASKS),
        "repeats": options.repeats,
        "runs": results,
    }
    Path(options.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
