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

"""Whatever the pages and docstrings point to is there: names, pages, sections, files, pictures."""

import ast
import builtins
import importlib
import pkgutil
import re
from functools import cache
from pathlib import Path

import pytest
import yaml
from helpers.pages import ROOT, SOURCE, all_pages, anchors, doc_pages, prose

import trl_diffusion_opd.rewards
import trl_diffusion_opd.trainer


# Libraries that a cross-reference may begin with; the documentation links to theirs.
LIBRARIES = ("accelerate", "datasets", "diffusers", "huggingface_hub", "peft", "torch", "transformers", "trl")
PAGES = [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in all_pages()]
DOC_PAGES = [pytest.param(page, id=page.stem) for page in doc_pages()]
MODULES = sorted((ROOT / "trl_diffusion_opd").rglob("*.py"))


def resolve(name: str, start: object) -> object | None:
    """What a dotted name means inside of `start`, where a module that nobody has imported yet is imported."""
    found = start
    for part in name.split("."):
        if not hasattr(found, part) and hasattr(found, "__path__"):
            try:
                importlib.import_module(f"{found.__name__}.{part}")
            except ModuleNotFoundError:
                return None
        if not hasattr(found, part):
            # A dataclass's field without a default is no attribute of its class.
            return found if part in getattr(found, "__annotations__", ()) else None
        found = getattr(found, part)
    return found


@cache
def everywhere() -> dict[str, object]:
    """The package's modules, and what is public in them, by their last names."""
    found: dict[str, object] = {}
    for one in pkgutil.walk_packages(trl_diffusion_opd.__path__, "trl_diffusion_opd."):
        module = importlib.import_module(one.name)
        found[one.name.rpartition(".")[2]] = module
        own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == one.name}
        found |= {name: value for name, value in own.items() if not name.startswith("_")}
    return found


def reference_problem(name: str, start: object = trl_diffusion_opd) -> str | None:
    """What is wrong with the name of a cross-reference. `start`: a module whose own names will do as well."""
    path, _, parameter = name.removeprefix("~").partition("#")
    library = path.partition(".")[0]
    if library in LIBRARIES:
        found = resolve(path.partition(".")[2], importlib.import_module(library))
    else:
        own = path.removeprefix("trl_diffusion_opd.")
        places = (trl_diffusion_opd, trl_diffusion_opd.trainer, trl_diffusion_opd.rewards, builtins, start)
        found = next((one for place in places if (one := resolve(own, place)) is not None), None)
    if found is None:
        return f"[`{name}`] is not in {library if library in LIBRARIES else 'the package'}"
    if (
        parameter
        and parameter not in getattr(getattr(found, "__init__", found), "__code__", found.__code__).co_varnames
    ):
        return f"[`{name}`]: no parameter {parameter!r}"
    return None


def test_the_table_of_contents_lists_every_page_once():
    sections = yaml.safe_load((SOURCE / "_toctree.yml").read_text(encoding="utf-8"))
    listed = [page["local"] for section in sections for page in section["sections"]]
    assert sorted(listed) == sorted(page.relative_to(SOURCE).with_suffix("").as_posix() for page in doc_pages())
    assert all(page["title"] for section in sections for page in section["sections"])


def test_the_first_heading_of_every_page_is_its_title():
    for page in doc_pages():
        headings = re.findall(r"^# .+", prose(page.read_text(encoding="utf-8")), re.MULTILINE)
        assert len(headings) == 1, (page.name, headings)


@pytest.mark.parametrize(
    "page", [page for page in DOC_PAGES if page.id not in ("claims", "claims_beyond", "gpu", "scaling")]
)
def test_lines_are_wrapped(page):
    """Those of paragraphs, without the addresses of links. Three pages are written by programs of `benchmarks/`."""
    text = re.sub(r"\]\([^)\n]*\)", "]", prose(page.read_text(encoding="utf-8")))
    lines = [line for line in text.splitlines() if not line.startswith(("|", "!", r"\\("))]
    assert not [line for line in lines if len(line) > 119]


@pytest.mark.parametrize("page", DOC_PAGES)
def test_what_a_page_documents_is_in_the_package(page):
    problems = []
    text = page.read_text(encoding="utf-8")
    for name, methods in re.findall(r"^\[\[autodoc\]\] +(\S+)\n((?: +- \S+\n)*)", text, re.MULTILINE):
        found = resolve(name, trl_diffusion_opd)
        if found is None:
            problems.append(f"[[autodoc]] {name}")
        elif not (getattr(found, "__doc__", None) or "").strip():
            problems.append(f"[[autodoc]] {name} has no docstring")
        for method in re.findall(r"- (\S+)", methods):
            if method not in ("all", "none") and not (getattr(getattr(found, method, None), "__doc__", None)):
                problems.append(f"[[autodoc]] {name}.{method}")
    assert text.count("[[autodoc]]") == len(re.findall(r"^\[\[autodoc\]\] +\S+$", text, re.MULTILINE))
    assert not problems, problems


def test_every_public_name_is_documented():
    documented = set()
    for page in doc_pages():
        names = re.findall(r"^\[\[autodoc\]\] +(\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        documented |= {name.rpartition(".")[2] for name in names}
    public = {*trl_diffusion_opd.__all__, *trl_diffusion_opd.trainer.__all__}
    assert public - documented == {"__version__", "tiny"}


@pytest.mark.parametrize("page", DOC_PAGES)
def test_cross_references_of_pages(page):
    names = re.findall(r"\[`([^`\n]+)`\](?!\()", prose(page.read_text(encoding="utf-8")))
    problems = [problem for name in dict.fromkeys(names) if (problem := reference_problem(name))]
    assert not problems, problems


def test_cross_references_of_docstrings():
    problems = []
    for file in MODULES:
        relative = file.relative_to(ROOT).with_suffix("")
        module = importlib.import_module(".".join(relative.parts).removesuffix(".__init__"))
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node, inside in _documented(tree, module):
            for name in re.findall(r"\[`([^`\n]+)`\](?!\()", ast.get_docstring(node) or ""):
                # Names of other modules will do: a reader of the code finds them.
                first, _, rest = name.removeprefix("~").partition(".")
                other = everywhere().get(first)
                known = other is not None and (not rest or resolve(rest, other) is not None)
                if not known and all(reference_problem(name, one) for one in (module, inside)):
                    problems.append(f"{relative}: {reference_problem(name, module)}")
    assert not problems, "\n".join(dict.fromkeys(problems))


def _documented(tree: ast.Module, module: object) -> list[tuple[ast.AST, object]]:
    """A module and what is public in it, with the class that each is in."""
    found: list[tuple[ast.AST, object]] = [(tree, module)]
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            found.append((node, getattr(module, node.name)))
            if isinstance(node, ast.ClassDef):
                methods = [one for one in node.body if isinstance(one, ast.FunctionDef)]
                found += [(one, getattr(module, node.name)) for one in methods if not one.name.startswith("_")]
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    text = prose(page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^()\s]+)\)", text) + re.findall(r"<(?:img|a) [^>]*?(?:src|href)=\"([^\"]+)\"", text)
    problems = []
    for target in dict.fromkeys(targets):
        if re.match(r"[a-z]+:", target):
            assert target.startswith(("https://", "http://", "mailto:")), target
            continue
        path, _, anchor = target.partition("#")
        file = page
        if path:
            file = page.parent / path
            if page.parent == SOURCE and not file.suffix and not file.is_dir():
                file = file.with_suffix(".md")
        if not file.exists():
            problems.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
            problems.append(f"{target}: {file.name} has no such heading")
    assert not problems, problems


OURS = re.compile(r"\btrl_diffusion_opd((?:\.\w+)+)(?::(\w+))?")
# `folder/file.ext` of this repository; what a run writes lies in folders of other names.
FILES = re.compile(r"`((?:benchmarks|docs|examples|model_cards|tests|trl_diffusion_opd)/[\w./-]+)`")


@pytest.mark.parametrize("page", [*PAGES, *(pytest.param(one, id=one.name) for one in ROOT.glob("examples/*/*.yaml"))])
def test_names_of_modules_and_files(page):
    text = page.read_text(encoding="utf-8")
    problems = []
    for path, function in set(OURS.findall(text)):
        if resolve(path[1:] + (f".{function}" if function else ""), trl_diffusion_opd) is None:
            problems.append(f"trl_diffusion_opd{path}:{function}")
    problems += [file for file in set(FILES.findall(text)) if not Path(ROOT, file).exists()]
    assert not problems, problems


@pytest.mark.parametrize(
    "broken",
    ["[`Nothing`]", "[`~transformers.Nothing`]", "[`DiffusionOPDTrainer.nothing`]", "[`rewards.nothing.Nothing`]"],
)
def test_a_broken_reference_is_found(broken):
    assert reference_problem(broken[2:-2])


def test_anchors_are_those_of_the_headings():
    text = "# A page\n\n## `code` and *more*, here\n```bash\n# no heading\n```\n## Twice\n## Twice\n"
    assert anchors(text) == {"a-page", "code-and-more-here", "twice", "twice-1"}
