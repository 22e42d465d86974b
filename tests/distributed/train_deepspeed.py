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
One of two processes over which DeepSpeed splits the training: every method, of which some go through a checkpoint. Writes
what it saw, under its rank, for the test.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from helpers.opd_fixtures import StopAt
from helpers.split_runs import MAKE, RESUMED, STOP, state_of
from safetensors.torch import save_file
from transformers import TrainingArguments

from trl_diffusion_opd.acceleration.sharding import in_zero3


# Not `use_cpu`, with which accelerate leaves DeepSpeed out.
OPTIONS = dict(per_device_train_batch_size=2, use_cpu=False, ddp_backend="gloo")


def main(folder: Path, *names: str) -> None:
    # They refuse bf16 on a CPU without `use_cpu`.
    TrainingArguments._validate_args = lambda self: None
    teachers = json.loads((folder / "scenario.json").read_text())
    report: dict[str, Any] = {}
    for name in names:
        output = folder / "of_two" / name
        trainer = MAKE[name](output, teachers, callbacks=[StopAt(STOP)] if name in RESUMED else [], **OPTIONS)
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        if name in RESUMED:
            trainer = MAKE[name](output, teachers, **OPTIONS)
            trainer.train(resume_from_checkpoint=True)
            log = [entry for entry in trainer.state.log_history if "loss" in entry]
        rank = trainer.accelerator.process_index
        report[name] = {
            "kind": str(trainer.accelerator.distributed_type),
            "split": [in_zero3(p) for p in trainer.model.parameters()],
            "steps": trainer.model_wrapped.global_steps,
            "dtypes": sorted({str(p.dtype) for p in trainer.student.parameters()}),
            "log": log,
        }
        save_file(state_of(trainer), folder / f"{name}_{rank}.safetensors")
        trainer.save_model(str(folder / "saved" / name))
        if name == "opd":
            report["unset"] = unset_accumulation(folder, teachers)
    (folder / f"rank_{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


def unset_accumulation(folder: Path, teachers: Any) -> list[int]:
    """How many micro-batches an update has where the settings don't say, and DeepSpeed's steps in one."""
    options = {**OPTIONS, "gradient_accumulation_steps": None, "max_steps": 1}
    trainer = MAKE["opd"](folder / "unset", teachers, **options)
    trainer.train()
    return [trainer.model_wrapped.gradient_accumulation_steps(), trainer.model_wrapped.global_steps]


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
