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

"""Which prompts are cut, by all text encoders of each family."""

import itertools
import logging

import pytest
import torch
from datasets import Dataset
from helpers.families import FAMILIES
from helpers.opd_fixtures import make_trainer

from trl_diffusion_opd.pipelines.text_length import cut_warning, silence_tokenizers
from trl_diffusion_opd.pipelines.velocity import VelocityField


WORDS = "red green blue cat dogs square circle two left"
# A pipeline whose processor reads text and image together: what it cuts is not known.
UNKNOWN = {"qwen_image_edit"}


def prompt_of(words: int, last: str) -> str:
    return " ".join([*itertools.islice(itertools.cycle(WORDS.split()), words), last])


def same(one, other) -> bool:
    """Whether two results of `encode_prompt` are equal."""
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_cut_prompt_is_one_whose_end_changes_nothing(name):
    family = FAMILIES[name]
    field = VelocityField(family.build(), num_inference_steps=2, **family.kwargs)
    limits = field.text_limits()
    assert (limits == []) == (name in UNKNOWN)
    seen = set()
    for words in [1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 24, 90] if limits else []:
        whole, other = prompt_of(words, "x"), prompt_of(words, "y")
        cut = cut_warning([whole], limits) is not None
        read = list(field.embeddings([whole, other], 1.0))
        # A prompt that is not cut is read to its end.
        assert cut == same(*read), (words, cut)
        seen.add(cut)
    assert seen == ({True, False} if limits else set())


def test_the_warning_counts_and_shows_the_first():
    family = FAMILIES["wan"]
    limits = VelocityField(family.build(), num_inference_steps=2, **family.kwargs).text_limits()
    (length,) = (limit.length for limit in limits)
    assert length == family.max_sequence_length
    long = prompt_of(400, "end\n")
    warning = cut_warning(["a", long, "b", long + "2"], limits)
    assert warning.startswith(
        f"2 of 4 prompts are longer than {length} tokens, and only the beginning is read, the fir"
    )
    assert "'red green blue" in warning and "\n" not in warning and len(warning) < 450
    assert cut_warning([long], limits).startswith(f"1 of 1 prompts is longer than {length} tokens")
    assert cut_warning(["a", "b"], limits) is None and cut_warning([long], []) is None


def test_the_longest_encoder_decides():
    family = FAMILIES["sd3"]
    options = family.kwargs | {"max_sequence_length": 256}
    limits = VelocityField(family.build(), num_inference_steps=2, **options).text_limits()
    assert [limit.length for limit in limits] == [77, 77, 256]
    between, long = prompt_of(45, "end"), prompt_of(400, "end")
    assert limits[0].cuts(between) and not limits[2].cuts(between)  # the normal cut of CLIP
    assert cut_warning([between], limits) is None
    assert "longer than 256 tokens" in cut_warning([between, long], limits)


def test_lines_of_transformers_and_diffusers_are_replaced(tmp_path, caplog, monkeypatch):
    pipeline = FAMILIES["sd3"].build()
    long = prompt_of(200, "end")
    with caplog.at_level(logging.WARNING):
        for name in ("transformers", "diffusers"):
            monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        dataset = Dataset.from_list([{"prompt": "a cat"}, {"prompt": long}, {"prompt": long}])
        trainer = make_trainer(tmp_path, "base", pipeline, train_dataset=dataset, max_sequence_length=16)
        trainer.train()
        assert "indexing errors" not in caplog.text and "was truncated" not in caplog.text
        pipeline.encode_prompt([long], None, None, max_sequence_length=16)
        assert "was truncated" in caplog.text, "a call of the user's own says it"
    assert "1 of 2 prompts is longer than 77 tokens" in caplog.text, "77 of CLIP, 16 of T5"


def test_silencing_touches_tokenizers_alone():
    components = FAMILIES["sd3"].build().components
    silence_tokenizers(components)
    line = "sequence-length-is-longer-than-the-specified-maximum"
    assert all(components[name].deprecation_warnings[line] for name in ("tokenizer", "tokenizer_2", "tokenizer_3"))
