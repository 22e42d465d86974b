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

"""Tiny tokenizers and text encoders that the families of the tests do not have."""

from typing import Any

from helpers import families_text as text
from helpers.tiny_sd3 import LANGUAGE_MODEL
from transformers import (
    BertConfig,
    BertModel,
    ByT5Tokenizer,
    GemmaConfig,
    GemmaModel,
    LlamaConfig,
    LlamaModel,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLProcessor,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    T5Config,
    T5EncoderModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


# As the tests' own, and it takes a message in parts.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def gemma() -> dict[str, Any]:
    tokenizer = text.language_tokenizer(bos=True)
    return {"text_encoder": GemmaModel(GemmaConfig(**text.language_config(tokenizer))).eval(), "tokenizer": tokenizer}


def llama(layers: int = 2) -> dict[str, Any]:
    tokenizer = text.language_tokenizer(bos=True)
    config = LlamaConfig(**text.language_config(tokenizer, num_hidden_layers=layers))
    return {"text_encoder": LlamaModel(config).eval(), "tokenizer": tokenizer}


def qwen2_5_text() -> dict[str, Any]:
    """The language part of Qwen2.5-VL."""
    tokenizer = text.language_tokenizer(bos=False)
    ropes = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLTextConfig(**text.language_config(tokenizer, num_hidden_layers=3, rope_parameters=ropes))
    return {"text_encoder": Qwen2_5_VLTextModel(config).eval(), "tokenizer": tokenizer}


def smollm3() -> dict[str, Any]:
    tokenizer = text.language_tokenizer(bos=False)
    # Bria FIBO takes the number of the first token for granted.
    config = SmolLM3Config(**text.language_config(tokenizer, num_hidden_layers=3, vocab_size=128_001))
    return {"text_encoder": SmolLM3ForCausalLM(config).eval(), "tokenizer": tokenizer}


def bert() -> dict[str, Any]:
    """Of 16 dimensions, with the words of the language models."""
    tokenizer = text.language_tokenizer(bos=True)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, max_position_embeddings=256, pad_token_id=0, **LANGUAGE_MODEL
    )
    return {"text_encoder": BertModel(config).eval(), "tokenizer": tokenizer}


def byt5() -> dict[str, Any]:
    config = T5Config(
        vocab_size=400, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0, pad_token_id=0
    )
    return {"text_encoder": T5EncoderModel(config).eval(), "tokenizer": ByT5Tokenizer()}


class Processor(Qwen3VLProcessor):
    """Qwen 3's processor without its video part, which torchvision would be needed for."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor":
            return None
        return super().check_argument_for_proper_class(argument_name, argument)


def processor(tokenizer: Any) -> Processor:
    images = Qwen2VLImageProcessorPil(min_pixels=32 * 32, max_pixels=128 * 128, patch_size=16)
    return Processor(images, tokenizer, chat_template=CHAT_TEMPLATE)


def qwen3_vl(layers: int = 2, generates: bool = False) -> dict[str, Any]:
    """`text_encoder` and `tokenizer`; its vision part sees pictures as `processor` cuts them."""
    tokenizer = text.language_tokenizer(bos=False)
    ropes = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    ends = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    config = Qwen3VLConfig(
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ends["vision_start"],
        vision_end_token_id=ends["vision_end"],
        text_config=text.language_config(tokenizer, num_hidden_layers=layers, rope_parameters=ropes),
        vision_config=dict(
            depth=1,
            hidden_size=16,
            intermediate_size=16,
            num_heads=2,
            out_hidden_size=16,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0],
        ),
    )
    model = Qwen3VLForConditionalGeneration if generates else Qwen3VLModel
    return {"text_encoder": model(config).eval(), "tokenizer": tokenizer}
