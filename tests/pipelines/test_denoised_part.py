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

"""Which part of prepared latents a loop denoises, and which part of its output is the state's."""

import torch

from trl_diffusion_opd.pipelines.denoised_part import DenoisedPart, own_output


def test_a_part_is_found_taken_and_put_back() -> None:
    latents = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    one = latents[:1].clone()
    part = DenoisedPart.find(one.permute(0, 2, 1, 3)[:, 1:, :, :3], one)
    assert part is not None
    expected = latents.permute(0, 2, 1, 3)[:, 1:, :, :3]
    assert torch.equal(part.of(latents), expected)
    x = torch.randn(expected.shape, dtype=torch.float64)
    within = part.within(x, latents)
    assert torch.equal(within.permute(0, 2, 1, 3)[:, 1:, :, :3], x)
    assert torch.equal(within[..., 3:], latents[..., 3:].double()) and torch.equal(
        within[:, :, 0], latents[:, :, 0].double()
    )
    assert within.data_ptr() != latents.data_ptr()


def test_copies_and_whole_latents_are_no_part() -> None:
    latents = torch.randn(1, 3, 4)
    assert DenoisedPart.find(latents, latents) is None
    assert DenoisedPart.find(latents[:, 1:].clone(), latents) is None


def test_the_output_is_that_of_the_state_among_a_pictures_latents() -> None:
    x, sample, output = torch.randn(2, 1, 3), torch.randn(2, 3, 3), torch.randn(2, 3, 3)
    assert own_output(output, sample, x) is output  # the state is not among them
    sample[:, 2:] = x
    assert torch.equal(own_output(output, sample, x), output[:, 2:])
    assert own_output(x, x, x) is x
    assert own_output(output, None, x) is output
