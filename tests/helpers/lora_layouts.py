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
Files of LoRAs in the layouts of the programs that write them, and what each is to change of its base, by hand.

The facts about each layout come from the programs, not from the package, since the package is tested against them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import diffusers
import torch
from diffusers import DiffusionPipeline
from helpers.families import FAMILIES
from torch import Tensor, nn


RANK, ALPHA = 6, 3.7
AB, KOHYA = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
# The families' names in the documentation.
TITLES = {
    "sd15": "Stable Diffusion 1.5", "sdxl": "Stable Diffusion XL", "sd3": "Stable Diffusion 3 and 3.5", "flux": "FLUX.1",
    "flux2_klein": "FLUX.2", "chroma": "Chroma", "wan": "Wan", "qwen_image": "Qwen-Image", "z_image": "Z-Image",
    "hidream": "HiDream", "ltx": "LTX-Video", "sana": "Sana", "lumina2": "Lumina 2",
    "auraflow": "AuraFlow", "krea2": "Krea 2",
}  # fmt: skip


def _unet(is_xl: bool) -> nn.Module:
    options = dict(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64
    )
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D") if is_xl else ("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D") if is_xl else ("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        use_linear_projection=is_xl,
        transformer_layers_per_block=(1, 2) if is_xl else 1,
        **(options if is_xl else {}),
    )


def _ltx() -> nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    )


def _auraflow() -> nn.Module:
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
    )


def _krea2() -> nn.Module:
    text = {f"text_{name}": 2 for name in ("num_attention_heads", "num_key_value_heads")}
    return diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 4, 8),
        **text,
    )


# Pipelines of which these tests need the network alone.
_NETWORKS = {
    "sd15": (diffusers.StableDiffusionPipeline, "unet", lambda: _unet(is_xl=False)),
    "sdxl": (diffusers.StableDiffusionXLPipeline, "unet", lambda: _unet(is_xl=True)),
    "ltx": (diffusers.LTXPipeline, "transformer", _ltx),
    "auraflow": (diffusers.AuraFlowPipeline, "transformer", _auraflow),
    "krea2": (diffusers.Krea2Pipeline, "transformer", _krea2),
}


def build(family: str) -> DiffusionPipeline:
    """A tiny pipeline of the family."""
    if family in FAMILIES:
        return FAMILIES[family].build()
    kind, name, network = _NETWORKS[family]
    torch.manual_seed(0)
    parts = dict.fromkeys(kind._get_signature_keys(kind)[0])
    if name == "unet":
        parts["scheduler"] = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    return kind(**{**parts, name: network().eval().requires_grad_(False)})


pipeline_of = cache(build)


@dataclass(frozen=True)
class Layout:
    """
    One layout, on one family.

    Args:
        writer (`str`): the layout's name in the documentation.
        family (`str`): the base.
        layers (`dict`): by the layer's name in the file, the layers of the base that it is, in the order of its rows.
            A name with "~" before it has the two halves of its rows exchanged.
        names (`tuple[str, str]`): the ends of the keys.
        alpha (`bool`): whether the file has alphas.
    """

    writer: str
    family: str
    layers: Mapping[str, Sequence[str]]
    names: tuple[str, str] = AB
    alpha: bool = False

    def file(self) -> dict[str, Tensor]:
        """The tensors of the file."""
        network = network_of(self.family)
        generator = torch.Generator().manual_seed(0)
        tensors = {}
        for name, layers in self.layers.items():
            weights = [network.get_submodule(layer.removeprefix("~")).weight for layer in layers]
            down, up = (RANK, *weights[0].shape[1:]), (sum(map(len, weights)), RANK, *[1] * (weights[0].ndim - 2))
            for end, shape in zip(self.names, (down, up), strict=True):
                tensors[f"{name}.{end}"] = torch.randn(shape, generator=generator)
            if self.alpha:
                tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
        return tensors

    def changes(self, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the file changes of each layer's weight, in float64."""
        network = network_of(self.family)
        changes = {}
        for name, layers in self.layers.items():
            down, up = (raw[f"{name}.{end}"].double().flatten(1) for end in self.names)
            alpha = float(raw.get(f"{name}.alpha", torch.tensor(float(RANK))))
            product, start = alpha / RANK * up @ down, 0
            for layer in layers:
                weight = network.get_submodule(layer.removeprefix("~")).weight
                rows = product[start : start + len(weight)]
                start += len(weight)
                if layer.startswith("~"):
                    rows = torch.cat([rows[len(rows) // 2 :], rows[: len(rows) // 2]])
                changes[layer.removeprefix("~")] = rows.reshape(weight.shape)
        return changes


def network_of(family: str) -> nn.Module:
    pipeline = pipeline_of(family)
    return pipeline.components.get("unet") or pipeline.components["transformer"]


def same(prefix: str, *layers: str, dots: bool = True) -> dict[str, list[str]]:
    """Layers whose names in the file are the base's own."""
    return {prefix + (layer if dots else layer.replace(".", "_")): [layer] for layer in layers}


def _qkv(*ends: str, block: str) -> list[str]:
    return [f"{block}.attn.{end}" for end in ends]


_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
# The layers of Stable Diffusion 3's own code.
_SD3 = {
    "joint_blocks.0.x_block.attn.qkv": _qkv(*_QKV, block="transformer_blocks.0"),
    "joint_blocks.1.context_block.attn.qkv": _qkv(*_ADDED, block="transformer_blocks.1"),
    "joint_blocks.0.x_block.attn.proj": ["transformer_blocks.0.attn.to_out.0"],
    "joint_blocks.0.context_block.attn.proj": ["transformer_blocks.0.attn.to_add_out"],
    "joint_blocks.0.x_block.mlp.fc1": ["transformer_blocks.0.ff.net.0.proj"],
    "joint_blocks.0.context_block.mlp.fc2": ["transformer_blocks.0.ff_context.net.2"],
    "joint_blocks.0.x_block.adaLN_modulation.1": ["transformer_blocks.0.norm1.linear"],
    "joint_blocks.0.context_block.adaLN_modulation.1": ["transformer_blocks.0.norm1_context.linear"],
    "joint_blocks.1.context_block.adaLN_modulation.1": ["~transformer_blocks.1.norm1_context.linear"],
    "final_layer.adaLN_modulation.1": ["~norm_out.linear"],
    "final_layer.linear": ["proj_out"],
    "context_embedder": ["context_embedder"],
    "y_embedder.mlp.0": ["time_text_embed.text_embedder.linear_1"],
    "t_embedder.mlp.2": ["time_text_embed.timestep_embedder.linear_2"],
}
_SINGLE = [f"single_transformer_blocks.0.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
_BLOCKS_OF_FLUX = {
    "double_blocks.0.img_attn.qkv": _qkv(*_QKV, block="transformer_blocks.0"),
    "double_blocks.0.txt_attn.qkv": _qkv(*_ADDED, block="transformer_blocks.0"),
    "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks.0.txt_attn.proj": ["transformer_blocks.0.attn.to_add_out"],
    "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.net.0.proj"],
    "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.net.2"],
    "single_blocks.0.linear1": _SINGLE,
    "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
    "final_layer.linear": ["proj_out"],
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
}
_FLUX = {
    **_BLOCKS_OF_FLUX,
    "double_blocks.0.img_mod.lin": ["transformer_blocks.0.norm1.linear"],
    "single_blocks.0.modulation.lin": ["single_transformer_blocks.0.norm.linear"],
    "final_layer.adaLN_modulation.1": ["~norm_out.linear"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
}
_FLUX2 = {
    "double_blocks.0.img_attn.qkv": _qkv(*_QKV, block="transformer_blocks.0"),
    "double_blocks.0.txt_attn.qkv": _qkv(*_ADDED, block="transformer_blocks.0"),
    "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.linear_in"],
    "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.linear_out"],
    "single_blocks.0.linear1": ["single_transformer_blocks.0.attn.to_qkv_mlp_proj"],
    "single_blocks.0.linear2": ["single_transformer_blocks.0.attn.to_out"],
    "double_stream_modulation_img.lin": ["double_stream_modulation_img.linear"],
    "single_stream_modulation.lin": ["single_stream_modulation.linear"],
    "final_layer.adaLN_modulation.1": ["~norm_out.linear"],
    "img_in": ["x_embedder"],
}
_WAN = {
    "blocks.0.self_attn.q": ["blocks.0.attn1.to_q"],
    "blocks.0.self_attn.o": ["blocks.0.attn1.to_out.0"],
    "blocks.1.cross_attn.k": ["blocks.1.attn2.to_k"],
    "blocks.0.ffn.0": ["blocks.0.ffn.net.0.proj"],
    "blocks.1.ffn.2": ["blocks.1.ffn.net.2"],
    "text_embedding.0": ["condition_embedder.text_embedder.linear_1"],
    "time_embedding.2": ["condition_embedder.time_embedder.linear_2"],
    "time_projection.1": ["condition_embedder.time_proj"],
    "head.head": ["proj_out"],
}
_Z_IMAGE = {
    "layers.0.attention.qkv": [f"layers.0.attention.{name}" for name in _QKV],
    "layers.1.attention.out": ["layers.1.attention.to_out.0"],
    "layers.0.feed_forward.w1": ["layers.0.feed_forward.w1"],
    "noise_refiner.0.attention.qkv": [f"noise_refiner.0.attention.{name}" for name in _QKV],
    "final_layer.linear": ["all_final_layer.2-1.linear"],
    "cap_embedder.1": ["cap_embedder.1"],
}
_LUMINA = {
    "layers.0.attention.qkv": [f"layers.0.attn.{name}" for name in _QKV],
    "layers.1.attention.out": ["layers.1.attn.to_out.0"],
    "layers.0.feed_forward.w2": ["layers.0.feed_forward.linear_2"],
}
_SANA = {
    "blocks.0.attn.qkv": [f"transformer_blocks.0.attn1.{name}" for name in _QKV],
    "blocks.1.cross_attn.kv_linear": [f"transformer_blocks.1.attn2.{name}" for name in ("to_k", "to_v")],
    "blocks.0.attn.proj": ["transformer_blocks.0.attn1.to_out.0"],
}
_AURAFLOW = {
    "double_layers.0.attn.w2q": ["joint_transformer_blocks.0.attn.to_q"],
    "double_layers.0.attn.w1o": ["joint_transformer_blocks.0.attn.to_add_out"],
    "double_layers.0.mlpC.c_proj": ["joint_transformer_blocks.0.ff_context.out_projection"],
    "double_layers.0.modX.1": ["joint_transformer_blocks.0.norm1.linear"],
    "single_layers.0.attn.w1v": ["single_transformer_blocks.0.attn.to_v"],
    "single_layers.0.mlp.c_fc1": ["single_transformer_blocks.0.ff.linear_1"],
    "modF.1": ["~norm_out.linear"],
    "cond_seq_linear": ["context_embedder"],
}
_KREA2 = {
    "blocks.0.attn.wq": ["transformer_blocks.0.attn.to_q"],
    "blocks.0.attn.gate": ["transformer_blocks.0.attn.to_gate"],
    "blocks.0.mlp.up": ["transformer_blocks.0.ff.up"],
    "txtfusion.refiner_blocks.0.attn.wo": ["text_fusion.refiner_blocks.0.attn.to_out.0"],
    "txtmlp.3": ["txt_in.linear_2"],
    "tproj.1": ["time_mod_proj"],
    "first": ["img_in"],
    "last.linear": ["final_layer.linear"],
}
# Of Stable Diffusion's own code: blocks are numbered through, each with its resnet (0) and its attention (1).
_SDXL = {
    "input_blocks.0.0": ["conv_in"],
    "input_blocks.4.1.transformer_blocks.1.attn1.to_q": ["down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"],
    "input_blocks.5.1.proj_in": ["down_blocks.1.attentions.1.proj_in"],
    "input_blocks.5.0.in_layers.2": ["down_blocks.1.resnets.1.conv1"],
    "input_blocks.4.0.skip_connection": ["down_blocks.1.resnets.0.conv_shortcut"],
    "input_blocks.3.0.op": ["down_blocks.0.downsamplers.0.conv"],
    "middle_block.1.transformer_blocks.0.ff.net.0.proj": ["mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"],
    "middle_block.2.out_layers.3": ["mid_block.resnets.1.conv2"],
    "output_blocks.2.1.transformer_blocks.0.attn2.to_out.0": ["up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_out.0"],
    "output_blocks.2.2.conv": ["up_blocks.0.upsamplers.0.conv"],
    "output_blocks.3.0.emb_layers.1": ["up_blocks.1.resnets.0.time_emb_proj"],
    "time_embed.0": ["time_embedding.linear_1"],
    "label_emb.0.2": ["add_embedding.linear_2"],
    "out.2": ["conv_out"],
}  # fmt: skip
_SD15 = {
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k": ["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"],
    "input_blocks.2.1.proj_out": ["down_blocks.0.attentions.1.proj_out"],
    "input_blocks.3.0.op": ["down_blocks.0.downsamplers.0.conv"],
    "output_blocks.2.1.conv": ["up_blocks.0.upsamplers.0.conv"],
    "output_blocks.5.1.transformer_blocks.0.ff.net.2": ["up_blocks.1.attentions.2.transformer_blocks.0.ff.net.2"],
}
_UNETS = [
    "down_blocks.{}.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.{}.attentions.1.proj_in",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "down_blocks.1.resnets.0.conv1",
    "up_blocks.1.resnets.0.time_emb_proj",
]
_TO_Q = "transformer_blocks.0.attn.to_q"


def _of_unet(family: str) -> list[str]:
    return [name.format(0 if family == "sd15" else 1) for name in _UNETS]


def written(prefix: str, layers: Mapping[str, list[str]], dots: bool = True) -> dict[str, list[str]]:
    """Layers under a writer's prefix, with its underscores for dots."""
    return {prefix + (name if dots else name.replace(".", "_")): layers[name] for name in layers}


def _kohya(family: str, layers: Mapping[str, list[str]], writer: str = "kohya", prefix: str = "lora_unet_") -> Layout:
    return Layout(writer, family, written(prefix, layers, dots=False), KOHYA, alpha=True)


_OWN_OF = {
    "sd3": [_TO_Q, "proj_out", "transformer_blocks.1.attn.add_q_proj"],
    "flux": [_TO_Q, "proj_out", "single_transformer_blocks.0.proj_mlp"],
    "flux2_klein": [_TO_Q, "single_transformer_blocks.0.attn.to_qkv_mlp_proj"],
    "chroma": [_TO_Q, "single_transformer_blocks.0.proj_out"],
    "wan": ["blocks.0.attn1.to_q", "blocks.1.ffn.net.0.proj"],
    "qwen_image": [_TO_Q, "transformer_blocks.1.img_mlp.net.2"],
    "z_image": ["layers.0.attention.to_q", "layers.1.feed_forward.w1"],
    "hidream": ["double_stream_blocks.0.block.attn1.to_q", "single_stream_blocks.0.block.attn1.to_k"],
    "ltx": ["transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.0.proj"],
    "sana": ["transformer_blocks.0.attn1.to_q"],
    "lumina2": ["layers.0.attn.to_q"],
    "auraflow": ["joint_transformer_blocks.0.attn.to_q"],
    "krea2": ["transformer_blocks.0.attn.to_q"],
    "sd15": _of_unet("sd15"),
    "sdxl": _of_unet("sdxl"),
}
_PREFIX_OF = {family: "unet." if family in ("sd15", "sdxl") else "transformer." for family in _OWN_OF}

LAYOUTS = [
    *(Layout("diffusers", family, same(_PREFIX_OF[family], *layers)) for family, layers in _OWN_OF.items()),
    *(Layout("own names", family, same("", *_OWN_OF[family]), alpha=True) for family in ("sd3", "sana", "sdxl")),
    Layout("diffusers", "flux", same("transformer.", *_OWN_OF["flux"]), KOHYA),
    Layout("diffusers", "sd3", same("transformer.base_model.model.", _TO_Q), alpha=True),
    Layout("PEFT", "sd3", same("base_model.model.", _TO_Q), alpha=True),
    Layout("PEFT", "flux2_klein", written("base_model.model.", _FLUX2)),
    Layout("old diffusers", "sd3", same("transformer.", *_OWN_OF["sd3"]), ("lora.down.weight", "lora.up.weight")),
    Layout(
        "old diffusers",
        "sd15",
        {
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora": [
                "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
            ],
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora": [
                "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
            ],
        },
        ("down.weight", "up.weight"),
    ),
    *(_kohya(family, same("", *_OWN_OF[family])) for family in ("sd15", "sdxl", "sd3", "qwen_image", "z_image")),
    *(_kohya(*of) for of in (("sdxl", _SDXL), ("sd15", _SD15), ("sd3", _SD3), ("flux", _FLUX), ("chroma", _BLOCKS_OF_FLUX))),
    *(_kohya(*of) for of in (("flux2_klein", _FLUX2), ("z_image", _Z_IMAGE), ("lumina2", _LUMINA), ("auraflow", _AURAFLOW), ("krea2", _KREA2))),
    _kohya("wan", _WAN, "musubi-tuner"),
    _kohya("qwen_image", same("", *_OWN_OF["qwen_image"]), "musubi-tuner"),
    _kohya("z_image", _Z_IMAGE, "musubi-tuner"),
    _kohya("flux", same("", *_OWN_OF["flux"]), "OneTrainer", "lora_transformer_"),
    _kohya("sd3", same("", *_OWN_OF["sd3"]), "OneTrainer", "lora_transformer_"),
    _kohya("sdxl", same("", *_OWN_OF["sdxl"]), "OneTrainer"),
    *(
        Layout("ComfyUI", family, written("diffusion_model.", layers), names, alpha)
        for family, layers in {
            "sdxl": _SDXL, "sd3": _SD3, "flux": _FLUX, "chroma": _BLOCKS_OF_FLUX, "flux2_klein": _FLUX2, "wan": _WAN,
            "z_image": _Z_IMAGE, "lumina2": _LUMINA, "sana": _SANA, "qwen_image": same("", *_OWN_OF["qwen_image"]),
            "auraflow": _AURAFLOW, "krea2": _KREA2, "hidream": same("", *_OWN_OF["hidream"]), "ltx": same("", *_OWN_OF["ltx"]),
        }.items()
        for names, alpha in ((AB, False), (KOHYA, True))
    ),
    Layout("ComfyUI", "sd3", written("model.diffusion_model.", _SD3), alpha=True),
    Layout("ComfyUI", "flux", {"diffusion_model.double_blocks_0_txt_attn_qkv": _BLOCKS_OF_FLUX["double_blocks.0.txt_attn.qkv"]}, KOHYA, True),
    *(
        Layout("ai-toolkit", family, written(prefix, layers), alpha=alpha)
        for family, prefix, layers, alpha in (
            ("flux", "transformer.", same("", *_OWN_OF["flux"]), False),
            ("sd3", "transformer.", same("", *_OWN_OF["sd3"]), True),
            ("wan", "diffusion_model.", _WAN, True),
            ("hidream", "diffusion_model.", same("", *_OWN_OF["hidream"]), True),
            ("flux2_klein", "diffusion_model.", _FLUX2, True),
            ("z_image", "diffusion_model.", _Z_IMAGE, False),
            ("qwen_image", "transformer.", same("", *_OWN_OF["qwen_image"]), False),
        )
    ),
    *(
        Layout("DiffSynth-Studio", family, same("", *_OWN_OF[family]), ("lora_A.default.weight", "lora_B.default.weight"))
        for family in ("qwen_image", "sd3", "z_image")
    ),
    Layout("DiffSynth-Studio", "wan", _WAN, ("lora_A.default.weight", "lora_B.default.weight")),
    Layout("lora_a and lora_b", "sd3", same("", *_OWN_OF["sd3"]), ("lora_a.weight", "lora_b.weight")),
    Layout(
        "XLabs",
        "flux",
        {
            "double_blocks.0.processor.qkv_lora1": _BLOCKS_OF_FLUX["double_blocks.0.img_attn.qkv"],
            "double_blocks.0.processor.qkv_lora2": _BLOCKS_OF_FLUX["double_blocks.0.txt_attn.qkv"],
            "double_blocks.0.processor.proj_lora1": ["transformer_blocks.0.attn.to_out.0"],
            "double_blocks.0.processor.proj_lora2": ["transformer_blocks.0.attn.to_add_out"],
        },
        ("down.weight", "up.weight"),
    ),
]  # fmt: skip
