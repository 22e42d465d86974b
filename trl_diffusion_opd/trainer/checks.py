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

"""Checks before the first step. Each function returns its problems, a sentence each, and changes nothing."""

import os
from collections.abc import Mapping, Sequence

from accelerate import ParallelismConfig
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, DatasetDict
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn
from transformers.trainer_pt_utils import AcceleratorConfig

from ..acceleration.compilation import compilable_blocks
from ..acceleration.quantization import (
    QuantizationConfig,
    is_quantized,
    named_components,
    pipeline_config,
    quantization_problems,
)
from ..data.readers import TEACHER_PROMPT, has_teacher_prompts, teacher_prompt_problems, template_problems
from ..data.source_images import source_image_problems
from ..data.tasks import SINGLE_TASK, dataset_problems, plain_dataset, task_rows
from ..guards.redaction import public_name
from ..hub.repository import repository_name, repository_problems
from ..models.lora_config import config_problems
from ..models.teacher_config import STUDENT_ITSELF, TeacherConfig, normalize_teachers
from ..pipelines.base_state import carries_lora, denoiser_problems, placement_problems
from ..pipelines.denoiser import denoiser, denoiser_name
from ..pipelines.experts import Experts, expert_problems
from ..pipelines.picture_checks import picture_problems
from ..pipelines.velocity import VelocityField
from ..problems import Problems
from ..reporting.cards import hub_id, is_tiny, unnamed_base
from ..rewards import RewardFunc, reward_data_problems, rewards_by_task
from .base_config import DiffusionConfig
from .rounds import Rounds


def loading_problems(
    model: str | DiffusionPipeline,
    pipeline: DiffusionPipeline,
    args: DiffusionConfig,
    quantization_config: QuantizationConfig,
) -> list[str]:
    """Options for loading the pipeline that have no effect."""
    if isinstance(model, DiffusionPipeline):
        if args.model_init_kwargs or quantization_config is not None:
            return [
                "model_init_kwargs and quantization_config are for a model that is given by name, but this one is "
                "already loaded. Load it with them, or pass its name."
            ]
        return []
    quantized = pipeline_config(quantization_config, denoiser_name(pipeline))
    named = [] if quantized is None else named_components(quantized)
    unknown = [name for name in named if name not in pipeline.components]
    if unknown:
        return [
            f"quantization_config is for {unknown}, which {type(pipeline).__name__} does not have. It has "
            f"{sorted(n for n, c in pipeline.components.items() if isinstance(c, nn.Module))}."
        ]
    return []


def model_problems(
    pipeline: DiffusionPipeline, args: DiffusionConfig, peft_config: PeftConfig | str | None
) -> list[str]:
    """Reasons why the pipeline's denoiser can't be trained with `args` and `peft_config`."""
    if problems := expert_problems(pipeline):
        return problems
    transformer, name = denoiser(pipeline), denoiser_name(pipeline)
    if not isinstance(transformer, nn.Module):
        return [
            f"{type(pipeline).__name__} has no transformer or unet: only text-to-image pipelines with a denoising "
            "transformer or UNet can be trained."
        ]
    problems = []
    if isinstance(transformer, PeftModel):
        problems.append(
            f"The pipeline already carries a LoRA: its {name} is a PeftModel. Take it out with "
            f"pipe.{name} = pipe.{name}.unload(), or merge_and_unload() to keep its effect, and name the "
            "layers in peft_config."
        )
    elif carries_lora(pipeline):
        problems.append(
            "The pipeline already carries a LoRA, which would become part of the base. Remove it with "
            "pipe.unload_lora_weights(), after pipe.fuse_lora() to keep its effect, or pass it as student_init or as "
            "a teacher."
        )
    else:
        problems += denoiser_problems(transformer, name)
    problems += placement_problems(pipeline)
    if type(transformer).__name__ == "HiDreamImageTransformer2DModel":
        # Its experts run under no_grad unless the module is in training mode, but here it stays in eval mode.
        problems.append("HiDream's experts pass no gradient in eval mode, so it can be sampled but not trained here.")
    if isinstance(peft_config, str) and peft_config != "default":
        problems.append(f"peft_config={peft_config!r}: use 'default', a LoraConfig, or None for full fine-tuning.")
    elif not isinstance(peft_config, str | LoraConfig | None):
        problems.append(f"peft_config is a {type(peft_config).__name__}; the student can be a LoRA or full weights.")
    elif peft_config is None and isinstance(transformer, Experts):
        problems.append(
            f"peft_config=None would train all weights of both experts of {type(pipeline).__name__}, which is not "
            "supported. Train a LoRA of each: leave peft_config out, or give a LoraConfig."
        )
    elif peft_config is None and args.student_init is not None:
        problems.append("student_init names a LoRA to start from, but peft_config=None trains the full weights.")
    elif isinstance(peft_config, LoraConfig):
        problems += config_problems(peft_config)
    return problems + quantization_problems(transformer, full_weights=peft_config is None)


def uses_fsdp(args: DiffusionConfig) -> bool:
    """Whether the launcher asks for FSDP. With one process it splits nothing."""
    return args.world_size > 1 and (args.fsdp_plugin_args is not None or parse_flag_from_env("ACCELERATE_USE_FSDP"))


def own_level_problems(transformer: nn.Module | None, args: DiffusionConfig) -> list[str]:
    """What a method does not work with that gives each image a noise level of its own."""
    if isinstance(transformer, Experts) and uses_fsdp(args):
        return [
            "Each image gets a noise level of its own, so processes would use the base's two experts in another "
            "order, and FSDP would wait for ever. Use multi_gpu.yaml of examples/accelerate_configs/."
        ]
    return []


def _expert_launch_problems(args: DiffusionConfig) -> list[str]:
    """What two experts, of which an update may use one, don't work with."""
    problems = []
    if args.deepspeed_plugin is not None:
        problems.append(
            "DeepSpeed's optimizer also moves the weights that an update does not use, and an update may use one of "
            "the base's two experts. Use fsdp2.yaml or multi_gpu.yaml of examples/accelerate_configs/."
        )
    if args.ddp_find_unused_parameters is False and args.world_size > 1:
        problems.append(
            "ddp_find_unused_parameters=False: an update may use one of the base's two experts, and DDP would wait "
            "for the gradients of the other. Leave it unset."
        )
    return problems


def launch_problems(transformer: ModelMixin, args: DiffusionConfig) -> list[str]:
    """Conflicts among `args` and the launcher's settings, which are in the environment."""
    problems = Problems()
    if args.n_gpu > 1:
        problems.append("Several GPUs in one process (DataParallel) are not supported: use `accelerate launch`.")
    is_module = isinstance(transformer, nn.Module)
    plugin, is_fsdp = args.fsdp_plugin_args, uses_fsdp(args)
    is_deepspeed = args.deepspeed_plugin is not None
    if args.torch_compile and (is_fsdp or is_deepspeed):
        problems.append(
            f"torch_compile=True is not supported with {'FSDP' if is_fsdp else 'DeepSpeed'}: leave it out."
        )
    elif args.torch_compile and is_module:
        with problems.collect():
            compilable_blocks(transformer)
    if is_module and is_quantized(transformer) and (is_fsdp or is_deepspeed):
        problems.append(
            "A quantized base is not supported with FSDP or DeepSpeed. Use multi_gpu.yaml of "
            "examples/accelerate_configs/, with which each process holds the whole base."
        )
    if isinstance(transformer, Experts):
        problems += _expert_launch_problems(args)
    if args.deepspeed_plugin is not None and (
        args.fp16 or args.deepspeed_plugin.deepspeed_config.get("fp16", {}).get("enabled") is True
    ):
        problems.append(
            "fp16 is not supported with DeepSpeed, which would round the trained weights to fp16. Set bf16, or train "
            "in float32, both in the launcher's settings (mixed_precision) and in the arguments."
        )
    if is_fsdp:
        version = os.environ.get("FSDP_VERSION", "1") if plugin is None else plugin["fsdp_version"]
        if int(version) != 2:
            problems.append(f"FSDP version {version} is not supported. Set fsdp_version: 2 in its settings.")
        # Trainer sets this variable too.
        if is_module and parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
            buffers = transformer.state_dict().keys() - dict(transformer.named_parameters())
            if buffers:
                problems.append(
                    f"fsdp_cpu_ram_efficient_loading: true fails on {type(transformer).__name__}, which saves a "
                    f"buffer ({min(buffers)}). Set it to false."
                )
    return problems


def loader_problems(args: DiffusionConfig) -> list[str]:
    """Options with which the data loader would not give each process a round's rows in order."""
    problems: list[str] = []
    loader, world = args.accelerator_config, args.world_size
    assert isinstance(loader, AcceleratorConfig)  # TrainingArguments makes it of a dict or a file
    if loader.split_batches and world > 1:
        size = args.per_device_train_batch_size
        problems.append(
            f"accelerator_config: split_batches=True splits a batch over the {world} processes, but here each process "
            f"has its own batch. Leave it out, and use per_device_train_batch_size={max(1, size // world)} for {size} "
            "samples over all processes."
        )
    if loader.dispatch_batches:
        problems.append(
            "accelerator_config: dispatch_batches=True sends batches of tensors from the first process to the others, "
            "but here batches are rows of prompts. Leave it out: every process reads its own rows."
        )
    if "num_steps" in (loader.gradient_accumulation_kwargs or {}):
        problems.append(
            "accelerator_config: num_steps in gradient_accumulation_kwargs is not supported, since the tasks share an "
            "update's micro-batches. Use gradient_accumulation_steps."
        )
    if not args.dataloader_in_order and args.dataloader_num_workers > 0:
        problems.append(
            "dataloader_in_order=False gives batches in any order, but tasks take turns in a fixed order. Leave it "
            "out."
        )
    # ParallelismConfig reads the launcher's settings from the environment.
    parallelism = args.parallelism_config
    if parallelism is None and parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        parallelism = ParallelismConfig()
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        problems.append(
            f"parallelism_config lets {parallelism.non_data_parallel_size} processes share one batch (tp, cp or sp), "
            "but here each process has its own samples. Use FSDP to split the model: fsdp2.yaml of "
            "examples/accelerate_configs/."
        )
    return problems


def training_data_problems(dataset: object, task_column: str) -> list[str]:
    """Reasons why `dataset` can't be trained on."""
    if not isinstance(dataset, Dataset):
        kind = "None" if dataset is None else f"a {type(dataset).__name__}"
        if isinstance(dataset, DatasetDict):
            return [
                "train_dataset is a DatasetDict. Choose one of its splits, such as "
                f"dataset[{next(iter(dataset), 'train')!r}]."
            ]
        advice = (
            "Dataset.from_list([...])"
            if isinstance(dataset, list) or dataset is None
            else ("Dataset.from_list(list(iterable)), if it is a streamed dataset")
        )
        return [
            f"train_dataset is {kind}; it must be a datasets.Dataset, since every update needs prompts of all tasks. "
            f"Make one with {advice}."
        ]
    return dataset_problems(dataset, task_column, "train_dataset")


def task_column_problems(dataset: Dataset, task_column: str, given: Mapping[str, object], name: str) -> list[str]:
    """
    Says if a dataset has no column of tasks, although options have values for several.

    Args:
        dataset ([`~datasets.Dataset`]), task_column (`str`), name (`str`): the dataset, and how messages call it.
        given (`dict`): options by name; those that are dicts are by task.
    """
    by_task = {
        option: value for option, value in given.items() if isinstance(value, Mapping) and set(value) - {SINGLE_TASK}
    }
    if task_column in dataset.column_names or not by_task:
        return []
    option, value = next(iter(by_task.items()))
    return [
        f"{name} has no column {task_column!r}, but {option} is a dict for the tasks {[*value]}. Add the column, or name "
        f"yours with task_column: there are {dataset.column_names}. With one task, give {option} without a dict."
    ]


def early_problems(
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    args: DiffusionConfig,
    teachers: Mapping[str, Sequence[TeacherConfig]] | None,
    reward_funcs: Mapping[str, Sequence[RewardFunc]],
) -> list[str]:
    """
    Finds in a command's arguments, before a model is loaded, what a trainer would refuse: tasks that do not fit each
    other, and a checkpoint that is not there.

    Args:
        train_dataset ([`~datasets.Dataset`]), eval_dataset ([`~datasets.Dataset`], *optional*): the prompts.
        args ([`DiffusionConfig`]): the trainer's config. `gradient_accumulation_steps` is set as the trainer sets it.
        teachers (`dict`, *optional*), reward_funcs (`dict`): by task.
    """
    problems = Problems()
    rows = task_rows(train_dataset, args.task_column)
    if teachers:
        with problems.collect():
            normalize_teachers(teachers, list(rows))
    with problems.collect():
        rewards_by_task(reward_funcs or None, list(rows))
    problems += evaluation_data_problems(eval_dataset, args.task_column, list(rows))
    problems += template_problems(args.templates, list(rows))
    if teachers:
        problems += read_data_problems(train_dataset, eval_dataset, args.task_column)
    Rounds.of(rows, args, problems)
    resumed = args.resume_from_checkpoint
    if isinstance(resumed, str) and not os.path.isdir(resumed):
        problems.append(f"resume_from_checkpoint: there is no folder {resumed!r}.")
    return problems


def evaluation_data_problems(eval_dataset: object, task_column: str, tasks: list[str]) -> list[str]:
    """Reasons why a run that trains `tasks` can't evaluate on `eval_dataset`, a dataset or a dict of datasets."""
    problems = []
    datasets = eval_dataset if isinstance(eval_dataset, Mapping) else {"eval_dataset": eval_dataset}
    for name, dataset in datasets.items():
        if dataset is None:
            continue
        if not isinstance(dataset, Dataset):
            problems.append(f"{name} is a {type(dataset).__name__}; it must be a datasets.Dataset, or a dict of them.")
            continue
        found = dataset_problems(dataset, task_column, name)
        if not found and task_column not in dataset.column_names and tasks != [SINGLE_TASK]:
            found = [f"{name} has no column {task_column!r} that names the task, as train_dataset has."]
        problems += found
        unknown = [] if found else [task for task in task_rows(dataset, task_column) if task not in tasks]
        if unknown:
            problems.append(f"{name} has prompts of tasks {unknown}, but train_dataset only has tasks {tasks}.")
    return problems


def read_data_problems(train_dataset: Dataset, eval_dataset: object, task_column: str) -> list[str]:
    """Reasons why teachers can't read the rows: those of training, and those of `eval_dataset`."""
    return [
        problem
        for name, dataset in _readable(train_dataset, eval_dataset, task_column)
        for problem in teacher_prompt_problems(dataset, task_rows(dataset, task_column), name)
    ]


def _readable(train_dataset: object, eval_dataset: object, task_column: str) -> list[tuple[str, Dataset]]:
    """The datasets of training and evaluation by name, without those that are refused for their columns."""
    of_evaluation = dict(eval_dataset) if isinstance(eval_dataset, Mapping) else {"eval_dataset": eval_dataset}
    return [
        (name, dataset)
        for name, dataset in {"train_dataset": train_dataset, **of_evaluation}.items()
        if isinstance(dataset, Dataset) and not dataset_problems(dataset, task_column, name)
    ]


def picture_data_problems(
    field: VelocityField, train_dataset: Dataset, eval_dataset: object, args: DiffusionConfig
) -> list[str]:
    """Reasons why the rows' pictures can't be used: those of training, and those of `eval_dataset`."""
    problems = []
    for name, dataset in _readable(train_dataset, eval_dataset, args.task_column):
        broken = source_image_problems(dataset, args.source_images_column, name)
        rows = task_rows(dataset, args.task_column)
        problems += broken or picture_problems(field, dataset, rows, name)
    return problems


def itself_problems(train_dataset: object, eval_dataset: object, task_column: str, tasks: list[str]) -> list[str]:
    """Reasons why the student can't teach itself in `tasks`, where it would read what it reads as a student."""
    problems = []
    for name, dataset in _readable(train_dataset, eval_dataset, task_column):
        rows = task_rows(dataset, task_column)
        same = [task for task in tasks if task in rows and not has_teacher_prompts(dataset, rows[task])]
        problems += [
            f'teachers: the teacher of task {task!r} is "{STUDENT_ITSELF}", but its rows in {name} have no '
            f"{TEACHER_PROMPT}. Both would read the same, and it would learn nothing: give the rows a {TEACHER_PROMPT}, "
            "or name another teacher."
            for task in same
        ]
    return problems


def scored_data_problems(
    functions: Mapping[str, Sequence[RewardFunc]], train_dataset: object, eval_dataset: object, task_column: str
) -> list[str]:
    """Reasons why rewards can't score the prompts: those of `eval_dataset`, or without it those of `train_dataset`."""
    scored = {"train_dataset": train_dataset} if eval_dataset is None else {"eval_dataset": eval_dataset}
    scored = dict(eval_dataset) if isinstance(eval_dataset, Mapping) else scored
    problems = []
    for name, given in scored.items():
        dataset = plain_dataset(given, task_column)
        if isinstance(dataset, Dataset) and not dataset_problems(dataset, task_column, name):
            problems += reward_data_problems(functions, dataset, task_rows(dataset, task_column), name)
    return problems


def hub_problems(
    args: DiffusionConfig, pipeline: DiffusionPipeline, full_weights: bool, token: str | None
) -> list[str]:
    """Reasons why a run can't push to the repository in `args`. See [`~hub.repository.repository_problems`]."""
    name = repository_name(args.hub_model_id, args.output_dir)
    kind = type(denoiser(pipeline)).__name__ if full_weights else None
    base = pipeline.config.get("_name_or_path")
    problems = repository_problems(name, args.hub_base_model or public_name(base), kind, token)
    if args.hub_base_model is None and hub_id(base) is None and not is_tiny(base):
        problems.append(f"The student can't be shared yet: {unnamed_base(public_name(base), '--hub_base_model')}")
    return problems


def base_name_problems(args: DiffusionConfig, pipeline: DiffusionPipeline) -> list[str]:
    """Says if `hub_base_model` contradicts the base, which was loaded from the Hub under another name."""
    loaded = hub_id(pipeline.config.get("_name_or_path"))
    if args.hub_base_model in (None, loaded) or loaded is None:
        return []
    return [
        f"hub_base_model={args.hub_base_model!r}, but the base comes from {loaded!r} on the Hub, which the model card "
        "names. Leave it out: it is for a base from a folder."
    ]
