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

"""Every tensor of a LoRA's file is used exactly, or the file is refused by that tensor's name, in every layout."""

import copy
import math
import re

import pytest
import torch
from helpers.families import FAMILIES
from helpers.lora_layouts import AB, KOHYA, LAYOUTS, RANK, TITLES, Layout, network_of, pipeline_of
from helpers.pages import SOURCE
from helpers.teachers_helpers import PEFT_FILE
from peft import LoraConfig
from safetensors.torch import save_file

from trl_diffusion_opd.models.lora_layouts import convert
from trl_diffusion_opd.models.original_names import OriginalNames
from trl_diffusion_opd.models.teachers import TeacherConfig, TeacherError, add_adapter, read_lora


every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda one: f"{one.writer}-{one.family}")


def find(writer, family):
    return next(layout for layout in LAYOUTS if (layout.writer, layout.family) == (writer, family))


def pairs(*modules, names=AB, alpha=False, width=12, rows=36):
    """Random matrices for modules, as a trainer names them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module in modules:
        for name, shape in zip(names, ((RANK, width), (rows, RANK)), strict=True):
            tensors[f"{module}.{name}"] = torch.randn(shape, generator=generator)
        if alpha:
            tensors[f"{module}.alpha"] = torch.tensor(3.7)
    return tensors


def read(pipeline, raw, folder, **options):
    save_file(raw, folder / "lora.safetensors")
    return read_lora(pipeline, TeacherConfig(str(folder), **options))


@every_layout
def test_a_teachers_weights_are_the_base_with_the_files_update_by_hand(layout, tmp_path):
    raw, scale = layout.file(), -0.6
    config, state, _ = read(pipeline_of(layout.family), raw, tmp_path, lora_scale=scale)
    network = copy.deepcopy(network_of(layout.family))
    before = {name: weight.double() for name, weight in network.named_parameters()}
    merged = add_adapter(network, "teacher", config, state).merge_and_unload()
    expected = layout.changes(raw)
    for name, weight in merged.named_parameters():
        change = weight.double() - before.pop(name)
        by_hand = expected.pop(name.removesuffix(".weight"), None)
        assert (
            not change.any() if by_hand is None else torch.allclose(change, scale * by_hand, atol=2e-5, rtol=1e-5)
        ), name
    assert not expected and not before


def test_the_documentations_table_is_this_list():
    section = (SOURCE / "teachers.md").read_text(encoding="utf-8").partition("### LoRAs of other programs")[2]
    rows = [
        row.strip("| ").split(" | ")
        for row in section.partition("\n\nRead are")[0].splitlines()
        if row.startswith("| ")
    ][1:]
    listed = {writer: sorted(families.split(", ")) for writer, _, families in rows}
    tested = {one.writer: sorted({TITLES[of.family] for of in LAYOUTS if of.writer == one.writer}) for one in LAYOUTS}
    assert listed == tested


# What a file may hold beside a LoRA's matrices, by what it is, for a module `m` in a block `b`.
BESIDE = {
    "a weight's difference": "{m}.diff",
    "a bias's difference": "{m}.diff_b",
    "a norm's difference": "{b}.norm3.diff",
    "a modulation's difference": "{b}.diff_m",
    "a replaced weight": "{m}.set_weight",
    "a matrix's bias": "{m}.lora_B.bias",
    "OFT": "{m}.oft_blocks",
    "a scale": "{m}.scale_weight",
    "a plain weight": "{b}.norm3.weight",
    "a bare name": "nowhere",
}


@every_layout
def test_a_foreign_tensor_is_refused_by_name(layout, tmp_path):
    raw, pipeline = layout.file(), pipeline_of(layout.family)
    module = next(iter(layout.layers))
    block = module.rpartition("0")[0] + "0"
    is_first = layout is find(layout.writer, layout.family)
    for kind in BESIDE if is_first and layout.family in ("flux", "sd3") else ["a bias's difference", "a plain weight"]:
        key = BESIDE[kind].format(m=module, b=block)
        with pytest.raises(
            TeacherError, match=rf"lora.safetensors: .*would be dropped: {re.escape(key)}\. Merge"
        ) as error:
            read(pipeline, {**raw, key: torch.ones(3, 3)}, tmp_path)
        assert ("LyCORIS" in str(error.value)) == (kind == "OFT")
    with pytest.raises(
        TeacherError, match="would be dropped: these are not all tensors of a LoRA, LoHa or LoKr"
    ) as error:
        read(pipeline, {**raw, f"{module}.lokr_w1": torch.ones(3, 3)}, tmp_path)
    with pytest.raises(TeacherError, match="would be dropped|cannot convert") as error:
        read(pipeline, {**raw, **pairs(f"{module}_nowhere", names=layout.names)}, tmp_path)
    assert "nowhere" in str(error.value)


@pytest.mark.parametrize(
    "layout", [one for one in LAYOUTS if "transformer.base" not in next(iter(one.layers))], ids=str
)
def test_half_of_a_pair_is_refused_by_name(layout, tmp_path):
    raw = layout.file()
    first, second = (f"{next(iter(layout.layers))}.{name}" for name in layout.names)
    for lost, has in ((first, second), (second, first)):
        rest = {key: value for key, value in raw.items() if key != lost}
        with pytest.raises(
            TeacherError, match=rf"half of a pair is missing: it has {re.escape(has)} and no {re.escape(lost)}"
        ):
            read(pipeline_of(layout.family), rest, tmp_path)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_stable_diffusions_own_names_of_a_unet_are_all_known(family):
    """Diffusers' converter is run on names that are made from the UNet's layers: it would lose a wrong one."""
    network = network_of(family)
    names = OriginalNames(network)
    found = {layer for original in names.known() for layer in names.find(original, False)}
    assert {name for name, module in network.named_modules() if hasattr(module, "weight")} <= found


# What is dropped in a file without an error: beside a layout, a module, its weight, with an alpha or without.
DROPPED = {
    "kohya's keys beside diffusers' for FLUX.1": (
        ("diffusers", "flux"),
        "lora_unet_double_blocks_0_img_attn_qkv",
        ("transformer_blocks.0.attn.to_q", "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"),
    ),
    "kohya's keys beside OneTrainer's for FLUX.1": (
        ("OneTrainer", "flux"),
        "lora_unet_double_blocks_0_img_attn_qkv",
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",),
    ),
    "one layer twice for Z-Image": (("kohya", "z_image"), "layers.0.attention.to_q", ("layers.0.attention.to_q",)),
    "a text projection of FLUX.1": (("kohya", "flux"), "lora_unet_text_projection", ("lora_unet_text_projection",)),
}


@pytest.mark.parametrize("label", DROPPED)
def test_what_would_be_lost_is_refused_by_name(label, tmp_path):
    layout, module, named = DROPPED[label]
    with pytest.raises(TeacherError, match="lora.safetensors: .* would be dropped") as error:
        read(pipeline_of(layout[1]), {**find(*layout).file(), **pairs(module, names=KOHYA)}, tmp_path)
    assert all(name in str(error.value) for name in named)


def test_differences_of_zeros_change_nothing(tmp_path):
    layout = find("kohya", "flux2_klein")
    raw, pipeline = layout.file(), pipeline_of(layout.family)
    zero = {f"lora_unet_double_blocks_0_img_norm1.{name}": torch.zeros(3) for name in ("diff", "diff_b")}
    expected = read(pipeline, raw, tmp_path)[1]
    state = read(pipeline, {**raw, **zero}, tmp_path)[1]
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_bit_of_the_matrices_changes(dtype):
    layout = find("XLabs", "flux")  # which the pipeline's own loader converts
    raw = {key: value.to(dtype) for key, value in layout.file().items()}
    pipeline = pipeline_of("flux")
    expected = type(pipeline).lora_state_dict({key: value.clone() for key, value in raw.items()})
    tensors, alphas, updates = convert(raw, pipeline, "file")
    assert not alphas and not updates and {f"transformer.{key}" for key in tensors} == expected.keys()
    for key, value in tensors.items():
        assert type(value) is torch.Tensor and value.dtype == dtype
        assert torch.equal(value, expected[f"transformer.{key}"]), key


ALPHAS = {
    "zero": (0.0, "is 0.0; alpha must be one finite number, and not 0"),
    "NaN": (math.nan, "is nan; alpha must be one finite number"),
    "several": ([1.0, 2.0], r"is \[1.0, 2.0\]; alpha must be one finite number"),
}


@pytest.mark.parametrize("label", ALPHAS)
def test_refuses_alphas(label, tmp_path):
    value, message = ALPHAS[label]
    key = "lora_unet_single_blocks_0_linear2.alpha"
    raw = find("kohya", "flux").file()
    assert key in raw
    with pytest.raises(TeacherError, match=f"{key} {message}"):
        read(pipeline_of("flux"), {**raw, key: torch.tensor(value)}, tmp_path)


@pytest.mark.parametrize(
    "key", ["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "te1.x.lora_A.weight"]
)
def test_text_encoders_are_refused_by_name(key, tmp_path):
    raw = find("kohya", "sdxl").file()
    with pytest.raises(TeacherError, match=rf"also adapts text encoders .{re.escape(key)[:40]}"):
        read(pipeline_of("sdxl"), {**raw, key: torch.ones(2, 2)}, tmp_path)


def test_a_negative_alpha_subtracts(tmp_path):
    layout = find("kohya", "sd3")
    raw = {key: -value if key.endswith("alpha") else value for key, value in layout.file().items()}
    config, state, _ = read(pipeline_of("sd3"), raw, tmp_path)
    assert {config.lora_alpha, *config.alpha_pattern.values()} == {
        -raw_alpha for raw_alpha in [float(torch.tensor(3.7))]
    }


# --- files for another base, and files without what they need


def test_pefts_keys_without_the_config_that_has_alpha_are_refused(tmp_path):
    raw = Layout("PEFT", "sd3", find("PEFT", "sd3").layers).file()
    with pytest.raises(
        TeacherError, match=r"layout of PEFT\. Its alpha is in its adapter_config\.json: put that beside"
    ):
        read(pipeline_of("sd3"), raw, tmp_path)


def test_a_larger_models_file_is_for_another_base(tmp_path):
    layout = next(
        one for one in LAYOUTS if one.writer == "kohya" and "lora_unet_joint_blocks_0_x_block_attn_qkv" in one.layers
    )
    raw = layout.file()
    more = pairs("lora_unet_joint_blocks_30_x_block_attn_qkv", names=KOHYA, alpha=True)
    with pytest.raises(
        TeacherError, match="lora_unet_joint_blocks_30_x_block_attn_qkv.lora_down.weight would be dropped: a SD3"
    ):
        read(pipeline_of("sd3"), {**raw, **more}, tmp_path)
    key = "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight"
    assert key in raw
    wider = {**raw, key: torch.ones(3 * 64, RANK)}
    with pytest.raises(
        TeacherError,
        match=r"made for another base: lora_unet_joint_blocks_0_x_block_attn_qkv has 192 rows in the file, and 48 here",
    ):
        read(pipeline_of("sd3"), wider, tmp_path)


def test_comfyui_keys_in_a_peft_folder_are_read(tmp_path):
    pipeline = FAMILIES["qwen_image"].build()
    name = "transformer_blocks.0.attn.to_q"
    layer = pipeline.transformer.get_submodule(name)
    raw = pairs(f"diffusion_model.{name}", width=layer.in_features, rows=layer.out_features)
    save_file(raw, tmp_path / PEFT_FILE)
    LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_q"]).save_pretrained(tmp_path)
    config, state, files = read_lora(pipeline, TeacherConfig(str(tmp_path)))
    assert files.kind == "peft" and config.lora_alpha == config.r == RANK
    add_adapter(pipeline.transformer, "teacher", config, state)
    LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["to_q"]).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match=f"lora_alpha={2 * RANK} and r={RANK}, but its keys are not"):
        read_lora(pipeline, TeacherConfig(str(tmp_path)))


def test_a_key_with_and_without_pefts_prefix_is_refused(tmp_path):
    pipeline = pipeline_of("sd3")
    name = "transformer_blocks.0.attn.to_q"
    save_file({**pairs(name), **pairs(f"base_model.model.{name}")}, tmp_path / PEFT_FILE)
    LoraConfig(r=RANK, target_modules=["to_q"]).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match=rf"{name}.lora_A.weight, .* is in it twice"):
        read_lora(pipeline, TeacherConfig(str(tmp_path)))


OTHER_FAMILY = {
    "Z-Image's for Wan": ("wan", "lora_unet_layers_0_attention_to_q", KOHYA, "IndexError"),
    "OneTrainer's for FLUX.1": ("flux", "lora_transformer_nowhere", KOHYA, "NotImplementedError"),
}


@pytest.mark.parametrize("label", OTHER_FAMILY)
def test_whatever_a_converter_raises_is_a_teachers_error(label, tmp_path):
    family, module, names, raised = OTHER_FAMILY[label]
    with pytest.raises(
        TeacherError, match=rf"lora.safetensors: .*cannot convert \({raised}.*name no layer of a"
    ) as error:
        read(pipeline_of(family), pairs(module, names=names, alpha=names == KOHYA), tmp_path)
    assert type(error.value.__cause__).__name__ == raised


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bits_are_read_to_the_bit(dtype, tmp_path):
    raw = {key: value.to(dtype) for key, value in find("diffusers", "sd3").file().items()}
    _, state, _ = read(pipeline_of("sd3"), raw, tmp_path)
    for key, value in raw.items():
        assert torch.equal(state[key.replace("transformer.", "base_model.model.", 1)].float(), value.float())


def test_integers_and_whole_models_are_refused(tmp_path):
    raw = {key: value.to(torch.int8) for key, value in find("diffusers", "sd3").file().items()}
    with pytest.raises(TeacherError, match="holds torch.int8 in transformer.*Save it in a floating-point dtype"):
        read(pipeline_of("sd3"), raw, tmp_path)
    whole = {key: value.contiguous() for key, value in pipeline_of("sd3").transformer.state_dict().items()}
    with pytest.raises(TeacherError, match="a LoRA is needed here, and this is a whole"):
        read(pipeline_of("sd3"), whole, tmp_path)
    with pytest.raises(TeacherError, match="is no LoRA: none of its 1 tensors is a LoRA's.*a single file"):
        read(pipeline_of("sd3"), {"scores": torch.ones(3)}, tmp_path)
