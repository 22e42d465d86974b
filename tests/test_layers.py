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

"""The layers of AGENTS.md: an import points down, also one for types alone."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl_diffusion_opd"
ROWS = re.findall(r"^\| (\d) \| (.+?) \|", (ROOT / "AGENTS.md").read_text(), re.MULTILINE)
LAYERS = {name: int(layer) for layer, cell in ROWS for name in re.findall(r"`(\w+)(?:/|\.py)`", cell)}
# Refused although it points down, and allowed although it does not.
REFUSED, ALLOWED = {("trainer", "evaluation")}, {("problems", "guards")}


def rooms(path: Path) -> set[str]:
    """The folders of the package, and its own files, that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            inside = path.relative_to(PACKAGE).parts[: -node.level]
            parts = [*inside, *(node.module or "").split(".")]
            first = next((part for part in parts if part), None)
            found |= {first} if first else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found |= {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE.name}.")}
    return found


def test_every_folder_has_a_layer():
    folders = {path.name for path in PACKAGE.iterdir() if list(path.glob("*.py"))}
    assert folders <= LAYERS.keys() and len(folders) > 10 and sorted(set(LAYERS.values())) == list(range(8))
    assert all((PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file() for name in LAYERS)


@pytest.mark.parametrize("room", LAYERS)
def test_imports_point_down(room):
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").is_file() else sorted((PACKAGE / room).rglob("*.py"))
    for path in files:
        for other in rooms(path) - {room}:
            down = (LAYERS[other] < LAYERS[room] and (room, other) not in REFUSED) or (room, other) in ALLOWED
            assert down, f"{path.relative_to(ROOT)} imports {other}"


def test_an_import_upward_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "trl_diffusion_opd")
    file = tmp_path / "trl_diffusion_opd" / "data" / "tasks.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import os\nimport trl_diffusion_opd.evaluation.run\nfrom .. import trainer\nfrom ..models.student import Student\n"
        "from . import near\nfrom .near import by\nif TYPE_CHECKING:\n    from trl_diffusion_opd.scripts.main import main\n"
    )
    assert rooms(file) == {"evaluation", "trainer", "models", "data", "scripts"}
