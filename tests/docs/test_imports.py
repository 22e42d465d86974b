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
Every module of the package can be the first one that is imported: none needs another's import order. What they import is a
dependency, and what is not needed yet is not imported yet.
"""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path


SCRIPT = """
import importlib, pkgutil, sys
import trl_diffusion_opd
names = [one.name for one in pkgutil.walk_packages(trl_diffusion_opd.__path__, "trl_diffusion_opd.")]
assert len(names) > 50, names
for name in names:
    if name.endswith("__main__"):
        continue
    for known in [one for one in sys.modules if one.split(".")[0] == "trl_diffusion_opd"]:
        del sys.modules[known]
    try:
        importlib.import_module(name)
    except ImportError as error:
        sys.exit(f"{name}: {error}")
"""


def test_any_module_is_imported_first(processes):
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_is_imported_is_named_in_pyproject():
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = project["dependencies"] + [
        one for name in extras if name not in ("dev", "docs") for one in extras[name]
    ]
    trackers = ["tensorboard", "trackio", "wandb"]  # imported only where Trainer found them
    names = {_normalised(re.match(r"[\w.-]+", one)[0]) for one in required + trackers}
    distributions = packages_distributions()
    for file in sorted((root / "trl_diffusion_opd").rglob("*.py")):
        for module in _imported(ast.parse(file.read_text())):
            if module not in sys.stdlib_module_names | {"trl_diffusion_opd"}:
                found = {_normalised(one) for one in distributions.get(module, [module])}
                assert found & names, f"{file.name} imports {module}, which pyproject.toml does not name"


def _imported(tree: ast.Module) -> set[str]:
    """The top-level modules that a file imports, in functions too."""
    nodes = list(ast.walk(tree))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names}


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


LAZY = """
import gc, importlib, sys

def imported(*names):
    return sorted(set(names) & set(sys.modules))

import trl_diffusion_opd
assert not imported("torch", "numpy", "datasets", "transformers", "diffusers", "trl", "peft", "matplotlib"), "the package"
from trl_diffusion_opd import tiny
assert not imported("torch", "transformers", "diffusers", "trl", "peft", "matplotlib"), "the tiny model"
from trl_diffusion_opd import DiffusionOPDConfig
for script in sys.argv[1:]:
    importlib.import_module(script)
late = "matplotlib", "evaluate", "trackio", "tensorboard", "onnxruntime", "aiohttp", "skimage"
assert not imported("diffusers", *late), imported("diffusers", *late)
from trl_diffusion_opd import DiffusionOPDTrainer
from trl_diffusion_opd.trainer import DiffusionGRPOTrainer, DiffusionNFTTrainer, DiffusionSFTTrainer
assert not imported(*late), imported(*late)
assert gc.isenabled()
gc.disable()
trl_diffusion_opd.estimate_memory, trl_diffusion_opd.write_teacher_card
assert not gc.isenabled()
for module in (trl_diffusion_opd, trl_diffusion_opd.trainer):
    for name in module.__all__:
        assert getattr(module, name) is not None
    try:
        module.Nothing
    except AttributeError as error:
        assert "'Nothing'" in str(error)
    else:
        raise AssertionError(module)
"""


def test_what_is_not_needed_is_not_imported(processes):
    examples = Path(__file__).parents[2] / "examples"
    scripts = ["opd_sd3", "teacher_grpo_sd3", "teacher_nft_sd3"]
    done = subprocess.run([sys.executable, "-c", LAZY, *scripts], capture_output=True, text=True, cwd=examples)
    assert done.returncode == 0, done.stderr[-2000:]
