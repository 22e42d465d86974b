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
What an update of GRPO costs in one pass, where the rollout's forwards are the training forwards, and in two.

Both forms are the same trainer with the same weights, in turns within one process: they draw, score and train on the same
prompts. A walk has 10 steps, of which a window of 4 is trained, and an update has two micro-batches. With `b` the time of a
backward over that of a forward, one pass can be at most (14 + 4 b) / (10 + 4 b) times as fast. Times on a CPU are those of the
processor, so that other programs disturb them little.

    OMP_NUM_THREADS=1 python benchmarks/grpo_one_pass.py --output docs/source/results/grpo_one_pass.json

What an update holds at its peak is that of a process of its own, beside what `estimate_memory` says. `--kl` has the KL to
the base in both forms.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from run_settings import ONE_UPDATE
from scipy import stats
from step_cost import SIZES, allocated, seconds_of

from trl_diffusion_opd import DiffusionGRPOConfig, DiffusionGRPOTrainer, estimate_memory, tiny


STEPS, WINDOW, MICRO_BATCHES = 10, 4, 2
# Groups need two images.
BATCH_SIZES = {"tiny": 16, "wide": 2, "sd35_small": 2}
FORMS = {"one_pass": True, "two_passes": False}


def brightness(images: list[Any], **columns: Any) -> list[float]:
    """A reward that costs nothing."""
    return [float(np.asarray(image).mean()) for image in images]


def make_trainer(size: str, folder: Path, checkpointing: bool, beta: float, one_pass: bool) -> DiffusionGRPOTrainer:
    """A trainer that has made one update."""
    torch.manual_seed(0)
    settings = SIZES[size]
    pipeline = DiffusionPipeline.from_pretrained(tiny.BASE)
    pipeline.set_progress_bar_config(disable=True)
    config = {**pipeline.transformer.config, **settings["transformer"]}
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        pipeline.transformer = SD3Transformer2DModel.from_config(config).eval()
    args = DiffusionGRPOConfig(
        output_dir=str(folder / "out"),
        height=settings["pixels"],
        width=settings["pixels"],
        max_sequence_length=12,
        num_inference_steps=STEPS,
        sde_window_size=WINDOW,
        one_pass=one_pass,
        beta=beta,
        guidance_scale=settings.get("guidance_scale", 1.0),
        num_generations=2,
        per_device_train_batch_size=BATCH_SIZES[size],
        gradient_accumulation_steps=MICRO_BATCHES,
        gradient_checkpointing=checkpointing,
        **ONE_UPDATE,
    )
    prompts = Dataset.from_list([{"prompt": f"{word} red circles"} for word in ("one", "two", "three", "four") * 16])
    trainer = DiffusionGRPOTrainer(pipeline, brightness, args=args, train_dataset=prompts)
    trainer.train()
    return trainer


def update(trainer: DiffusionGRPOTrainer, size: str) -> None:
    """A whole update: the round, its losses, and the optimizer's step."""
    groups = [[{"prompt": "two red circles"}] * BATCH_SIZES[size]] * MICRO_BATCHES
    for rollout in trainer.roll_out(groups).rollouts:
        trainer.training_step(trainer.model_wrapped, rollout)
    trainer.accelerator.clip_grad_norm_(trainer.student.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.model_wrapped.zero_grad()


def seconds(trainer: DiffusionGRPOTrainer, run: Callable[[], None]) -> float:
    """Seconds of the processor, or on a GPU those until it is done."""
    if trainer.accelerator.device.type == "cuda":
        return seconds_of(trainer, run)
    before = time.process_time()
    run()
    return time.process_time() - before


def in_turns(size: str, checkpointing: bool, beta: float, repeats: int) -> dict[str, Any]:
    """
    Returns:
        `dict`: the median seconds of each form; `"speedup"`, the geometric mean of the ratios of neighbours; and its
        `"ci95"`, Student's interval of their logarithms.
    """
    taken: dict[str, list[float]] = {form: [] for form in FORMS}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(size, Path(folder), checkpointing, beta, one_pass=True)
        for repeat in range(repeats):
            for form in list(FORMS)[:: 1 if repeat % 2 else -1]:
                trainer.args.one_pass = FORMS[form]
                taken[form].append(seconds(trainer, lambda: update(trainer, size)))
    logs = [math.log(two / one) for one, two in zip(taken["one_pass"], taken["two_passes"], strict=True)]
    margin = stats.t.ppf(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    mean = statistics.mean(logs)
    return {
        **{form: {"seconds": statistics.median(values)} for form, values in taken.items()},
        "speedup": math.exp(mean),
        "ci95": [math.exp(mean - margin), math.exp(mean + margin)],
        "repeats": repeats,
    }


def print_memory(size: str, form: str, checkpointing: bool, beta: float) -> None:
    """What an update holds at its peak, and what was estimated; run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(size, Path(folder), checkpointing, beta, FORMS[form])
        estimate = estimate_memory(trainer)
        if trainer.accelerator.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            update(trainer, size)
            held = torch.cuda.max_memory_allocated() - before
        else:
            held = allocated(lambda: update(trainer, size), Path(folder))
    guessed = estimate["activations"]["bytes"] + estimate["gradients"]["bytes"]
    print(json.dumps({"held_mib": held / 2**20, "estimate_mib": guessed / 2**20}))


def memory(size: str, form: str, checkpointing: bool, beta: float) -> dict[str, float]:
    command = [sys.executable, __file__, "--only", size, form, "--kl", str(beta)]
    command += ["--checkpointing"] if checkpointing else []
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def table_row(name: str, row: dict[str, Any]) -> str:
    """A row of the table in docs/source/diffusion_grpo_trainer.md."""
    size, *options = name.split(", ")
    low, high = row["ci95"]
    cells = [size, "yes" if "checkpointing" in options else "no"]
    cells += [f"{row[form]['seconds']:.2f}" for form in FORMS]
    cells.append(f"{row['speedup']:.2f} ({low:.2f} to {high:.2f})")
    cells += [f"{row[form][figure]:.0f}" for form in FORMS for figure in ("held_mib", "estimate_mib")]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to write the results as JSON; rows that are there are kept")
    parser.add_argument("--sizes", nargs="+", default=["tiny", "sd35_small"], choices=list(BATCH_SIZES))
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--kl", type=float, default=0.0, help="beta")
    parser.add_argument("--only", nargs=2, metavar=("SIZE", "FORM"), help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.only:
        print_memory(*args.only, args.checkpointing, args.kl)
        return
    known = args.output is not None and args.output.exists()
    results = json.loads(args.output.read_text())["rows"] if known else {}
    for size in args.sizes:
        for checkpointing in (False, True):
            row = in_turns(size, checkpointing, args.kl, args.repeats)
            for form in FORMS:
                row[form] |= memory(size, form, checkpointing, args.kl)
            name = size + (", checkpointing" if checkpointing else "") + (f", beta {args.kl:g}" if args.kl else "")
            results[name] = row
            print(table_row(name, row))
    if args.output:
        about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "steps": STEPS, "window": WINDOW}
        about |= {"micro_batches": MICRO_BATCHES, "batch_sizes": BATCH_SIZES, "cuda": torch.cuda.is_available()}
        args.output.write_text(json.dumps({"about": about, "rows": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
