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
What several teachers of one task cost in one forward (`batch_teachers=True`) and in one forward each.

One forward has as many rows as there are teachers times samples, and every LoRA computes its own rows; separate forwards
have the samples' rows each. Both are the target of a training step as the trainer computes it, in turns within one process.
The models are those of `step_cost.py`. On a CPU seconds are the processor's for this process, so that others on the machine
count less; run it with one thread.

    OMP_NUM_THREADS=1 python benchmarks/teachers_in_one_forward.py --output teachers_in_one_forward.json
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from peft import LoraConfig, get_peft_model
from step_cost import SIZES

from trl_diffusion_opd import tiny
from trl_diffusion_opd.models.backbone import Backbone
from trl_diffusion_opd.models.student import ATTENTION_TARGETS
from trl_diffusion_opd.models.teachers import TeacherBank, normalize_teachers
from trl_diffusion_opd.pipelines.velocity import VelocityField
from trl_diffusion_opd.profiling.timing import instant, seconds_between


def make_bank(
    size: str, folder: Path, n: int, device: torch.device, dtype: torch.dtype
) -> tuple[TeacherBank, VelocityField]:
    """A student and `n` LoRA teachers of one task, of random weights."""
    torch.manual_seed(0)
    settings = SIZES[size]
    pipeline = DiffusionPipeline.from_pretrained(tiny.BASE)
    pipeline.set_progress_bar_config(disable=True)
    config = {**pipeline.transformer.config, **settings["transformer"]}
    with device:
        pipeline.transformer = SD3Transformer2DModel.from_config(config).to(dtype).eval().requires_grad_(False)
    pipeline.to(device)
    model = get_peft_model(pipeline.transformer, LoraConfig(r=32, target_modules=list(ATTENTION_TARGETS)))
    folders = [str(folder / f"{size}{i}") for i in range(n)]
    for name in folders:
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.01)
        model.save_pretrained(name)
    teachers = normalize_teachers(folders, ["task"])
    bank = TeacherBank(Backbone(model.eval(), "default"), pipeline, teachers, settings.get("guidance_scale", 1.0))
    field = VelocityField(
        pipeline, num_inference_steps=10, height=settings["pixels"], width=settings["pixels"], max_sequence_length=12
    )
    bank.backbone.to(device)
    return bank, field


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """The processor's seconds on a CPU, a GPU's own on one."""
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    begin = instant(device)
    run()
    return seconds_between(begin, instant(device))


@torch.no_grad()
def measure(
    size: str, n: int, batch_size: int, repeats: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Seconds of the target of one step, both ways."""
    with tempfile.TemporaryDirectory() as folder:
        bank, field = make_bank(size, Path(folder), n, device, dtype)
    prompts = [f"{number} red circles" for number in ("one", "two", "three", "four") * batch_size][:batch_size]
    x = field.initial_latents(prompts, [torch.Generator().manual_seed(i) for i in range(batch_size)])

    def target() -> torch.Tensor:
        return bank.mean_velocity(field, bank.teachers["task"], x, 0.5, prompts)

    seconds: dict[bool, list[float]] = {False: [], True: []}
    velocities: dict[bool, torch.Tensor] = {}
    for update in range(repeats + 1):
        for batched in (False, True) if update % 2 else (True, False):
            bank.batched = batched
            seconds[batched].append(seconds_of(target, device))
            velocities[batched] = target()
    separate, together = (seconds[batched][1:] for batched in (False, True))  # the first of each warms up
    ratios = sorted(a / b for a, b in zip(separate, together, strict=True))
    return {
        "separate_s": statistics.median(separate),
        "one_forward_s": statistics.median(together),
        "speedup": statistics.median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
        "relative_difference": float((velocities[True] - velocities[False]).norm() / velocities[False].norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--teachers", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    results: list[dict[str, Any]] = []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)\n")
    print("| model | samples | teachers | separate s | one forward s | separate / one (lowest to highest) |")
    print("|---|---:|---:|---:|---:|---:|")
    for size in args.sizes:
        for batch_size in args.batch_sizes:
            for n in args.teachers:
                row = measure(size, n, batch_size, args.repeats, torch.device("cpu"), torch.float32)
                results.append({"model": size, "samples": batch_size, "teachers": n, **row})
                print(
                    f"| {size} | {batch_size} | {n} | {row['separate_s']:.3f} | {row['one_forward_s']:.3f} | "
                    f"{row['speedup']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f}) |",
                    flush=True,
                )
    if args.output:
        report = {"torch": torch.__version__, "threads": torch.get_num_threads(), "results": results}
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
