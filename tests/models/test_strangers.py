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

"""What a stranger's files may say: what multiplies the matrices, which layers are meant, and what happens where files can't be read."""

import ast
import copy
import json
import math
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from helpers.opd_fixtures import make_trainer
from helpers.teachers_helpers import DIFFUSERS_FILE, PEFT_FILE, edit_json, make_bank, rewrite, save_full, velocity
from helpers.tiny_sd3 import ATTENTION, forward, make_lora, make_pipeline
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from trl_diffusion_opd.models import teacher_files
from trl_diffusion_opd.models.lora_scales import LoraScales, _asked, _Patterns, layer_names, resolve
from trl_diffusion_opd.models.merge import merge_teachers
from trl_diffusion_opd.models.teachers import parse_teacher


CONFIG = "adapter_config.json"
FULL_FILE = "diffusion_pytorch_model.safetensors"
NESTED, ALTERNATIVES = r"(([a-z0-9_.])+)+!", "(t|t|r|r)?" * 40 + "(a|a)" * 40


@pytest.fixture
def pipeline():
    return make_pipeline()


def loaded(pipeline, folder):
    base = copy.deepcopy(pipeline.transformer)
    return make_bank(pipeline, str(folder), base, student_adapter=None)


def refusal(pipeline, folder):
    with pytest.raises(ValueError, match=r"The teachers cannot be used:\n- task 'task': ") as error:
        loaded(pipeline, folder)
    return str(error.value).removeprefix("The teachers cannot be used:\n- task 'task': ")


# --- what multiplies the matrices


def alpha_in_config(pipeline, folder, alpha):
    make_lora(pipeline, folder, seed=1)
    edit_json(folder / CONFIG, lora_alpha=alpha)


def alpha_in_pattern(pipeline, folder, alpha):
    make_lora(pipeline, folder, seed=1)
    edit_json(folder / CONFIG, alpha_pattern={".*": alpha})


def alpha_in_metadata(pipeline, folder, alpha):
    make_lora(pipeline, folder, seed=1, format="diffusers")
    options = {"transformer.r": 4, "transformer.lora_alpha": alpha, "transformer.target_modules": ATTENTION}
    rewrite(folder / DIFFUSERS_FILE, lambda tensors: tensors, {"lora_adapter_metadata": json.dumps(options)})


def alpha_in_tensors(pipeline, folder, alpha):
    make_lora(pipeline, folder, seed=1, format="diffusers")

    def change(tensors):
        names = [key.replace("lora_A.weight", "alpha") for key in tensors if "lora_A" in key]
        return tensors | {name: torch.tensor(float(alpha)) for name in names}

    rewrite(folder / DIFFUSERS_FILE, change)


PLACES = [alpha_in_config, alpha_in_pattern, alpha_in_metadata, alpha_in_tensors]


@pytest.mark.parametrize("place", PLACES)
def test_an_alpha_without_meaning_is_refused(pipeline, tmp_path, place):
    for i, alpha in enumerate([0, 1e-30, math.nan, math.inf, 1e308, 1e30]):
        place(pipeline, tmp_path / str(i), alpha)
        assert "alpha" in refusal(pipeline, tmp_path / str(i)), alpha
    place(pipeline, tmp_path / "sound", -3)  # a LoRA that is subtracted
    loaded(pipeline, tmp_path / "sound")


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_base_begins_where_float32_ends(pipeline, tmp_path, use_rslora):
    make_lora(pipeline, tmp_path, seed=1)
    tensors = load_file(tmp_path / PEFT_FILE)
    root = 2 if use_rslora else 4  # of rank 4
    sizes, weights = [], []
    for key in [key for key in tensors if "lora_A" in key]:
        product = tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()
        layer = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        sizes.append(float(product.norm()) / root)
        weights.append(float(pipeline.transformer.get_submodule(layer).weight.detach().norm()))
    least = 2**-24 / max(size / weight for size, weight in zip(sizes, weights, strict=True))
    most = 2**24 * math.hypot(*weights) / math.hypot(*sizes)
    for alpha, message in (
        (0.999 * least, "less than 2^-24 of the base's weights in all of its 15 layers"),
        (1.001 * least, None),
        (0.999 * most, None),
        (1.001 * most, "more than 2^24 times the base's weights"),
    ):
        edit_json(tmp_path / CONFIG, lora_alpha=alpha, use_rslora=use_rslora)
        if message is None:
            loaded(pipeline, tmp_path)
        else:
            assert message in refusal(pipeline, tmp_path)


def test_products_of_zero_are_the_base(pipeline, tmp_path):
    """One side of a layer is zero here, and the other there; or what one side reads the other does not write."""
    for name, change in {
        "sides": lambda key, value: value * (("0.attn" in key) == ("lora_A" in key)),
        "ranks": lambda key, value: (
            value * (torch.arange(4) % 2 == ("lora_A" in key)).view(-1, *[1] * ("lora_A" in key))
        ),
    }.items():
        make_lora(pipeline, tmp_path / name, seed=1)
        rewrite(tmp_path / name / PEFT_FILE, lambda tensors, by=change: {k: by(k, v) for k, v in tensors.items()})
        assert "so this teacher is the base model" in refusal(pipeline, tmp_path / name)


def test_what_overflows_on_its_way_is_refused(pipeline, tmp_path):
    """The update itself is as it was."""
    make_lora(pipeline, tmp_path / "matrix", seed=1)
    rewrite(
        tmp_path / "matrix" / PEFT_FILE, lambda t: {k: v * (1e25 if "lora_A" in k else 1e-25) for k, v in t.items()}
    )
    assert "lora_A.weight has a norm beyond 1.8e+19" in refusal(pipeline, tmp_path / "matrix")
    make_lora(pipeline, tmp_path / "product", seed=1, lora_alpha=8e-12)
    rewrite(tmp_path / "product" / PEFT_FILE, lambda t: {k: v * 1e6 for k, v in t.items()})
    assert "more than 2^24 times" in refusal(pipeline, tmp_path / "product")
    pipeline.transformer.half()
    make_lora(pipeline, tmp_path / "half", seed=1)
    rewrite(tmp_path / "half" / PEFT_FILE, lambda t: {k: v * (1e8 if "lora_A" in k else 1e-8) for k, v in t.items()})
    assert "infinite in the base's torch.float16" in refusal(pipeline, tmp_path / "half")


def test_a_large_rank_is_compared_before_anything_is_allocated(pipeline, tmp_path):
    make_lora(pipeline, tmp_path, seed=1)
    for change in ({"r": 10**9}, {"rank_pattern": {"to_q": 10**9}}):
        config = json.loads((tmp_path / CONFIG).read_text())
        edit_json(tmp_path / CONFIG, **change)
        assert f"(4, 16) in the file, and the config says rank {10**9}" in refusal(pipeline, tmp_path)
        (tmp_path / CONFIG).write_text(json.dumps(config))


# --- which layers are meant


def test_patterns_mean_what_they_mean_to_peft(pipeline):
    network = pipeline.transformer
    names = layer_names(network)
    configs = [
        {"target_modules": targets, **more}
        for targets in (ATTENTION, ["to_q", "proj_out", "transformer_blocks.0.attn.to_k"], ["nowhere"])
        for more in (
            {},
            {"exclude_modules": ["to_out.0", "transformer_blocks.1.attn.to_q"]},
            {"exclude_modules": r".*\.0\..*"},
            {"layers_to_transform": [1]},
            {"layers_to_transform": 0, "layers_pattern": "transformer_blocks"},
            {"layers_to_transform": [0, 1], "layers_pattern": ["x", "transformer_block."]},
        )
    ]
    configs += [
        {"target_modules": pattern}
        for pattern in (
            ".*to_q",
            "(?i).*TO_[QK]",
            r"transformer_blocks\.0\.attn\.to_q|proj_out",
            "to_q",
            ".*(0|1).attn.to_(q|k|out.0)",
        )
    ]
    for options in configs:
        config = LoraConfig(**options)
        expected = {name for name in names if check_target_module_exists(config, name)}
        assert _asked(config, network, names, _Patterns()) == expected, options
    for patterns in (
        ["attn.to_q", "to_q", "to_k"], ["^proj_out", "out"], [r"^(transformer_blocks\.0\.attn\.to_q|proj_out)", "to_[qk]"], ["^a|to_v"],
        [r"^transformer_blocks\.1\.attn\.to_v", "(attn).to_v$", ".*"], ["o", "t.$"], [r"^(proj_out)|to_q"], ["to_q)|(to_k"],
    ):  # fmt: skip
        table = {pattern: i for i, pattern in enumerate(patterns)}
        expected = {name: table.get(get_pattern_key(patterns, name), "usual") for name in names}
        assert _Patterns().values(table, "usual", names) == expected, patterns


def test_pefts_config_names_every_layer_that_the_base_has(pipeline):
    layers = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q", "proj_out", "nowhere.else"]
    scales = LoraScales(dict(zip(layers, (4, 4, 2, 9), strict=True)), dict.fromkeys(layers, 8), use_rslora=True)
    config = scales.config(pipeline.transformer)
    assert (config.r, config.lora_alpha, config.use_rslora, config.alpha_pattern) == (4, 8, True, {})
    assert config.target_modules == {*layers[:3]} and config.rank_pattern == {"^proj_out": 2}
    # It is read back as what it is.
    tensors = {f"{name}.lora_{side}.weight": torch.ones(shape) for name in layers[:3] for side, shape in
               (("A", (scales.ranks[name], 16)), ("B", (16, scales.ranks[name])))}  # fmt: skip
    again = resolve(config, tensors, pipeline.transformer)
    assert (again.ranks, again.alphas) == ({n: scales.ranks[n] for n in layers[:3]}, dict.fromkeys(layers[:3], 8))
    assert [scales.scale(name) for name in layers] == [4.0, 4.0, 8 / math.sqrt(2), 8 / 3]


@pytest.mark.parametrize("pattern", [NESTED, ALTERNATIVES, "a{1000}{1000}", ".*" * 30_000, "("])
def test_patterns_end(pipeline, tmp_path, pattern):
    make_lora(pipeline, tmp_path, seed=1)
    config = (tmp_path / CONFIG).read_text()
    for change in (
        {"target_modules": pattern},
        {"exclude_modules": pattern},
        {"rank_pattern": {pattern: 4}},
        {"alpha_pattern": {pattern: 4}},
        {"layers_pattern": pattern, "layers_to_transform": [0]},
    ):
        edit_json(tmp_path / CONFIG, **change)
        start = time.perf_counter()
        try:
            message = refusal(pipeline, tmp_path)
        except pytest.fail.Exception:
            assert pattern == ALTERNATIVES  # which is matched, and by no layer
        else:
            assert "pattern" in message
        assert time.perf_counter() - start < 5
        (tmp_path / CONFIG).write_text(config)


# --- what can't be read


def test_an_unreadable_teacher_is_not_a_missing_one(pipeline, tmp_path, monkeypatch):
    """As another user: root may read everything."""
    if os.geteuid() != 0:
        pytest.skip("needs root, who may become somebody else")
    folder = Path("/tmp") / f"strangers-{os.getpid()}"
    try:
        make_lora(pipeline, folder, seed=1)
        (folder / PEFT_FILE).chmod(0)
        os.seteuid(65534)
        assert f"{folder.name}: its files cannot be read (PermissionError: " in refusal(pipeline, folder)
        os.seteuid(0)
        folder.chmod(0)
        os.seteuid(65534)
        assert "its files cannot be read (PermissionError: " in refusal(pipeline, folder)
        with pytest.raises(ValueError, match=r"cannot be looked for \(PermissionError"):
            parse_teacher(str(folder / "lora"))
    finally:
        os.seteuid(0)
        folder.chmod(0o700)
        shutil.rmtree(folder)


def test_a_name_that_no_system_takes(tmp_path):
    for name in ("x" * 5000, "~nobody-of-that-name/x"):
        with pytest.raises(ValueError, match=f"Teacher '{name[:10]}.*' (cannot be looked for|is neither)"):
            parse_teacher(name)


def test_what_no_config_or_network_has_is_refused_early(pipeline, tmp_path, monkeypatch):
    make_lora(pipeline, tmp_path / "long", seed=1)
    edit_json(tmp_path / "long" / CONFIG, revision="x" * teacher_files._LONGEST_JSON)
    assert "adapter_config.json has more than 16 MB" in refusal(pipeline, tmp_path / "long")
    make_lora(pipeline, tmp_path / "key", seed=1)
    rewrite(tmp_path / "key" / PEFT_FILE, lambda tensors: tensors | {"x" * 501: torch.ones(1)})
    message = refusal(pipeline, tmp_path / "key")
    assert "a tensor with a name of 501 characters" in message and len(message) < 300
    save_full(pipeline, tmp_path / "many", seed=1)
    monkeypatch.setattr(teacher_files, "_MOST_TENSORS", 20)
    assert "tensors, more than any network" in refusal(pipeline, tmp_path / "many")


def test_a_whole_transformer_is_compared_before_it_is_built(pipeline, tmp_path):
    save_full(pipeline, tmp_path, seed=1)
    edit_json(tmp_path / "config.json", num_layers=10**9)
    start = time.perf_counter()
    assert "made for another base: num_layers 1000000000 (base 2)" in refusal(pipeline, tmp_path)
    assert time.perf_counter() - start < 2


WHOLE = {
    "NaN in a buffer": (lambda k, v: v * math.nan if k == "pos_embed.pos_embed" else v, "NaN or infinite values in pos_embed"),
    "integers": (lambda k, v: v.to(torch.int8), "holds I8 in context_embedder.bias"),
    "complex": (lambda k, v: v.to(torch.complex64), "holds C64 in context_embedder.bias"),
    "zeros": (lambda k, v: v * 0, "all of its weights are zero"),
    "huge": (lambda k, v: v * 1e20, "its weights are more than 2^24 times those of the base"),
}  # fmt: skip


@pytest.mark.parametrize("label", WHOLE)
def test_the_weights_of_a_whole_transformer(pipeline, tmp_path, label):
    change, message = WHOLE[label]
    save_full(pipeline, tmp_path, seed=1)
    rewrite(tmp_path / FULL_FILE, lambda tensors: {k: change(k, v) for k, v in tensors.items()}, {"format": "pt"})
    assert message in refusal(pipeline, tmp_path)


def test_an_index_says_where_each_weight_is(pipeline, tmp_path):
    expected = forward(save_full(pipeline, tmp_path / "whole", seed=1))
    sharded = type(pipeline.transformer).from_pretrained(tmp_path / "whole")
    sharded.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    bank = loaded(pipeline, tmp_path / "shards")
    assert torch.equal(velocity(bank, bank.teachers["task"][0]), expected)
    index = tmp_path / "shards" / f"{FULL_FILE}.index.json"
    said = json.loads(index.read_text())["weight_map"]
    key, other = "proj_out.bias", next(name for name in said.values() if name != said["proj_out.bias"])
    for wrong, message in (
        (
            {**said, key: "../whole/x.safetensors"},
            "names ../whole/x.safetensors; a .safetensors file beside it is needed",
        ),
        ({**said, key: "*.safetensors"}, "names *.safetensors; a .safetensors"),
        ({**said, key: other}, "does not fit the files: it does not say where proj_out.bias is"),
    ):
        edit_json(index, weight_map=wrong)
        assert message in refusal(pipeline, tmp_path / "shards")
    edit_json(index, weight_map=said)
    rewrite(tmp_path / "shards" / other, lambda tensors: tensors | {key: torch.ones(16)}, {"format": "pt"})
    assert f"{key} is in " in refusal(pipeline, tmp_path / "shards")


def test_who_else_reads_a_strangers_lora(pipeline, tmp_path):
    make_lora(pipeline, tmp_path / "lora", seed=1)
    edit_json(tmp_path / "lora" / CONFIG, lora_alpha=1e-30)
    message = "lora: its updates .* are less than 2\\^-24 of the base's weights"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "out", "base", pipeline, student_init=str(tmp_path / "lora"))
    with pytest.raises(ValueError, match=f"The teachers cannot be used:\n- task 'default': {message}"):
        merge_teachers(make_pipeline(), str(tmp_path / "lora"), tmp_path / "merged")


def test_there_is_one_boundary():
    """Of what reads teachers, one place catches everything, and raises it again as our own error."""
    package = Path(teacher_files.__file__).parent
    files = [
        *package.glob("lora_*.py"),
        *package.glob("teacher*.py"),
        package / "boundary.py",
        package / "whole_transformer.py",
    ]
    broad = [
        file.name
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ExceptHandler) and (node.type is None or "Exception" in ast.unparse(node.type))
    ]
    assert broad == ["boundary.py"] and len(files) > 8
