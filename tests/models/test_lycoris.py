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

"""LoKr, LoHa, LoCon and DoRA as LyCORIS itself writes them: the teacher's weights are those that LyCORIS merges."""

import copy
import json
import logging

import pytest
import torch
from helpers.lora_layouts import network_of, pipeline_of
from helpers.teachers_helpers import PEFT_FILE, make_bank
from helpers.tiny_sd3 import forward
from lycoris import LycorisNetwork, create_lycoris
from lycoris.modules.locon import LoConModule
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from trl_diffusion_opd.models.folded_lora import FoldedLora, folded_copy
from trl_diffusion_opd.models.lora_files import read_lora_files
from trl_diffusion_opd.models.teacher_files import find_files
from trl_diffusion_opd.models.teachers import TeacherConfig, TeacherError, add_adapter, read_lora


logging.getLogger("LyCORIS").setLevel(logging.ERROR)
ALPHA = 1.5
# Which kind of teacher comes of what LyCORIS is asked for, on which base.
CASES = {
    "LoKr, both whole": ("folded", "sd3", dict(algo="lokr", factor=4, full_matrix=True)),
    "LoKr, one a product": ("folded", "sd3", dict(algo="lokr", factor=2, linear_dim=2)),
    "LoKr, both products": ("folded", "sdxl", dict(algo="lokr", factor=8, linear_dim=1, decompose_both=True)),
    "LoKr, rsLoRA": ("folded", "sd3", dict(algo="lokr", factor=2, linear_dim=2, rs_lora=True)),
    "LoKr of convolutions": ("folded", "sdxl", dict(algo="lokr", factor=4, linear_dim=2, conv_dim=2, conv_alpha=1)),
    "LoKr of convolutions, Tucker's": (
        "folded",
        "sdxl",
        dict(algo="lokr", factor=4, linear_dim=2, conv_dim=2, use_tucker=True),
    ),
    "LoHa of a low rank": ("lora", "sd3", dict(algo="loha", linear_dim=2)),
    "LoHa of a high rank": ("folded", "sd3", dict(algo="loha", linear_dim=4)),
    "LoHa of convolutions, Tucker's": ("folded", "sdxl", dict(algo="loha", linear_dim=2, conv_dim=2, use_tucker=True)),
    "LoCon": ("lora", "sd15", dict(algo="locon", linear_dim=3, conv_dim=2)),
    "LoCon, Tucker's": ("lora", "sd15", dict(algo="locon", linear_dim=3, conv_dim=2, use_tucker=True)),
    "DoRA of rows": ("folded", "sd15", dict(algo="locon", linear_dim=3, conv_dim=2, dora_wd=True)),
    "DoRA of columns": ("folded", "sd15", dict(algo="locon", linear_dim=3, dora_wd=True, wd_on_output=False)),
    "DoRA of a LoKr": ("folded", "sd3", dict(algo="lokr", factor=2, linear_dim=2, dora_wd=True)),
}


def trained_weight(lora: nn.Module) -> torch.Tensor:
    """
    The weight that LyCORIS computes with while it trains. (Its `get_merged_weight` multiplies LoHa and LoKr by their
    scale twice.)
    """
    change = lora.make_weight() * lora.scale if isinstance(lora, LoConModule) else lora.get_weight(lora.shape)
    changed = lora.org_weight + change.reshape(lora.org_weight.shape)
    return lora.apply_weight_decompose(changed) if lora.wd else changed


def write(network: nn.Module, path, target: str, options) -> dict[str, torch.Tensor]:
    """Writes a file by LyCORIS, with random weights, and returns the weights that LyCORIS makes with it."""
    LycorisNetwork.apply_preset({"target_module": [target], "target_name": []})
    options = {"linear_dim": 2, "linear_alpha": ALPHA, "conv_alpha": ALPHA, **options}
    made = create_lycoris(network, 1.0, **options)
    generator = torch.Generator().manual_seed(0)
    for lora in made.loras:
        for name, parameter in lora.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter * (1 + 0.1 * noise) if "dora" in name else 0.3 * noise
    names = {name.replace(".", "_"): name for name, _ in network.named_modules()}
    merged = {names[lora.lora_name.removeprefix("lycoris_")]: trained_weight(lora).detach() for lora in made.loras}
    made.apply_to()
    made.save_weights(str(path), torch.float32, {"ss_network_module": "lycoris.kohya"})
    made.restore()
    return merged


def teacher_of(family, folder, **options):
    """The teacher's network, and its kind."""
    pipeline, network = pipeline_of(family), copy.deepcopy(network_of(family))
    read = read_lora_files(find_files(TeacherConfig(str(folder))), pipeline, **options)
    if isinstance(read, FoldedLora):
        return "folded", folded_copy(network, read)
    return "lora", add_adapter(network, "teacher", *read).merge_and_unload()


@pytest.mark.parametrize("label", CASES)
def test_a_file_of_lycoris_makes_the_weights_that_lycoris_makes(label, tmp_path):
    kind, family, options = CASES[label]
    base = network_of(family)
    target = "Attention" if family == "sd3" else "Transformer2DModel"
    if "conv_dim" in options:
        target = "ResnetBlock2D"
    expected = write(copy.deepcopy(base), tmp_path / "style.safetensors", target, options)
    for scale in (1.0, -0.5):
        found, network = teacher_of(family, tmp_path, lora_scale=scale)
        assert found == kind
        for name, weight in network.named_parameters():
            old = base.get_parameter(name)
            merged = expected.get(name.removesuffix(".weight"), old) if name.endswith(".weight") else old
            torch.testing.assert_close(weight - old, scale * (merged.reshape(old.shape) - old), atol=3e-6, rtol=1e-5)
    assert len(expected) > 3


@pytest.mark.parametrize(
    "options", [CASES[label][2] for label in ("LoKr, one a product", "DoRA of rows", "DoRA of columns")]
)
def test_fused_layers_of_original_code_are_cut_after_their_change_is_computed(options, tmp_path):
    network = network_of("sd3")
    parts = [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")]
    fused = nn.Module()
    fused.joint_blocks = nn.ModuleList([nn.Module()])
    fused.joint_blocks[0].x_block = nn.Module()
    fused.joint_blocks[0].x_block.attn = nn.Module()
    weight = torch.cat([network.get_submodule(part).weight for part in parts])
    fused.joint_blocks[0].x_block.attn.qkv = nn.Linear(weight.shape[1], len(weight))
    fused.joint_blocks[0].x_block.attn.qkv.weight.data = weight.clone()
    ((_, merged),) = write(fused, tmp_path / "style.safetensors", "Linear", options).items()
    _, teacher = teacher_of("sd3", tmp_path)
    torch.testing.assert_close(
        torch.cat([teacher.get_submodule(part).weight for part in parts]), merged, atol=3e-6, rtol=1e-5
    )


@pytest.mark.parametrize("is_peft", [True, False], ids=["PEFT", "diffusers"])
def test_a_dora_by_peft(is_peft, tmp_path):
    base = network_of("sd3")
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=["attn.to_q", "proj_out"], use_dora=True, init_lora_weights=False
    )
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.1
    model.save_pretrained(tmp_path)
    if not is_peft:
        tensors = load_file(tmp_path / PEFT_FILE)
        metadata = {
            f"transformer.{key}": value
            for key, value in config.to_dict().items()
            if key in ("r", "lora_alpha", "use_dora")
        }
        metadata["transformer.target_modules"] = ["attn.to_q", "proj_out"]
        for path in tmp_path.iterdir():
            path.unlink()
        save_file(
            {key.replace("base_model.model", "transformer"): value for key, value in tensors.items()},
            tmp_path / "style.safetensors",
            {"lora_adapter_metadata": json.dumps(metadata)},
        )
    kind, network = teacher_of("sd3", tmp_path)
    assert kind == "folded"
    with torch.no_grad():
        torch.testing.assert_close(forward(network), forward(model), atol=1e-5, rtol=1e-5)


def test_a_folded_teacher_beside_a_student(tmp_path):
    pipeline = copy.deepcopy(pipeline_of("sd3"))
    write(
        copy.deepcopy(network_of("sd3")), tmp_path / "style.safetensors", "Attention", CASES["LoKr, one a product"][2]
    )
    _, expected = teacher_of("sd3", tmp_path, lora_scale=0.5)
    teachers = {"a": TeacherConfig(str(tmp_path), lora_scale=0.5), "b": [TeacherConfig(str(tmp_path)), "base"]}
    bank = make_bank(pipeline, teachers, batched=True)
    (half,), (whole, the_base) = bank.teachers["a"], bank.teachers["b"]
    assert half.teacher.kind == "folded" and half.teacher is not whole.teacher
    assert [len(group) for group in bank.forwards(bank.teachers["b"])] == [1, 1]
    with bank.use(half) as network, torch.no_grad():
        assert torch.equal(forward(network), forward(expected))
        assert not any("lora" in name for name, _ in network.named_parameters())
    with bank.use(the_base) as network, torch.no_grad():
        assert torch.equal(forward(network), forward(network_of("sd3")))
    # The memory estimate counts these parameters.
    own = sum(parameter.numel() for parameter in expected.parameters())
    assert sum(parameter.numel() for parameter in bank.backbone.parameters()) == 2 * own
    entry = bank.manifest()["a"][0]
    assert (entry["kind"], entry["lora_scale"], entry["rank"]) == ("folded", 0.5, None)


def test_what_cannot_be_folded_is_refused(tmp_path):
    path = tmp_path / "style.safetensors"
    write(copy.deepcopy(network_of("sd3")), path, "Attention", CASES["LoKr, one a product"][2])
    with pytest.raises(TeacherError, match="a LoRA is needed here, and this is a LoKr, LoHa or DoRA"):
        read_lora(pipeline_of("sd3"), TeacherConfig(str(tmp_path)))
    tensors = load_file(path)
    name = "lycoris_transformer_blocks_0_attn_to_q"
    for change, message in (
        ({f"{name}.lokr_w1": None}, f"{name}.* would be dropped: these are not all tensors of a LoRA, LoHa or LoKr"),
        ({f"{name}.lokr_w1": torch.ones(3, 3)}, f"made for another base: {name}: its change of shape"),
        ({f"{name}.lokr_w1": torch.full((2, 2), float("nan"))}, f"NaN or infinite values in {name} .w1"),
        ({f"{name}_nowhere.lokr_w1": torch.ones(2, 2)} | {f"{name}_nowhere.lokr_w2": torch.ones(8, 8)}, "nowhere.lokr_w1 would be dropped"),
        ({key: torch.zeros_like(value) for key, value in tensors.items() if "w1" in key}, "changes no weight, so this teacher is the base"),
        ({f"{name}.lokr_w1": torch.full((2, 2), 1e38)}, "is not finite|more than 2.24"),
    ):  # fmt: skip
        save_file({key: value for key, value in {**tensors, **change}.items() if value is not None}, path)
        with pytest.raises(TeacherError, match=message):
            teacher_of("sd3", tmp_path)
