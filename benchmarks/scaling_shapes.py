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

"""What scaling.py counts: released networks without their weights, from shapes alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from trl_diffusion_opd.acceleration.compilation import repeated_blocks
from trl_diffusion_opd.models.student import default_lora_config
from trl_diffusion_opd.profiling.memory import step_bytes


BATCHES = (1, 4, 8)


@dataclass(frozen=True)
class Released:
    """
    A released model.

    Attributes:
        network (`type`), config (`dict`): its transformer or UNet, as published.
        sizes (`tuple[int, ...]`): sides of square images in pixels.
        tokens (`int`): length of the text.
        rows (`int`): rows that guidance makes of a sample in one call of the network.
        calls (`int`): calls of the network that guidance makes.
        inputs (`Callable`): `(rows, side, tokens)` to the inputs of a call.
        others (`dict`): the encoders and the VAE.
    """

    network: Any
    config: dict[str, Any]
    sizes: tuple[int, ...]
    tokens: int
    rows: int
    calls: int
    inputs: Callable[[int, int, int], dict[str, Any]]
    others: dict[str, Callable[[], nn.Module]]


def _shape(*sizes: int) -> Tensor:
    return torch.empty(*sizes, device="meta")


def sd3_inputs(rows: int, side: int, tokens: int) -> dict[str, Any]:
    return {
        "hidden_states": _shape(rows, 16, side // 8, side // 8),
        "encoder_hidden_states": _shape(rows, tokens, 4096),
        "pooled_projections": _shape(rows, 2048),
        "timestep": _shape(rows),
    }


def flux_inputs(rows: int, side: int, tokens: int) -> dict[str, Any]:
    patches = (side // 16) ** 2
    return {
        "hidden_states": _shape(rows, patches, 64),
        "encoder_hidden_states": _shape(rows, tokens, 4096),
        "pooled_projections": _shape(rows, 768),
        "timestep": _shape(rows),
        "guidance": _shape(rows),
        "img_ids": _shape(patches, 3),
        "txt_ids": _shape(tokens, 3),
    }


def qwen_inputs(rows: int, side: int, tokens: int) -> dict[str, Any]:
    return {
        "hidden_states": _shape(rows, (side // 16) ** 2, 64),
        "encoder_hidden_states": _shape(rows, tokens, 3584),
        "timestep": _shape(rows),
        "img_shapes": [[(1, side // 16, side // 16)]] * rows,
    }


def _clip_l() -> nn.Module:
    return CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))


def _clip_l_projected() -> nn.Module:
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)
    return CLIPTextModelWithProjection(config)


def _clip_g() -> nn.Module:
    sizes = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)
    return CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=1280, **sizes))


def _t5_xxl() -> nn.Module:
    sizes = dict(d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, vocab_size=32128)
    return T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes))


def _qwen_vl_7b() -> nn.Module:
    text = dict(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    )
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def _vae() -> nn.Module:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


MODELS = {
    "SD3.5-M": Released(
        SD3Transformer2DModel,
        dict(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        sizes=(512,),
        tokens=77 + 128,
        rows=2,
        calls=1,
        inputs=sd3_inputs,
        others={"CLIP-L": _clip_l_projected, "CLIP-G": _clip_g, "T5-XXL": _t5_xxl, "VAE": _vae},
    ),
    "FLUX.1-dev": Released(
        FluxTransformer2DModel,
        dict(guidance_embeds=True),
        sizes=(512, 1024),
        tokens=512,
        rows=1,
        calls=1,
        inputs=flux_inputs,
        others={"CLIP-L": _clip_l, "T5-XXL": _t5_xxl, "VAE": _vae},
    ),
    "Qwen-Image": Released(
        QwenImageTransformer2DModel,
        {},
        sizes=(512, 1024),
        tokens=512,
        rows=1,
        calls=2,
        inputs=qwen_inputs,
        others={"Qwen2.5-VL-7B": _qwen_vl_7b, "VAE": AutoencoderKLQwenImage},
    ),
}


def network(released: Released, **changes: Any) -> tuple[PeftModel, Any]:
    """The network in bfloat16 with the paper's LoRA in float32, on `meta`, and the network within."""
    with torch.device("meta"):
        base = released.network(**{**released.config, **changes}).to(torch.bfloat16).eval().requires_grad_(False)
        model = get_peft_model(base, default_lora_config(base))
    if released.network is QwenImageTransformer2DModel:
        # Its table of frequencies is no buffer, and moved to the device of the inputs: it must have values.
        base.pos_embed = QwenEmbedRope(theta=10000, axes_dim=list(base.config.axes_dims_rope), scale_rope=True)
    return model, base


def parameters(model: PeftModel, base: Any) -> dict[str, int]:
    """Numbers of parameters: of the base, of its blocks, of its largest block, of the LoRA, and values in buffers."""
    lora = {id(p) for p in model.parameters() if p.requires_grad}
    blocks = [[p for p in block.parameters() if id(p) not in lora] for block in repeated_blocks(base)]
    counts = [sum(p.numel() for p in block) for block in blocks]
    return {
        "base": sum(p.numel() for p in model.parameters() if id(p) not in lora),
        "blocks": sum(counts),
        "number_of_blocks": len(counts),
        "largest_block": max(counts),
        "lora": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "buffers": sum(b.numel() for b in base.buffers()),
    }


def flops(model: PeftModel, base: Any, inputs: dict[str, Any]) -> dict[str, int]:
    """
    Operations of a forward of the inputs' rows, of its backward, and of the forward that checkpointing repeats: those of
    matrix products and attention, as PyTorch's own counter has them.
    """
    model.float()  # products of one dtype, which does not change their number

    def passes() -> tuple[int, int]:
        with FlopCounterMode(display=False) as counter:
            output = model(**inputs)[0]
            forward = counter.get_total_flops()
            output.sum().backward()
        return forward, counter.get_total_flops() - forward

    forward, backward = passes()
    base.enable_gradient_checkpointing()
    _, repeated = passes()
    base.disable_gradient_checkpointing()
    return {"forward": forward, "backward": backward, "recompute": repeated - backward}


def activations(released: Released, model: PeftModel, base: Any, side: int, batch: int, checkpointing: bool) -> int:
    """Bytes that the student's forward and backward of `batch` samples hold at most, beside weights and gradients."""
    if checkpointing:
        base.enable_gradient_checkpointing()
    call = released.inputs(batch * released.rows, side, released.tokens)
    size = step_bytes(model, base, [call] * released.calls, device_type="cuda", precision=torch.bfloat16)
    base.disable_gradient_checkpointing()
    return size


def count(name: str) -> dict[str, Any]:
    """All of it for one of `MODELS`."""
    released = MODELS[name]
    model, base = network(released)
    found: dict[str, Any] = {
        "parameters": parameters(model, base),
        "rows": released.rows,
        "calls": released.calls,
        "tokens": released.tokens,
        "activations": {},
        "flops": {},
        "others": {},
    }
    for side in released.sizes:
        found["activations"][str(side)] = {
            kind: {str(batch): activations(released, model, base, side, batch, checkpointing) for batch in BATCHES}
            for kind, checkpointing in (("plain", False), ("checkpointing", True))
        }
    for side in released.sizes:
        found["flops"][str(side)] = flops(model, base, released.inputs(1, side, released.tokens))
    for part, make in released.others.items():
        with torch.device("meta"):
            found["others"][part] = sum(p.numel() for p in make().parameters())
    return found
