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
"""Every module of the package can be the first one that is imported: none needs another's import order."""

import subprocess
import sys


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
