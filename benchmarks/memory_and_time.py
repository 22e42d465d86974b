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
How much memory and time the package's configs for large models need, on paper: one row a config, which is read as a run reads it.

Counts from shapes (half an hour on one busy core, no weights, no GPU), then the tables of the pages:

    python benchmarks/memory_and_time.py --output docs/source/results/memory_and_time.json \\
        --page docs/source/memory_and_time.md README.md

With `--counts` what shapes give is read from an earlier result; configs that are not in it are counted.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scaling_formulas as paper
from scaling import gb, table, with_tables

from trl_diffusion_opd.algorithms.samplers import default_skip_last_steps
from trl_diffusion_opd.scripts import opd
from trl_diffusion_opd.scripts.arguments import load_teachers
from trl_diffusion_opd.scripts.parser import parse


UPDATES = 1000
# Shares of the data sheet's operations: a target, and what one H100 reached without compilation. docs/source/gpu.md gives
# it as 19% of the rate of large products there, 791 of 989 TFLOP/s.
MFU = (0.45, 0.15)
# The config whose time was measured, a sample and trained step at a time.
MEASURED = "sd35_80gb"
# Of the paper's LoRA, as the student and, where nothing else is said, the teachers have it.
RANK = 32
COST = Path(__file__).parents[1] / "docs" / "source" / "results" / "gpu" / "cost.json"


@dataclass(frozen=True)
class Card:
    """A GPU: its name, its memory in bytes, its dense bfloat16 operations a second (NVIDIA's data sheets)."""

    name: str
    memory: float
    rate: float


CARDS = {
    "24gb": Card("RTX 4090", 24e9, 165e12),
    "48gb": Card("L40S", 48e9, 362e12),
    "80gb": Card("H100", paper.MEMORY, paper.RATE),
}
# Each config's model, as `memory_and_time_shapes.MODELS` calls it.
CONFIGS = {
    "sd35_24gb": "SD3.5-M",
    "sd35_80gb": "SD3.5-M",
    "flux1_dev_24gb": "FLUX.1-dev",
    "flux1_dev_48gb": "FLUX.1-dev",
    "flux1_dev_80gb": "FLUX.1-dev",
    "flux2_klein_24gb": "FLUX.2-klein 4B",
    "flux2_klein_48gb": "FLUX.2-klein 4B",
    "qwen_image_48gb": "Qwen-Image",
    "qwen_image_80gb": "Qwen-Image",
    "sdxl_24gb": "SDXL",
    "wan21_1b_24gb": "Wan 2.1 1.3B",
    "wan21_14b_48gb": "Wan 2.1 14B",
    "wan21_14b_80gb": "Wan 2.1 14B",
}


@dataclass(frozen=True)
class Recipe:
    """
    A recipe whose memory no config tells: its model, its card, and the rank of its teachers, whose LoRAs are counted on the
    student's layers.
    """

    model: str
    card: str
    teacher_rank: int


# The rank is that of the command with which the authors of the teachers trained.
RECIPES = {"flux1_kontext_styles": Recipe("FLUX.1 Kontext", "80gb", teacher_rank=256)}


def settings(config: str) -> dict[str, Any]:
    """What the estimate needs to know of a config."""
    script, args = parse(opd.ARGUMENTS, ["--config", config, "--use_cpu", "true"])
    default = args.guidance_scale if args.teacher_guidance_scale is None else args.teacher_guidance_scale
    teachers = load_teachers(script.teachers, script.teacher_guidance_scales)
    scales = [
        [default if one.guidance_scale is None else one.guidance_scale for one in of] for of in teachers.values()
    ]
    skipped = default_skip_last_steps(args.sampler) if args.skip_last_steps is None else args.skip_last_steps
    return {
        "card": config.rpartition("_")[2],
        "height": args.height,
        "width": args.width,
        "precision": "4-bit" if script.load_in_4bit else "8-bit" if script.torchao_quant_type else args.dtype,
        "batch": args.per_device_train_batch_size,
        "samples": args.per_device_train_batch_size * args.gradient_accumulation_steps,
        "steps": args.num_trained_timesteps or args.num_inference_steps - skipped,
        "guidance_scale": args.guidance_scale,
        "teachers": scales,
        "checkpointing": args.gradient_checkpointing,
        "offload_encoders": args.offload_encoders,
        "average": args.ema_decay not in (None, 0),
    }


def memory(run: Mapping[str, Any], counted: Mapping[str, Any], teacher_rank: int = RANK) -> dict[str, float]:
    """Bytes on the GPU by part, then `train` (at the student's backward) and `encode` (while prompts are encoded)."""
    lora, others = counted["lora"], counted["others"]
    teachers = sum(map(len, run["teachers"])) * teacher_rank // RANK
    encoders = sum(paper.BF16 * n for name, n in others.items() if name != "VAE")
    parts = {
        "base": counted["base_bytes"],
        "adapters": (paper.FP32 + teachers * paper.BF16) * lora,
        "gradients": paper.FP32 * lora,
        "optimizer": 2 * paper.FP32 * lora,
        "moving average": paper.FP32 * lora * run["average"],
    }
    resident = float(sum(parts.values()))
    beside = 0.0 if run["offload_encoders"] else encoders + paper.BF16 * others.get("VAE", 0)
    return {
        **parts,
        "encoders": float(encoders),
        "activations": counted["activations"],
        "train": resident + beside + counted["activations"],
        "encode": resident + max(encoders, beside),
    }


def update_flops(run: Mapping[str, Any], counted: Mapping[str, Any]) -> float:
    """Operations of an update: of the teachers' forwards, and of the student's forwards and backwards."""
    flops, guided = counted["flops"], counted["guided_rows"]
    teachers = [sum(guided if scale != 1 else 1 for scale in of) for of in run["teachers"]]
    student = guided if run["guidance_scale"] != 1 else 1
    trained = flops["forward"] + flops["backward"] + run["checkpointing"] * flops["recompute"]
    of_step = sum(teachers) / len(teachers) * flops["forward"] + student * trained
    return float(run["samples"] * run["steps"] * of_step)


def compute(counts: Mapping[str, Any]) -> dict[str, Any]:
    """All numbers of the page, from what was counted."""
    rows = []
    for config, model in CONFIGS.items():
        run = settings(config)
        card, work = CARDS[run["card"]], update_flops(run, counts[config])
        sizes = memory(run, counts[config])
        rows.append(
            {
                "config": config,
                "model": model,
                **run,
                "card": card.name,
                "card_bytes": card.memory,
                "memory": sizes,
                "peak": max(sizes["train"], sizes["encode"]),
                "update_flops": work,
                "seconds": {str(mfu): work / (card.rate * mfu) for mfu in MFU},
            }
        )
    return {
        "mfu": list(MFU),
        "updates": UPDATES,
        "counts": dict(counts),
        "rows": rows,
        "measured": measured(),
        "recipes": [recipe_row(name, recipe, counts[name]) for name, recipe in RECIPES.items()],
    }


def recipe_row(name: str, recipe: Recipe, counted: Mapping[str, Any]) -> dict[str, Any]:
    """The memory of a recipe. It has no hours: it does not train all steps."""
    run, card = settings(name), CARDS[recipe.card]
    sizes = memory(run, counted, recipe.teacher_rank)
    return {
        "recipe": name,
        "model": recipe.model,
        **run,
        "card": card.name,
        "card_bytes": card.memory,
        "memory": sizes,
        "peak": max(sizes["train"], sizes["encode"]),
    }


def measured() -> dict[str, float]:
    """Seconds of an update of `MEASURED`, from the H100's measured seconds a sample and trained step."""
    check = json.loads(COST.read_text())["checks"]["seconds, batch 8, checkpointing"]
    run = settings(MEASURED)
    of_step = check["one_pass"]["seconds"] / check["samples"] / check["trained_steps"]
    return {"seconds": of_step * run["samples"] * run["steps"]}


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """The page's tables, by the names of its markers."""
    target, low = (str(mfu) for mfu in result["mfu"])
    sizes = ["model", "card", "size", "precision", "batch", "samples an update", "GB training", "GB encoding prompts"]
    header = [
        "config",
        *sizes,
        f"s an update at {float(target):.0%}",
        f"hours for {result['updates']:,} updates at {float(target):.0%}",
        f"at {float(low):.0%}",
        "source",
    ]

    def cells(row: Mapping[str, Any], seconds: Mapping[str, float], source: str) -> list[str]:
        hours = [seconds[mfu] * result["updates"] / 3600 if mfu in seconds else None for mfu in (target, low)]
        return [
            *size_cells(row["config"], row),
            *("" if n is None else f"{n:.1f}" for n in (seconds[target], *hours)),
            source,
        ]

    rows = [cells(row, row["seconds"], "estimated") for row in result["rows"]]
    (run,) = (row for row in result["rows"] if row["config"] == MEASURED)
    rows.append(cells(run, {target: result["measured"]["seconds"]}, "time measured"))
    short = [
        [cell[0], cell[1], cell[2], cell[3], cell[4], str(max(map(float, cell[7:9]))), f"{cell[10]} – {cell[11]}"]
        for cell in rows[:-1]
    ]
    names = ["config", "model", "card", "size", "precision", "GB", f"hours for {result['updates']:,} updates"]
    of_recipes = [size_cells(row["recipe"], row) for row in result["recipes"]]
    return {
        "runs": table(header, rows),
        "short": table(names, short),
        "recipes": table(["recipe", *sizes], of_recipes),
    }


def size_cells(name: str, row: Mapping[str, Any]) -> list[str]:
    """What a row of a table says of a run, as far as its memory."""
    return [
        f"`{name}`",
        row["model"],
        f"{row['card']}, {row['card_bytes'] / 1e9:.0f} GB",
        f"{row['width']} x {row['height']}",
        {"bfloat16": "bf16"}.get(row["precision"], row["precision"]),
        str(row["batch"]),
        str(row["samples"]),
        *(gb(row["memory"][moment]) for moment in ("train", "encode")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    parser.add_argument("--page", type=Path, nargs="*", default=[], help="the pages whose tables are exchanged")
    parser.add_argument("--counts", type=Path, help="an earlier result, whose counts are taken")
    args = parser.parse_args()
    counts = {} if args.counts is None else json.loads(args.counts.read_text())["counts"]
    for config, model in {**CONFIGS, **{name: recipe.model for name, recipe in RECIPES.items()}}.items():
        if config not in counts:
            from memory_and_time_shapes import count

            counts[config] = count(model, settings(config))
            print(config, json.dumps(counts[config]), flush=True)
    result = compute(counts)
    found = tables(result)
    print("\n\n".join(found.values()))
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    for page in args.page:
        page.write_text(with_tables(page.read_text(), found))


if __name__ == "__main__":
    main()
