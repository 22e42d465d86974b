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

"""One of two processes that train Wan 2.2's two experts. Writes what it saw, under its rank, for the test."""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from fsdp_on_cpu import allow_fsdp_on_cpu
from helpers.families_experts import trained_on_few_levels
from safetensors.torch import save_file

from trl_diffusion_opd.acceleration.sharding import whole


def main(folder: Path) -> None:
    if "FSDP_VERSION" in os.environ:
        allow_fsdp_on_cpu()
    trainer, moved = trained_on_few_levels(folder / "out", **json.loads((folder / "scenario.json").read_text()))
    rank = trainer.accelerator.process_index
    save_file(whole(trainer.student.named_parameters()), folder / f"rank_{rank}.safetensors")
    report = {"kind": str(trainer.accelerator.distributed_type), "log": trainer.state.log_history, "moved": moved}
    (folder / f"rank_{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
