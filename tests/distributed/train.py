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

"""One of several processes of a training. Writes what it saw, under its rank, for the test that launched it."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from helpers.opd_fixtures import StopAt, make_trainer, snapshot
from helpers.sft_fixtures import sft_trainer
from helpers.two_processes import SCORED
from reduced import CountReducedBytes
from safetensors.torch import save_file


def main(folder: Path) -> None:
    scenario = json.loads((folder / "scenario.json").read_text())
    teachers, options = scenario["teachers"], scenario["options"]
    counter, latents = CountReducedBytes(), []
    trainer = make_trainer(
        folder / "through",
        teachers,
        callbacks=[counter],
        **SCORED,
        **options,
    )
    counter.trainer = trainer
    rank = trainer.accelerator.process_index
    draw = trainer.velocity_field.initial_latents
    trainer.velocity_field.initial_latents = lambda *inputs: latents.append(draw(*inputs)) or latents[-1]
    trainer.train()
    through, drawn = snapshot(trainer), torch.stack(latents)
    metrics = trainer.evaluate()

    stopped = make_trainer(folder / "stopped", teachers, callbacks=[StopAt(2)], **options)
    stopped.train()
    resumed = make_trainer(folder / "stopped", teachers, **options)
    resumed.train(resume_from_checkpoint=True)
    same = all(torch.equal(p, through[name]) for name, p in snapshot(resumed).items())

    broken = make_trainer(folder / "broken", teachers, **options)
    velocity = broken._target_at
    if rank == 1:
        broken._target_at = lambda *inputs: velocity(*inputs) * float("nan")
    error = ""
    try:
        broken.train()
    except FloatingPointError as stop:
        error = str(stop)

    tuning_counter = CountReducedBytes()
    tuned = sft_trainer(
        folder / "tuned",
        teachers,
        teacher_cache_dir=str(folder / "images"),
        callbacks=[tuning_counter],
        **scenario["tuning"],
    )
    tuning_counter.trainer = tuned
    tuned.train()

    save_file({**through, "drawn": drawn}, folder / f"rank_{rank}.safetensors")
    report = {
        "world_size": trainer.accelerator.num_processes,
        "log": trainer.state.log_history,
        "metrics": metrics,
        "reduced_bytes": counter.bytes,
        "trained_parameters": sum(p.numel() for p in trainer.student.parameters()),
        "resumed_is_same": same,
        "error": error,
        "tuning_reduced_bytes": tuning_counter.bytes,
        "tuning_log": tuned.state.log_history,
        "updates_before_error": broken.state.global_step,
    }
    (folder / f"rank_{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
