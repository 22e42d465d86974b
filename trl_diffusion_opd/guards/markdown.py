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
A stranger's text in Markdown: names of tasks, rewards and layers, and prompts. It is shown, and makes no heading, table,
picture, link or HTML.
"""

import json
import re

from .redaction import shown, visible


# A card's cell may name all layers of a LoRA.
_LONGEST = 1000

# What acts within a line. A lone underscore between letters does nothing, and names have many.
_ACTIVE = re.compile(r"([\\`*\[\]|~#]|(?<![^\W_])_|_(?![^\W_]))")
# Renderers make links and formulas of these without any brackets, and a backslash does not keep all of them from it.
_SELF_ACTING = re.compile(r"://|www\.|@|\$|mailto:|xmpp:", re.IGNORECASE)
_ENTITY = re.compile(r"&(?=#?\w+;)")


def inline(text: object, in_table: bool = False) -> str:
    """
    A text as Markdown within a line, not at its beginning, that shows it.

    Args:
        text: a string, or anything else by its `str`. Line breaks become spaces, and of a very long text the middle is cut.
        in_table (`bool`, *optional*, defaults to `False`): whether it is for a cell of a table.
    """
    line = shown(" ".join(str(text).split()), _LONGEST)
    if _SELF_ACTING.search(line):
        return code(line, in_table)
    line = _ENTITY.sub("&amp;", line)
    return _ACTIVE.sub(r"\\\1", line).replace("<", "&lt;")


def cell(text: object) -> str:
    """A text as a cell of a table: see [`inline`]."""
    return inline(text, in_table=True)


def code(text: object, in_table: bool = False) -> str:
    """
    A text as code within a line, in which nothing acts. In a table its bars are broken bars: of a bar after a backslash
    renderers differ.
    """
    line = shown(" ".join(str(text).split()), _LONGEST)
    if in_table:
        line = line.replace("|", "¦")
    fence = "`"
    while fence in line:
        fence += "`"
    space = " " if not line or "`" in (line[0], line[-1]) else ""
    return f"{fence}{space}{line}{space}{fence}"


def literal(value: str | bool | int | float | None) -> str:
    """A value as Python writes it, on one line, for code in a card."""
    return visible(json.dumps(value, ensure_ascii=False)) if isinstance(value, str) else repr(value)
