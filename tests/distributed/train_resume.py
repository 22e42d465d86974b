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

"""One of two processes: goes on with a checkpoint of one process, and leaves one of two behind."""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from fsdp_on_cpu import allow_fsdp_on_cpu
from helpers.opd_fixtures import StopAt, make_trainer
from safetensors.torch import save_file

from trl_diffusion_opd.acceleration.sharding import whole


def main(folder: Path) -> None:
    if "ACCELERATE_USE_FSDP" in os.environ:
        allow_fsdp_on_cpu()
    scenario = json.loads((folder / "scenario.json").read_text())
    teachers, options = scenario["teachers"], scenario["options"]
    make_trainer(folder / "of_two", teachers, callbacks=[StopAt(scenario["stop"])], **options).train()
    trainer = make_trainer(folder / "of_one", teachers, **options)
    trainer.train(resume_from_checkpoint=True)
    rank = trainer.accelerator.process_index
    weights = whole(trainer.student.named_parameters())
    average = {f"average {i}": p for i, p in enumerate(trainer.student.ema.shadow_params)}
    save_file(weights | whole(average), folder / f"rank_{rank}.safetensors")
    report = {"kind": str(trainer.accelerator.distributed_type), "log": trainer.state.log_history}
    (folder / f"rank_{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
