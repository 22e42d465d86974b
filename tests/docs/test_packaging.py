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

"""What goes with the package: its version, its dependencies, the pages beside the README, and the licence on every file."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import trl_diffusion_opd


ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOLDERS = ("trl_diffusion_opd", "tests", "examples", "benchmarks", "docs", "model_cards")
# What nothing imports by name, but what the imported need.
NEEDED_BY_OTHERS = {
    "protobuf": "sentencepiece",
    "sentencepiece": "tokenizers",
}


def python_files():
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def test_one_version():
    assert trl_diffusion_opd.__version__ == version("trl-diffusion-opd") == PROJECT["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]
    base = PROJECT["version"].partition(".dev")[0]
    assert f"\n## {base}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_licence_is_on_every_file():
    header = (ROOT / "trl_diffusion_opd" / "__init__.py").read_text().partition("\n\n")[0]
    assert header.startswith("# Copyright") and len(python_files()) > 300
    assert [path for path in python_files() if not path.read_text().startswith(header)] == []


def test_every_dependency_is_imported():
    imported = "\n".join(path.read_text() for path in (ROOT / "trl_diffusion_opd").rglob("*.py"))
    modules = {"pillow": "PIL", "pyyaml": "yaml"}
    for requirement in map(Requirement, PROJECT["dependencies"]):
        module = modules.get(requirement.name, requirement.name)
        found = re.search(rf"^\s*(?:import|from) {re.escape(module)}\b", imported, re.MULTILINE)
        assert found or requirement.name in NEEDED_BY_OTHERS, requirement.name


def test_urls_are_addresses():
    assert PROJECT["urls"] and all(re.fullmatch(r"https://[\w.-]+/\S+", url) for url in PROJECT["urls"].values())


@pytest.mark.parametrize("page", ["AGENTS.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_what_pages_name_is_there(page):
    text = (ROOT / page).read_text()
    for name in re.findall(r"`([\w./-]+/[\w./-]*|[\w/-]+\.(?:py|yaml|md|toml))`", text):
        places = [ROOT, ROOT / "trl_diffusion_opd", ROOT / "trl_diffusion_opd" / "trainer"]
        assert any((place / name).exists() for place in places), name
    for name in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (ROOT / name).exists(), name
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([\w-]+)`", text):
        assert f"\n{target}:" in makefile, target


def test_the_issue_template_asks_for_the_environment():
    template = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text())
    fields = {field["id"]: field for field in template["body"]}
    assert "trl-diffusion-opd env" in fields["env"]["attributes"]["description"]
    assert all(field["validations"]["required"] for field in fields.values())
