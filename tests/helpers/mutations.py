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
Changes (mutates) files of valid teachers, drawn by a seed, to test what happens to bad files.

Each mutation says which outcome is right: `"refuse"`, `"same"` (the teacher computes the same as before), or
`"reference"` (it computes the same as in the library of its format; if that fails, the same as before). Refusing is
always right, except for a few mutations that must load.
"""

import copy
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from helpers.teachers_helpers import DIFFUSERS_FILE, PEFT_FILE
from helpers.tiny_sd3 import ATTENTION, make_lora, make_transformer
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


Right = Literal["same", "reference", "refuse"]
CONFIG, FULL_FILE = "adapter_config.json", "diffusion_pytorch_model.safetensors"
INDEX = f"{FULL_FILE}.index.json"
SLOW = r"(([a-z0-9_.])+)+!"
SLOW_TOO = "|".join(["(a|a)" * 40 + "b", ".*" * 60 + "!", "(t|t|r|r)?" * 40 + "!"])
DEEP = "[" * 100_000 + "]" * 100_000
# What may stand where something else is expected.
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 3, 4, 8, 10**9, 10**18, -(10**9), 10**400, 0.0, -0.5, 1.5, 1e-30, 5e-324, 1e30, 1e308, math.nan,
    math.inf, -math.inf, "", "x", "attn.to_q", "(", "[", "*", ".*", "\\", "\x00", "é" * 50, "x" * 100_000, SLOW, SLOW_TOO, "a{99999}{9999}",
    "all-linear", "__proto__", "../../x", [], [1], [None], ["attn.to_q"], ["x" * 100_000], [[]], [{}], list(range(10_000)),
    {}, {"attn.to_q": 3}, {"(": 4}, {SLOW: 4}, {SLOW_TOO: 4.0}, {".*": 1e-30}, {".*": math.inf}, {"to_q": "4"}, {"to_q": 10**9}, {"": 4},
    {"x": {"y": {"z": []}}}, {f"layer{i}": 4 for i in range(20_000)},
]  # fmt: skip


@dataclass
class Stranger:
    """A teacher's files before they are written; `texts` and `raw` stand for a whole file."""

    kind: Literal["peft", "diffusers", "alphas", "full", "sharded"]
    jsons: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    metadata: dict[str, str] | None = None

    @property
    def is_lora(self) -> bool:
        return self.kind in ("peft", "diffusers", "alphas")

    @property
    def weights(self) -> str:
        return next(iter(self.tensors))

    @property
    def options(self) -> dict[str, Any]:
        """The options of a LoRA, or of a transformer; what is changed of a LoRA that has none is lost."""
        return next(iter(self.jsons.values()), {"none": None})

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        metadata = self.metadata
        for name, content in self.jsons.items():
            if name == "metadata":
                prefixed = {f"transformer.{key}": value for key, value in content.items()}
                metadata = {**(metadata or {}), "lora_adapter_metadata": json.dumps(prefixed)}
            else:
                (folder / name).write_text(json.dumps(content))
        for name, tensors in self.tensors.items():
            save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / name, metadata)


def sound_teachers(pipeline: Any, work: Path) -> dict[str, Stranger]:
    """One of each kind, for the tiny SD3."""
    found: dict[str, Stranger] = {}
    loras = {
        "peft": {},
        "patterns": {"rank_pattern": {"attn.to_q": 2, "^transformer_blocks.1.attn.to_v": 7}, "alpha_pattern": {"attn.to_k": 11}},
        "rslora": {"use_rslora": True, "rank": 6, "target_modules": r".*\.attn\.(to_[qkv]|add_k_proj)"},
        "diffusers": {"format": "diffusers", "rank_pattern": {"attn.to_v": 3}},
        "alphas": {"format": "diffusers", "target_modules": ATTENTION[:5]},
    }  # fmt: skip
    for seed, (name, options) in enumerate(loras.items()):
        make_lora(pipeline, work / name, seed=seed, **options)
        if "format" not in options:
            config = json.loads((work / name / CONFIG).read_text())
            found[name] = Stranger("peft", {CONFIG: config}, {PEFT_FILE: load_file(work / name / PEFT_FILE)})
            continue
        tensors = load_file(work / name / DIFFUSERS_FILE)
        if name == "alphas":
            layers = [key.removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key]
            tensors |= {f"{layer}.alpha": torch.tensor(3.0 + i) for i, layer in enumerate(layers)}
            found[name] = Stranger("alphas", {}, {DIFFUSERS_FILE: tensors})
        else:
            options = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "rank_pattern": {"attn.to_v": 3}}
            found[name] = Stranger("diffusers", {"metadata": options}, {DIFFUSERS_FILE: tensors}, {"format": "pt"})
    for name, size in (("full", "1GB"), ("sharded", "10KB")):
        make_transformer(seed=7).save_pretrained(work / name, max_shard_size=size)
        files = sorted((work / name).glob("*.safetensors"))
        jsons = {
            path.name: json.loads(path.read_text())
            for path in [work / name / "config.json", work / name / INDEX]
            if path.is_file()
        }
        found[name] = Stranger(name, jsons, {path.name: load_file(path) for path in files}, {"format": "pt"})
    return found


# --- mutations: of what is in the files


Mutation = Callable[[Random, Stranger], Right]


def any_tensor(rng: Random, it: Stranger) -> tuple[dict[str, Tensor], str]:
    tensors = it.tensors[rng.choice(sorted(it.tensors))]
    return tensors, rng.choice(sorted(key for key in tensors if not key.endswith(".alpha")))


def odd_option(rng: Random, it: Stranger) -> Right:
    names = [f.name for f in fields(LoraConfig) if f.init] if it.is_lora else list(it.options)
    it.options[rng.choice([*names, *it.options])] = copy.deepcopy(rng.choice(ODD))
    return "reference"


def odd_meaning(rng: Random, it: Stranger) -> Right:
    """As [`odd_option`], of the options that say most."""
    if it.is_lora:
        names = ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "use_rslora"]  # fmt: skip
    else:
        names = [
            "_class_name",
            "num_layers",
            "sample_size",
            "pos_embed_max_size",
            "quantization_config",
            "num_attention_heads",
        ]
    it.options[rng.choice(names)] = copy.deepcopy(rng.choice(ODD))
    return "reference"


def plausible_option(rng: Random, it: Stranger) -> Right:
    if not it.is_lora:
        it.options["an_option_of_tomorrow"] = rng.random()
        return "same"
    name, value = rng.choice(
        [
            ("lora_alpha", rng.choice([1, 2.5, 16, -3])), ("use_rslora", True), ("alpha_pattern", {"attn.to_q": 2, "to_[kv]": 5.5}),
            ("alpha_pattern", {r"^transformer_blocks\.0\.attn\.to_q": 1, "attn.to_q": 9}), ("alpha_pattern", {"transformer_blocks.1.*": 7}),
            ("lora_dropout", 0.3), ("exclude_modules", ["nowhere"]), ("exclude_modules", r".*nowhere.*"), ("inference_mode", False),
            ("alpha_pattern", {"nowhere": 3}), ("layers_to_transform", [0, 1]), ("layers_to_transform", 0), ("layers_pattern", "x"),
            ("target_modules", "|".join([rf".*\.{name}" for name in ATTENTION])), ("init_lora_weights", "gaussian"),
            ("target_modules", ".*attn.(" + "|".join(name[5:] for name in ATTENTION) + ")"), ("fan_in_fan_out", True),
            ("target_modules", ATTENTION[1:]), ("target_modules", [*ATTENTION, "proj_out"]), ("base_model_name_or_path", "a/b"),
        ]
    )  # fmt: skip
    it.options[name] = value
    return "reference"


def lost_option(rng: Random, it: Stranger) -> Right:
    del it.options[rng.choice(sorted(it.options))]
    return "reference"


def one_bad_number(rng: Random, it: Stranger) -> Right:
    tensors, key = any_tensor(rng, it)
    tensors[key].view(-1)[rng.randrange(tensors[key].numel())] = rng.choice([math.nan, math.inf, -math.inf])
    return "refuse"


def another_dtype(rng: Random, it: Stranger) -> Right:
    dtype = rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool, torch.complex64])  # fmt: skip
    tensors, key = any_tensor(rng, it)
    for name in [key] if rng.random() < 0.5 else [name for name in tensors if not name.endswith(".alpha")]:
        tensors[name] = (tensors[name] * 100).to(dtype) if not dtype.is_floating_point else tensors[name].to(dtype)
    return "reference" if dtype.is_floating_point else "refuse"


def another_shape(rng: Random, it: Stranger) -> Right:
    tensors, key = any_tensor(rng, it)
    old = tensors[key]
    changes = [lambda x: x[:-1], lambda x: x[..., :-1], lambda x: x[None], lambda x: x.flatten()[0], lambda x: x[:0], lambda x: torch.cat([x, x])]  # fmt: skip
    tensors[key] = rng.choice([*changes, lambda x: x.T if x.ndim == 2 else x[None], lambda x: x.flatten()])(old)
    return "reference" if tensors[key].shape == old.shape else "refuse"


def another_size(rng: Random, it: Stranger) -> Right:
    tensors, key = any_tensor(rng, it)
    factor = rng.choice([0.0, 2.0, -1.0, 1e-20, 1e-40, 1e10, 1e20, 1e30])
    for name in [key] if rng.random() < 0.5 else [name for name in tensors if not name.endswith(".alpha")]:
        tensors[name] = tensors[name] * factor
    return "reference"


def zero_side(rng: Random, it: Stranger) -> Right:
    """Every product is zero: of one side, or of one here and of the other there."""
    if not it.is_lora:
        return "same"
    tensors = it.tensors[it.weights]
    mixed, one = rng.random() < 0.5, rng.choice("AB")
    for layer in {key.partition(".lora_")[0] for key in tensors}:
        key = f"{layer}.lora_{rng.choice('AB') if mixed else one}.weight"
        if key in tensors:
            tensors[key] = torch.zeros_like(tensors[key])
    return "refuse"


def lost_tensor(rng: Random, it: Stranger) -> Right:
    tensors, key = any_tensor(rng, it)
    del tensors[key]
    return "refuse"


def lost_layer(rng: Random, it: Stranger) -> Right:
    tensors, key = any_tensor(rng, it)
    layer = key.partition(".lora_")[0] if it.is_lora else key.rpartition(".")[0]
    for name in [name for name in tensors if name.startswith(f"{layer}.")]:
        del tensors[name]
    return "reference" if it.kind == "alphas" else "refuse"


def more_tensors(rng: Random, it: Stranger) -> Right:
    tensors, key = any_tensor(rng, it)
    more = {
        f"{key}.extra": (2, 2), "x": (1,), "text_encoder.layers.0.q.lora_A.weight": (4, 8), key.replace("transformer_blocks.", "transformer_blocks.9"): (4, 16),
        key.replace(".weight", ".bias"): (4,), key.replace("lora_A", "lora_magnitude_vector").replace("lora_B", "lora_magnitude_vector") + "x": (4,),
        key.replace("transformer_blocks", "x" * 50_000): (4, 16), "lora_unet_x.lora_down.weight": (4, 16), f"{key}\n": (4, 16),
    }  # fmt: skip
    name = rng.choice(sorted(set(more) - set().union(*it.tensors.values())))
    tensors[name] = torch.randn(more[name])
    return "refuse"


def renamed_tensor(rng: Random, it: Stranger) -> Right:
    tensors, key = any_tensor(rng, it)
    new = rng.choice(
        [
            key.upper(),
            f"{key} ",
            f"module.{key}",
            key[:-1],
            key.replace(".", "_"),
            "",
            key.replace("weight", "w"),
            f"{key}.{key}",
        ]
    )
    tensors[new] = tensors.pop(key)
    return "same" if new == key else "refuse"


def swapped_tensors(rng: Random, it: Stranger) -> Right:
    tensors, key = any_tensor(rng, it)
    other = rng.choice(sorted(name for name in tensors if tensors[name].shape == tensors[key].shape))
    tensors[key], tensors[other] = tensors[other], tensors[key]
    return "reference"


def without_prefix(rng: Random, it: Stranger) -> Right:
    if it.is_lora:
        name = it.weights
        it.tensors[name] = {key.removeprefix("base_model.model."): value for key, value in it.tensors[name].items()}
    return "same"


def alpha_tensor(rng: Random, it: Stranger) -> Right:
    tensors = it.tensors[it.weights]
    keys = sorted(key for key in tensors if key.endswith(".alpha"))
    if not keys:
        return odd_meaning(rng, it)
    value = rng.choice([0.0, 1e-30, math.nan, math.inf, 1e30, -2.0, 7.0, [1.0, 2.0], [], True, 4, 2 + 1j])
    for key in keys if rng.random() < 0.5 else keys[:1]:
        tensors[key] = torch.tensor(value)
    return "reference"


def odd_metadata(rng: Random, it: Stranger) -> Right:
    if it.kind not in ("diffusers", "alphas"):
        it.metadata = rng.choice(
            [None, {}, {"format": "pt", "x": "y" * 100_000}, {"format": "pt", "lora_adapter_metadata": DEEP}]
        )
        return "same" if it.is_lora else "reference"
    if it.kind == "diffusers" and rng.random() < 0.2:
        it.jsons.clear()
        return "reference"
    it.jsons.clear()
    text = rng.choice(["{", "[]", "null", "1", DEEP, '"x"', '{"transformer.r": 4}', '{"r": NaN}', '{"r": ' + "9" * 5000 + "}", "\ufeff{}", '{"transformer.": 1}'])  # fmt: skip
    it.metadata = {"lora_adapter_metadata": text}
    return "refuse"


def odd_index(rng: Random, it: Stranger) -> Right:
    if it.kind != "sharded":
        return odd_meaning(rng, it)
    index = it.jsons[INDEX]
    key = rng.choice(sorted(index["weight_map"]))
    shards = sorted(it.tensors)
    what = rng.randrange(7)
    if what == 0:
        index["weight_map"] = copy.deepcopy(rng.choice(ODD))
    elif what == 1:
        index["weight_map"][key] = rng.choice(
            ["../x.safetensors", "/etc/passwd", "*", "a/b.safetensors", "x.bin", "", 1, None, ["x"]]
        )
    elif what == 2:
        index["weight_map"][key] = rng.choice([shard for shard in shards if shard != index["weight_map"][key]])
    elif what == 3:
        index["weight_map"][f"{key}.x"] = shards[0]
    elif what == 4:
        del index["weight_map"][key]
    elif what == 5:
        other = next(shard for shard in shards if key not in it.tensors[shard])
        it.tensors[other][key] = torch.randn_like(it.tensors[index["weight_map"][key]][key])
    else:
        index["metadata"] = copy.deepcopy(rng.choice(ODD))
        return "same"
    return "refuse"


# --- mutations: of the bytes of a file


def damaged_bytes(rng: Random, folder: Path) -> Right:
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    what = rng.randrange(9)
    if what == 0:
        del data[rng.randrange(len(data)) :]
    elif what == 1:
        data[rng.randrange(8)] ^= 1 << rng.randrange(8)
    elif what == 2:
        data[rng.randrange(8, header)] ^= 1 << rng.randrange(8)
    elif what == 3:
        data[rng.randrange(header, len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        return "reference"
    elif what == 4:
        data += b"\0" * rng.choice([1, 1000])
    elif what == 5:
        data = bytearray(
            rng.choice(
                [
                    b"",
                    b"\0" * 8,
                    b"\xff" * 100,
                    b"PK\x03\x04" + bytes(50),
                    b"version https://git-lfs.github.com/spec/v1\n",
                ]
            )
        )
    else:
        described = json.loads(data[8:header])
        name = rng.choice(sorted(key for key in described if key != "__metadata__" and not key.endswith(".alpha")))
        described[name] |= rng.choice(
            [
                {"shape": [10**9, 10**9]},
                {"shape": [-1]},
                {"data_offsets": [0, 10**15]},
                {"dtype": "Q4"},
                {"dtype": "I32"},
                {"shape": []},
            ]
        )
        text = json.dumps(described).encode()
        data = bytearray(len(text).to_bytes(8, "little") + text + data[header:])
    path.write_bytes(data)
    return "reference" if what == 2 else "refuse"


def damaged_json(rng: Random, folder: Path) -> Right:
    paths = sorted(folder.glob("*.json"))
    if not paths:
        return damaged_bytes(rng, folder)
    path = rng.choice(paths)
    data = path.read_bytes()
    what = rng.randrange(9)
    if what == 0:
        path.write_bytes(b"\xef\xbb\xbf" + data)
        return "same"
    changed = {
        1: data[: rng.randrange(len(data))], 2: data.decode().encode("utf-16"), 3: b"", 4: rng.choice([b"null", b"[]", b"1", b'"x"', b"{}"]),
        5: DEEP.encode(), 6: data + b"x", 7: b'{"x": ' + b"9" * 5000 + b"," + data[1:], 8: b'{"x": "\xff\xfe",' + data[1:],
    }  # fmt: skip
    path.write_bytes(changed[what])
    return "same" if what == 2 else "refuse"


def odd_file(rng: Random, folder: Path) -> Right:
    path = rng.choice(sorted(folder.iterdir()))
    path.unlink()
    what = rng.randrange(4)
    if what == 0:
        path.mkdir()
    elif what == 1:
        path.symlink_to(path)
    elif what == 2:
        path.symlink_to("/dev/zero")
    # A folder without its index is of other files, and so is a LoRA without its config.
    return "refuse"


IN_FILES: list[Mutation] = [
    odd_option, odd_meaning, odd_meaning, plausible_option, plausible_option, lost_option, one_bad_number, another_dtype, another_shape,
    another_size, zero_side, lost_tensor, lost_layer, more_tensors, renamed_tensor, swapped_tensors, without_prefix, alpha_tensor,
    odd_metadata, odd_index, odd_index,
]  # fmt: skip
OF_BYTES: list[Callable[[Random, Path], Right]] = [damaged_bytes, damaged_bytes, damaged_json, damaged_json, odd_file]


def mutate(seed: int, sound: dict[str, Stranger], folder: Path) -> tuple[str, str, Right]:
    """Writes the mutated teacher of a seed. Returns of which sound one it is, what was done, and what is right."""
    rng = Random(seed)
    name = rng.choice(sorted(sound))
    it = copy.deepcopy(sound[name])
    shutil.rmtree(folder, ignore_errors=True)
    # Without their prefix PEFT does not read the matrices, and can't tell what else changed.
    two = [what for what in IN_FILES if what is not without_prefix]
    whats: list[Any] = rng.sample(two, 2) if rng.random() < 0.15 else [rng.choice(IN_FILES + OF_BYTES)]
    if it.kind == "alphas":
        # It has no options.
        about_options = (odd_option, odd_meaning, plausible_option, lost_option, odd_index)
        whats = [alpha_tensor if what in about_options else what for what in whats]
    rights: list[Right] = [what(rng, it) for what in whats if what in IN_FILES]
    it.write(folder)
    rights += [what(rng, folder) for what in whats if what not in IN_FILES]
    done = " and ".join(what.__name__ for what in whats)
    if "refuse" in rights:
        # A second mutation can undo the first.
        return name, done, "refuse" if len(rights) == 1 else "reference"
    return name, done, "reference" if "reference" in rights else "same"


# --- what is right


def reference(it: Stranger, folder: Path, base: nn.Module) -> nn.Module:
    """The transformer as the library makes it that a teacher's format is of. Raises whatever that library raises."""
    model: Any = copy.deepcopy(base)
    if it.kind == "peft":
        return PeftModel.from_pretrained(model, str(folder)).eval()
    if it.kind == "diffusers":
        model.load_lora_adapter(str(folder), weight_name=DIFFUSERS_FILE, prefix="transformer")
        return model.eval()
    if it.kind in ("full", "sharded"):
        return type(model).from_pretrained(folder).eval()
    tensors = load_file(folder / DIFFUSERS_FILE)
    for key in [key for key in tensors if "lora_A" in key]:
        layer = key.removesuffix(".lora_A.weight")
        a, b = (tensors[f"{layer}.lora_{side}.weight"].double() for side in "AB")
        alpha = tensors.get(f"{layer}.alpha", torch.tensor(len(a))).double()
        weight = model.get_submodule(layer.removeprefix("transformer.")).weight
        weight.data += (alpha / len(a) * b @ a).to(weight)
    return model
