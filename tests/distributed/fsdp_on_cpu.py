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

"""FSDP2 on CPUs with gloo, which accelerate does not start by itself: it knows FSDP on accelerators only."""

from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


def allow_fsdp_on_cpu() -> None:
    """Call it before the first `Accelerator`. From then on an FSDP plugin is taken on CPUs too."""
    init, plugins = AcceleratorState.__init__, []

    def with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugins.extend([fsdp_plugin] if fsdp_plugin is not None else [])
        # The state is also made anew without a plugin, where only its type is asked for.
        if plugins and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugins[-1]
            if self.mixed_precision != "no":  # as it does on accelerators
                plugins[-1].set_mixed_precision(self.mixed_precision)

    AcceleratorState.__init__ = with_fsdp
