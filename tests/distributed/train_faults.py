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

"""One of two processes of a training in which something goes wrong on one of them, in update 3 of 4."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist
from helpers.opd_fixtures import make_trainer, snapshot
from safetensors.torch import save_file
from transformers import TrainerCallback


class FullDisk(TrainerCallback):
    """Has no space for the optimizer of a checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == 0:
            folder = Path(args.output_dir) / "checkpoint-3"
            folder.mkdir()
            (folder / "optimizer.pt").symlink_to("/dev/full")


def main(folder: Path, fault: str) -> None:
    scenario = json.loads((folder / "scenario.json").read_text())
    callbacks = [FullDisk()] if fault == "disk" else []
    trainer = make_trainer(folder / "run", scenario["teachers"], callbacks=callbacks, **scenario["options"])
    rank = trainer.accelerator.process_index
    target, collate = trainer._target_at, trainer.data_collator

    def killed(*inputs):
        if trainer.state.global_step == 2:
            (folder / "killed_at").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return target(*inputs)

    def unreadable(rows):
        if trainer.state.global_step == 2:
            raise ValueError("a row that cannot be read")
        return collate(rows)

    if fault == "killed" and rank == 1:
        trainer._target_at = killed
    if fault == "raises" and rank == 1:
        trainer.data_collator = unreadable
    trainer.train(resume_from_checkpoint=fault == "none")
    save_file(snapshot(trainer), folder / f"rank_{rank}.safetensors")
    (folder / f"rank_{rank}.json").write_text(json.dumps({"log": trainer.state.log_history}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
