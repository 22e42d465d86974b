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

"""Takes the keys of a LoRA's file apart, whoever wrote it: the layer's name, and which of its tensors it is."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..guards.redaction import shown


# The end of a key, behind the layer's name, and what the tensor is. `lora_A` may have an adapter's name behind it.
_ENDS = {
    "down": r"\.lora_(?:embedding_)?[Aa](?:\.(?!bias|weight)\w+)?(?:\.weight)?|\.lora_down(?:\.weight)?"
    r"|(?:\.|_)lora\.down(?:\.weight)?|\.lora_linear_layer\.down(?:\.weight)?|(?<=_lora\d)\.down(?:\.weight)?",
    "up": r"\.lora_(?:embedding_)?[Bb](?:\.(?!bias|weight)\w+)?(?:\.weight)?|\.lora_up(?:\.weight)?"
    r"|(?:\.|_)lora\.up(?:\.weight)?|\.lora_linear_layer\.up(?:\.weight)?|(?<=_lora\d)\.up(?:\.weight)?",
    "mid": r"\.lora_mid(?:\.weight)?",
    "alpha": r"\.alpha",
    "magnitude": r"\.dora_scale|\.lora_magnitude_vector(?:\.(?!weight)\w+)?(?:\.weight)?",
    **{part: rf"\.lokr_{part}(?:\.weight)?" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f"hada_{part}": rf"\.hada_{part}(?:\.weight)?" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
}
_END = re.compile("|".join(f"(?P<{part}>(?:{end})$)" for part, end in _ENDS.items()))
# What programs write before a layer's name. Some write several of these.
PREFIX = re.compile(
    r"^(?:(?:base_model\.model|model\.diffusion_model|diffusion_model|transformer|unet)\."
    r"|(?:lora_unet|lora_transformer|lycoris)_)+"
)
_UNDERSCORED = re.compile(r"^(?:lora_unet|lora_transformer|lycoris)_")
# Keys of adapters that are not read, and of differences of whole weights or biases that some programs save beside a LoRA.
LYCORIS_KEY = re.compile(r"\.(lokr|hada|oft|boft)_\w+$|\.(glora|[ab][12])\.weight$")
DIFFERENCE_KEY = re.compile(r"\.diff(_[bm])?$")
# Parts of a file that adapt text encoders, in the names of all writers.
TEXT_ENCODER = re.compile(r"^(text_encoder|lora_te|lora_clip|te\d?[._]|clip_[lgh][._]|t5xxl[._]|conditioner\.)")


def split_key(key: str) -> tuple[str, str] | None:
    """The layer's name as the file has it, and the tensor's part in it (a key of `_ENDS`); `None` for other tensors."""
    found = _END.search(key)
    return None if found is None or found.lastgroup is None else (key[: found.start()], found.lastgroup)


def by_layer(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """The keys of each layer in a file, by their part. Keys of other tensors are left out."""
    layers: dict[str, dict[str, str]] = {}
    for key in keys:
        if (split := split_key(key)) is not None:
            layers.setdefault(split[0], {})[split[1]] = key
    return layers


def bare_name(name: str) -> tuple[str, bool]:
    """A layer's name without what its writer put before it, and whether underscores stand for its dots."""
    bare = PREFIX.sub("", name)
    return bare, "." not in bare and _UNDERSCORED.match(name) is not None


def spellings(name: str) -> list[str]:
    """A layer's name, and what it is now if an old diffusers, which put LoRAs into processors, wrote it."""
    new = name.replace(".processor.", ".")
    return [name, new, f"{new}.0"] if new.endswith("to_out") else [name, new]


def some(names: list[str]) -> str:
    """Joins names for a message. Long lists and long names are cut short."""
    return ", ".join(shown(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
