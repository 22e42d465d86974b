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

import io

import numpy as np
import pytest
from PIL import Image

from trl_diffusion_opd.rewards import JPEGCompressibility, load_reward


def picture(size: int, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def test_is_minus_the_kilobytes_of_a_file_of_quality_95(tmp_path):
    images = [picture(size, seed=size) for size in (16, 64, 200)] + [Image.new("RGB", (64, 64), "teal")]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.jpg", quality=95)
    expected = [-(tmp_path / f"{i}.jpg").stat().st_size / 1000 for i in range(len(images))]
    reward = load_reward("jpeg_compressibility")
    assert reward(["any"] * 4, images) == expected
    assert reward([""] * 4, images, task=["a"] * 4) == expected  # again, and whatever else there is


def test_smooth_images_score_higher_and_none_above_the_bound():
    flat, noisy = Image.new("RGB", (64, 64)), picture(64, seed=0)
    of_flat, of_noisy = JPEGCompressibility()(["", ""], [flat, noisy])
    assert of_noisy < 3 * of_flat < 0 == JPEGCompressibility.bounds[1]


def test_other_modes_are_read_as_rgb():
    image = picture(32, seed=1)
    reward = JPEGCompressibility()
    assert reward([""], [image.convert("RGBA")]) == reward([""], [image])
    buffer = io.BytesIO()
    image.convert("L").convert("RGB").save(buffer, "JPEG", quality=95)
    assert reward([""], [image.convert("L")]) == [-len(buffer.getvalue()) / 1000]


def test_every_prompt_applies():
    assert JPEGCompressibility().why_not("", {}) is None
    assert JPEGCompressibility().fingerprint == "jpeg_compressibility"
    with pytest.raises(ValueError, match="batch_size=0"):
        JPEGCompressibility(batch_size=0)
