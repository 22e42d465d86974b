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
Escapes text from others for Markdown: prompts, and names of tasks, rewards and layers. The text is shown as it is and
cannot become a heading, table, picture, link or HTML.
"""

import json
import re

from .redaction import shown, visible


# In characters: a cell of a model card may name all layers of a LoRA.
_LONGEST = 1000

# Characters that mark something up within a line. An underscore between letters does not, and names have many.
_ACTIVE = re.compile(r"([\\`*\[\]|~#]|(?<![^\W_])_|_(?![^\W_]))")
# Renderers turn these into links and formulas without any brackets, some even after a backslash.
_SELF_ACTING = re.compile(r"://|www\.|@|\$|mailto:|xmpp:", re.IGNORECASE)
_ENTITY = re.compile(r"&(?=#?\w+;)")


def inline(text: object, in_table: bool = False) -> str:
    """
    Returns Markdown that shows a text literally, for use within a line (not at its start).

    Args:
        text: a string, or any object (its `str` is used). Line breaks become spaces. A very long text loses its
            middle.
        in_table (`bool`, *optional*, defaults to `False`): whether the text goes into a table's cell.
    """
    line = shown(" ".join(str(text).split()), _LONGEST)
    if _SELF_ACTING.search(line):
        return code(line, in_table)
    line = _ENTITY.sub("&amp;", line)
    return _ACTIVE.sub(r"\\\1", line).replace("<", "&lt;")


def cell(text: object) -> str:
    """Returns a text as [`inline`] does, for a table's cell."""
    return inline(text, in_table=True)


def code(text: object, in_table: bool = False) -> str:
    """
    Returns a text as a code span, in which no markup acts. In a table, `|` becomes a broken bar, since renderers
    disagree on an escaped bar.
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
    """Returns a value as Python code on one line, for examples in a model card."""
    return visible(json.dumps(value, ensure_ascii=False)) if isinstance(value, str) else repr(value)
