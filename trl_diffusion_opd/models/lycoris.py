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

"""
Computes what LoRA, LoHa, LoKr (the kinds of LyCORIS) and DoRA change of a weight.

A LoRA's change is `scale up down`. LoHa multiplies two such products element by element, LoKr makes a Kronecker
product of two matrices of which either may be a product. With DoRA the changed weight is brought to a length that the
file stores, for each row or for each column (arXiv:2106.09685, 2108.06098, 2309.14859, 2402.09353).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


Parts = Mapping[str, Tensor]  # the tensors of one layer, by the names in `lora_keys.py`

# The tensors of each kind, and those that a file of a convolution may have besides.
_KINDS = {
    "LoRA": [{"down", "up"}, {"down", "up", "mid"}],
    "LoHa": [{"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}]
    + [{"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}],
    "LoKr": [first | second for first in ({"w1"}, {"w1_a", "w1_b"}) for second in ({"w2"}, {"w2_a", "w2_b"})]
    + [first | {"w2_a", "w2_b", "t2"} for first in ({"w1"}, {"w1_a", "w1_b"})],
}
# A LoHa is a LoRA of its rank squared. Up to this share of a matrix's smaller side it is used as one.
_LARGEST_SHARE = 0.25


def kind_of(parts: Parts) -> str | None:
    """`"LoRA"`, `"LoHa"` or `"LoKr"`; `None` if tensors are missing or of several kinds."""
    own = parts.keys() - {"alpha", "magnitude"}
    return next((kind for kind, sets in _KINDS.items() if own in sets), None)


def _scale(parts: Parts, rank: int | None) -> float:
    """The factor of the product: alpha by the rank, and 1 without an alpha or a rank."""
    return float(parts["alpha"]) / rank if "alpha" in parts and rank is not None else 1.0


def as_lora(parts: Parts) -> tuple[Tensor, Tensor, float] | None:
    """
    The matrices and alpha of a LoRA that is the same as a layer's tensors; `None` if there is none of a small rank.

    Returns:
        `lora_A`, `lora_B` and alpha.
    """
    kind = kind_of(parts)
    if "magnitude" in parts:
        return None
    if kind == "LoRA":
        down, up = parts["down"], parts["up"]
        rank = len(down)
        if "mid" in parts:  # lora_down (j, in), lora_mid (i, j, height, width), lora_up (out, i)
            rank = len(parts["mid"])
            down = torch.einsum("ij...,jr->ir...", parts["mid"].float(), down.flatten(1).float()).to(down.dtype)
        return down, up, _scale(parts, len(parts["down"])) * rank
    if kind == "LoHa" and "hada_t1" not in parts:
        a, b, c, d = (parts[f"hada_{name}"].float() for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        rank = len(b) * len(d)
        if rank > _LARGEST_SHARE * min(len(a), b[0].numel()):
            return None
        up = torch.einsum("oi,oj->oij", a, c).flatten(1)
        down = torch.einsum("in,jn->ijn", b, d).flatten(0, 1)
        return down, up, _scale(parts, len(b)) * rank
    return None


def _product(parts: Parts, name: str) -> Tensor:
    """One of the two matrices of a LoHa or LoKr, which the file has whole, as a product, or in Tucker's form."""
    if name in parts:
        return parts[name].float()
    a, b = parts[f"{name}_a"].float(), parts[f"{name}_b"].float()
    core = parts.get(name.replace("w", "t"))
    if core is not None:  # a (i, out), b (j, in), core (i, j, height, width)
        return torch.einsum("ij...,ip,jr->pr...", core.float(), a, b)
    return a @ b


def change(parts: Parts, weight: Tensor) -> Tensor:
    """
    What a layer's tensors change of its weight, in float32.

    Args:
        parts (`dict[str, Tensor]`): the layer's tensors.
        weight (`Tensor` of shape `(out, in, ...)`): the weight of the base.

    Raises:
        ValueError: If the shapes do not fit.
    """
    kind, shape = kind_of(parts), weight.shape
    if kind == "LoRA":
        lora = as_lora({name: part for name, part in parts.items() if name != "magnitude"})
        assert lora is not None
        down, up, alpha = lora
        update = alpha / len(down) * (up.flatten(1).float() @ down.flatten(1).float())
    elif kind == "LoHa":
        first, second = _product(parts, "hada_w1"), _product(parts, "hada_w2")
        update = _scale(parts, len(parts["hada_w1_b"])) * first * second
    else:
        first, second = _product(parts, "w1"), _product(parts, "w2")
        if len(shape) > 2 and second.ndim == 2:  # (out, in height width)
            second = second.reshape(len(second), -1, *shape[2:])
        first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
        ranks = [len(parts[name]) for name in ("w1_b", "w2_b") if name in parts]
        update = _scale(parts, ranks[-1] if ranks else None) * torch.kron(first, second.contiguous())
    if update.numel() != weight.numel() or len(update) != len(weight):
        raise ValueError(f"its change of shape {tuple(update.shape)} does not fit a weight of {tuple(shape)}")
    update = update.reshape(shape)
    return update if "magnitude" not in parts else _dora(weight.float(), update, parts["magnitude"]) - weight.float()


def _dora(weight: Tensor, update: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA's weight. The file's lengths are those of rows, `(out, 1)`, or of columns, `(1, in)`."""
    changed = weight + update
    lengths = magnitude.float().squeeze()
    if math.prod(magnitude.shape[1:]) == 1 and len(magnitude) == len(weight):  # rows
        norms, shape = changed.flatten(1).norm(dim=1), (-1, *[1] * (weight.ndim - 1))
    elif magnitude.ndim > 1 and len(magnitude) == 1 and magnitude.shape[1] == weight.shape[1]:
        norms, shape = changed.transpose(0, 1).flatten(1).norm(dim=1), (1, -1, *[1] * (weight.ndim - 2))
    else:
        raise ValueError(f"its magnitudes of shape {tuple(magnitude.shape)} do not fit {tuple(weight.shape)}")
    return changed * (lengths / norms.clamp(min=torch.finfo(norms.dtype).tiny)).reshape(shape)
