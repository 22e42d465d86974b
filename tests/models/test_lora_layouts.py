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

"""Every tensor of a LoRA's file is used, or the file is refused by that tensor's name, in every layout that diffusers converts."""

import math
import re
from functools import cache

import pytest
import torch
from helpers.families import FAMILIES
from helpers.teachers_helpers import PEFT_FILE
from peft import LoraConfig
from safetensors.torch import save_file

from trl_diffusion_opd.models.lora_layouts import convert
from trl_diffusion_opd.models.teachers import TeacherConfig, TeacherError, add_adapter, read_lora


RANK, ALPHA = 6, 3.7
AB, KOHYA = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")


@cache
def pipeline_of(family):
    return FAMILIES[family].build()


def pairs(*modules, names=AB, alpha=False, width=12, rows=36):
    """Random matrices for modules, as a trainer names them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module in modules:
        for name, shape in zip(names, ((RANK, width), (rows, RANK)), strict=True):
            tensors[f"{module}.{name}"] = torch.randn(shape, generator=generator)
        if alpha:
            tensors[f"{module}.alpha"] = torch.tensor(ALPHA)
    return tensors


# Family, and tensors of a file: what trainers write, each by a few of its modules.
LAYOUTS = {
    "diffusers": ("sd3", pairs("transformer.transformer_blocks.0.attn.to_q", "transformer.proj_out")),
    "diffusers, alpha": ("sd3", pairs("transformer.transformer_blocks.0.attn.to_q", alpha=True)),
    "diffusers, given PEFT's keys": (
        "flux",
        pairs("transformer.base_model.model.transformer_blocks.0.attn.to_q", alpha=True),
    ),
    "the transformer's own names": ("sana", pairs("transformer_blocks.0.attn1.to_q", alpha=True)),
    "diffusers for FLUX.1, alpha": ("flux", pairs("transformer.transformer_blocks.0.attn.to_q", alpha=True)),
    "diffusers for FLUX.1, down and up": ("flux", pairs("transformer.transformer_blocks.0.attn.to_q", names=KOHYA)),
    "kohya for FLUX.1": (
        "flux",
        pairs("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_3_linear2", names=KOHYA, alpha=True),
    ),
    "ComfyUI for FLUX.1": (
        "flux",
        pairs("diffusion_model.double_blocks_0_txt_attn_qkv", "diffusion_model.img_in", names=KOHYA, alpha=True),
    ),
    "OneTrainer for FLUX.1": (
        "flux",
        pairs("lora_transformer_transformer_blocks_1_attn_to_q", "lora_transformer_proj_out", names=KOHYA, alpha=True),
    ),
    "X-Labs for FLUX.1": (
        "flux",
        pairs("double_blocks.0.processor.qkv_lora1", "double_blocks.1.processor.proj_lora2", names=("down.weight", "up.weight")),
    ),
    "kohya for Chroma": ("chroma", pairs("lora_unet_double_blocks_0_img_attn_qkv", names=KOHYA, alpha=True)),
    "ComfyUI for FLUX.2": (
        "flux2_klein",
        pairs("diffusion_model.double_blocks.0.img_attn.qkv", "diffusion_model.single_stream_modulation.lin"),
    ),
    "PEFT's keys for FLUX.2": ("flux2_klein", pairs("base_model.model.double_blocks.0.txt_attn.qkv")),
    "kohya for FLUX.2": (
        "flux2_klein",
        pairs("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1", names=KOHYA, alpha=True),
    ),
    "ComfyUI for Wan": (
        "wan", pairs("diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.cross_attn.k", "diffusion_model.head.head")
    ),
    "ComfyUI for Wan, alpha": (
        "wan", pairs("diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.1.ffn.0", names=KOHYA, alpha=True)
    ),
    "musubi-tuner for Wan": (
        "wan",
        pairs(
            *(f"lora_unet_blocks_0_{kind}_attn_{name}" for kind in ("self", "cross") for name in "qkvo"),
            "lora_unet_blocks_0_ffn_0",
            "lora_unet_blocks_0_ffn_2",
            names=KOHYA,
            alpha=True,
        ),
    ),
    "ComfyUI for Qwen-Image": (
        "qwen_image",
        pairs("diffusion_model.transformer_blocks.0.attn.to_q", "diffusion_model.transformer_blocks.1.img_mlp.net.2", alpha=True),
    ),
    "kohya for Qwen-Image": (
        "qwen_image",
        pairs("lora_unet_transformer_blocks_0_attn_to_q", "lora_unet_img_in", names=KOHYA, alpha=True),
    ),
    "DiffSynth-Studio for Qwen-Image": (
        "qwen_image",
        pairs("transformer_blocks.0.attn.to_q", names=("lora_A.default.weight", "lora_B.default.weight")),
    ),
    "ComfyUI for Z-Image": ("z_image", pairs("diffusion_model.layers.0.attention.to_q", alpha=True)),
    "kohya for Z-Image": (
        "z_image",
        pairs("lora_unet_layers_0_attention_to_q", "lora_unet_layers_1_feed_forward_w1", names=KOHYA, alpha=True),
    ),
    "ComfyUI for HiDream": ("hidream", pairs("diffusion_model.double_stream_blocks.0.block.attn1.to_q")),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_of_a_layout_changes_the_result(layout):
    family, raw = LAYOUTS[layout]
    pipeline = pipeline_of(family)

    def products(tensors):
        matrices, alphas = convert({key: value.clone() for key, value in tensors.items()}, pipeline, "file")
        assert all(type(value) is torch.Tensor for value in matrices.values())
        modules = sorted(key.removesuffix(".lora_A.weight") for key in matrices if "lora_A" in key)
        assert len(matrices) == 2 * len(modules)
        return {
            module: alphas.get(module, 1) * matrices[f"{module}.lora_B.weight"] @ matrices[f"{module}.lora_A.weight"]
            for module in modules
        }

    before = products(raw)
    for key, value in raw.items():
        after = products({**raw, key: 2 * value})
        assert any(not torch.equal(before[module], after[module]) for module in before), key


# What a file may hold beside a LoRA's matrices, by what it is, for a module `m` in a block `b`.
BESIDE = {
    "a weight's difference": "{m}.diff",
    "a bias's difference": "{m}.diff_b",
    "a norm's difference": "{b}.norm3.diff",
    "a modulation's difference": "{b}.diff_m",
    "a replaced weight": "{m}.set_weight",
    "a matrix's bias": "{m}.lora_B.bias",
    "a convolution's middle": "{m}.lora_mid.weight",
    "LoKr": "{m}.lokr_w1",
    "a scale": "{m}.scale_weight",
    "a plain weight": "{b}.norm3.weight",
    "a bare name": "nowhere",
}


def first_module(raw):
    key = next(iter(raw))
    return re.sub(r"(\.lora_[AB](\.default)?|\.lora_down|\.down)\.weight$", "", key)


def read(pipeline, raw, folder):
    save_file(raw, folder / "lora.safetensors")
    return read_lora(pipeline, TeacherConfig(str(folder)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_no_matrix_is_refused_by_name_beside_every_layout(layout, tmp_path):
    family, raw = LAYOUTS[layout]
    module = first_module(raw)
    block = module.rpartition("0")[0] + "0"
    for kind, key in BESIDE.items():
        key = key.format(m=module, b=block)
        with pytest.raises(
            TeacherError, match=rf"lora.safetensors: .*would be dropped: {re.escape(key)}\. Merge"
        ) as error:
            read(pipeline_of(family), {**raw, key: torch.ones(3, 3)}, tmp_path)
        assert ("LyCORIS" in str(error.value)) == (kind == "LoKr")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matrices_of_a_layer_that_the_converter_does_not_know_are_not_dropped(layout, tmp_path):
    family, raw = LAYOUTS[layout]
    module = first_module(raw)
    names = [key.removeprefix(f"{module}.") for key in list(raw)[:2]]
    for unknown in (f"{module}_nowhere", "nowhere"):
        try:
            _, state, _ = read(pipeline_of(family), {**raw, **pairs(unknown, names=names)}, tmp_path)
        except TeacherError as error:
            assert "nowhere" in str(error), error
        else:  # it is for `add_adapter` to say that the base has no such layer
            assert sum("nowhere" in key for key in state) == 2


# What a converter drops without a word, or with one in the log: beside a layout, a module's weight, with an alpha or without.
DROPPED = {
    "modulation of FLUX.2 by kohya": (
        "kohya for FLUX.2",
        "lora_unet_double_stream_modulation_img_lin",
        "lora_down.weight",
        True,
    ),
    "kohya's keys beside diffusers' for FLUX.1": (
        "diffusers for FLUX.1, down and up",
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_down.weight",
        False,
    ),
    "kohya's keys beside OneTrainer's for FLUX.1": (
        "OneTrainer for FLUX.1",
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_down.weight",
        False,
    ),
    "alpha of the last layer of FLUX.1": ("kohya for FLUX.1", "lora_unet_final_layer_linear", "alpha", True),
    "a text projection of FLUX.1": ("kohya for FLUX.1", "lora_unet_text_projection", "lora_down.weight", False),
    "one layer twice for Z-Image": ("kohya for Z-Image", "layers.0.attention.to_q", "lora_down.weight", False),
}


@pytest.mark.parametrize("label", DROPPED)
def test_what_a_converter_drops_is_refused_by_name(label, tmp_path):
    layout, module, weight, alpha = DROPPED[label]
    family, raw = LAYOUTS[layout]
    more = pairs(module, names=KOHYA, alpha=alpha)
    with pytest.raises(
        TeacherError, match=rf"lora.safetensors: .*{re.escape(f'{module}.{weight}')}.* would be dropped"
    ):
        read(pipeline_of(family), {**raw, **more}, tmp_path)


def test_what_changes_nothing_may_be_dropped(tmp_path):
    family, raw = LAYOUTS["kohya for FLUX.2"]
    zero = {f"lora_unet_double_blocks_0_img_norm1.{name}": torch.zeros(3) for name in ("diff", "diff_b")}
    unused = pairs("lora_unet_double_stream_modulation_img_lin", names=KOHYA, alpha=True)
    unused["lora_unet_double_stream_modulation_img_lin.lora_up.weight"] *= 0
    expected = read(pipeline_of(family), raw, tmp_path)[1]
    state = read(pipeline_of(family), {**raw, **zero, **unused}, tmp_path)[1]
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    # An alpha that is the rank scales nothing.
    family, raw = LAYOUTS["kohya for FLUX.1"]
    last = pairs("lora_unet_final_layer_linear", names=KOHYA, alpha=True)
    last["lora_unet_final_layer_linear.alpha"] = torch.tensor(float(RANK))
    state = read(pipeline_of(family), {**raw, **last}, tmp_path)[1]
    assert torch.equal(
        state["base_model.model.proj_out.lora_A.weight"], last["lora_unet_final_layer_linear.lora_down.weight"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "layout", ["kohya for FLUX.1", "ComfyUI for Wan, alpha", "kohya for Z-Image", "kohya for FLUX.2"]
)
def test_tracing_changes_no_bit_of_what_diffusers_converts(layout, dtype):
    family, raw = LAYOUTS[layout]
    raw = {key: value.to(dtype) for key, value in raw.items()}
    expected = type(pipeline_of(family)).lora_state_dict({key: value.clone() for key, value in raw.items()})
    tensors, alphas = convert(raw, pipeline_of(family), "file")
    assert not alphas and {f"transformer.{key}" for key in tensors} == expected.keys()
    for key, value in tensors.items():
        assert value.dtype == dtype and torch.equal(value, expected[f"transformer.{key}"]), key


ALPHAS = {
    "zero": (0.0, "is 0.0; alpha must be one finite number, and not 0"),
    "NaN": (math.nan, "is nan; alpha must be one finite number"),
    "several": ([1.0, 2.0], r"is \[1.0, 2.0\]; alpha must be one finite number"),
    "negative": (-1.0, "is -1.0; a negative alpha cannot be converted"),  # diffusers would not come to an end
}


@pytest.mark.parametrize("label", ALPHAS)
def test_refuses_alphas(label, tmp_path):
    value, message = ALPHAS[label]
    family, raw = LAYOUTS["kohya for FLUX.1"]
    key = "lora_unet_single_blocks_3_linear2.alpha"
    with pytest.raises(TeacherError, match=f"{key} {message}"):
        read(pipeline_of(family), {**raw, key: torch.tensor(value)}, tmp_path)


# --- files for this very base in a layout that is not read, and files for another


TO_Q = {
    "sd3": "transformer_blocks.0.attn.to_q",
    "qwen_image": "transformer_blocks.0.attn.to_q",
    "z_image": "layers.0.attention.to_q",
}
FOREIGN = {
    "DiffSynth-Studio": ("sd3", "{}", ("lora_A.default.weight", "lora_B.default.weight"), "layout of DiffSynth-Studio"),
    "ComfyUI": ("sd3", "diffusion_model.{}", AB, "layout of ComfyUI"),
    "down and up": ("sd3", "transformer.{}", KOHYA, "layout of kohya's trainers .lora_down"),
    "underscores": ("sd3", "lora_unet_{}", KOHYA, "layout of kohya's trainers .underscores"),
    "PEFT without its config": ("sd3", "base_model.model.{}", AB, r"layout of PEFT.*its adapter_config\.json: put that beside"),
    "LoKr": ("z_image", "diffusion_model.{}", ("lokr_w1", "lokr_w2"), "holds tensors that are LyCORIS's"),
}  # fmt: skip


@pytest.mark.parametrize("label", FOREIGN)
def test_a_layout_that_is_not_read_is_the_reason(label, tmp_path):
    family, prefix, names, message = FOREIGN[label]
    pipeline = FAMILIES[family].build()
    layer = pipeline.transformer.get_submodule(TO_Q[family])
    module = prefix.format(TO_Q[family].replace(".", "_") if label == "underscores" else TO_Q[family])
    raw = pairs(module, names=names, width=layer.in_features, rows=layer.out_features)
    with pytest.raises(TeacherError, match=message) as error:
        read(pipeline, raw, tmp_path)
    wrong = ("another base", "no lora_B", "asks for", "name no layer")
    assert not [reason for reason in wrong if reason in str(error.value)]
    if label not in ("PEFT without its config", "LoKr"):
        key, new = re.search(r"Rename its keys: (\S+) to (\S+), and so on", str(error.value)).groups()
        assert key in raw and new == f"transformer.{TO_Q[family]}.lora_A.weight"
        # The advice works.
        renamed = pairs(f"transformer.{TO_Q[family]}", width=layer.in_features, rows=layer.out_features)
        config, state, _ = read(pipeline, renamed, tmp_path)
        add_adapter(pipeline.transformer, "teacher", config, state)


def test_comfyui_keys_in_a_peft_folder_are_read(tmp_path):
    pipeline = FAMILIES["qwen_image"].build()
    name = TO_Q["qwen_image"]
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
    name = TO_Q["sd3"]
    save_file({**pairs(name), **pairs(f"base_model.model.{name}")}, tmp_path / PEFT_FILE)
    LoraConfig(r=RANK, target_modules=["to_q"]).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match=rf"{name}.lora_A.weight, .* is in it twice"):
        read_lora(pipeline, TeacherConfig(str(tmp_path)))


OTHER_FAMILY = {
    "Z-Image's for Wan": ("wan", "lora_unet_layers_0_attention_to_q", KOHYA, "IndexError"),
    "FLUX.2's for FLUX.1": ("flux", "lora_unet_single_blocks_0_linear1", KOHYA, "AssertionError"),
    "Z-Image's for Lumina 2": ("lumina2", "diffusion_model.layers.0.attention.qkv", AB, "RuntimeError"),
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
    raw = {key: value.to(dtype) for key, value in LAYOUTS["diffusers"][1].items()}
    _, state, _ = read(pipeline_of("sd3"), raw, tmp_path)
    for key, value in raw.items():
        assert torch.equal(state[key.replace("transformer.", "base_model.model.", 1)].float(), value.float())


def test_integers_and_whole_models_are_refused(tmp_path):
    raw = {key: value.to(torch.int8) for key, value in LAYOUTS["diffusers"][1].items()}
    with pytest.raises(TeacherError, match="holds torch.int8 in transformer.*Save it in a floating-point dtype"):
        read(pipeline_of("sd3"), raw, tmp_path)
    whole = {key: value.contiguous() for key, value in pipeline_of("sd3").transformer.state_dict().items()}
    with pytest.raises(TeacherError, match="is no LoRA: none of its .* tensors is a LoRA's.*from_single_file"):
        read(pipeline_of("sd3"), whole, tmp_path)
