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

"""Builds tiny tokenizers and text encoders for the pipelines of `families.py`."""

import string
from typing import Any

from helpers import tiny_sd3
from tokenizers import Regex, Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Sequence, Split
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5EncoderModel,
    UMT5EncoderModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


CHARACTERS = string.ascii_letters + string.digits + ".,:;!?'-_<>|/"
SPECIAL = (
    "<pad>",
    "<eos>",
    "<unk>",
    "<bos>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Whole words of the templates that pipelines put around a prompt: Qwen-Image cuts a fixed number of tokens off.
WORDS = (
    "system user assistant Describe Generate You an the image by detailing color shape size texture quantity text spatial "
    "relationships of objects and background key features input then explain how s instruction should alter or modify a "
    "new that meets requirements while maintaining consistency with original where appropriate are designed to generate "
    "superior images degree alignment based on textual prompts red green blue cat dogs square circle two left"
).split()
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def language_tokenizer(bos: bool, padding_side: str = "right") -> PreTrainedTokenizerFast:
    """
    Words of the templates as single tokens, anything else letter by letter, so that no two prompts are alike. Without
    a first token of its own (Qwen has none), an empty prompt is empty.
    """
    pieces = [(token, 0.0) for token in SPECIAL] + [("\n", -1.0)]
    pieces += [(word, -1.0) for word in dict.fromkeys(WORDS)]
    pieces += [(c, -9.0) for c in CHARACTERS if c not in WORDS]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = Sequence([Split(Regex("[ \t]+"), "removed"), Split(Regex(r"\n|[^\w\s]"), "isolated")])
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        bos_token="<bos>",
        additional_special_tokens=list(SPECIAL[4:]),
        chat_template=CHAT_TEMPLATE,
        padding_side=padding_side,
        model_max_length=512,
    )


def language_config(tokenizer: PreTrainedTokenizerFast, **options: Any) -> dict[str, Any]:
    """What the small language models have in common."""
    sizes = dict(
        vocab_size=len(tokenizer),
        hidden_size=16,
        **tiny_sd3.LANGUAGE_MODEL,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return {**sizes, **options}


def clip(projection: bool = True) -> dict[str, Any]:
    """`text_encoder` and `tokenizer`; 8 dimensions."""
    model = CLIPTextModelWithProjection if projection else CLIPTextModel
    return tiny_sd3.clip(CHARACTERS, hidden_act="gelu", model=model)


def t5(multilingual: bool = False) -> dict[str, Any]:
    """`text_encoder` and `tokenizer`; 16 dimensions."""
    return tiny_sd3.t5(CHARACTERS, UMT5EncoderModel if multilingual else T5EncoderModel)


def qwen3(causal: bool) -> dict[str, Any]:
    tokenizer = language_tokenizer(bos=False)
    config = Qwen3Config(**language_config(tokenizer, num_hidden_layers=3))
    return {"text_encoder": (Qwen3ForCausalLM if causal else Qwen3Model)(config).eval(), "tokenizer": tokenizer}


def gemma2() -> dict[str, Any]:
    tokenizer = language_tokenizer(bos=True)
    config = Gemma2Config(**language_config(tokenizer), query_pre_attn_scalar=8, sliding_window=64)
    return {"text_encoder": Gemma2Model(config).eval(), "tokenizer": tokenizer}


def glm() -> dict[str, Any]:
    tokenizer = language_tokenizer(bos=True, padding_side="left")
    return {"text_encoder": GlmModel(GlmConfig(**language_config(tokenizer))).eval(), "tokenizer": tokenizer}


def llama() -> dict[str, Any]:
    tokenizer = language_tokenizer(bos=True)
    # HiDream asks for attention maps, which only eager attention has.
    config = LlamaConfig(**language_config(tokenizer), attn_implementation="eager")
    return {"text_encoder": LlamaForCausalLM(config).eval(), "tokenizer": tokenizer}


class ImageProcessorOnly(Qwen2VLProcessor):
    """Qwen's processor without its video part, which torchvision would be needed for."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return (
            None
            if argument_name == "video_processor"
            else super().check_argument_for_proper_class(argument_name, argument)
        )


def qwen2_vl() -> dict[str, Any]:
    """`text_encoder`, `tokenizer` and, for pipelines that edit images, `processor`."""
    tokenizer = language_tokenizer(bos=False)
    text = language_config(
        tokenizer, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    )
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    ends = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ends["vision_start"],
        vision_end_token_id=ends["vision_end"],
    )
    # Nothing but the encoder's view of the image shrinks to 4 tokens.
    image_processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 56)
    return {
        "text_encoder": Qwen2_5_VLForConditionalGeneration(config).eval(),
        "tokenizer": tokenizer,
        "processor": ImageProcessorOnly(image_processor, tokenizer, chat_template=CHAT_TEMPLATE),
    }
