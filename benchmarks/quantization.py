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
What quantising the tiny world's base saves and costs: its bytes, the noise floor, and how near a student comes to its teachers.

The same distillation of the tiny world's teachers on its base in float32 and bfloat16 and quantised from bfloat16 in several
ways; the teachers' LoRAs are on the same base as the student. diffusers quantises by bitsandbytes on a GPU only, though the
layers run on a CPU as well: where there is no GPU, its question for one is answered here.

    python benchmarks/quantization.py --output quantization.json

With `--sizes` it counts, on the meta device, what the transformers of three large bases hold in each way.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, TorchAoConfig
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer
from run_settings import QUIET, TINY
from scaling_shapes import MODELS
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

from trl_diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer, estimate_memory, tiny


def config_of(way: str) -> Any:
    if way.startswith("nf4"):
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=way == "nf4 nested",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return {
        "8 bits": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "torchao int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
        "torchao float8": lambda: TorchAoConfig(Float8WeightOnlyConfig()),
    }.get(way, lambda: None)()


def measure(way: str, updates: int) -> dict[str, float]:
    """Bytes of the base's transformer; `kl` of the first update and mean of the last fifth, mean noise floor."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = DiffusionOPDTrainer(
            model=tiny.BASE,
            teachers=tiny.TEACHERS,
            args=DiffusionOPDConfig(
                folder,
                dtype="float32" if way == "float32" else "bfloat16",
                **TINY,
                **QUIET,
                per_device_train_batch_size=4,
                max_steps=updates,
                learning_rate=1e-3,
                ema_decay=None,
                logging_steps=1,
            ),
            train_dataset=tiny.dataset("train"),
            quantization_config=config_of(way),
        )
        size = estimate_memory(trainer)["transformer"]["bytes"]
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "kl" in entry]
    floors = [entry["noise_floor"] for entry in log if entry.get("noise_floor")]
    last = log[-max(1, updates // 5) :]
    return {
        "bytes": size,
        "first_kl": log[0]["kl"],
        "last_kl": sum(entry["kl"] for entry in last) / len(last),
        "noise_floor": sum(floors) / len(floors),
    }


def sizes() -> dict[str, dict[str, float]]:
    """GiB of the transformers, in bfloat16 and with all linear layers quantised; scales and their tables are counted in full."""
    with torch.device("meta"):
        transformers = {name: one.network(**one.config) for name, one in MODELS.items()}
    found = {}
    for name, transformer in transformers.items():
        linear = [module for module in transformer.modules() if isinstance(module, nn.Linear)]
        weights, rows = [layer.weight.numel() for layer in linear], sum(layer.out_features for layer in linear)
        n = sum(weights)
        # Buffers are in bfloat16 too once they are loaded.
        rest = sum(t.numel() for t in [*transformer.parameters(), *transformer.buffers()]) - n
        nested = sum(w // 2 + w // 64 + 4 * -(-w // (64 * 256)) + 4 + 4 * 16 + 4 * 256 for w in weights)
        quantized = {
            "bfloat16": 2 * n,
            "nf4": n // 2 + 4 * n // 64 + 4 * 16 * len(linear),
            "nf4 nested": nested,
            "8 bits": n + 4 * rows,
            "torchao int8": n + 5 * rows,
            "torchao float8": n + 4 * rows,
        }
        found[name] = {way: (2 * rest + size) / 2**30 for way, size in quantized.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--sizes", action="store_true")
    arguments = parser.parse_args()
    if arguments.sizes:
        for name, row in sizes().items():
            print(f"| {name} | {' | '.join(f'{size:.2f}' for size in row.values())} |")
        return
    if not torch.cuda.is_available():
        for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
            quantizer.validate_environment = lambda self, *args, **kwargs: None
            quantizer.update_device_map = lambda self, device_map: {"": "cpu"}
    ways = ("float32", "bfloat16", "nf4", "nf4 nested", "8 bits", "torchao int8", "torchao float8")
    results = {way: measure(way, arguments.updates) for way in ways}
    print("| base | bytes | first kl | last kl | noise_floor |\n|---|---:|---:|---:|---:|")
    for way, row in results.items():
        kls = f"{row['first_kl']:.2e} | {row['last_kl']:.2e}"
        print(f"| {way} | {row['bytes']:,} | {kls} | {row['noise_floor']:.1e} |")
    if arguments.output:
        arguments.output.write_text(json.dumps({"updates": arguments.updates, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
