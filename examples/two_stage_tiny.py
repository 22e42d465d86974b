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
The whole story on the embedded tiny model, in one run: three teachers by reinforcement learning, each from the base, the
student that they teach, and the report of what it kept of each.

```bash
accelerate launch --config_file examples/accelerate_configs/cpu.yaml examples/two_stage_tiny.py
```

Run again after an interruption, it goes on where it stopped, and the result is the same.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState

from trl_diffusion_opd import DiffusionOPDConfig, evaluate_retention, tiny
from trl_diffusion_opd.evaluation.retention import retention_table, scores_table
from trl_diffusion_opd.problems import Refusal
from trl_diffusion_opd.scripts.parser import parse
from trl_diffusion_opd.scripts.refusals import refusals_told
from trl_diffusion_opd.scripts.stages import StageSpec, read_stages, run_stages
from trl_diffusion_opd.scripts.values import packaged


@dataclass
class ScriptArguments:
    """
    Arguments of the script.

    Args:
        stages (`str`, *optional*, defaults to `"tiny_two_stage"`):
            A file of stages, or the name of one in the package; the last one is the student's, with a teacher for each task of the tiny world.
        output_dir (`str`, *optional*): an output folder other than the file's.
        num_test_images (`int`, *optional*, defaults to `512`): images a task in the report.
    """

    stages: str = field(
        default="tiny_two_stage",
        metadata={"help": "YAML with output_dir, shared and stages, or the name of one in the package."},
    )
    output_dir: str | None = field(default=None, metadata={"help": "An output folder other than the file's."})
    num_test_images: int = field(default=512, metadata={"help": "Images a task in the report."})


def main(script_args: ScriptArguments) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    stages, output_dir = read_stages(script_args.stages, script_args.output_dir)
    student = StageSpec(**stages[-1].settings)
    teachers = student.teachers_by_task()
    problems = []  # what the report would refuse after all the training
    if student.trainer != "opd" or teachers.keys() != set(tiny.TASKS):
        problems.append(
            f"The last stage, {student.name!r}, has trainer={student.trainer!r} and teachers for {list(teachers)}. The report "
            f"needs a student by 'opd' with teachers for {list(tiny.TASKS)}."
        )
    if script_args.num_test_images < 1:
        problems.append(f"--num_test_images {script_args.num_test_images}: it must be at least 1.")
    if problems:
        raise Refusal("\n".join(problems))

    folder = run_stages(stages, output_dir)
    settings = student.make_config(folder, None)
    assert isinstance(settings, DiffusionOPDConfig)
    report = evaluate_retention(
        packaged(student.model_name_or_path),
        teachers,
        str(folder),
        tiny.rewards,
        tiny.dataset("test"),
        num_images=script_args.num_test_images,
        output_dir=Path(output_dir),
        **settings.retention_options(),
    )
    if PartialState().is_main_process:
        print(f"{retention_table(report)}\n\n{scores_table(report)}")


if __name__ == "__main__":
    with refusals_told():
        main(*parse((ScriptArguments,)))
