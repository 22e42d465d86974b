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
One of two processes over which FSDP2 splits the model: every method, checkpoints that one process resumes, and one
process's checkpoints resumed. Writes what it saw, under its rank, for the test.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from fsdp_on_cpu import allow_fsdp_on_cpu
from helpers.opd_fixtures import StopAt
from helpers.split_runs import MAKE, RESUMED, STOP, state_of
from reduced import CountScatteredBytes
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor


def main(folder: Path) -> None:
    allow_fsdp_on_cpu()
    teachers = json.loads((folder / "scenario.json").read_text())
    report: dict[str, Any] = {}
    for name, make in MAKE.items():
        counter, callbacks = CountScatteredBytes(), []
        if name in RESUMED:
            callbacks = [StopAt(STOP)]
        trainer = make(
            folder / "of_two" / name, teachers, per_device_train_batch_size=2, callbacks=[counter, *callbacks]
        )
        rank = trainer.accelerator.process_index
        levels: set[tuple[str, float]] = set()
        if name == "full":
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("SHARDED_STATE_DICT")
        if name == "half":
            embedding = trainer.model.get_base_model().time_text_embed
            embedding.register_forward_pre_hook(
                lambda _, inputs, seen=levels: seen.update((str(inputs[0].dtype), t) for t in inputs[0].tolist())
            )
        trainer.train()
        losses = [entry for entry in trainer.state.log_history if "loss" in entry]
        report[name] = {
            "split": all(isinstance(p, DTensor) for p in trainer.model.parameters()),
            "reduced_bytes": counter.bytes,
            "trained_parameters": sum(p.numel() for p in trainer.student.parameters()),
            "log": losses,
            "levels": sorted(levels),
            "dtypes": sorted({str(p.dtype) for p in trainer.student.parameters()}),
        }
        if name == "opd":
            try:
                trainer.pipeline("count1")
            except RuntimeError as error:
                report["pipeline"] = str(error)
        if name in RESUMED:
            trainer = make(folder / "of_one" / name, teachers, per_device_train_batch_size=2)
            trainer.train(resume_from_checkpoint=True)
            report[name]["resumed_log"] = [entry for entry in trainer.state.log_history if "loss" in entry]
        save_file(state_of(trainer), folder / f"{name}_{rank}.safetensors")
    (folder / f"rank_{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
