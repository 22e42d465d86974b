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
Every module of the package can be the first one that is imported: none needs another's import order. And what is not needed
yet is not imported yet.
"""

import subprocess
import sys
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


def test_any_module_is_imported_first():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


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


def test_what_is_not_needed_is_not_imported():
    examples = Path(__file__).parents[1] / "examples"
    scripts = ["opd_sd3", "teacher_grpo_sd3", "teacher_nft_sd3"]
    done = subprocess.run([sys.executable, "-c", LAZY, *scripts], capture_output=True, text=True, cwd=examples)
    assert done.returncode == 0, done.stderr[-2000:]
