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

"""One of two processes over which FSDP2 splits the model. Writes what it saw, under its rank, for the test."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from fsdp_on_cpu import allow_fsdp_on_cpu
from helpers.opd_fixtures import StopAt, make_trainer, student_lora
from helpers.two_processes import SCORED
from reduced import CountScatteredBytes
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from trl_diffusion_opd.acceleration.sharding import whole


def main(folder: Path) -> None:
    allow_fsdp_on_cpu()
    scenario = json.loads((folder / "scenario.json").read_text())
    teachers, options = scenario["teachers"], scenario["options"]
    counter = CountScatteredBytes()
    trainer = make_trainer(
        folder / "through",
        teachers,
        callbacks=[counter],
        **SCORED,
        peft_config=student_lora(target_modules=scenario["targets"]),
        per_device_eval_batch_size=1,
        eval_strategy="steps",
        eval_steps=1,
        **options,
    )
    rank = trainer.accelerator.process_index
    trainer.train()
    through = whole(trainer.student.named_parameters())
    metrics = trainer.evaluate()
    unchanged = whole(trainer.student.named_parameters())
    trainer.save_model()

    options["peft_config"] = student_lora(target_modules=scenario["targets"])
    make_trainer(folder / "stopped", teachers, callbacks=[StopAt(2)], **options).train()
    resumed = make_trainer(folder / "stopped", teachers, **options)
    resumed.train(resume_from_checkpoint=True)
    after = whole(resumed.student.named_parameters())

    save_file(through, folder / f"rank_{rank}.safetensors")
    report = {
        "kind": str(trainer.accelerator.distributed_type),
        "split": [all(isinstance(p, DTensor) for p in t.model.parameters()) for t in (trainer, resumed)],
        "log": trainer.state.log_history,
        "metrics": metrics,
        "reduced_bytes": counter.bytes,
        "trained_parameters": sum(p.numel() for p in trainer.student.parameters()),
        "evaluation_left_weights": all(torch.equal(p, through[name]) for name, p in unchanged.items()),
        "resumed_is_same": all(torch.equal(p, through[name]) for name, p in after.items()),
    }
    (folder / f"rank_{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
