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

"""Finds NaN and infinity in weights, images and options before they are saved, pushed or scored."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


if TYPE_CHECKING:
    from transformers import TrainingArguments


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that hold NaN or infinity. Of a sharded tensor, only this process's shard is checked."""
    names, finite = [], []
    for name, tensor in tensors:
        if tensor.is_floating_point():
            names.append(name)
            own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            finite.append(own.isfinite().all())
    if not finite:
        return []
    # Waits for the device once, not once a tensor.
    flags = torch.stack([flag.to(finite[0].device) for flag in finite]).tolist()
    return [name for name, flag in zip(names, flags, strict=True) if not flag]


@contextmanager
def finite_images() -> Iterator[None]:
    """
    Refuses images made of NaN inside its block. A pipeline would draw them black, and they would be scored.

    Raises:
        [`FloatingPointError`]: when a pipeline turns NaN or infinity into a pixel.
    """
    with np.errstate(invalid="raise"):
        try:
            yield
        except FloatingPointError as error:
            raise FloatingPointError(
                "The VAE computed NaN or infinity, which would become black pixels. Many VAEs need more than float16: "
                "try dtype='bfloat16' or 'float32'."
            ) from error


def infinite_options(options: "TrainingArguments") -> list[tuple[str, float]]:
    """Returns name and value of each option of a dataclass that is NaN or infinite."""
    values = {known.name: getattr(options, known.name) for known in fields(options)}
    return [(name, value) for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
