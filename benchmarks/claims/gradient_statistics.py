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

"""Mean, noise and direction of a sampled gradient, without keeping the samples."""

import math

import torch
from torch import Tensor


class Moments:
    """
    Sums over samples of a gradient, from which the size of its mean and of its noise follow without bias.

    With n samples of mean `mu` and total variance `N` (the trace of their covariance), the sample mean has the expected squared
    norm `|mu|² + N / n`: noise makes it longer, and lowers its cosine with everything.
    """

    def __init__(self) -> None:
        self.n = 0
        self.total: Tensor | float = 0.0
        self.sum_of_squares = 0.0

    def add(self, samples: Tensor) -> None:
        """`samples`: shape `(B, p)`, one gradient a row."""
        wide = samples.double()
        self.n += len(wide)
        self.total = self.total + wide.sum(0)
        self.sum_of_squares += float(wide.square().sum())

    @property
    def mean(self) -> Tensor:
        return torch.as_tensor(self.total) / self.n

    @property
    def noise(self) -> float:
        """Unbiased estimate of `N`, the total variance of one sample. Needs two samples."""
        return max(0.0, self.sum_of_squares - self.n * float(self.mean.square().sum())) / (self.n - 1)

    @property
    def signal(self) -> float:
        """Unbiased estimate of `|mu|²`: the mean product of two different samples. It may come out negative."""
        return float(self.mean.square().sum()) - self.noise / self.n

    @property
    def reliability(self) -> float:
        """
        The cosine to expect between this mean and that of as many other samples, `|mu|² / (|mu|² + N / n)`.

        It is the split-half cosine r over all splits, stepped up to the whole by Spearman and Brown's `2 r / (1 + r)`.
        """
        return self.signal / float(self.mean.square().sum())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def corrected_cosine(a: Moments, b: Moments) -> float | None:
    """
    The cosine of two expectations, from means with independent noise: `cos / sqrt(rel_a rel_b)`. `None` where one of the
    means is all noise. Not bounded by 1.
    """
    product = a.reliability * b.reliability
    if a.reliability <= 0 or b.reliability <= 0:
        return None
    return cosine(a.mean, b.mean) / math.sqrt(product)


def against(samples: Moments, exact: Tensor, scale: float = 1.0) -> dict[str, float | None]:
    """
    A sampled gradient against the exact one.

    Args:
        samples (`Moments`), exact (`Tensor` of shape `(p,)`)
        scale (`float`, *optional*, defaults to 1.0): times `exact` is what the samples should have as expectation.

    Returns:
        `dict`: `nsr`, the variance of one sample over `|scale exact|²` (what is measured of the mean may be mostly noise, and
        no divisor; that it is `scale exact`, `norm_ratio` and `cosine` say); `cosine` of the mean with
        it, which is lowered by what noise is left, and `corrected`, `cos / sqrt(rel)`; and `norm_ratio`, the part of the mean
        along `exact` over its norm, 1 without bias.
    """
    exact = exact.double()
    ratio = float(samples.mean @ exact / exact.square().sum())
    direction, reliability = cosine(samples.mean, exact), samples.reliability
    return {
        "nsr": samples.noise / float((scale * exact).square().sum()),
        "cosine": direction,
        "corrected": direction / math.sqrt(reliability) if reliability > 0 else None,
        "norm_ratio": ratio,
    }
