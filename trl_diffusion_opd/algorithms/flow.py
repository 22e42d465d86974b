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

"""What the losses of flow models share: noised images, values a sample, and the difference of two velocities."""

import torch
from torch import Tensor


def noised(x0: Tensor, eps: Tensor, t: float | Tensor) -> Tensor:
    """
    The forward process `x_t = (1 - t) x0 + t eps`, with `t` from 0 (image) to 1 (noise).

    Args:
        x0, eps (`Tensor` of shape `(B, ...)`): images (latents) and noise.
        t (`float` or `Tensor` of shape `(B,)`): one noise level for all samples, or one for each.
    """
    t = per_sample(t, x0)
    return (1 - t) * x0 + t * eps


def per_sample(values: float | Tensor, like: Tensor) -> float | Tensor:
    """Values a sample, on `like`'s device and with axes of size 1 for its other ones. A number stays as it is."""
    if not isinstance(values, Tensor):
        return values
    return values.to(like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def velocity_gap_sq(v_student: Tensor, v_teacher: Tensor) -> Tensor:
    """The squared difference of two velocities, averaged over the latent dimensions.

    The closed-form loss of step `j` is this times the step's weight `w_j` (arXiv 2605.15055, Eqs. 11 and 12, per
    latent dimension).

    Args:
        v_student, v_teacher (`Tensor` of shape `(B, ...)`):
            Velocities at the same states. Subtracted in float32 or, if both are wider, in float64.

    Returns:
        `Tensor` of shape `(B,)`, one value a sample.

    Raises:
        ValueError: if the shapes differ.
    """
    return velocity_difference(v_student, v_teacher).square().flatten(1).mean(1)


def velocity_difference(v_student: Tensor, v_teacher: Tensor) -> Tensor:
    """The difference of two velocities of one shape, in float32 or, if both are wider, in float64.

    Raises:
        ValueError: if the shapes differ.
    """
    if v_student.shape != v_teacher.shape:
        raise ValueError(
            f"The student's velocity has shape {tuple(v_student.shape)}, the teacher's {tuple(v_teacher.shape)}."
        )
    # Converted before the subtraction: in bfloat16 the difference of two close velocities is mostly rounding.
    dtype = torch.float64 if v_student.dtype == v_teacher.dtype == torch.float64 else torch.float32
    return v_student.to(dtype) - v_teacher.to(dtype)
