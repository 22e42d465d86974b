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

"""What is said of options that a config does not have, and of those that would do nothing."""

import difflib
from collections.abc import Sequence
from dataclasses import fields

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames


# What took the place of options that people still write: transformers' before its version 5, and those of diffusers' and
# TRL's scripts.
REPLACED = {
    "evaluation_strategy": "Use eval_strategy.",
    "overwrite_output_dir": "A run writes into the folder that is there; with resume_from_checkpoint it goes on from a checkpoint.",
    "no_cuda": "Use use_cpu.",
    "use_mps_device": "It is found by itself; use_cpu leaves it.",
    "warmup_ratio": "Use warmup_steps, which takes a part of the updates as well, such as 0.1.",
    "logging_dir": "Set the environment variable TENSORBOARD_LOGGING_DIR.",
    "save_safetensors": "It is always so.",
    "per_gpu_train_batch_size": "Use per_device_train_batch_size.",
    "per_gpu_eval_batch_size": "Use per_device_eval_batch_size.",
    "push_to_hub_model_id": "Use hub_model_id.",
    "push_to_hub_organization": "Use hub_model_id, as owner/name.",
    "push_to_hub_token": "Use hub_token.",
    "half_precision_backend": "Use bf16 or fp16.",
    "fp16_backend": "Use bf16 or fp16.",
    "fp16_opt_level": "Use bf16 or fp16.",
    "torchdynamo": "Use torch_compile and torch_compile_backend.",
    "jit_mode_eval": "Use torch_compile.",
    "group_by_length": "Prompts have no order by length here.",
    "adafactor": "Use optim='adafactor'.",
    "mixed_precision": "Use bf16 or fp16.",
    "train_batch_size": "Use per_device_train_batch_size.",
    "resolution": "Use height and width.",
    "num_train_timesteps": "Use num_inference_steps.",
    "checkpointing_steps": "Use save_strategy='steps' and save_steps.",
    "checkpoints_total_limit": "Use save_total_limit.",
    "max_train_steps": "Use max_steps.",
    "lr_warmup_steps": "Use warmup_steps.",
    "lr_scheduler": "Use lr_scheduler_type.",
    "adam_weight_decay": "Use weight_decay.",
    "max_prompt_length": "Use max_sequence_length.",
    "torch_dtype": "Use dtype.",
    "rank": "Use lora_r.",
    "use_peft": "A LoRA is the default; full_finetuning is the other.",
    "reward_model_name_or_path": "Use reward_funcs.",
    "dataset_name": "Use prompts, as task=owner/name.",
    "pretrained_model_name_or_path": "Use model_name_or_path.",
}

# Options of Trainer that its own loop reads and the trainers here do not.
_WITHOUT_EFFECT = {
    "auto_find_batch_size": "Rounds of tasks are made for one size of batch. The dry run and estimate_memory() say what fits.",
    "train_sampling_strategy": "Prompts come in rounds of tasks, in random order.",
    "length_column_name": "Prompts come in rounds of tasks, in random order.",
    "label_smoothing_factor": "Nothing here has classes as labels.",
    "neftune_noise_alpha": "It is noise for the embeddings of a language model.",
    "use_liger_kernel": "Its kernels are for language models.",
    "torch_empty_cache_steps": "Against fragmented memory set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.",
    "bf16_full_eval": "Evaluations are in the precision of training: see dtype and bf16.",
    "fp16_full_eval": "Evaluations are in the precision of training: see dtype and fp16.",
}
# They step inside of Trainer's own backward.
_OPTIMIZERS_WITHOUT_STEP = ("lomo", "adalomo")


def unknown_option(config_class: type, name: str, configs: Sequence[type] = (), others: type | None = None) -> str:
    """
    What to say of an option that a config does not have: which of `configs` have it, what took its place, or what is spelled
    like it.

    Args:
        config_class (`type`), name (`str`)
        configs (`list[type]`, *optional*): all configs of this package, where the caller knows them.
        others (`type`, *optional*): a dataclass whose options can be meant as well, as a command's own.
    """
    owners = [one.__name__ for one in configs if name in {known.name for known in fields(one)}]
    known = [one.name for given in (config_class, others) if given is not None for one in fields(given)]
    alike = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    said = f"{config_class.__name__} has no {name!r}."
    if owners:
        return f"{said} It is an option of {' and '.join(sorted(owners))}."
    if name in REPLACED:
        return f"{said} {REPLACED[name]}"
    return (
        said
        + (" No config of this package has it." if configs else "")
        + (f" Is {alike[0]!r} meant?" if alike else "")
    )


def idle_options(args: TrainingArguments) -> list[str]:
    """What is refused of Trainer's own options, since it would do nothing."""
    defaults = {known.name: known.default for known in fields(args)}
    idle = {name: value for name, value in vars(args).items() if name in _WITHOUT_EFFECT and value != defaults[name]}
    problems = [f"{name}={value!r} has no effect here. {_WITHOUT_EFFECT[name]}" for name, value in idle.items()]
    optimizer = OptimizerNames(args.optim).value
    if optimizer in _OPTIMIZERS_WITHOUT_STEP:
        problems.append(f"optim={optimizer!r} is not supported: it steps inside of a backward of its own.")
    return problems
