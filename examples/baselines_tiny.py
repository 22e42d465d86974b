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

# /// script
# dependencies = ["trl-diffusion-opd"]
# ///

"""
What DiffusionOPD is compared with in its paper, on the embedded tiny model: every baseline is a trainer of the package with other
arguments, and one report measures all of them against base and teachers.

```bash
accelerate launch examples/baselines_tiny.py
accelerate launch examples/baselines_tiny.py --methods multi-task cascade merge
```

| method | what it is |
|---|---|
| `opd` | DiffusionOPD itself |
| `multi-task` | one `DiffusionGRPOTrainer`, a column `task`, a reward a task |
| `cascade` | `DiffusionGRPOTrainer` on one task after another, each from the last LoRA |
| `merge` | `merge_teachers`, without training |
| `merge-opd` | `student_init="merge"`: OPD that starts from the merge |
| `off-policy` | `on_policy=False`: OPD on the teachers' trajectories |
| `policy-gradient` | `loss_type="policy_gradient"`, with a stochastic sampler |
| `sft` | `DiffusionSFTTrainer(teachers=...)`: flow matching on images that the teachers draw |

The settings are in `tiny_baselines.yaml` and `tiny_cascade.yaml` of `trl_diffusion_opd/stage_configs`. They show how the methods are
called, and are no comparison: updates are few, so that everything takes some ten minutes with one thread, and their cost is not the same. The
comparison at equal cost is `benchmarks/claims`.

Run again after an interruption, it goes on: what is trained is not trained again, and no image is drawn twice.
"""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate import PartialState

from trl_diffusion_opd import evaluate_retention, merge_teachers, tiny
from trl_diffusion_opd.evaluation.retention import retention_table, scores_table
from trl_diffusion_opd.pipelines.loading import load_pipeline
from trl_diffusion_opd.problems import Problems
from trl_diffusion_opd.scripts.parser import parse
from trl_diffusion_opd.scripts.refusals import refusals_told
from trl_diffusion_opd.scripts.stages import Stage, read_stages, run_stages


# Of the trained ones in the stage files too.
RANK = 64


@dataclass
class ScriptArguments:
    """
    Arguments of the script.

    Args:
        methods (`list[str]`, *optional*): the methods to run, all if not given.
        output_dir (`str`, *optional*, defaults to `"outputs/baselines"`): has a folder for each method, and the report.
        stages (`str`, *optional*): the file with a stage for each method that is one trainer.
        cascade (`str`, *optional*): the file with the stages of the cascade.
        num_test_images (`int`, *optional*, defaults to `128`): images a task in the report.
    """

    methods: list[str] | None = field(default=None, metadata={"help": "The methods to run, all if not given."})
    output_dir: str = field(
        default="outputs/baselines", metadata={"help": "A folder for each method, and the report."}
    )
    stages: str = field(default="tiny_baselines", metadata={"help": "A stage for each method of one trainer."})
    cascade: str = field(default="tiny_cascade", metadata={"help": "The stages of the cascade, in their order."})
    num_test_images: int = field(default=128, metadata={"help": "Images a task in the report."})


def load_methods(args: ScriptArguments) -> dict[str, list[Stage]]:
    """The stages of the methods to run, in their order. The merge has none."""
    single, _ = read_stages(args.stages)
    cascade, _ = read_stages(args.cascade)
    known = {stage.name: [replace(stage, from_base=True)] for stage in single}
    known["cascade"] = [
        replace(stage, name=f"cascade-{stage.name}", from_base=i == 0) for i, stage in enumerate(cascade)
    ]
    known["merge"] = []
    chosen = list(known) if args.methods is None else args.methods
    problems = Problems(
        f"there is no method {name!r}; there are {', '.join(known)}." for name in chosen if name not in known
    )
    if not chosen:
        problems.append(f"none is named; there are {', '.join(known)}.")
    if args.num_test_images < 1:
        problems.append(f"num_test_images={args.num_test_images}: it must be at least 1.")
    problems.raise_under("The methods can't be run")
    return {name: known[name] for name in chosen}


def main(args: ScriptArguments) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    methods, output_dir = load_methods(args), Path(args.output_dir)
    stages = [stage for of_method in methods.values() for stage in of_method]
    if stages:
        run_stages(stages, output_dir)
    students = {name: str(output_dir / (stages[-1].name if stages else name)) for name, stages in methods.items()}

    state = PartialState()
    if "merge" in methods and state.is_main_process:  # again each time: it takes a second, and is the same
        merged = merge_teachers(load_pipeline(tiny.BASE, "float32"), tiny.TEACHERS, students["merge"], rank=RANK)
        print(f"The merge lost {merged.error:.1%} of the teachers' mean update.")
    state.wait_for_everyone()

    report = evaluate_retention(
        tiny.BASE,
        tiny.TEACHERS,
        students,
        tiny.rewards,
        tiny.dataset("test"),
        num_images=args.num_test_images,
        num_inference_steps=10,
        guidance_scale=1.0,
        height=32,
        width=32,
        max_sequence_length=12,
        batch_size=64,
        output_dir=output_dir,
        keep_images=False,
    )
    if state.is_main_process:
        print(f"{retention_table(report)}\n\n{scores_table(report)}")


if __name__ == "__main__":
    with refusals_told():
        main(*parse((ScriptArguments,)))
