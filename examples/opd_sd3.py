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
Distils several teachers into one student (DiffusionOPD).

The embedded tiny model, on any laptop:

```bash
accelerate launch examples/opd_sd3.py --config examples/configs/tiny.yaml
```

With `--dry_run` it shows what the run would do, draws an image of every model, and stops.

Stable Diffusion 3.5 Medium with the paper's teachers, or any other flow-matching pipeline of diffusers:

```bash
accelerate launch examples/opd_sd3.py \
    --model_name_or_path stabilityai/stable-diffusion-3.5-medium \
    --dtype bfloat16 \
    --teachers aesthetic=quanhaol/DiffusionOPD/AesTeacher/lora \
               ocr=quanhaol/DiffusionOPD/OCRTeacher/lora \
               geneval=quanhaol/DiffusionOPD/GenEvalTeacher/lora \
    --teacher_guidance_scales geneval=1.0 \
    --prompts aesthetic=prompts/aesthetic.txt ocr=prompts/ocr.txt geneval=prompts/geneval.jsonl \
    --max_sequence_length 128 \
    --per_device_train_batch_size 8 \
    --max_steps 1000 \
    --output_dir sd35-opd
```
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_diffusion_opd import DiffusionOPDConfig
from trl_diffusion_opd.data.tasks import task_rows
from trl_diffusion_opd.evaluation.retention import retention_table
from trl_diffusion_opd.guards.extras import extra
from trl_diffusion_opd.scripts.arguments import (
    QuantizationArguments,
    json_object,
    load_prompts,
    load_rewards,
    load_teachers,
    parse,
)


@dataclass
class ScriptArguments(QuantizationArguments):
    """
    What the script needs beyond [`DiffusionOPDConfig`]; see [`QuantizationArguments`] for a quantised base. Lists are given as `task=value task=value …`.

    Args:
        model_name_or_path (`str`): the base, a Hub id or a folder.
        teachers (`list[str]`): `task=spec`, where a spec is `base`, a folder or `owner/repo[/sub/folder][@revision]`.
            A task that is named several times is taught by the mean of its teachers.
        prompts (`list[str]`): `task=source`: a Hub dataset (`owner/name[:split]`) or a text, jsonl, csv, tsv or parquet file.
        teacher_guidance_scales (`list[str]`, *optional*): `task=scale` for teachers that differ from the others.
        eval_prompts (`list[str]`, *optional*): `task=source` of the prompts that are evaluated during training.
        test_prompts (`list[str]`, *optional*): `task=source` of held-out prompts; with them and a reward for each task
            the retention report is made at the end.
        reward_funcs (`list[str]`, *optional*): `task=name` of a reward of the package, or `task=package.module:function`.
        reward_kwargs (`dict`, *optional*): arguments of named rewards, such as `{"remote": {"url": "http://..."}}`.
        num_test_images (`int`, *optional*, defaults to `128`): images a task in the report.
        full_finetuning (`bool`, *optional*, defaults to `False`): train all weights instead of a LoRA.
        lora_r (`int`, *optional*, defaults to `32`), lora_alpha (`int`, *optional*, defaults to `64`): the student's LoRA.
        lora_target_modules (`list[str]`, *optional*): its layers, the attention projections if not given.
        dry_run (`bool`, *optional*, defaults to `False`): show what the run would do, with an image of every model, and stop.
    """

    model_name_or_path: str = field(metadata={"help": "The base: a Hub id or a folder."})
    teachers: list[str] = field(metadata={"help": "task=spec …: base, a folder or owner/repo[/sub/folder][@revision]"})
    prompts: list[str] = field(
        metadata={"help": "task=source …: a Hub dataset, or a text, jsonl, csv, tsv, parquet file."}
    )
    teacher_guidance_scales: list[str] | None = field(default=None, metadata={"help": "task=scale …"})
    eval_prompts: list[str] | None = field(default=None, metadata={"help": "task=source …, evaluated while training."})
    test_prompts: list[str] | None = field(default=None, metadata={"help": "task=source …, held out for the report."})
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "task=name …: a reward of the package, or package.module:function"}
    )
    reward_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON: arguments of named rewards, by name."}
    )
    num_test_images: int = field(default=128, metadata={"help": "Images a task in the retention report."})
    full_finetuning: bool = field(default=False, metadata={"help": "Train all weights instead of a LoRA."})
    lora_r: int = field(default=32, metadata={"help": "Rank of the student's LoRA."})
    lora_alpha: int = field(default=64, metadata={"help": "Alpha of the student's LoRA."})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "Layers of the student's LoRA."})

    dry_run: bool = field(
        default=False, metadata={"help": "Show what the run would do, with an image of every model, and stop."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.reward_kwargs, str):  # from a command line; a YAML file gives a dict
            self.reward_kwargs = json_object("reward_kwargs", self.reward_kwargs)


def main(script_args: ScriptArguments, training_args: DiffusionOPDConfig) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    teachers = load_teachers(script_args.teachers, script_args.teacher_guidance_scales)
    reward_funcs = load_rewards(script_args.reward_funcs, script_args.reward_kwargs or {})
    test_dataset = load_prompts("test_prompts", script_args.test_prompts, training_args.task_column)
    if test_dataset is not None:  # what the report at the end would refuse
        from trl_diffusion_opd.evaluation import report_problems

        problems = report_problems(teachers, reward_funcs, test_dataset, training_args.task_column, "--test_prompts")
        if script_args.num_test_images < 1:
            problems.append(f"--num_test_images {script_args.num_test_images}: it must be at least 1.")
        if problems:
            raise ValueError("\n".join(problems))
        tested = task_rows(test_dataset, training_args.task_column)  # not each task need be

    # Imported here, so that --help and what is wrong with the arguments are there sooner.
    from peft import LoraConfig

    from trl_diffusion_opd import DiffusionOPDTrainer, evaluate_retention
    from trl_diffusion_opd.evaluation import rehearse_report
    from trl_diffusion_opd.models.student import ATTENTION_TARGETS
    from trl_diffusion_opd.reporting.plots import plot_curves

    peft_config = LoraConfig(
        r=script_args.lora_r,
        lora_alpha=script_args.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=script_args.lora_target_modules or list(ATTENTION_TARGETS),
    )
    quantization_config = script_args.quantization_config(training_args.dtype)
    if script_args.dry_run:
        training_args.push_to_hub = False  # with it the trainer makes the repository
    trainer = DiffusionOPDTrainer(
        model=script_args.model_name_or_path,
        teachers=teachers,
        reward_funcs=reward_funcs or None,
        args=training_args,
        train_dataset=load_prompts("prompts", script_args.prompts, training_args.task_column),
        eval_dataset=load_prompts("eval_prompts", script_args.eval_prompts, training_args.task_column),
        quantization_config=quantization_config,
        peft_config=None if script_args.full_finetuning else peft_config,
    )
    if script_args.dry_run:
        trainer.dry_run()
        trainer.end()
        return
    if test_dataset is not None:
        scale = training_args.eval_guidance_scale
        with trainer.averaged_student() as student:
            rehearse_report(
                trainer.eval_field,
                student,
                {task: reward_funcs[task] for task in tested},
                test_dataset,
                task_column=training_args.task_column,
                seed=training_args.seed,
                guidance_scale=training_args.guidance_scale if scale is None else scale,
                reward_timeout=training_args.reward_timeout,
            )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)

    if trainer.is_world_process_zero():
        with extra("The picture curves.png"):
            plot_curves(trainer.state.log_history, Path(training_args.output_dir) / "curves.png")
    report = None
    if test_dataset is not None:
        with extra(
            "The retention report", "python -m trl_diffusion_opd.scripts.evaluate makes it of the saved student."
        ):
            report = evaluate_retention(
                script_args.model_name_or_path,
                {task: teachers[task] for task in tested},
                training_args.output_dir,
                {task: reward_funcs[task] for task in tested},
                test_dataset,
                num_images=script_args.num_test_images,
                output_dir=training_args.output_dir,
                quantization_config=quantization_config,
                **training_args.retention_options(),
            )
    with extra("The model card"):
        trainer.create_model_card()
    if training_args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()
    if report is not None and trainer.is_world_process_zero():
        print(retention_table(report))


if __name__ == "__main__":
    main(*parse(ScriptArguments, DiffusionOPDConfig))
