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

"""Reward functions that tests name by their import path, such as `helpers.stub_reward:width`."""

import time
from pathlib import Path

import numpy as np


def width(images, **columns):
    return [image.width for image in images]


def brightness(images, **kwargs):
    return [float(np.asarray(image).mean() / 255) for image in images]


def redness(images, **kwargs):
    return [float(np.asarray(image)[..., 0].mean() / 255) for image in images]


def fails(images, **kwargs):
    raise KeyError("label")


def stuck(prompts, **kwargs):
    """Hangs until a file says that it may answer."""
    deadline = time.monotonic() + 60
    while not Path("answer").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return [0.5] * len(prompts)
