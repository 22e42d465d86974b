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

"""Contexts in which pipelines that take pictures are small, and encode them without noise."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.joyimage import image_processor as joy_sizes
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit


@contextmanager
def small_longcat() -> Iterator[None]:
    """Context in which LongCat draws 32 x 32 pixels, not a million."""
    with pytest.MonkeyPatch.context() as patch:
        sized = pipeline_longcat_image_edit.calculate_dimensions
        patch.setattr(pipeline_longcat_image_edit, "calculate_dimensions", lambda _, ratio: sized(32 * 32, ratio))
        yield


@contextmanager
def noiseless() -> Iterator[None]:
    """
    Context in which encoders of pictures add no noise. Some pipelines draw it with the walk's seed, and here a picture is
    encoded once for all walks.
    """
    with pytest.MonkeyPatch.context() as patch:
        drawn = DiagonalGaussianDistribution.sample

        def sample(self: DiagonalGaussianDistribution, generator: Any = None) -> Any:
            drawn(self, generator)  # what is drawn later is the same
            return self.mode()

        patch.setattr(DiagonalGaussianDistribution, "sample", sample)
        yield


@contextmanager
def small_joy() -> Iterator[None]:
    """Context in which JoyImage draws 32 x 32 pixels, not a million."""
    with noiseless(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(joy_sizes.BUCKETS, 1024, [(32, 32)])
        yield
