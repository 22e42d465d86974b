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

"""Fake prompt encoders with known embeddings, in every layout that pipelines use."""

import torch

from trl_diffusion_opd.pipelines.prompt_cache import _PROBES


LENGTH, WIDTH = 64, 3


def embed(text, length=LENGTH):
    """(1, length, WIDTH): a row of its own for every character, zeros behind."""
    codes = torch.tensor([float(ord(character)) for character in text[:length]])
    padded = torch.nn.functional.pad(codes, (0, length - len(codes)))
    return (padded[None, :, None] * torch.arange(1, WIDTH + 1)).contiguous()


class Encoder:
    """A pipeline's `encode_prompt`, which remembers what it was asked to encode."""

    def __init__(self, outputs):
        self.outputs = outputs
        self.batches = []

    def __call__(self, prompt, negative_prompt=None, device=None, max_sequence_length=LENGTH):
        self.batches.append(list(prompt))
        return self.outputs(prompt, negative_prompt, max_sequence_length)

    def forget_trial(self):
        self.batches = [batch for batch in self.batches if not set(batch) <= set(_PROBES)]


def rows(prompt, negative_prompt, length):
    embeds = torch.cat([embed(text, length) for text in prompt])
    negative = None if negative_prompt is None else torch.cat([embed(text, length) for text in negative_prompt])
    return embeds, negative, embeds[:, 0], None


def shared_ids(prompt, negative_prompt, length):
    return torch.cat([embed(text, length) for text in prompt]), torch.arange(length)[:, None].float()


def one_tensor(prompt, negative_prompt, length):
    return torch.cat([embed(text, length) for text in prompt])


def lists(prompt, negative_prompt, length):
    return [embed(text, len(text))[0] for text in prompt], []


def nested(prompt, negative_prompt, length):
    return (one_tensor(prompt, None, length), lists(prompt, None, length)[0]), None


def layers_first(prompt, negative_prompt, length):
    return torch.stack([torch.cat([embed(text, length) * layer for text in prompt]) for layer in (1, 2, 3)])


def padded_to_the_longest(prompt, negative_prompt, length):
    longest = max(len(text) for text in prompt)
    return torch.cat([embed(text, longest) for text in prompt])


def padded_to_sixteens(prompt, negative_prompt, length):
    longest = max(len(text) for text in prompt)
    return torch.cat([embed(text, -(-longest // 16) * 16) for text in prompt])


def position_of_the_batch(prompt, negative_prompt, length):
    return one_tensor(prompt, None, length), torch.tensor([float(len(prompt))])


BY_ROW = [rows, shared_ids, one_tensor, lists, nested]
BY_BATCH = [layers_first, padded_to_the_longest, position_of_the_batch]


def assert_equal(got, expected):
    assert type(got) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert got.dtype == expected.dtype and torch.equal(got, expected)
    elif expected is not None:
        assert len(got) == len(expected)
        for ours, theirs in zip(got, expected, strict=True):
            assert_equal(ours, theirs)


def of_the_batch(outputs):
    """As an encoder that rounds a prompt by the size of its batch and what else is in it."""

    def rounded(prompt, negative_prompt, length):
        factor = 1 + 1e-4 * sum(map(len, prompt))
        scale = lambda part: part if part is None else part * factor  # noqa: E731
        value = outputs(prompt, negative_prompt, length)
        return tuple(map(scale, value)) if isinstance(value, tuple) else scale(value)

    return rounded
