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

"""The middle of 300 pictures of odd sizes, to the pixel, by the rule of each reward's published code."""

import numpy as np
import pytest
import torch
from helpers.clip_models import MEAN, STD, cropped
from PIL import Image
from transformers import CLIPImageProcessorPil

from trl_diffusion_opd.rewards.center_crop import CenterCropProcessor


def pictures(count: int, longest: int) -> list[Image.Image]:
    """Noise, so that a shift by a pixel shows, of every odd width and height up to `longest`."""
    rng = np.random.default_rng(0)
    sizes = 2 * rng.integers(0, (longest + 1) // 2, (count, 2)) + 1
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def middle(processor: CLIPImageProcessorPil, image: Image.Image) -> np.ndarray:
    """What the model is shown, back in 0 to 255."""
    pixels = processor([image], return_tensors="pt").pixel_values[0].double()
    shown = (pixels * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255
    assert (shown - shown.round()).abs().max() < 1e-3
    return shown.round().byte().permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("size", "count", "longest"), [(16, 300, 99), (224, 10, 499)])
def test_the_middle_of_odd_sizes(size, count, longest):
    options = dict(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    ours, plain = CenterCropProcessor(**options), CLIPImageProcessorPil(**options)
    apart = 0
    for image in pictures(count, longest):
        official = np.asarray(cropped(image, size))
        assert np.array_equal(middle(ours, image), official), image.size
        assert np.array_equal(middle(plain, image), np.asarray(cropped(image, size, "transformers"))), image.size
        apart += not np.array_equal(middle(plain, image), official)
    assert count / 10 < apart < count / 2  # one margin in four


def test_a_picture_that_is_smaller_than_the_crop_is_padded():
    ours = CenterCropProcessor(do_resize=False, crop_size={"height": 6, "width": 4})
    image = pictures(20, 9)[3]
    small = image.crop((0, 0, 4, 4))
    assert np.array_equal(middle(ours, small), np.pad(np.asarray(small), ((1, 1), (0, 0), (0, 0))))
