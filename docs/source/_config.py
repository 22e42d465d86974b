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
What doc-builder runs before it builds the pages. It finds a name only in modules that are imported already, so all of them are.
"""

import importlib
import pkgutil

import trl_diffusion_opd


for _module in pkgutil.walk_packages(trl_diffusion_opd.__path__, "trl_diffusion_opd."):
    if not _module.name.endswith("__main__"):
        importlib.import_module(_module.name)
