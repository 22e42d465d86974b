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

"""What is said of options: of those that a config does not have, and of how a base is loaded."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames


DTYPES = ("float32", "bfloat16", "float16")
FOLLOWING = "auto"  # `ema_decay` of an average whose reach follows the length of the run

# What took the place of options that people still write: transformers' before its version 5, and those of diffusers' and
# TRL's scripts.
_REPLACED = {
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


def unknown_option(config_class: type, name: str, others: type | None = None) -> str:
    """
    What to say of an option that a config does not have: what took its place, which configs of this package have it, or what
    is spelled like it.

    Args:
        config_class (`type`), name (`str`)
        others (`type`, *optional*): a dataclass whose options could have been meant as well, such as a script's.
    """
    from .. import trainer

    configs = [getattr(trainer, known) for known in trainer.__all__ if known.endswith("Config")]
    configs = [one for one in configs if not one.__subclasses__()]  # what others share is no trainer's
    owners = [one.__name__ for one in configs if name in {known.name for known in fields(one)}]
    known = [one.name for given in (config_class, others) if given is not None for one in fields(given)]
    alike = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if owners:
        has = f"It is an option of {' and '.join(sorted(owners))}."
    elif name in _REPLACED:
        has = _REPLACED[name]
    else:
        has = "No config of this package has it." + (f" Is {alike[0]!r} meant?" if alike else "")
    return f"{config_class.__name__} has no {name!r}. {has}"


def idle_options(args: TrainingArguments) -> list[str]:
    """What is refused of Trainer's own options, since it would do nothing."""
    defaults = {known.name: known.default for known in fields(args)}
    idle = {name: value for name, value in vars(args).items() if name in _WITHOUT_EFFECT and value != defaults[name]}
    problems = [f"{name}={value!r} has no effect here. {_WITHOUT_EFFECT[name]}" for name, value in idle.items()]
    optimizer = OptimizerNames(args.optim).value
    if optimizer in _OPTIMIZERS_WITHOUT_STEP:
        problems.append(f"optim={optimizer!r} is not supported: it steps inside of a backward of its own.")
    return problems


def dtype_name(value: Any) -> str | None:
    """The name of a dtype in which a base can be loaded, from `"bfloat16"`, `"torch.bfloat16"` or `torch.bfloat16`."""
    name = str(value).removeprefix("torch.")
    return name if name in DTYPES else None


def model_init_problems(options: Mapping[str, Any]) -> list[str]:
    """What is refused of keyword arguments for `DiffusionPipeline.from_pretrained`."""
    problems = []
    for name in ("trust_remote_code", "custom_pipeline"):
        if options.get(name):
            problems.append(
                f"model_init_kwargs: {name} would run code from the Hub and is refused. If you trust it, load the "
                "pipeline yourself and pass it as the model."
            )
    if not options.get("use_safetensors", True):
        problems.append("model_init_kwargs: use_safetensors is always on; pickled weights are not read.")
    for name in ("dtype", "torch_dtype"):
        given = options.get(name)
        for value in given.values() if isinstance(given, Mapping) else [given]:
            if value is not None and dtype_name(value) is None:
                problems.append(f"model_init_kwargs: {name}={value!r} is none of {', '.join(DTYPES)}.")
    return problems
