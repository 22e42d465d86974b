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
The layers of AGENTS.md: an import points down, wherever it stands, under `TYPE_CHECKING` and within functions too.

Files and functions stay short: a file has at most 500 lines; a function 60, from `def` to its end, without its docstring.
"""

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = "trl_diffusion_opd"
ROWS = re.findall(r"^\| (\d) \| (.+?) \|", (ROOT / "AGENTS.md").read_text(), re.MULTILINE)
LAYERS = {name: int(layer) for layer, cell in ROWS for name in re.findall(r"`(\w+)(?:/|\.py)`", cell)}
# Refused although it points down, and allowed although it does not.
REFUSED, ALLOWED = {("trainer", "evaluation")}, {("problems", "guards")}


# Read where a test asks, and not by every process that collects the tests.
@cache
def files() -> dict[Path, ast.Module]:
    """The package's files, by their path in the repository."""
    return {path.relative_to(ROOT): ast.parse(path.read_text()) for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


@cache
def modules() -> dict[str, Path]:
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in files()}


@cache
def trainers() -> set[str]:
    return {
        node.name
        for tree in files().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith("Trainer")
    }


def room(path: Path) -> str:
    """The folder of the package that a file is in, or the file itself where it is in none."""
    return path.with_suffix("").parts[1]


def imports(path: Path) -> dict[Path, set[str]]:
    """The files of the package that a file imports, and the names that it takes from each."""
    found: dict[Path, set[str]] = {}
    for node in ast.walk(files()[path]):
        if isinstance(node, ast.Import):
            taken = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            outer = path.parts[: len(path.parts) - node.level] if node.level else ()
            module = ".".join([*outer, *filter(None, [node.module])])
            taken = [(module, alias.name) for alias in node.names]
        else:
            continue
        for module, name in taken:
            whole = f"{module}.{name}"  # of a folder, a file may be taken
            target = modules().get(whole, modules().get(module))
            if target is not None and target != path:
                found.setdefault(target, set()).add(name)
    return found


@cache
def all_imports() -> dict[Path, dict[Path, set[str]]]:
    return {path: imports(path) for path in files()}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(path: Path) -> set[str]:
    """Private names that a file defines: functions, variables, attributes."""
    names = set()
    for node in ast.walk(files()[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in names if private(name)}


def test_every_folder_has_a_layer():
    assert {room(path) for path in files()} == LAYERS.keys() and sorted(set(LAYERS.values())) == list(range(8))


def test_imports_point_down():
    found = [
        (path, target) for path, targets in all_imports().items() for target in targets if room(path) != room(target)
    ]
    upward = []
    for path, target in found:
        rooms = (room(path), room(target))
        down = (LAYERS[rooms[0]] > LAYERS[rooms[1]] and rooms not in REFUSED) or rooms in ALLOWED
        upward += [] if down else [f"{path} -> {target}"]
    assert len(found) > 300 and not upward, "\n" + "\n".join(upward)


def test_imports_are_found(monkeypatch):
    path = Path(PACKAGE, "data", "tasks.py")
    text = (
        "import os\nimport trl_diffusion_opd.evaluation.run\nfrom .. import trainer\nfrom ..models.student import Student\n"
        "from . import latent_cache\nif TYPE_CHECKING:\n    from trl_diffusion_opd.scripts.main import main\n"
        "def later():\n    from .. import __version__\n"
    )
    monkeypatch.setitem(files(), path, ast.parse(text))
    found = {str(target.relative_to(PACKAGE)) for target in imports(path)}
    expected = {"evaluation/run.py", "models/student.py", "data/latent_cache.py", "scripts/main.py", "__init__.py"}
    assert found == expected | {"trainer/__init__.py"}


def test_no_circles():
    try:
        TopologicalSorter({path: [*targets] for path, targets in all_imports().items()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(str(path) for path in error.args[1]))


def test_no_private_name_of_another_file():
    names = {path: own_names(path) for path in files()}
    everywhere = set().union(*names.values())
    found = []
    for path, tree in files().items():
        found += [f"{path} -> {name}" for taken in all_imports()[path].values() for name in taken if private(name)]
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or node.attr not in everywhere - names[path]:
                continue
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls", "super()"):
                found.append(f"{path}:{node.lineno} {owner}.{node.attr}")
    assert not found, "\n" + "\n".join(found)


def test_helpers_take_the_data_they_use():
    """Outside of `trainer/` nothing takes a trainer, but for the commands, which make one."""
    found = []
    for path, tree in files().items():
        for node in ast.walk(tree) if room(path) not in ("trainer", "scripts") else ():
            if isinstance(node, ast.arg) and node.annotation is not None:
                text = ast.unparse(node.annotation)
                found += [f"{path}:{node.lineno} {node.arg}: {text}" for name in trainers() if name in text]
    assert not found, "\n" + "\n".join(found)


def test_files_and_functions_are_short():
    long = [f"{path}: {n}" for path in files() if (n := len((ROOT / path).read_text().splitlines())) > 500]
    for path, tree in files().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                first = node.body[0]
                docs = 0
                if ast.get_docstring(node, clean=False) is not None and first.end_lineno is not None:
                    docs = first.end_lineno - first.lineno + 1
                lines = node.end_lineno - node.lineno + 1 - docs
                if lines > 60:
                    long.append(f"{path}:{node.lineno} {node.name}: {lines}")
    assert not long, "\n" + "\n".join(long)
