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

"""One of two processes: trains by reward on its share of the groups."""

import importlib
import json
import sys
from pathlib import Path

import torch.distributed as dist
from helpers.opd_fixtures import first_pixel, snapshot
from reduced import CountReducedBytes
from safetensors.torch import save_file


def main(folder: Path, fixtures: str) -> None:
    make_trainer = importlib.import_module(fixtures).make_trainer
    options = json.loads((folder / "options.json").read_text())
    counter = CountReducedBytes()
    trainer = make_trainer(folder / "through", reward_funcs=first_pixel, callbacks=[counter], **options)
    counter.trainer = trainer
    trainer.train()
    rank = trainer.accelerator.process_index
    save_file(snapshot(trainer), folder / f"rank_{rank}.safetensors")
    report = {
        "log": trainer.state.log_history,
        "reduced_bytes": counter.bytes,
        "trained_parameters": sum(p.numel() for p in trainer.student.parameters()),
    }
    (folder / f"rank_{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
