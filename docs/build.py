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
Builds the documentation: HTML pages in build/docs/html, made of what doc-builder makes of docs/source.

doc-builder, which builds huggingface.co/docs, writes the docstrings into the pages and resolves the links between them. Its own
step from there to HTML needs a checkout of it, Node and a network; this one needs none of them. Whatever does not resolve is
printed, and is an error.

python docs/build.py
"""

import html
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import yaml
from doc_builder import build_doc
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # of optional libraries that these pages do not need
ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "docs/source"
OUTPUT = ROOT / "build/docs"
PACKAGE = "trl_diffusion_opd"
# Where doc-builder's links to its own pages begin.
PREFIX = f"/docs/{PACKAGE}/main/en/"
STYLE = """
body { margin: 0; display: flex; font: 16px/1.55 system-ui, sans-serif; color: #1a1a1a; }
nav { width: 15rem; flex: none; height: 100vh; position: sticky; top: 0; overflow: auto; background: #f6f6f6;
  padding: 1rem; box-sizing: border-box; font-size: 14px; }
nav a { display: block; color: inherit; text-decoration: none; padding: .12rem 0 .12rem .6rem; }
nav a[aria-current] { font-weight: bold; } nav b { display: block; margin-top: .8rem; }
main { max-width: 54rem; padding: 1rem 2rem 6rem; min-width: 0; }
pre { background: #f6f6f6; padding: .8rem; overflow: auto; font-size: 13.5px; } code { font-size: .9em; }
table { border-collapse: collapse; display: block; overflow: auto; } td, th { border: 1px solid #ddd; padding: .3rem .6rem; }
img { max-width: 100%; } blockquote { border-left: 4px solid #ddd; margin-left: 0; padding-left: 1rem; }
.docstring { border-left: 2px solid #ddd; padding-left: 1rem; margin: 1.5rem 0; } .signature { font-family: monospace; }
"""


def highlighted(code: str, language: str, _options: str) -> str:
    return highlight(code, get_lexer_by_name(language or "text"), HtmlFormatter(nowrap=True))


MARKDOWN = MarkdownIt("commonmark", {"html": True, "highlight": highlighted}).enable("table")


def slug(heading: str) -> str:
    """A heading in the spelling of links, as GitHub has it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def outside_of_code(text: str, pattern: str, replace: Callable[[re.Match[str]], str]) -> str:
    """Substitutes in the prose of a page, not in its code."""
    parts = re.split(r"(^ *```.*?^ *```|`[^`\n]+`)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if i % 2 else re.sub(pattern, replace, part, flags=re.DOTALL) for i, part in enumerate(parts))


def inside(tag: str, text: str) -> str:
    found = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return found[1].strip() if found else ""


def docstring(match: re.Match[str]) -> str:
    """A component of doc-builder as Markdown: name and signature, then arguments, results and errors."""
    text = match[1]
    given = json.loads(inside("parameters", text) or "[]")
    # Types by their names, without the modules that they are in.
    signature = html.escape(", ".join(one["name"] + re.sub(r"\b([a-z]\w*\.)+", "", one["val"]) for one in given))
    name, anchor = inside("name", text), inside("anchor", text)
    lines = [f'<p class="signature" id="{anchor}"><b>{name}</b>({signature})</p>']
    groups = [("Parameters", inside("paramsdesc", text))]
    for number in range(1, int(inside("paramgroups", text) or 0) + 1):
        groups.append((inside(f"paramsdesc{number}title", text), inside(f"paramsdesc{number}", text)))
    returned = " ".join(filter(None, (inside("rettype", text), inside("retdesc", text))))
    groups += [("Returns", returned), ("Raises", inside("raises", text) or inside("raisederrors", text))]
    lines += [f"**{title}**\n\n{content}" for title, content in groups if content]
    return "\n\n" + "\n\n".join(lines) + "\n\n"


def page_body(text: str, depth_to_root: str) -> str:
    """The HTML of a page, from doc-builder's MDX."""
    text = text.partition("HF_DOC_BODY_START")[2].partition("HF_DOC_BODY_END")[0]
    text = text.replace("<!--HF DOCBUILD BODY END-->", "")
    text = re.sub(r"<docstring>(.*?)</docstring>", docstring, text, flags=re.DOTALL)
    text = re.sub(r"</?ExampleCodeBlock[^>]*>", "", text)
    text = re.sub(r"`~[\w.]+\.(\w+)`", r"`\1`", text)  # of libraries that doc-builder has no links to
    text = re.sub(r"^> \[!(\w+)\]", lambda match: f"> **{match[1].capitalize()}.**", text, flags=re.MULTILINE)
    text = outside_of_code(text, r"\$\$(.+?)\$\$", lambda match: convert(match[1].strip(), display="block"))
    text = outside_of_code(text, r"\\\\\((.+?)\\\\\)", lambda match: convert(match[1].strip()))
    body = MARKDOWN.render(text)
    return re.sub(r'(href|src)="([^"]+)"', lambda match: f'{match[1]}="{target(match[2], depth_to_root)}"', body)


def target(link: str, depth_to_root: str) -> str:
    """A link of a page in docs/source, or of doc-builder, as it is between the built pages."""
    link = html.unescape(link).removeprefix(PREFIX)
    path, hash_, anchor = link.partition("#")
    if re.match(r"[a-z]+:|$", path):
        return link
    if path.startswith("../../"):
        return depth_to_root + path.removeprefix("../../")
    return (f"{path}.html" if (SOURCE / f"{path}.md").exists() else path) + hash_ + anchor


def with_anchors(body: str) -> str:
    """Headings that can be linked to; doc-builder writes the name of what a section documents behind its heading."""
    seen: dict[str, int] = {}

    def heading(match: re.Match[str]) -> str:
        level, content = match[1], re.sub(r"\[\[.*?\]\]", "", match[2])
        name = slug(html.unescape(re.sub(r"<[^>]+>", "", content)))
        seen[name] = seen.get(name, -1) + 1
        return f'<h{level} id="{name}{f"-{seen[name]}" if seen[name] else ""}">{content}</h{level}>'

    return re.sub(r"<h([1-6])>(.*?)</h\1>", heading, body, flags=re.DOTALL)


def navigation(current: str) -> str:
    lines = []
    for section in yaml.safe_load((SOURCE / "_toctree.yml").read_text(encoding="utf-8")):
        lines.append(f"<b>{html.escape(section['title'])}</b>")
        for page in section["sections"]:
            here = ' aria-current="page"' if page["local"] == current else ""
            lines.append(f'<a href="{page["local"]}.html"{here}>{html.escape(page["title"])}</a>')
    return "\n".join(lines)


def problems(pages: dict[str, str]) -> list[str]:
    """Links that lead nowhere, and cross-references that doc-builder left as they were."""
    ids = {name: set(re.findall(r'\bid="([^"]+)"', body)) for name, body in pages.items()}
    found = []
    for name, body in pages.items():
        for link in re.findall(r'(?:href|src)="([^"]+)"', body):
            path, _, anchor = html.unescape(link).partition("#")
            if re.match(r"[a-z]+:", link):
                continue
            page = Path(path).stem if path else name
            if path and not (OUTPUT / "html" / unquote(path)).exists():
                found.append(f"{name}: {link}: no such file")
            elif anchor and anchor not in ids.get(page, set()):
                found.append(f"{name}: {link}: no such place")
        found += [f"{name}: {left}" for left in re.findall(r"\[<code>[^<]*</code>\]|\[\[autodoc\]\][^<]*", body)]
    return found


def main() -> None:
    os.chdir(ROOT)
    mdx, folder = OUTPUT / "mdx", OUTPUT / "html"
    build_doc(PACKAGE, SOURCE, mdx, clean=True, is_python_module=True, version_tag_suffix="")
    folder.mkdir(parents=True, exist_ok=True)
    pages = {}
    for file in sorted(mdx.glob("*.mdx")):
        body = page_body(file.read_text(encoding="utf-8"), os.path.relpath(ROOT, folder) + "/")
        pages[file.stem] = with_anchors(body)
    for name, body in pages.items():
        title = re.sub(r"<[^>]+>", "", re.search(r"<h1[^>]*>(.*?)</h1>", body)[1])
        style = STYLE + HtmlFormatter().get_style_defs("pre")
        page = f'<!doctype html><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        page += f"<nav>{navigation(name)}</nav>\n<main>\n{body}</main>\n"
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    for part in ("images", "results"):
        if not (folder / part).exists():
            (folder / part).symlink_to(os.path.relpath(SOURCE / part, folder))
    found = problems(pages)
    for problem in found:
        print(problem, file=sys.stderr)
    print(f"{len(pages)} pages in {folder.relative_to(ROOT)}, {len(found)} problems")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
