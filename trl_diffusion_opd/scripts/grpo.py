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
Trains a teacher by reinforcement learning (Flow-GRPO or GRPO-Guard), or one model on several tasks at once.

The embedded tiny model, on any laptop:

```bash
accelerate launch examples/teacher_grpo_sd3.py --config examples/configs/tiny_grpo.yaml
```

With `--dry_run` it draws and scores a round, shows what the run would cost, and stops.

Stable Diffusion 3.5 Medium, or any other flow-matching pipeline of diffusers:

```bash
accelerate launch examples/teacher_grpo_sd3.py \
    --model_name_or_path stabilityai/stable-diffusion-3.5-medium \
    --dtype bfloat16 \
    --prompts ocr=prompts/ocr.txt \
    --reward_funcs ocr=ocr \
    --loss_type grpo_guard \
    --num_generations 24 \
    --per_device_train_batch_size 8 \
    --gradient_accumulation_steps 12 \
    --beta 0.009 \
    --max_sequence_length 128 \
    --max_steps 2000 \
    --output_dir sd35-ocr-teacher
```

With several tasks (`--prompts ocr=… geneval=…`, a reward for each) it is multi-task RL.
"""

import logging
from pathlib import Path

from trl_diffusion_opd import DiffusionGRPOConfig
from trl_diffusion_opd.guards.extras import extra
from trl_diffusion_opd.scripts.arguments import TeacherScriptArguments as ScriptArguments
from trl_diffusion_opd.scripts.arguments import load_prompts, load_rewards, parse


def main(script_args: ScriptArguments, training_args: DiffusionGRPOConfig) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    # Imported here, so that --help and what is wrong with the arguments are there sooner.
    from peft import LoraConfig

    from trl_diffusion_opd import DiffusionGRPOTrainer
    from trl_diffusion_opd.models.student import ATTENTION_TARGETS
    from trl_diffusion_opd.reporting.plots import plot_curves

    peft_config = LoraConfig(
        r=script_args.lora_r,
        lora_alpha=script_args.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=script_args.lora_target_modules or list(ATTENTION_TARGETS),
    )
    if script_args.dry_run:
        training_args.push_to_hub = False  # with it the trainer makes the repository
    trainer = DiffusionGRPOTrainer(
        model=script_args.model_name_or_path,
        reward_funcs=load_rewards(script_args.reward_funcs, script_args.reward_kwargs or {}),
        args=training_args,
        train_dataset=load_prompts("prompts", script_args.prompts, training_args.task_column),
        eval_dataset=load_prompts("eval_prompts", script_args.eval_prompts, training_args.task_column),
        quantization_config=script_args.quantization_config(training_args.dtype),
        peft_config=None if script_args.full_finetuning else peft_config,
    )
    if script_args.dry_run:
        trainer.dry_run()
        trainer.end()
        return
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if trainer.is_world_process_zero():
        with extra("The picture curves.png"):
            plot_curves(trainer.state.log_history, Path(training_args.output_dir) / "curves.png")
    with extra("The model card"):
        trainer.create_model_card()
    if training_args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


if __name__ == "__main__":
    main(*parse(ScriptArguments, DiffusionGRPOConfig))
