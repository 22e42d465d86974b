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

r"""
Trains a teacher for on-policy distillation by reinforcement learning on the forward process, DiffusionNFT.

A teacher for one task of the embedded 32 px model, on a laptop:

```bash
python examples/teacher_nft_sd3.py --config examples/configs/tiny_nft.yaml
```

With `--dry_run` it draws and scores a round, shows what the run would cost, and stops.

A GenEval teacher for Stable Diffusion 3.5 Medium on eight GPUs, with the settings of the paper:

```bash
accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml examples/teacher_nft_sd3.py \
    --model_name_or_path stabilityai/stable-diffusion-3.5-medium \
    --dtype bfloat16 \
    --prompts geneval=prompts/geneval.jsonl \
    --reward_funcs geneval=geneval \
    --max_sequence_length 128 \
    --num_generations 24 \
    --per_device_train_batch_size 6 \
    --gradient_accumulation_steps 24 \
    --max_steps 1000 \
    --output_dir sd35-geneval-teacher
```
"""

import logging
from pathlib import Path

from trl_diffusion_opd import DiffusionNFTConfig
from trl_diffusion_opd.guards.extras import extra
from trl_diffusion_opd.scripts.arguments import TeacherScriptArguments as ScriptArguments
from trl_diffusion_opd.scripts.arguments import load_prompts, load_rewards, parse


def main(script_args: ScriptArguments, training_args: DiffusionNFTConfig) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    # Imported here, so that --help and what is wrong with the arguments are there sooner.
    from peft import LoraConfig

    from trl_diffusion_opd import DiffusionNFTTrainer
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
    trainer = DiffusionNFTTrainer(
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
    main(*parse(ScriptArguments, DiffusionNFTConfig))
