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
Checks and completes the arguments with which a base is loaded. Configs import this module, so it imports no diffusers.
"""

from collections.abc import Mapping

import torch

from ..guards.files import JSON


DTYPES = ("float32", "bfloat16", "float16")
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def full_dtype(name: str) -> str:
    """The name of a dtype that may be given by its short name, such as `"bfloat16"` for `"bf16"`."""
    return _SHORT.get(name, name)


def dtype_name(value: object) -> str | None:
    """
    The name of a dtype for a base, such as `"bfloat16"` for `"bfloat16"`, `"torch.bfloat16"` or `torch.bfloat16`.
    `None` if a base can't be loaded in it.
    """
    name = full_dtype(str(value).removeprefix("torch."))
    return name if name in DTYPES else None


def model_init_problems(options: Mapping[str, JSON]) -> list[str]:
    """Says which keyword arguments for `DiffusionPipeline.from_pretrained` are refused and why, one sentence each."""
    problems = []
    for name in ("trust_remote_code", "custom_pipeline"):
        if options.get(name):
            problems.append(
                f"model_init_kwargs: {name} would run code from the Hub and is refused. If you trust it, load the "
                "pipeline yourself and pass it as the model."
            )
    if not options.get("use_safetensors", True):
        problems.append("model_init_kwargs: use_safetensors is always on; pickled weights are not read.")
    for name in ("dtype", "torch_dtype"):
        given = options.get(name)
        for value in given.values() if isinstance(given, Mapping) else [given]:
            if value is not None and dtype_name(value) is None:
                problems.append(f"model_init_kwargs: {name}={value!r} is none of {', '.join(DTYPES)}.")
    return problems


def loading_options(dtype: str, model_init_kwargs: Mapping[str, JSON] | None) -> dict[str, JSON]:
    """
    Makes the arguments of `DiffusionPipeline.from_pretrained`, with dtypes as objects, since it ignores their names.

    Args:
        dtype (`str`): the dtype of the base.
        model_init_kwargs (`dict`, *optional*): further arguments. A `dtype` or `torch_dtype` in them replaces `dtype`
            only if it is a dict with a dtype for each component.
    """
    options = dict(model_init_kwargs or {})
    named = [options.pop(name, None) for name in ("dtype", "torch_dtype")]
    of_components = next((one for one in named if isinstance(one, Mapping)), None)
    if of_components is None:
        options["dtype"] = getattr(torch, dtype)
    else:
        options["dtype"] = {part: getattr(torch, dtype_name(one) or "") for part, one in of_components.items()}
    return {**options, "use_safetensors": True}
