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
What SD3.5-M, FLUX.1-dev and Qwen-Image need on 1, 8 and 64 H100s, on paper: memory, time and communication of an update.

Counts from shapes (a quarter of an hour on one busy core, no weights, no GPU), then the formulas, then the tables of the page:

    python benchmarks/scaling.py --output docs/source/results/scaling.json --page docs/source/scaling.md

With `--counts` the shapes' part is read from an earlier result.
"""

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import scaling_formulas as paper
from scaling_formulas import Layout


NODE = paper.GPUS_A_NODE
# GPUs, and GPUs that share the base: one, a machine by DDP and by FSDP2, eight machines by DDP, hybrid and flat FSDP2.
PLACES = ((1, 1), (8, 1), (8, 8), (64, 1), (64, 8), (64, 64))


def place_name(gpus: int, shards: int) -> str:
    if shards == 1:
        return "one GPU" if gpus == 1 else "DDP"
    return "FSDP2" if shards == gpus else f"FSDP2 in {shards}s"


def compute(models: dict[str, Any]) -> dict[str, Any]:
    """All numbers of the page, from what was counted."""
    cases = [(name, int(side)) for name, counted in models.items() for side in counted["flops"]]
    return {
        "constants": {
            "bfloat16 rate, FLOP/s (data sheet)": paper.RATE,
            "memory, bytes (data sheet)": paper.MEMORY,
            "NVLink one way, bytes/s (data sheet)": paper.NVLINK,
            "network a GPU, bytes/s (assumed)": paper.NETWORK,
            "share of a link (assumed)": paper.LINK_SHARE,
            "MFU (assumed)": list(paper.MFU),
            "reserve of memory (assumed)": paper.RESERVE,
        },
        "models": models,
        "memory": [memory_row(models, *case, *place) for case in cases for place in PLACES[1:3]],
        "updates": [update_row(models, *case) for case in cases],
        "ddp": [ddp_row(name, counted) for name, counted in models.items()],
        "fsdp": [fsdp_row(models, *case, shards) for case in cases for shards in (8, 64)],
        "quantised": [quantized_row(models, name, side) for name, side in cases],
        "layouts": [
            row
            for case in cases
            for place in PLACES
            for checkpointing in (False, True)
            if (row := layout_row(models, *case, *place, checkpointing)) is not None
        ],
    }


def memory_row(models: dict[str, Any], name: str, side: int, gpus: int, shards: int) -> dict[str, Any]:
    counted = models[name]
    parts = {
        checkpointing: paper.memory(counted, side, Layout(gpus, shards, checkpointing, 1, 1))
        for checkpointing in (False, True)
    }
    resident = {part: size for part, size in parts[True].items() if part != "activations"}
    left = (1 - paper.RESERVE) * paper.MEMORY - sum(resident.values())
    return {
        "model": name,
        "side": side,
        "layout": place_name(gpus, shards),
        "base": parts[True]["base"],
        "resident": sum(resident.values()),
        "activations": {str(c): p["activations"] for c, p in parts.items()},
        "largest_batch": {str(c): largest_batch(counted, side, left, c) for c in parts},
    }


def largest_batch(counted: dict[str, Any], side: int, left: float, checkpointing: bool) -> int:
    one, two = (paper.activations(counted, side, batch, checkpointing) for batch in (1, 2))
    return max(0, int((left - one) // (two - one)) + 1)


def update_row(models: dict[str, Any], name: str, side: int) -> dict[str, Any]:
    counted = models[name]
    flops = counted["flops"][str(side)]
    one, three = (paper.sample_flops(counted, side, False, passes) for passes in (1, 3))
    checkpointed = [paper.sample_flops(counted, side, True, passes) for passes in (1, 3)]
    return {
        "model": name,
        "side": side,
        "forward": flops["forward"],
        "b": flops["backward"] / flops["forward"],
        "update": {"plain": paper.SAMPLES * one, "checkpointing": paper.SAMPLES * checkpointed[0]},
        "three_passes": {"plain": three / one, "checkpointing": checkpointed[1] / checkpointed[0]},
    }


def ddp_row(name: str, counted: dict[str, Any]) -> dict[str, Any]:
    sizes = {str(gpus): paper.ddp_bytes(counted, gpus) for gpus in (8, 64)}
    links = {"8": paper.NVLINK, "64": paper.NETWORK}
    seconds = {gpus: size / (paper.LINK_SHARE * links[gpus]) for gpus, size in sizes.items()}
    return {"model": name, "bytes": sizes, "seconds": seconds}


def fsdp_row(models: dict[str, Any], name: str, side: int, shards: int) -> dict[str, Any]:
    counted = models[name]
    layout = Layout(shards, shards, True, 1, 1)
    return {
        "model": name,
        "side": side,
        "shards": shards,
        "gathered": paper.gathered_bytes(counted),
        "gather_seconds": paper.gather_seconds(counted, shards),
        "forward_seconds": paper.call_seconds(counted, side, 1, paper.MFU[0]),
        "hiding_batch": paper.hiding_batch(counted, side, shards, paper.MFU[0]),
        "gathers_a_step": {str(reshard): paper.gathers(counted, reshard) for reshard in (True, False)},
        "micro_batch_round": {str(r): paper.update_gather_bytes(counted, layout, r) for r in (True, False)},
    }


def quantized_row(models: dict[str, Any], name: str, side: int) -> dict[str, Any]:
    layout = Layout(1, 1, True, 1, 1)
    return {
        "model": name,
        "side": side,
        "base": {kind: size * models[name]["parameters"]["base"] for kind, size in paper.BASE_BYTES.items()},
        "peak": {
            kind: sum(paper.memory(models[name], side, layout, size).values())
            for kind, size in paper.BASE_BYTES.items()
        },
    }


def layout_row(
    models: dict[str, Any], name: str, side: int, gpus: int, shards: int, checkpointing: bool
) -> dict[str, Any] | None:
    counted = models[name]
    layout = paper.layouts(counted, side, gpus, shards, checkpointing)
    if layout is None:
        return None
    seconds = {}
    for mfu in paper.MFU:
        exposed = paper.exposed_seconds(counted, side, layout, mfu)
        seconds[str(mfu)] = {"all": paper.compute_seconds(counted, side, layout, mfu) + exposed, "exposed": exposed}
    return {
        "model": name,
        "side": side,
        "gpus": gpus,
        "layout": place_name(gpus, shards),
        "checkpointing": checkpointing,
        "batch": layout.batch,
        "accumulation": paper.TASKS * layout.micro_batches,
        "samples": layout.samples,
        "peak": sum(paper.memory(counted, side, layout).values()),
        "seconds": seconds,
    }


# Tables


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    align = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, align, *rows))


def gb(size: float) -> str:
    return f"{size / 1e9:.1f}"


def tables(result: dict[str, Any]) -> dict[str, str]:
    """The page's tables, by the names of its markers."""
    models = result["models"]
    target, caution = (str(mfu) for mfu in paper.MFU)

    def of(row: dict[str, Any]) -> str:
        return f"{row['model']}, {row['side']} px"

    sizes = []
    for name, counted in models.items():
        n, others = counted["parameters"], counted["others"]
        parts = ", ".join(f"{part} {gb(paper.BF16 * count)}" for part, count in others.items())
        sizes.append(
            [name, f"{n['base'] / 1e9:.2f}", gb(2 * n["base"]), gb(2 * n["buffers"]), f"{n['lora'] / 1e6:.1f}", parts]
        )
    activation = [
        [f"{name}, {side} px", *(gb(kinds[kind][batch]) for kind in kinds for batch in ("1", "4", "8"))]
        for name, counted in models.items()
        for side, kinds in counted["activations"].items()
    ]
    memory = [
        [
            of(row),
            row["layout"],
            gb(row["base"]),
            gb(row["resident"]),
            *(gb(row["activations"][kind]) for kind in ("False", "True")),
            *(str(row["largest_batch"][kind]) for kind in ("False", "True")),
        ]
        for row in result["memory"]
    ]
    updates = [
        [
            of(row),
            f"{row['forward'] / 1e12:.1f}",
            f"{row['b']:.2f}",
            *(f"{row['update'][kind] / 1e15:.1f}" for kind in ("plain", "checkpointing")),
            *(f"{row['three_passes'][kind]:.2f}" for kind in ("plain", "checkpointing")),
        ]
        for row in result["updates"]
    ]
    ddp = [
        [row["model"]]
        + [f"{row['bytes'][n] / 1e6:.0f}" for n in ("8", "64")]
        + [f"{1000 * row['seconds'][n]:.1f}" for n in ("8", "64")]
        for row in result["ddp"]
    ]
    fsdp = [
        [
            of(row),
            str(row["shards"]),
            gb(row["gathered"]),
            f"{1000 * row['gather_seconds']:.0f}",
            f"{1000 * row['forward_seconds']:.0f}",
            f"{row['gather_seconds'] / row['forward_seconds']:.2f}",
            str(row["hiding_batch"]),
            f"{row['gathers_a_step']['True']:.2f}",
            *(f"{row['micro_batch_round'][kind] / 1e9:,.0f}" for kind in ("True", "False")),
        ]
        for row in result["fsdp"]
    ]
    quantized = [
        [of(row), *(gb(row["base"][kind]) for kind in row["base"]), *(gb(row["peak"][kind]) for kind in row["peak"])]
        for row in result["quantised"]
    ]
    fastest = [
        [
            of(row),
            str(row["gpus"]),
            row["layout"],
            *placed(row, target),
            f"{row['seconds'][caution]['all']:.1f}",
            *placed(other, target),
        ]
        for row, other in chosen(result)
    ]
    split = [
        [f"{name}, {side} px", "yes" if checkpointing else "no"]
        + [
            cell
            for layout in ("DDP", "FSDP2 in 8s", "FSDP2")
            for cell in in_short(
                find(result, model=name, side=side, gpus=64, layout=layout, checkpointing=checkpointing), target
            )
        ]
        for name, side in dict.fromkeys((row["model"], row["side"]) for row in result["layouts"])
        for checkpointing in (False, True)
    ]
    both = ("plain", "checkpointing")
    return {
        "sizes": table(
            ["model", "base, billions", "base GB", "buffers GB", "LoRA, millions", "encoders and VAE, GB each"], sizes
        ),
        "activations": table(
            ["activations, GB", *(f"{kind}, {b} samples" for kind in both for b in (1, 4, 8))], activation
        ),
        "memory": table(
            [
                "GB a GPU",
                "on 8 GPUs",
                "base",
                "all that stays",
                "activations of 1, plain",
                "checkpointing",
                "largest batch, plain",
                "checkpointing",
            ],
            memory,
        ),
        "updates": table(
            [
                "model",
                "forward of a row, TFLOP",
                "b",
                "update, PFLOP",
                "with checkpointing",
                "three passes / one",
                "with checkpointing",
            ],
            updates,
        ),
        "ddp": table(
            [
                "sent by a GPU in an update, MB",
                "8 GPUs",
                "64 GPUs",
                "ms on 8",
                "ms on 64",
            ],
            ddp,
        ),
        "fsdp": table(
            [
                "model",
                "shards",
                "gathered GB",
                "gather ms",
                "forward of a row ms",
                "gather / forward",
                "hidden from batch",
                "gathers a step",
                "GB a GPU and round",
                "without resharding",
            ],
            fsdp,
        ),
        "quantised": table(
            [
                "GB",
                *(f"base, {kind}" for kind in paper.BASE_BYTES),
                *(f"one GPU's peak, {kind}" for kind in paper.BASE_BYTES),
            ],
            quantized,
        ),
        "fastest": table(
            [
                "model",
                "GPUs",
                "layout",
                "checkpointing",
                "batch x accumulation",
                "samples",
                "GB a GPU",
                f"s at {float(target):.0%}",
                f"at {float(caution):.0%}",
                "other: checkpointing",
                "batch x accumulation",
                "samples",
                "GB",
                f"s at {float(target):.0%}",
            ],
            fastest,
        ),
        "split": table(
            [
                "on 64 GPUs",
                "checkpointing",
                *(f"{layout}, {what}" for layout in ("DDP", "FSDP2 in 8s", "FSDP2") for what in ("GB", "s")),
            ],
            split,
        ),
    }


def find(result: dict[str, Any], **fields: Any) -> dict[str, Any] | None:
    rows = [row for row in result["layouts"] if all(row[name] == value for name, value in fields.items())]
    return rows[0] if rows else None


def chosen(result: dict[str, Any]) -> Iterable[tuple[dict[str, Any], dict[str, Any] | None]]:
    """
    For each model, size and number of GPUs the first layout (the plainest) that is at most 5% slower than the fastest, and
    the same with checkpointing the other way.
    """
    rows = result["layouts"]
    target = str(paper.MFU[0])
    for name, side, gpus in dict.fromkeys((row["model"], row["side"], row["gpus"]) for row in rows):
        group = [row for row in rows if (row["model"], row["side"], row["gpus"]) == (name, side, gpus)]
        least = min(row["seconds"][target]["all"] for row in group)
        row = next(row for row in group if row["seconds"][target]["all"] <= 1.05 * least)
        same = {field: row[field] for field in ("model", "side", "gpus", "layout")}
        yield row, find(result, **same, checkpointing=not row["checkpointing"])


def placed(row: dict[str, Any] | None, mfu: str) -> list[str]:
    if row is None:
        return ["does not fit", "", "", "", ""]
    kind = "yes" if row["checkpointing"] else "no"
    batch = f"{row['batch']} x {row['accumulation']}"
    return [kind, batch, str(row["samples"]), *in_short(row, mfu)]


def in_short(row: dict[str, Any] | None, mfu: str) -> list[str]:
    return ["–", "–"] if row is None else [gb(row["peak"]), f"{row['seconds'][mfu]['all']:.1f}"]


def with_tables(page: str, found: dict[str, str]) -> str:
    """The page with its tables exchanged: each is between `<!-- table: name -->` and `<!-- end -->`."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{found[match[2]]}\n{match[3]}",
        page,
        flags=re.DOTALL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    parser.add_argument("--page", type=Path, help="the page whose tables are exchanged")
    parser.add_argument("--counts", type=Path, help="an earlier result, whose counts are taken")
    args = parser.parse_args()
    if args.counts is None:
        import scaling_shapes

        models = {name: scaling_shapes.count(name) for name in scaling_shapes.MODELS}
    else:
        models = json.loads(args.counts.read_text())["models"]
    result = compute(models)
    found = tables(result)
    for name, text in found.items():
        print(f"{name}\n\n{text}\n")
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    if args.page is not None:
        args.page.write_text(with_tables(args.page.read_text(), found))


if __name__ == "__main__":
    main()
