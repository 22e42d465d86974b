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
"""One of two processes over which FSDP2 splits a bfloat16 base. The first writes what it saw for the test."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from fsdp_on_cpu import allow_fsdp_on_cpu
from opd_fixtures import make_trainer
from tiny_sd3 import make_pipeline


def main(folder: Path) -> None:
    allow_fsdp_on_cpu()
    scenario = json.loads((folder / "scenario.json").read_text())
    pipeline, timesteps = make_pipeline().to(torch.bfloat16), []
    trainer = make_trainer(folder / "half", scenario["teachers"], pipeline, **scenario["options"])
    pipeline.transformer.time_text_embed.register_forward_pre_hook(lambda _, args: timesteps.append(args[0]))
    trainer.train()
    if trainer.is_world_process_zero():
        report = {
            "kind": str(trainer.accelerator.distributed_type),
            "mesh": list(next(trainer.model.parameters()).device_mesh.shape),
            "mixed_precision": trainer.accelerator.mixed_precision,
            "timesteps": sorted({float(t) for row in timesteps for t in row}),
            "log": trainer.state.log_history,
        }
        (folder / "report.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
