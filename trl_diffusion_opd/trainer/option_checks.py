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

"""Messages for options that a config does not have, and for options of Trainer that would have no effect here."""

import difflib
from collections.abc import Sequence
from dataclasses import fields

from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import OptimizerNames


# Advice for options that users may know from transformers before version 5, or from diffusers' and TRL's scripts.
REPLACED = {
    "evaluation_strategy": "Use eval_strategy.",
    "overwrite_output_dir": "A run writes into an existing folder; resume_from_checkpoint continues from a checkpoint.",
    "no_cuda": "Use use_cpu.",
    "use_mps_device": "MPS is used automatically; use_cpu turns it off.",
    "warmup_ratio": "Use warmup_steps, which also takes a fraction of the updates, such as 0.1.",
    "logging_dir": "Set the environment variable TENSORBOARD_LOGGING_DIR.",
    "save_safetensors": "Files are always saved as safetensors.",
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
    "group_by_length": "Prompts are not ordered by length here.",
    "adafactor": "Use optim='adafactor'.",
    "mixed_precision": "Use bf16 or fp16.",
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
    "precision": "Use dtype, or bf16 or fp16.",
    "use_peft": "A LoRA is the default; full_finetuning turns it off.",
    "reward_model_name_or_path": "Use reward_funcs.",
    "dataset_name": "Use prompts, as task=owner/name.",
    "pretrained_model_name_or_path": "Use model_name_or_path.",
    "lora_r": "Set it in peft_config=LoraConfig(r=...) of the trainer.",
    "lora_alpha": "Set it in peft_config=LoraConfig(lora_alpha=...) of the trainer.",
    "lora_target_modules": "Set them in peft_config=LoraConfig(target_modules=...) of the trainer.",
}

# Short and other names that people type, and the options that they may mean.
_MEANT = {
    **dict.fromkeys(("lr", "rate"), ("learning_rate",)),
    **dict.fromkeys(("rank", "lora_rank", "network_dim"), ("lora_r", "rank")),
    **dict.fromkeys(("alpha", "network_alpha"), ("lora_alpha",)),
    **dict.fromkeys(("batch_size", "train_batch_size", "bs"), ("per_device_train_batch_size", "batch_size")),
    "eval_batch_size": ("per_device_eval_batch_size",),
    "steps": ("num_inference_steps", "max_steps"),
    **dict.fromkeys(("inference_steps", "sampling_steps", "sample_steps"), ("num_inference_steps",)),
    **dict.fromkeys(("train_steps", "iterations", "updates"), ("max_steps",)),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance", "true_cfg_scale"), ("guidance_scale",)),
    **dict.fromkeys(("epochs", "num_epochs"), ("num_train_epochs",)),
    **dict.fromkeys(
        ("base", "model", "base_model", "model_name", "model_name_or_path"), ("model_name_or_path", "base")
    ),
    **dict.fromkeys(("grad_accum", "accumulation_steps"), ("gradient_accumulation_steps",)),
    **dict.fromkeys(("prompt", "data", "train_data", "dataset"), ("prompts", "dataset")),
    **dict.fromkeys(("prompt_key", "caption_column", "text_column"), ("prompt_column",)),
    "teacher": ("teachers",),
    **dict.fromkeys(("reward", "rewards", "reward_fn"), ("reward_funcs",)),
    **dict.fromkeys(("output", "output_folder", "out", "save_dir"), ("output_dir",)),
    "resume": ("resume_from_checkpoint",),
    **dict.fromkeys(("eval_every", "eval_interval"), ("eval_steps",)),
    **dict.fromkeys(("save_every", "save_interval"), ("save_steps",)),
    **dict.fromkeys(("num_frames", "frames"), ("generation_kwargs",)),
}

# Options that Trainer's own loop reads, but the trainers here do not.
WITHOUT_EFFECT = {
    "auto_find_batch_size": "The batch size must not change during a run. The dry run and estimate_memory() say what fits.",
    "train_sampling_strategy": "Prompts come in rounds of tasks, in random order.",
    "length_column_name": "Prompts come in rounds of tasks, in random order.",
    "label_smoothing_factor": "Nothing here has classes as labels.",
    "neftune_noise_alpha": "It is noise for the embeddings of a language model.",
    "use_liger_kernel": "Its kernels are for language models.",
    "torch_empty_cache_steps": "If memory is fragmented, set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.",
    "bf16_full_eval": "Evaluations are in the precision of training: see dtype and bf16.",
    "fp16_full_eval": "Evaluations are in the precision of training: see dtype and fp16.",
}
# Others of Trainer's options that nothing here reads. They do no harm, and are not refused.
UNUSED = (
    "batch_eval_metrics",
    "do_eval",
    "do_predict",
    "do_train",
    "eval_accumulation_steps",
    "eval_do_concat_batches",
    "eval_use_gather_object",
    "include_for_metrics",
    "include_num_input_tokens_seen",
    "label_names",
    "liger_kernel_config",
    "prediction_loss_only",
    "use_cache",
)
# Trackers whose packages transformers does not look for.
_UNLISTED_TRACKERS = ("azure_ml", "flyte")
# They take the optimizer's step inside of their own backward.
_OPTIMIZERS_WITHOUT_STEP = ("lomo", "adalomo")


def unknown_option(config_class: type, name: str, configs: Sequence[type] = (), others: type | None = None) -> str:
    """
    Makes the message for an option that a config does not have. It names another config that has it, what is meant by
    a common other name, its replacement, or an option with a similar name.

    Args:
        config_class (`type`), name (`str`): the config, and the unknown option.
        configs (`list[type]`, *optional*): all configs of this package.
        others (`type`, *optional*): a dataclass with further options, such as a command's own.
    """
    owners = [one.__name__ for one in configs if name in {known.name for known in fields(one)}]
    known = [one.name for given in (config_class, others) if given is not None for one in fields(given)]
    alike = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    said = f"{config_class.__name__} has no {name!r}."
    if owners:
        return f"{said} It is an option of {' and '.join(sorted(owners))}."
    meant = [f"{one!r}" for one in _MEANT.get(name, ()) if one in known]
    if meant:
        return f"{said} Did you mean {' or '.join(meant)}?"
    if name in REPLACED:
        return f"{said} {REPLACED[name]}"
    return (
        said
        + (" No config of this package has it." if configs else "")
        + (f" Did you mean {alike[0]!r}?" if alike else "")
    )


def evaluation_problems(args: TrainingArguments, eval_dataset: object) -> list[str]:
    """Says which options ask for evaluations of no prompts. `eval_dataset` is `None` where there are none."""
    asking = []
    if args.eval_strategy != IntervalStrategy.NO:
        asking.append(f"eval_strategy={IntervalStrategy(args.eval_strategy).value!r}")
    if args.eval_on_start:
        asking.append("eval_on_start=True")
    if eval_dataset is not None or not asking:
        return []
    return [
        f"{' and '.join(asking)}: there are no prompts to evaluate. Give --eval_prompts (in Python, eval_dataset), or "
        "leave it out."
    ]


def idle_evaluation(args: TrainingArguments, eval_dataset: object) -> str | None:
    """A warning of prompts for evaluations where none takes place during training; `None` where some does."""
    if eval_dataset is None or args.eval_strategy != IntervalStrategy.NO or args.eval_on_start:
        return None
    return (
        "There are prompts for evaluations (--eval_prompts; in Python, eval_dataset), but eval_strategy is 'no': "
        "nothing is evaluated during training. Add --eval_strategy steps --eval_steps 50."
    )


def tracker_problems(report_to: str | Sequence[str] | None) -> list[str]:
    """Says which trackers of `report_to` there are not, or are not installed. A text is `"none"`."""
    problems = []
    for name in () if report_to is None or isinstance(report_to, str) else report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            problems.append(f"report_to names {name!r}; it must be one of {', '.join(INTEGRATION_TO_CALLBACK)}.")
        elif name not in (*get_available_reporting_integrations(), *_UNLISTED_TRACKERS):
            problems.append(f"report_to names {name}, which is not installed: pip install {name}")
    return problems


def step_problems(args: TrainingArguments) -> list[str]:
    """Says which of Trainer's numbers would end a run with an error of another library, or with no update."""
    problems = [
        f"{name}={value}: it must be at least 1."
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size")
        if (value := vars(args)[name]) < 1
    ]
    if args.max_steps == 0 or args.max_steps < -1:
        problems.append(
            f"max_steps={args.max_steps}: it must be at least 1, or -1 for as many updates as num_train_epochs has. A "
            "look at a run without an update is the dry run."
        )
    if args.max_steps < 0 and args.num_train_epochs == 0:
        problems.append("num_train_epochs=0: there would be no update.")
    for what in ("logging", "eval", "save"):
        is_by_steps = IntervalStrategy.STEPS == vars(args)[f"{what}_strategy"]
        value = vars(args)[f"{what}_steps"]
        if is_by_steps and value is not None and value <= 0:
            problems.append(f"{what}_steps={value}: it must be positive: a number of updates, or a fraction below 1.")
    for name in ("seed", "data_seed"):
        value = vars(args)[name]
        if value is not None and not 0 <= value < 2**32:
            problems.append(f"{name}={value}: it must be from 0 to {2**32 - 1}.")
    if args.dataloader_num_workers < 0:
        problems.append(f"dataloader_num_workers={args.dataloader_num_workers}: it must not be negative.")
    return problems


def idle_options(args: TrainingArguments) -> list[str]:
    """Lists Trainer's options that are set but would have no effect here, or do not work."""
    defaults = {known.name: known.default for known in fields(args)}
    idle = {name: value for name, value in vars(args).items() if name in WITHOUT_EFFECT and value != defaults[name]}
    problems = [f"{name}={value!r} has no effect here. {WITHOUT_EFFECT[name]}" for name, value in idle.items()]
    optimizer = OptimizerNames(args.optim).value
    if optimizer in _OPTIMIZERS_WITHOUT_STEP:
        problems.append(f"optim={optimizer!r} is not supported: it steps inside of a backward of its own.")
    return problems
