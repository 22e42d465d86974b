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
Writes diffusers' weights as the programs of the models' authors name them. The names are those of the released files,
not read from diffusers' converters, since what is read is tested against them.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor


_SD3 = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
_SD3_BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_SD3_QKV = {
    "x_block": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def sd3(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a transformer of SD3: one matrix for query, key and value; shift before scale where diffusers has it after."""
    state, found = dict(state), {}
    last = max(int(key.split(".")[1]) for key in state if key.startswith("transformer_blocks."))
    for i in range(last + 1):
        for block, parts in _SD3_QKV.items():
            for kind in ("weight", "bias"):
                rows = [state.pop(f"transformer_blocks.{i}.{part}.{kind}") for part in parts]
                found[f"joint_blocks.{i}.{block}.attn.qkv.{kind}"] = torch.cat(rows)
    for key, value in state.items():
        swaps = key.startswith(("norm_out.", f"transformer_blocks.{last}.norm1_context."))
        value = torch.cat(value.chunk(2)[::-1]) if swaps else value.contiguous()
        module, _, kind = key.rpartition(".")
        if match := re.match(r"transformer_blocks\.(\d+)\.(.*)", module):
            found[f"joint_blocks.{match[1]}.{_SD3_BLOCK[match[2]]}.{kind}"] = value
        else:
            found[_SD3.get(key) or f"{_SD3.get(module, module)}.{kind}"] = value
    return found


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet(state: Mapping[str, Tensor], layers: int, attends: tuple[bool, ...]) -> dict[str, Tensor]:
    """Of Stable Diffusion's UNet, with so many `layers` a block; `attends` says which of its levels have attention."""
    found = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", module)
        if match:
            side, level, part, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
            per_level = layers + 1
            if side == "down":
                place = f"input_blocks.{1 + level * per_level + (layers if part == 'downsamplers' else layer)}"
            else:
                place = f"output_blocks.{level * per_level + (layers if part == 'upsamplers' else layer)}"
            at = {"resnets": 0, "attentions": 1, "downsamplers": 0}.get(part)
            at = (2 if attends[::-1][level] else 1) if part == "upsamplers" else at
            rest = {"resnets": _RESNET.get(rest), "downsamplers": "op"}.get(part, rest)
            module = f"{place}.{at}.{rest}"
        elif match := re.match(r"mid_block\.(\w+)\.(\d+)\.(.*)", module):
            at = 1 if match[1] == "attentions" else 2 * int(match[2])
            module = f"middle_block.{at}.{_RESNET.get(match[3], match[3])}"
        else:
            module = _UNET[module]
        found[f"{module}.{kind}"] = value
    return found


_VAE = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def vae(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Of an autoencoder: its up blocks are counted from the image, and its attention is of convolutions."""
    found = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        if match := re.match(r"(\w+)\.(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", module):
            level = int(match[3]) if match[2] == "down" else levels - 1 - int(match[3])
            part = f"block.{match[5]}" if match[4] == "resnets" else f"{match[2]}sample"
            module = f"{match[1]}.{match[2]}.{level}.{part}.{match[6].replace('conv_shortcut', 'nin_shortcut')}"
        elif match := re.match(r"(\w+)\.mid_block\.resnets\.(\d)\.(.*)", module):
            module = f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
        elif match := re.match(r"(\w+)\.mid_block\.attentions\.0\.(.*)", module):
            module = f"{match[1]}.mid.attn_1.{_VAE[match[2]]}"
            value = value[:, :, None, None].contiguous() if value.ndim == 2 else value
        found[f"{module.replace('conv_norm_out', 'norm_out')}.{kind}"] = value
    return found
