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

"""Compiles the repeated blocks of a transformer in place (regional `torch.compile`)."""

from collections.abc import Callable, Iterator
from typing import cast

import torch
from accelerate.utils.other import is_repeated_blocks
from torch import nn


# Maximum number of graphs for one class of block. There is one for each combination of: with or without gradients;
# student, base or a teacher's LoRA rank; and two or three kinds of blocks, since a transformer's first or last blocks
# often differ. PyTorch's default of 8 is too few for SD3 with one teacher, and beyond the limit all blocks silently
# run uncompiled.
RECOMPILE_LIMIT = 64


def compile_blocks(transformer: nn.Module, backend: str | None = None, mode: str | None = None) -> None:
    """
    Compiles the repeated blocks of a transformer in place. Parameters keep their names, and the model can still be
    wrapped later. The layers around the blocks are not compiled.

    Args:
        transformer (`nn.Module`): a transformer of diffusers, with its LoRAs if any.
        backend, mode (`str`, *optional*): as in `torch.compile`.

    Raises:
        [`ValueError`]: if the transformer has no repeated blocks.
    """
    options: dict[str, str | int] = {} if backend is None else {"backend": backend}
    takes_limit = torch.__version__ >= "2.13"
    if takes_limit:
        options["recompile_limit"] = RECOMPILE_LIMIT
    for block in compilable_blocks(transformer):
        block.compile(mode=mode, **options)
        if not takes_limit:
            _limit_recompiles(block)


def _limit_recompiles(block: nn.Module) -> None:
    """
    Sets [`RECOMPILE_LIMIT`] for a compiled block if `torch.compile` has no argument for it. PyTorch reads the limit in
    the thread of the call that compiles, which may be autograd's with gradient checkpointing, so it is set around each
    call.
    """
    compiled = cast(Callable, block._compiled_call_impl)

    def call(*args: object, **kwargs: object) -> object:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            return compiled(*args, **kwargs)

    block._compiled_call_impl = call


def compilable_blocks(transformer: nn.Module) -> list[nn.Module]:
    """
    Returns the blocks that [`compile_blocks`] compiles.

    Raises:
        [`ValueError`]: if there are none.
    """
    blocks = list(repeated_blocks(transformer))
    if not blocks:
        raise ValueError(
            f"torch_compile: {type(transformer).__name__} has no list of equal blocks to compile. Leave it out."
        )
    return blocks


def repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the blocks that make up most of a transformer: the members of its outermost lists of equal modules."""
    for child in module.children():
        if is_repeated_blocks(child):
            yield from child.children()
        else:
            yield from repeated_blocks(child)
