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

"""Splits Markdown pages into prose, headings and code blocks."""

import re
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "docs/source"

_FENCE = re.compile(r"^( *)(`{3,})(\S*)[^\n]*\n(.*?)^\1\2 *$", re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(r"<!-- (not run|first):\s(.*?)-->\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """
    A code block of a page.

    Args:
        line (`int`): where it begins.
        language (`str`): what stands behind its backticks, or nothing.
        text (`str`): what is in it.
        why_not (`str`, *optional*): why it is not run, from `<!-- not run: ... -->` on the line before it.
        first (`str`): what is run before it, from `<!-- first: ... -->` there: code that a reader need not see.
    """

    line: int
    language: str
    text: str
    why_not: str | None
    first: str


def doc_pages() -> list[Path]:
    """The pages of the documentation."""
    return sorted(SOURCE.rglob("*.md"))


def all_pages() -> list[Path]:
    """Every page in Markdown that people read: the documentation, the cards, and what lies in the root."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "model_cards").glob("*.md")), *doc_pages()]


def blocks(text: str) -> list[Block]:
    """A page's code blocks, in order."""
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()]
        begin = before.rfind("<!--")
        comment = _COMMENT.match(before, begin) if begin >= 0 else None
        mark = {comment[1]: comment[2].strip()} if comment else {}
        indent = len(match[1])
        lines = [line[indent:] for line in match[4].splitlines()]
        number = text.count("\n", 0, match.start()) + 1
        found.append(Block(number, match[3], "\n".join(lines) + "\n", mark.get("not run"), mark.get("first", "")))
    return found


def prose(text: str) -> str:
    """A page without its code blocks and comments, line for line."""
    for pattern in (_FENCE, re.compile(r"<!--.*?-->", re.DOTALL)):
        text = pattern.sub(lambda match: "\n" * match[0].count("\n"), text)
    return text


def anchors(text: str) -> set[str]:
    """What a link to a page may name behind its `#`: the page's headings, in the spelling of links."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = sum(one == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", one) is not None for one in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found
