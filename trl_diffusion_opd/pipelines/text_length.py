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
Finds prompts that are cut because they are too long. Several text encoders may read a prompt, each up to its own length;
a prompt is cut only if none of them reads all of it.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..guards.log_lines import without_lines
from ..guards.redaction import shown
from .prompt_store import Encoded


# The prompt with which pipelines are asked. Its place in what a tokenizer gets shows the text around it.
TRIAL_PROMPT = "cat"


@dataclass(frozen=True)
class TextLimit:
    """
    How many tokens of a prompt a text encoder reads.

    Attributes:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the encoder's tokenizer.
        length (`int`): tokens of a prompt, with the special tokens that the tokenizer adds.
    """

    tokenizer: PreTrainedTokenizerBase
    length: int

    def cuts(self, prompt: str) -> bool:
        # A token has at least one byte, so most prompts need no tokenizer.
        special = self.tokenizer.num_special_tokens_to_add()
        if len(prompt.encode()) + special < self.length:
            return False
        return len(self.tokenizer(prompt, verbose=False).input_ids) > self.length


class RecordingTokenizer:
    """Replaces a pipeline's tokenizer, and notes the first call that cuts its text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.limit: TextLimit | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: str | list[str], *args: Any, **options: Any) -> Any:
        longest = options.get("max_length")
        if self.limit is None and options.get("truncation") and isinstance(longest, int):
            before, prompt, _ = (text if isinstance(text, str) else text[0]).rpartition(TRIAL_PROMPT)
            if prompt:  # some pipelines put an instruction around it; what follows the prompt is cut before it
                special = options.get("add_special_tokens", True)
                taken = len(self.tokenizer(before, add_special_tokens=special).input_ids)
                own = self.tokenizer.num_special_tokens_to_add()
                self.limit = TextLimit(self.tokenizer, longest - max(0, taken - own))
        return self.tokenizer(text, *args, **options)


class NoCache:
    """Replaces a pipeline's cache of embeddings, so that prompts are encoded again."""

    def encode(
        self, encode_prompt: Callable[..., Encoded], *args: object, beside: str = "", **options: object
    ) -> Encoded:
        return encode_prompt(*args, **options)


def recorders(components: Mapping[str, object]) -> dict[str, RecordingTokenizer]:
    """Replacements of a pipeline's tokenizers, by name."""
    return {
        name: RecordingTokenizer(part)
        for name, part in components.items()
        if isinstance(part, PreTrainedTokenizerBase)
    }


def limits(recorded: Mapping[str, RecordingTokenizer], max_sequence_length: object) -> list[TextLimit]:
    """
    What the text encoders read at most; empty if that is unknown, since a tokenizer was used in another way.

    Args:
        recorded (`dict[str, RecordingTokenizer]`): the tokenizers, after the pipeline has encoded [`TRIAL_PROMPT`].
        max_sequence_length (`int`, *optional*): the pipeline's argument. Qwen-Image cuts to it after the encoder.
    """
    found = [one.limit for one in recorded.values() if one.limit is not None]
    if len(found) == 1 and isinstance(max_sequence_length, int):
        found = [TextLimit(found[0].tokenizer, min(found[0].length, max_sequence_length))]
    return found


def cut_warning(prompts: Iterable[str], found: list[TextLimit]) -> str | None:
    """
    Says how many prompts are cut by every text encoder, and how the first one begins; `None` if there are none.

    Args:
        prompts (`Iterable[str]`): the prompts.
        found (`list[TextLimit]`): what the text encoders read.
    """
    count, cut = 0, []
    for prompt in prompts:
        count += 1
        if found and all(limit.cuts(prompt) for limit in found):
            cut.append(prompt)
    if not cut:
        return None
    verb = "is longer than" if len(cut) == 1 else "are longer than"
    return (
        f"{len(cut)} of {count} prompts {verb} {max(limit.length for limit in found)} tokens, and only the beginning is "
        f"read, the first: '{shown(cut[0], 200)}'. Shorten them, or raise max_sequence_length if the pipeline allows it."
    )


def no_cut_lines(pipeline_class: type) -> AbstractContextManager[None]:
    """
    Context that leaves out the lines in which a pipeline shows what it cuts from its prompts. It shows each batch in full,
    with its padding, also where another encoder reads the whole prompt.
    """
    modules = {
        base.__module__ for base in pipeline_class.__mro__ if base.__module__.startswith("diffusers.pipelines.")
    }
    return without_lines("part of your input was truncated", *modules)


def silence_tokenizers(components: Mapping[str, object]) -> None:
    """
    Switches off transformers' own line about a long prompt, which speaks of indexing errors. Pipelines cause it when they
    count what they cut.
    """
    for part in components.values():
        if isinstance(part, PreTrainedTokenizerBase):
            part.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
