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
Merges teachers' LoRAs into one, without training.

```bash
trl-diffusion-opd merge \
    --base stabilityai/stable-diffusion-3.5-medium \
    --teachers aesthetic=quanhaol/DiffusionOPD/AesTeacher/lora ocr=quanhaol/DiffusionOPD/OCRTeacher/lora \
    --rank 32 --method svd --output_dir outputs/merge
```
"""

from dataclasses import dataclass, field

from ..guards.files import JSON
from ..guards.redaction import shown
from ..models.merge import METHODS, merge_teachers
from ..pipelines.loading import load_pipeline
from ..pipelines.loading_options import full_dtype, model_init_problems
from ..problems import Refusal
from .arguments import LORA_SCALES, load_teachers
from .parser import parse
from .refusals import refusals_told
from .values import by_task, json_object, packaged


@dataclass
class MergeArguments:
    """
    Arguments of the command. The others are those of [`merge_teachers`].

    Args:
        base (`str`): the base, a Hub id or a folder.
        teachers (`list[str]`): `task=spec`, where a spec is `base`, a folder or `owner/repo[/sub/folder][@revision]`.
        teacher_lora_scales (`list[str]`, *optional*): `task=scale`, the strength of the LoRAs of a task's teachers.
        output_dir (`str`): where the merged LoRA is written.
        weights (`list[str]`, *optional*): `task=weight`; 1 for tasks that are not named.
        dtype (`str`, *optional*, defaults to `"float32"`): precision in which base and teachers are loaded.
        model_init_kwargs (`dict`, *optional*): further arguments to load the base, such as
            `{"revision": "...", "variant": "fp16"}`.
    """

    base: str = field(metadata={"help": "The base: a Hub id or a folder."})
    teachers: list[str] = field(metadata={"help": "task=spec …: base, a folder or owner/repo[/sub/folder][@revision]"})
    output_dir: str = field(metadata={"help": "Where the merged LoRA is written."})
    teacher_lora_scales: list[str] | None = field(default=None, metadata={"help": LORA_SCALES})
    rank: int = field(default=32, metadata={"help": "Rank of the merged LoRA."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Alpha, for svd; twice the rank if not set."})
    method: str = field(default="svd", metadata={"help": "How the updates are combined.", "choices": list(METHODS)})
    weights: list[str] | None = field(default=None, metadata={"help": "task=weight …; 1 for tasks not named."})
    density: float | None = field(
        default=None, metadata={"help": "Fraction of the numbers that pruning methods keep."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random choices of dare."})
    dtype: str = field(
        default="float32", metadata={"help": "Precision of the base.", "choices": ["float32", "bfloat16", "float16"]}
    )
    model_init_kwargs: dict[str, JSON] | str | None = field(
        default=None, metadata={"help": "JSON: further arguments to load the base, such as its revision and variant."}
    )

    def __post_init__(self) -> None:
        self.dtype = full_dtype(self.dtype)
        if isinstance(self.model_init_kwargs, str):  # from a command line; a YAML file gives a dict
            self.model_init_kwargs = json_object("model_init_kwargs", self.model_init_kwargs)


ARGUMENTS = (MergeArguments,)


def main(arguments: MergeArguments) -> None:
    model_init_kwargs = arguments.model_init_kwargs or {}
    assert isinstance(model_init_kwargs, dict)  # strings are parsed
    problems = model_init_problems(model_init_kwargs)
    if problems:
        raise Refusal("\n".join(problems))
    weights = {}
    for task, values in by_task("weights", arguments.weights).items():
        try:
            weights[task] = float(values[-1])
        except ValueError as error:
            raise Refusal(f"--weights: {values[-1]!r} for task {task!r} is not a number.") from error
    report = merge_teachers(
        load_pipeline(packaged(arguments.base), arguments.dtype, model_init_kwargs=model_init_kwargs),
        load_teachers(arguments.teachers, None, arguments.teacher_lora_scales),
        arguments.output_dir,
        rank=arguments.rank,
        lora_alpha=arguments.lora_alpha,
        method=arguments.method,
        weights=weights,
        density=arguments.density,
        seed=arguments.seed,
    )
    worst = max(report.layers, key=lambda name: report.layers[name])
    print(
        f"{arguments.output_dir}: rank {report.rank} by {report.method}, {report.error:.2%} from the mean of the "
        f"updates, with the most, {report.layers[worst]:.2%}, in {shown(worst)}."
    )


if __name__ == "__main__":
    with refusals_told():
        main(*parse(ARGUMENTS))
