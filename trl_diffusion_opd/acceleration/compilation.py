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

"""Regional `torch.compile`: the repeated blocks of a transformer, in place."""

from collections.abc import Callable, Iterator
from typing import cast

import torch
from accelerate.utils.other import is_repeated_blocks
from torch import nn


# Graphs of one class of block: with and without gradients, the student, the base, and a teacher's of each rank, each twice or
# three times, since a transformer's first or last blocks often differ. The default of 8 is not enough for SD3 with one
# teacher, and beyond the limit all blocks silently run uncompiled.
RECOMPILE_LIMIT = 64


def compile_blocks(transformer: nn.Module, backend: str | None = None, mode: str | None = None) -> None:
    """
    Compiles the repeated blocks of a transformer where they are, so that parameters keep their names and wrappers put
    around the model later still work. What is around the blocks is not compiled.

    Args:
        transformer (`nn.Module`): a transformer of diffusers, with its LoRAs if any.
        backend, mode (`str`, *optional*): as in `torch.compile`.

    Raises:
        [`ValueError`]: if it has no repeated blocks.
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
    Our limit for a compiled block, where `torch.compile` has no argument for it. It is set around each call, since it is
    looked up when a call compiles, in that call's thread, which with gradient checkpointing may be one of autograd's.
    """
    compiled = cast(Callable, block._compiled_call_impl)

    def call(*args: object, **kwargs: object) -> object:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            return compiled(*args, **kwargs)

    block._compiled_call_impl = call


def compilable_blocks(transformer: nn.Module) -> list[nn.Module]:
    """
    What [`compile_blocks`] compiles.

    Raises:
        [`ValueError`]: if there is nothing.
    """
    blocks = list(repeated_blocks(transformer))
    if not blocks:
        raise ValueError(
            f"torch_compile: {type(transformer).__name__} has no list of equal blocks to compile. Leave it out."
        )
    return blocks


def repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks of which a transformer mostly consists: the members of its outermost lists of equal modules."""
    for child in module.children():
        if is_repeated_blocks(child):
            yield from child.children()
        else:
            yield from repeated_blocks(child)
